"""The future lens over data: how far ahead each layer's states look."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from nodelens.analysis.base import Analysis, AnalysisCall
from nodelens.engine.driver import device_of
from nodelens.interventions.lenses.future import fit_maps, score_maps
from nodelens.interventions.lenses.inserted import score_inserted
from nodelens.interventions.lenses.lens import LENS, about
from nodelens.interventions.lenses.lens_pass import blocks_to_read
from nodelens.interventions.lenses.scores import TokenMeans
from nodelens.interventions.lenses.soft_prompts import SoftPrompts
from nodelens.interventions.token_model import TokenModel
from nodelens.network.layers import Layer
from nodelens.results.findings import Findings


@dataclass(frozen=True)
class FutureLens(Analysis):
    """What a state says of tokens further ahead: by a linear map to the last block's later state, or behind a learned prompt.

    layers: blocks whose states are read. ahead: how many positions after the next token; 0 is the next token itself
    ks:     precision and agreement are measured at each of these numbers of tokens
    learned_prompt: the file of an analysis ``learned_prompt``: states are inserted behind its soft prompts, in place of linear maps

    Maps are fitted by least squares on data and scored on the evaluation split. The table ``layers`` has a row per block and
    ahead: precision_at_k of the true token, agreement_at_k with the model's own first choice there, surprisal, kl and entropy in
    nats, with standard errors over samples. Behind a learned prompt the model also reads the true tokens between the state and the
    predicted one.
    Source: Pal et al. 2023, Future Lens, 2311.04897, section 2.2 (the linear model approximation) and 2.4 (the learned prompt)
    """

    layers: str | int | Sequence[int] = "all"
    ahead: Sequence[int] = (0, 1, 2, 3)
    ks: Sequence[int] = (1, 5, 10)
    learned_prompt: str | None = None

    def __post_init__(self) -> None:
        check_ahead("future_lens", self.ahead, self.ks)

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> Findings:
        """Reads data once and evaluation (default: data) once. Memory: (2 d)^2 numbers per block and position ahead."""
        known, layers, output = TokenModel(model), blocks_to_read(model, self.layers), call.objective.get("output")
        if self.learned_prompt is None:
            maps = fit_maps(model, call.progress(data), layers, len(known.roles.blocks) - 1, list(self.ahead), output)
            means = score_maps(model, call.evaluation, layers, maps, list(self.ks), output)
        else:
            prompts = SoftPrompts.load(self.learned_prompt).check(known).to(device_of(model))
            means = score_inserted(model, call.evaluation, layers, prompts, self.ahead, self.ks, output=output)
        table = future_table(means, layers, device_of(model))
        metadata = {"lens": "future", "ahead": list(self.ahead), "learned_prompt": self.learned_prompt}
        return Findings(LENS, {"layers": table}, future_lines(table), metadata=about(known) | metadata)


def check_ahead(name: str, ahead: Sequence[int], ks: Sequence[int]) -> None:
    """Raises ValueError, with the name of the analysis, for distances below 0 and numbers of tokens below 1."""
    if not ahead or min(ahead) < 0 or not ks or min(ks) < 1:
        raise ValueError(f"{name}: ahead is {list(ahead)} and ks is {list(ks)}; positions from 0, tokens from 1")


def future_table(means: Mapping[int, TokenMeans], layers: Mapping[int, Layer], device: torch.device) -> pd.DataFrame:
    """One row per distance and block, from the scores of each distance. Collective.

    Raises ValueError for a distance at which no token is predicted.
    """
    rows = []
    for n, found in means.items():
        found.reduced(device)
        rows += [{"ahead": n, "layer": k, "module": layer.name} | found.row(k) for k, layer in layers.items()]
    table = pd.DataFrame(rows)
    counts = table.groupby("ahead")["tokens"].max()
    if (counts == 0).any():
        most = int(counts.index[counts == 0].min()) + 1
        raise ValueError(f"no token is followed by {most} others that are predicted: give longer samples, or smaller ahead=")
    table["lens"] = [f"+{n}" for n in table["ahead"]]
    return table


def future_lines(table: pd.DataFrame) -> list[str]:
    """For each distance the layer that is right most often."""
    name = next(column for column in table if column.startswith("precision_at_"))
    lines = []
    for ahead, rows in table.groupby("ahead"):
        best = rows.loc[rows[name].idxmax()]
        lines.append(
            f"{ahead} after the next token: {name.replace('_', ' ')} is largest at layer {best['layer']}, {best[name]:.1%}"
        )
    return lines
