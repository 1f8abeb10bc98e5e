"""Names of test cases that are the same in every process."""

from dataclasses import MISSING, fields
from typing import Any


def label(value: Any) -> str | None:
    """A parameter's text; functions, whose text holds an address, and long texts are numbered by pytest."""
    text = str(value)
    return None if (callable(value) and "0x" in repr(value)) or len(text) > 100 else text


def metric_id(metric: Any) -> str:
    """A metric's name and those options that differ from their defaults; of weights the numbers alone."""
    words = [metric.names[-1]]
    for field in fields(metric):
        value = getattr(metric, field.name)
        if value != (field.default if field.default_factory is MISSING else field.default_factory()):
            words.append(f"{field.name}={', '.join(map(str, value.values())) if isinstance(value, dict) else value}")
    return "-".join(words)
