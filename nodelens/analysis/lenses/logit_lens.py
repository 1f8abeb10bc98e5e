"""The logit lens over data: how well each layer predicts the next token, and what the model itself predicts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from nodelens.analysis.base import Analysis, AnalysisCall, Progress
from nodelens.engine.driver import device_of
from nodelens.interventions.lenses.lens import LENS, about, read_lens, translated
from nodelens.interventions.lenses.lens_pass import PredictingRows, blocks_to_read, run_lens
from nodelens.interventions.lenses.scores import TokenMeans, row_scores
from nodelens.interventions.lenses.translators import Translators
from nodelens.interventions.prompts import read_prompts
from nodelens.interventions.token_model import TokenModel
from nodelens.results.findings import Findings


@dataclass(frozen=True)
class LogitLens(Analysis):
    """The final norm and the head, applied after each block: precision, surprisal, KL to the model's own logits, entropy.

    layers:    blocks: all, indices, or an expression such as ``n//2:``
    ks:        precision and agreement are measured at each of these numbers of tokens
    prompts:   texts for the table of predicted tokens and its figure; tokenizer: their tokenizer, or its path
    k:         how many tokens the table lists

    Tables: ``layers`` has a row per block with means over tokens and standard errors over samples, in nats. precision_at_k: the
    true next token is among the k likeliest of the lens; agreement_at_k: the model's own first choice is. For prompts,
    ``predictions`` and ``positions`` as in ``nl.lens``.
    Source: nostalgebraist 2020; Belrose et al. 2023, 2303.08112 (KL and surprisal by layer)
    """

    layers: str | int | Sequence[int] = "all"
    ks: Sequence[int] = (1, 5, 10)
    prompts: str | Sequence[str] | None = None
    tokenizer: Any | None = None
    k: int = 5

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1 or self.k < 1:
            raise ValueError(f"logit_lens: ks is {list(self.ks)} and k is {self.k}; they are numbers of tokens, 1 or more")

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> Findings:
        """Reads data once. Memory does not grow with the data; under a process group each process gives its own share."""
        table = lens_table(model, data, self.layers, self.ks, progress=call.progress, output=call.objective.get("output"))
        frames, known = {"layers": table}, TokenModel(model)
        if self.prompts is not None:
            frames |= read_lens(known, read_prompts(self.prompts, self.tokenizer), known.blocks(self.layers), self.k).frames
        return Findings(LENS, frames, _lines(table), metadata=about(known) | {"lens": "logit", "ks": list(self.ks)})


def lens_table(
    model: nn.Module,
    data: Iterable[Any],
    layers: str | int | Sequence[int] = "all",
    ks: Sequence[int] = (1, 5, 10),
    translators: Translators | None = None,
    *,
    progress: Progress = iter,
    output: Any = None,
) -> pd.DataFrame:
    """Means of the scores of a lens, one row per block. translators: of a tuned lens."""
    read, means, known = blocks_to_read(model, layers), TokenMeans(), TokenModel(model)

    def see(rows: PredictingRows) -> None:
        for block in read:
            for part in rows.tail.parts(len(rows.sample)):
                states = rows.states(block, part)
                logits = rows.tail(states if translators is None else translated(known, translators, block, states))
                scores = row_scores(logits, rows.final(part), rows.following[part], ks)
                means.add(block, scores, rows.sample[part], len(rows.logits))

    with torch.no_grad():
        run_lens(model, data, read, see, output=output, progress=progress)
    means.reduced(device_of(model))
    return pd.DataFrame([{"layer": k, "module": layer.name} | means.row(k) for k, layer in read.items()])


def _lines(table: pd.DataFrame) -> list[str]:
    """From which layer on the lens agrees with the model, and the KL of the first and last layers."""
    agreement = next(name for name in table if name.startswith("agreement_at_") and not name.endswith("_se"))
    half = table.loc[table[agreement] >= 0.5, "layer"]
    k = agreement.rpartition("_")[2]
    known = f"from layer {half.min()} of {table['layer'].max()} on" if len(half) else "in no layer"
    choice = "the first choice" if k == "1" else f"among the first {k} choices"
    first, last = table.iloc[0], table.iloc[-1]
    return [
        f"{first['tokens']:,.0f} tokens: for half of them or more, the model's first choice is {choice} of the lens {known}",
        f"KL to the model's logits {first['kl']:.3g} nats after layer {first['layer']}, "
        f"{last['kl']:.3g} after layer {last['layer']}",
    ]
