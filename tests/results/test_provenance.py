"""What a result says about the code that made it."""

import subprocess
from pathlib import Path

import pytest

import nodelens
from nodelens.results.result import commit, provenance

HOME = Path(nodelens.__file__).parents[1]


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=HOME, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(not (HOME / ".git").exists(), reason="the package is not imported from a checkout")
def test_the_commit_is_that_of_the_checkout():
    found = provenance()["commit"]
    assert git("rev-parse", found.removesuffix("-dirty")) == git("rev-parse", "HEAD")


def test_outside_a_checkout_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr("nodelens.results.result.__file__", str(tmp_path / "nodelens/results/result.py"))
    assert commit.__wrapped__() is None
