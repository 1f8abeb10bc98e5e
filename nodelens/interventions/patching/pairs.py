"""Pairs of prompts that differ in one fact, and what a patch changes in the prediction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nodelens.interventions.lenses.scores import kl
from nodelens.interventions.prompts import TokenizedPrompt, read_prompts, token_text
from nodelens.messages import option

METRICS = ("logit_difference", "probability", "surprisal", "kl")


@dataclass(frozen=True, eq=False)
class PromptPair:
    """A clean and a corrupt prompt of the same number of tokens; answer and wrong: ids of the tokens that are compared."""

    clean: TokenizedPrompt
    corrupt: TokenizedPrompt
    answer: int | None = None
    wrong: int | None = None


@dataclass(frozen=True, eq=False)
class Contrast:
    """What is measured of logits: the answer against another token, and against the logits of a reference run, (V,)."""

    answer: int
    wrong: int | None
    reference: Tensor

    @classmethod
    def of(cls, pair: PromptPair, clean: Tensor, corrupt: Tensor, into: str) -> "Contrast":
        """By default the answer is the first choice of the clean run, and the wrong token that of the corrupt run, (V,) each."""
        answer = int(clean.argmax()) if pair.answer is None else pair.answer
        other = int(corrupt.argmax()) if pair.wrong is None else pair.wrong
        check_answers(len(clean), answer, other)
        return cls(answer, None if other == answer else other, clean if into == "corrupt" else corrupt)

    def __call__(self, logits: Tensor) -> dict[str, Tensor]:
        """Each of ``METRICS`` for logits (n, V): (n,).

        logit_difference: logit of the answer less that of the wrong token; NaN if they are the same. probability and surprisal, in
        nats, of the answer. kl: KL(reference || these logits), in nats.
        """
        logs = logits.float().log_softmax(1)
        answer = logs[:, self.answer]
        difference = torch.full_like(answer, math.nan) if self.wrong is None else answer - logs[:, self.wrong]
        divergence = kl(self.reference.float().log_softmax(0), logs)
        return {"logit_difference": difference, "probability": answer.exp(), "surprisal": -answer, "kl": divergence}

    def tokens(self, prompt: TokenizedPrompt) -> dict[str, str | None]:
        """The texts of the two tokens."""
        wrong = None if self.wrong is None else token_text(self.wrong, prompt.tokenizer)
        return {"answer": token_text(self.answer, prompt.tokenizer), "wrong": wrong}


def check_answers(vocabulary: int, *tokens: int | None) -> None:
    """Raises ValueError for the id of an answer that no logit has."""
    wrong = next((token for token in tokens if token is not None and not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise ValueError(f"the answer has the token id {wrong}; the model has logits for 0 to {vocabulary - 1}")


def check_distinct(answer: int | None, wrong: int | None) -> None:
    """Raises ValueError for an answer and a wrong token that are the same."""
    if answer is not None and answer == wrong:
        raise ValueError(f"answer and wrong are both the token {answer}, whose logit does not differ from itself: give two tokens")


def read_pairs(clean: Any, corrupt: Any, tokenizer: Any = None, answer: Any = None, wrong: Any = None) -> list[PromptPair]:
    """Pairs of a clean and a corrupt prompt, or of as many of both; see ``read_prompts``. answer, wrong: one, or one per pair.

    Raises ValueError for numbers of prompts or tokens that differ, and answers that are not one token of the model or that are
    the wrong token.
    """
    left, right = read_prompts(clean, tokenizer), read_prompts(corrupt, tokenizer)
    if len(left) != len(right):
        raise ValueError(f"there are {len(left)} clean prompts and {len(right)} corrupt ones: give as many of both")
    answers, others = (_each(value, len(left), name) for name, value in (("answer", answer), ("wrong", wrong)))
    pairs = []
    for k, (a, b) in enumerate(zip(left, right, strict=True)):
        if len(a) != len(b):
            raise ValueError(
                f"the clean prompt has {len(a)} tokens, {' | '.join(a.tokens)}, the corrupt one {len(b)}, {' | '.join(b.tokens)}: "
                "states are exchanged position by position, so give prompts of the same number of tokens"
            )
        ids = [None if each is None else a.next_token(each) for each in (answers[k], others[k])]
        check_distinct(*ids)
        pairs.append(PromptPair(a, b, *ids))
    return pairs


def _each(value: Any, count: int, name: str) -> Sequence[Any]:
    """One value per pair."""
    if value is None or isinstance(value, (str, int)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{option(name)} has {len(value)} tokens for {count} pairs of prompts: give one, or one per pair")
    return [int(each) if isinstance(each, Tensor) else each for each in value]
