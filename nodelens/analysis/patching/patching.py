"""Patching as analyses: exact grids, attribution patching, and direct logit attribution of given prompts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from nodelens.analysis.registry import Progress
from nodelens.interventions.patching.attribution import AttributionOptions, attribution_grid
from nodelens.interventions.patching.direct import attribute_logits
from nodelens.interventions.patching.grid import GridOptions
from nodelens.interventions.patching.pairs import PromptPair, read_pairs
from nodelens.interventions.patching.patch import patch_grid
from nodelens.interventions.prompts import first_prompts, read_prompts
from nodelens.interventions.token_model import TokenModel
from nodelens.interventions.token_positions import Positions
from nodelens.messages import option
from nodelens.metrics import Metric
from nodelens.network.eval_mode import one_at_a_time
from nodelens.results.findings import Findings
from nodelens.results.result import Result


class _OfPrompts:
    """An analysis that reads prompts, and no metrics of units."""

    def required_metrics(self) -> dict[str, Metric]:
        """None."""
        return {}


@dataclass(frozen=True)
class Patching(_OfPrompts, GridOptions):
    """Activation patching of pairs of prompts; see ``nl.patch``.

    clean, corrupt: prompts of the same number of tokens, one or as many of both; answer, wrong: tokens, one or one per pair;
    tokenizer: of the prompts, or its path. The other fields are those of ``GridOptions``.
    """

    clean: Any = None
    corrupt: Any = None
    answer: Any = None
    wrong: Any = None
    tokenizer: Any = None

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
        """Raises ValueError as ``nl.patch`` does, and without prompts."""
        return patch_grid(TokenModel(model), progress(_pairs("patching", self)), self)


@dataclass(frozen=True)
class AttributionPatching(_OfPrompts, AttributionOptions):
    """Attribution patching of pairs of prompts; see ``attribution_grid``.

    The fields are those of ``Patching``, and metric and exact of ``AttributionOptions``.
    """

    clean: Any = None
    corrupt: Any = None
    answer: Any = None
    wrong: Any = None
    tokenizer: Any = None

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
        """Raises ValueError as ``nl.patch`` does, without prompts, and for runs whose first choices are the same token."""
        return attribution_grid(TokenModel(model), progress(_pairs("attribution_patching", self)), self)


@dataclass(frozen=True)
class LogitAttribution(_OfPrompts):
    """Direct logit attribution of prompts; see ``attribute_logits``.

    prompts:  texts or token ids; None: the first ``samples`` of the data. tokenizer: theirs, or its path
    answer:   the token whose logit is divided, by default the first choice; wrong: one whose logit is subtracted
    position: where it is predicted, by default at the last token; heads: whether attentions are divided into heads
    """

    prompts: Any = None
    answer: Any = None
    wrong: Any = None
    position: Positions = -1
    heads: bool = True
    tokenizer: Any = None
    samples: int = 8

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
        """Raises ValueError for texts without a tokenizer, positions out of range, and a norm that cannot be frozen."""
        given = self.prompts
        prompts = first_prompts(data, self.samples, self.tokenizer) if given is None else read_prompts(given, self.tokenizer)
        return attribute_logits(TokenModel(model), prompts, self.answer, self.wrong, self.position, self.heads)


def _pairs(name: str, given: Any) -> list[PromptPair]:
    if given.clean is None or given.corrupt is None:
        raise ValueError(f"{name} compares pairs of prompts: give {option('clean')}= and {option('corrupt')}=")
    return read_pairs(given.clean, given.corrupt, given.tokenizer, given.answer, given.wrong)
