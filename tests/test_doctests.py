"""The examples in the package's docstrings. Only modules that have some are imported."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path.relative_to(ROOT) for path in sorted((ROOT / "nodelens").rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_examples_print_what_they_say(file):
    name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert tried > 0
    assert failed == 0, "the report stands in the captured output"


def test_there_are_examples():
    assert len(FILES) >= 6
