"""Words that error messages share."""

import difflib
from collections.abc import Iterable


def nearest(word: str, words: Iterable[str]) -> str:
    """' Did you mean ...?', or nothing where no word is near."""
    near = difflib.get_close_matches(word, list(words), 1, 0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
