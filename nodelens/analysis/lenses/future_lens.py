"""The future lens over data: how far ahead each layer's states look."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import nn

from nodelens.analysis.base import Analysis, AnalysisCall
from nodelens.engine.driver import device_of
from nodelens.interventions.lenses.future import fit_maps, score_maps
from nodelens.interventions.lenses.lens import LENS, about
from nodelens.interventions.lenses.lens_pass import blocks_to_read
from nodelens.interventions.token_model import TokenModel
from nodelens.results.findings import Findings


@dataclass(frozen=True)
class FutureLens(Analysis):
    """A linear map from each state to the last block's state some positions later, read by the model's own norm and head.

    layers: blocks whose states are read. ahead: how many positions after the next token; 0 is the next token itself
    ks:     precision and agreement are measured at each of these numbers of tokens

    Maps are fitted by least squares on data and scored on the evaluation split. The table ``layers`` has a row per block and
    ahead: precision_at_k of the true token, agreement_at_k with the model's own first choice there, surprisal, kl and entropy in
    nats, with standard errors over samples.
    Source: Pal et al. 2023, Future Lens, 2311.04897, section 3.1 (the linear model approximation)
    """

    layers: str | int | Sequence[int] = "all"
    ahead: Sequence[int] = (0, 1, 2, 3)
    ks: Sequence[int] = (1, 5, 10)

    def __post_init__(self) -> None:
        if not self.ahead or min(self.ahead) < 0 or not self.ks or min(self.ks) < 1:
            raise ValueError(f"future_lens: ahead is {list(self.ahead)} and ks is {list(self.ks)}; positions from 0, tokens from 1")

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> Findings:
        """Reads data once and evaluation (default: data) once. Memory: (2 d)^2 numbers per block and position ahead."""
        output = call.objective.get("output")
        known, layers = TokenModel(model), blocks_to_read(model, self.layers)
        maps = fit_maps(model, call.progress(data), layers, len(known.roles.blocks) - 1, list(self.ahead), output)
        means = score_maps(model, call.evaluation, layers, maps, list(self.ks), output)
        rows = []
        for n in self.ahead:
            means[n].reduced(device_of(model))
            rows += [{"ahead": n, "layer": k, "module": layer.name} | means[n].row(k) for k, layer in layers.items()]
        table = pd.DataFrame(rows)
        table["lens"] = [f"+{n}" for n in table["ahead"]]
        return Findings(
            LENS, {"layers": table}, _lines(table), metadata=about(known) | {"lens": "future", "ahead": list(self.ahead)}
        )


def _lines(table: pd.DataFrame) -> list[str]:
    """For each distance the layer that is right most often."""
    name = next(column for column in table if column.startswith("precision_at_"))
    lines = []
    for ahead, rows in table.groupby("ahead"):
        best = rows.loc[rows[name].idxmax()]
        lines.append(
            f"{ahead} after the next token: {name.replace('_', ' ')} is largest at layer {best['layer']}, {best[name]:.1%}"
        )
    return lines
