"""Patchscopes over prompts: how well each layer's states say what the model will predict."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nodelens.analysis.base import Analysis, AnalysisCall
from nodelens.interventions.lenses.patchscope import PatchscopeOptions, patchscope_grid
from nodelens.interventions.prompts import first_prompts, read_prompts
from nodelens.interventions.token_model import TokenModel
from nodelens.results.findings import Findings


@dataclass(frozen=True)
class Patchscope(Analysis, PatchscopeOptions):
    """Puts hidden states of source prompts into a target prompt, all layers and positions at once.

    prompts:   the sources: texts, or token ids; None: the first ``samples`` of the data
    tokenizer: of the prompts, or its path
    The other fields are those of ``PatchscopeOptions``. Tables: ``predictions``, ``positions``; see ``patchscope_grid``.
    """

    prompts: str | Sequence[Any] | None = None
    tokenizer: Any | None = None
    samples: int = 8

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> Findings:
        """Raises ValueError for texts without a tokenizer, layers and positions out of range, and a target without the position."""
        known = TokenModel(model)
        target = read_prompts(self.target, self.tokenizer)[0]
        given = self.prompts
        sources = first_prompts(data, self.samples, self.tokenizer) if given is None else read_prompts(given, self.tokenizer)
        return patchscope_grid(known, call.progress(sources), target, self)
