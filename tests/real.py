"""Where real data lie."""

import os
from pathlib import Path

import pytest


def folder(variable: str) -> Path:
    """The folder an environment variable names; the test is skipped, with the reason, where it is not set."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set: it names a folder of real data")
    return Path(os.environ[variable])
