"""Patchscopes over prompts: how well each layer's states say what the model will predict."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nodelens.analysis.registry import Progress
from nodelens.interventions.lenses.patchscope import PatchscopeOptions, patchscope_grid
from nodelens.interventions.prompts import first_prompts, read_prompts
from nodelens.interventions.token_model import TokenModel
from nodelens.metrics import Metric
from nodelens.network.eval_mode import one_at_a_time
from nodelens.results.findings import Findings
from nodelens.results.result import Result


@dataclass(frozen=True)
class Patchscope(PatchscopeOptions):
    """Puts hidden states of source prompts into a target prompt, all layers and positions at once.

    prompts:   the sources: texts, or token ids; None: the first ``samples`` of the data
    tokenizer: of the prompts, or its path
    The other fields are those of ``PatchscopeOptions``. Tables: ``predictions``, ``positions``; see ``patchscope_grid``.
    """

    prompts: str | Sequence[Any] | None = None
    tokenizer: Any = None
    samples: int = 8

    def required_metrics(self) -> dict[str, Metric]:
        """None."""
        return {}

    @one_at_a_time
    def __call__(
        self,
        model: nn.Module,
        data: Iterable[Any] = (),
        *,
        result: Result | None = None,
        evaluation: Iterable[Any] | None = None,
        seed: int = 0,
        progress: Progress = iter,
        **objective: Any,
    ) -> Findings:
        """Raises ValueError for texts without a tokenizer, layers and positions out of range, and a target without the position."""
        known = TokenModel(model)
        target = read_prompts(self.target, self.tokenizer)[0]
        given = self.prompts
        sources = first_prompts(data, self.samples, self.tokenizer) if given is None else read_prompts(given, self.tokenizer)
        return patchscope_grid(known, progress(sources), target, self)
