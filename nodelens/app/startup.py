"""How long a command takes until its first batch, by phase, for the log of the run."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

_marks: list[tuple[str, float]] = []  # phases and their ends, the start of the command first


def begin() -> None:
    """The command has started."""
    _marks[:] = [("", time.perf_counter())]


def phase(name: str) -> None:
    """A phase has ended. Nothing happens after the first batch, and outside of the command line."""
    if _marks:
        _marks.append((name, time.perf_counter()))


def until_first_batch(items: Iterable[Any]) -> Iterator[Any]:
    """The items. Before the first one, a line with the phases and their seconds is written to the log."""
    for item in items:
        if _marks:
            phase("first batch")
            logging.getLogger("nodelens").info(_line())
            _marks.clear()
        yield item


def _line() -> str:
    ends = [end for _, end in _marks]
    phases = [f"{name} {end - start:.1f} s" for (name, end), start in zip(_marks[1:], ends[:-1], strict=True)]
    return f"from the command to the first batch: {ends[-1] - ends[0]:.1f} s ({', '.join(phases)})"
