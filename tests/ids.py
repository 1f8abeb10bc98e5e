"""Names of test cases that are the same in every process."""

from typing import Any


def label(value: Any) -> str | None:
    """A parameter's text; functions, whose text holds an address, are numbered by pytest."""
    return None if callable(value) and "0x" in repr(value) else str(value)
