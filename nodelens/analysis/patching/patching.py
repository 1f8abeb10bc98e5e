"""Patching as analyses: exact grids, attribution patching, and direct logit attribution of given prompts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from nodelens.analysis.base import Analysis, AnalysisCall
from nodelens.interventions.patching.attribution import AttributionOptions, attribution_grid
from nodelens.interventions.patching.direct import attribute_logits
from nodelens.interventions.patching.grid import GridOptions
from nodelens.interventions.patching.pairs import PromptPair, read_pairs
from nodelens.interventions.patching.patch import patch_grid
from nodelens.interventions.prompts import first_prompts, read_prompts
from nodelens.interventions.token_model import TokenModel
from nodelens.interventions.token_positions import Positions
from nodelens.messages import option
from nodelens.results.findings import Findings


@dataclass(frozen=True)
class _OfPairs(Analysis):
    """An analysis of a grid of states for pairs of prompts.

    clean, corrupt: prompts of the same number of tokens, one or as many of both; answer, wrong: tokens, one or one per pair;
    tokenizer: of the prompts, or its path.
    """

    title: ClassVar[str]  # of the analysis, for messages
    clean: Any | None = None
    corrupt: Any | None = None
    answer: Any | None = None
    wrong: Any | None = None
    tokenizer: Any | None = None

    def grid(self, model: TokenModel, pairs: Iterable[PromptPair]) -> Findings:
        """The grid of all pairs."""
        raise NotImplementedError

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> Findings:
        """Raises ValueError as ``nl.patch`` does, and without prompts."""
        if self.clean is None or self.corrupt is None:
            raise ValueError(f"{self.title} compares pairs of prompts: give {option('clean')}= and {option('corrupt')}=")
        pairs = read_pairs(self.clean, self.corrupt, self.tokenizer, self.answer, self.wrong)
        return self.grid(TokenModel(model), call.progress(pairs))


@dataclass(frozen=True)
class Patching(_OfPairs, GridOptions):
    """Activation patching of pairs of prompts; see ``nl.patch``. Fields: the prompts, and those of ``GridOptions``."""

    title: ClassVar = "patching"

    def grid(self, model: TokenModel, pairs: Iterable[PromptPair]) -> Findings:
        """The grid of all pairs."""
        return patch_grid(model, pairs, self)


@dataclass(frozen=True)
class AttributionPatching(_OfPairs, AttributionOptions):
    """Attribution patching of pairs of prompts; see ``attribution_grid``. Fields: the prompts, and those of ``AttributionOptions``.

    A call raises ValueError, too, for runs whose first choices are the same token.
    """

    title: ClassVar = "attribution_patching"

    def grid(self, model: TokenModel, pairs: Iterable[PromptPair]) -> Findings:
        """The grid of all pairs."""
        return attribution_grid(model, pairs, self)


@dataclass(frozen=True)
class LogitAttribution(Analysis):
    """Direct logit attribution of prompts; see ``attribute_logits``.

    prompts:  texts or token ids; None: the first ``samples`` of the data. tokenizer: theirs, or its path
    answer:   the token whose logit is divided, by default the first choice; wrong: one whose logit is subtracted
    position: where it is predicted, by default at the last token; heads: whether attentions are divided into heads
    """

    prompts: Any | None = None
    answer: Any | None = None
    wrong: Any | None = None
    position: Positions = -1
    heads: bool = True
    tokenizer: Any | None = None
    samples: int = 8

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> Findings:
        """Raises ValueError for texts without a tokenizer, positions out of range, and a norm that cannot be frozen."""
        given = self.prompts
        prompts = first_prompts(data, self.samples, self.tokenizer) if given is None else read_prompts(given, self.tokenizer)
        return attribute_logits(TokenModel(model), prompts, self.answer, self.wrong, self.position, self.heads)
