"""Positions of tokens by index expression, or by a phrase or pattern of the prompt."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nodelens.data.selectors import Selector, select_tokens
from nodelens.data.tokens import as_tokenizer
from nodelens.network.expressions import CHARACTERS, parse_index

Positions = str | int | Sequence[int]
_KINDS = ("phrase:", "regex:")


def searches_text(positions: Any) -> bool:
    """Whether positions are a text of the prompt: ``phrase:...``, ``regex:...``, or one that cannot be an index expression."""
    if not isinstance(positions, str) or positions.strip() == "all":
        return False
    return positions.startswith(_KINDS) or not CHARACTERS.fullmatch(positions)


def indices(expression: Positions, n: int, what: str) -> list[int]:
    """Indices in [0, n), in the order given, from an expression of ``parse_index``, an index or a list of indices.

    what: names the indices in errors, such as ``positions``. Raises ValueError for one out of range.
    """
    several = isinstance(expression, Sequence) and not isinstance(expression, str)
    if isinstance(expression, bool) or (several and any(isinstance(k, bool) for k in expression)):  # type: ignore[union-attr]
        raise ValueError(f"{what} are booleans; they are indices, as np.flatnonzero(mask) gives them")
    if isinstance(expression, str):
        text = expression
    elif isinstance(expression, int):
        text = str(expression)
    elif not isinstance(expression, Sequence) or not all(isinstance(k, int) for k in expression):
        raise ValueError(f"{what} is {expression!r}; it takes an index, a list of indices, or an expression such as n//2:")
    else:
        found = [int(k) for k in expression]
        wrong = next((k for k in found if not -n <= k < n), None)
        if wrong is not None or not found:
            shown = "an empty list" if wrong is None else f"{wrong}"
            raise ValueError(f"{what}: {shown} selects nothing among n = {n}" + (f"; valid are {-n} to {n - 1}" if n else ""))
        return list(dict.fromkeys(k % n for k in found))
    try:
        return parse_index(text, n)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def find_text(positions: str, ids: Tensor, real: Tensor, tokenizer: Any, text: str | None = None) -> list[int]:
    """The tokens that overlap a phrase or a match of a pattern, as indices among the real tokens of one prompt.

    positions: a phrase, ``phrase:<text>`` or ``regex:<pattern>``. Shapes: ids, real (T,). text: the prompt; by default the decoded
    ids. Raises ValueError for a text that is not in the prompt or occurs more than once, without a tokenizer, and for ids that are
    not the tokens of the text.
    """
    if tokenizer is None:
        raise ValueError(
            f"positions {positions!r} search the text of the prompt: give tokenizer=, or positions as indices, made of integers, "
            "n, + - * // %, brackets, colons and commas"
        )
    positions = positions if positions.startswith(_KINDS) else f"phrase:{positions}"
    kind, _, words = positions.partition(":")
    if " & " in words and kind == "phrase":  # between the terms of a selector
        positions = "regex:" + re.escape(words).replace(r"\&", r"\x26")
    known = as_tokenizer(tokenizer)
    plain = real & ~torch.isin(ids, torch.tensor(known.special, dtype=ids.dtype)) if known.special else real
    text = known.decode(ids[plain].tolist()) if text is None else text
    found = len(Selector.parse(positions).words[0].spans(text))
    if found != 1:
        times = "is not in the prompt" if found == 0 else f"occurs {found} times in the prompt"
        way_out = "give another" if found == 0 else "give a longer one, or positions as indices"
        raise ValueError(f"the {kind} {words!r} {times} {_short(text)!r}: {way_out}")
    mask = select_tokens(ids[None], positions, mask=real[None], tokenizer=tokenizer, texts=[text])[0]
    return mask[real].nonzero()[:, 0].tolist()


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
