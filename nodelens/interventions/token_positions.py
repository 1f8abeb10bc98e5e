"""Positions of tokens by index expression, or by a phrase or pattern of the prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nodelens.data.selectors import Selector, select_tokens
from nodelens.data.tokens import as_tokenizer
from nodelens.network.expressions import CHARACTERS, parse_index

Positions = str | int | Sequence[int]


def sought(positions: Any) -> str | None:
    """The selector ``phrase:...`` or ``regex:...`` of positions that are a text of the prompt; None for indices.

    A text in which only characters of index expressions occur is one; any other text is a phrase.
    """
    if not isinstance(positions, str) or positions.startswith(("phrase:", "regex:")):
        return positions if isinstance(positions, str) else None
    return None if positions.strip() == "all" or CHARACTERS.fullmatch(positions) else f"phrase:{positions}"


def indices(expression: Positions, n: int, what: str) -> list[int]:
    """Indices in [0, n), in the order given, from an expression of ``parse_index``, an index or a list of indices.

    what: names the indices in errors, such as ``positions``. Raises ValueError for one out of range.
    """
    if isinstance(expression, str):
        text = expression
    elif isinstance(expression, int):
        text = str(expression)
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
    """The tokens that overlap a phrase or a match of a pattern (``sought``), as indices among the real tokens of one prompt.

    Shapes: ids, real (T,). text: the prompt; by default the decoded ids. Raises ValueError for a text that is not in the prompt or
    occurs more than once, without a tokenizer, and for ids that are not the tokens of the text.
    """
    kind, _, words = positions.partition(":")
    if tokenizer is None:
        raise ValueError(
            f"positions search the text of the prompt for the {kind} {words!r}: give tokenizer=, or positions as indices, made of "
            "integers, n, + - * // %, brackets, colons and commas"
        )
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
