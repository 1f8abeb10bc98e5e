"""Prompts: texts or token ids, as the tokens that a model reads."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from nodelens.data.tokens import Tokenizer, as_tokenizer, open_tokenizer
from nodelens.messages import option, shown
from nodelens.statistics.processes import gathered

from .token_positions import Positions, find_text, indices, searches_text

_SPACES = ("▁", "Ġ")  # how vocabularies write a space before a word


@dataclass(frozen=True, eq=False)
class TokenizedPrompt:
    """The token ids of one prompt without padding, (T,) int64; the text and the tokenizer where they are known."""

    ids: Tensor
    text: str | None = None
    tokenizer: Tokenizer | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def tokens(self) -> list[str]:
        """The text of each token."""
        return [token_text(int(i), self.tokenizer) for i in self.ids]

    def positions(self, chosen: Positions = "all") -> list[int]:
        """Positions among the T tokens of the prompt.

        chosen: a number, several, an expression such as ``all``, ``-1`` or ``n//2:``, or a phrase of the prompt,
        ``phrase:<text>`` or ``regex:<pattern>``: the tokens that overlap its only occurrence.

        Raises ValueError for a position out of range, a phrase that is missing or occurs more than once, and an invalid expression.
        """
        if searches_text(chosen):
            return find_text(str(chosen), self.ids.cpu(), torch.ones(len(self), dtype=torch.bool), self.tokenizer, self.text)
        return indices(chosen, len(self), option("positions"))

    def next_token(self, answer: str | int) -> int:
        """The id of the one token with which a text continues the prompt; an id as it is.

        Raises ValueError for a text that is several tokens, or that changes how the prompt itself is cut into tokens.
        """
        if isinstance(answer, int) and not isinstance(answer, bool):
            return answer
        if not isinstance(answer, str):
            raise ValueError(f"the answer is {answer!r}; it is a text of one token, or the id of one")
        if self.tokenizer is None or self.text is None:
            raise ValueError(f"the answer {shown(answer)} is a text, but the prompt is given as ids: give the answer's id")
        own, longer = self.ids.tolist(), encode(self.text + str(answer), self.tokenizer)
        added = longer[len(own) :]
        if longer[: len(own)] != own or not added:
            raise ValueError(
                f"the answer {shown(answer)} changes the tokens of the prompt {shown(self.text)}: begin it with a space, or give "
                "the id of a token"
            )
        if len(added) > 1:
            pieces = " | ".join(token_text(i, self.tokenizer) for i in added)
            spaced = encode(f"{self.text} {answer}", self.tokenizer)
            hint = f", such as {f' {answer}'!r}" if spaced[: len(own)] == own and len(spaced) == len(own) + 1 else ""
            raise ValueError(
                f"the answer {shown(answer)} is {len(added)} tokens after the prompt, {pieces}: give one that is a single "
                f"token{hint}, or an id, such as that of the first, {added[0]}"
            )
        return added[0]


def read_prompts(prompts: Any, tokenizer: Any = None) -> list[TokenizedPrompt]:
    """Prompts of a text, ids (T,) or (B, T), a batch with input_ids and attention_mask, or a list of texts or ids.

    Padding is left out, on either side. Prompts may differ in length: each one runs without padding.
    tokenizer: of transformers, ``ByteTokenizer``, or the path of one. Texts are encoded with the special tokens that it adds.

    Raises ValueError for texts without a tokenizer, for an empty prompt and for ids that are no integers.
    """
    known = _opened(tokenizer)
    if isinstance(prompts, str):
        return [_of_text(prompts, known)]
    if isinstance(prompts, TokenizedPrompt):
        return [prompts]
    if hasattr(prompts, "keys"):
        return _of_batch(prompts, known)
    if isinstance(prompts, Tensor) or hasattr(prompts, "__array__"):
        ids = torch.as_tensor(prompts)
        return [_of_ids(row, known) for row in (ids[None] if ids.ndim == 1 else ids)]
    items = list(prompts)
    if not items:
        raise ValueError("there are no prompts: give at least one text, or its token ids")
    if all(isinstance(item, int) for item in items):
        return [_of_ids(torch.tensor(items), known)]
    return [one for item in items for one in read_prompts(item, known)]


def encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text with the special tokens that the tokenizer adds at the beginning, and none at the end."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None:
        plain = [int(i) for i in tokenizer.encode([text])[0].ids]
        return plain if tokenizer.bos is None else [tokenizer.bos, *plain]
    ids = list(inner(text, verbose=False)["input_ids"])
    added = (
        bool(ids)
        and ids[-1] == tokenizer.eos
        and inner(text, add_special_tokens=False, verbose=False)["input_ids"][-1:] != ids[-1:]
    )
    return ids[:-1] if added and len(ids) > 1 else ids


def token_text(token: int, tokenizer: Tokenizer | None) -> str:
    """The text of one token, with the space before a word; ``#<id>`` without a tokenizer."""
    if tokenizer is None:
        return f"#{token}"
    inner = getattr(tokenizer, "tokenizer", None)
    text = tokenizer.decode([token])
    piece = "" if inner is None else str(inner.convert_ids_to_tokens(token))
    if not text:
        return piece or f"#{token}"
    return f" {text}" if piece.startswith(_SPACES) and len(piece) > 1 and not text.startswith(" ") else text


def _opened(tokenizer: Any) -> Tokenizer | None:
    if tokenizer is None or isinstance(tokenizer, str):
        return None if tokenizer is None else open_tokenizer(tokenizer)
    return as_tokenizer(tokenizer)


def _of_text(text: str, tokenizer: Tokenizer | None) -> TokenizedPrompt:
    if tokenizer is None:
        raise ValueError(f"the prompt {shown(text)} is a text and there is no tokenizer: give {option('tokenizer')}=, or token ids")
    return TokenizedPrompt(_checked(torch.tensor(encode(text, tokenizer), dtype=torch.int64), text), text, tokenizer)


def _of_ids(ids: Tensor, tokenizer: Tokenizer | None) -> TokenizedPrompt:
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        kind = str(ids.dtype).removeprefix("torch.")
        raise ValueError(f"a prompt is {tuple(ids.shape)} {kind}: give a text, or token ids (T,), or several, (B, T)")
    return TokenizedPrompt(_checked(ids.long()), None, tokenizer)


def _of_batch(batch: Any, tokenizer: Tokenizer | None) -> list[TokenizedPrompt]:
    if "input_ids" not in batch:
        raise ValueError(f"a batch of prompts has {', '.join(map(str, batch.keys()))}, and no input_ids: give token ids (B, T)")
    ids = torch.as_tensor(batch["input_ids"])
    ids = ids[None] if ids.ndim == 1 else ids
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask).reshape(ids.shape).bool()
    return [_of_ids(row[keep], tokenizer) for row, keep in zip(ids, real, strict=True)]


def _checked(ids: Tensor, text: str | None = None) -> Tensor:
    if not len(ids):
        raise ValueError(f"the prompt {'of no ids' if text is None else repr(text)} has no tokens: give at least one")
    return ids


def first_prompts(data: Iterable[Any], count: int, tokenizer: Any = None) -> list[TokenizedPrompt]:
    """The first samples of batches with input_ids, without padding; of several processes in turn, the same for each. Collective.

    Raises ValueError for data without token ids.
    """
    found: list[TokenizedPrompt] = []
    for batch in data:
        found += read_prompts(
            batch if hasattr(batch, "keys") else batch[0] if isinstance(batch, (tuple, list)) else batch, tokenizer
        )
        if len(found) >= count:
            break
    every = gathered([(prompt.ids.cpu(), prompt.text) for prompt in found[:count]])
    dealt = [each for turn in zip_longest(*every) for each in turn if each is not None][:count]
    if not dealt:
        raise ValueError(f"there are no prompts and no data: give {option('prompts')}=, texts or token ids")
    known = _opened(tokenizer)
    return [TokenizedPrompt(ids, text, known) for ids, text in dealt]
