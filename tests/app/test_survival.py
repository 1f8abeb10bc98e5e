"""Some of the trials of benchmarks/survival.py: kills, full disks, signals and damaged files."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/survival.py"


@pytest.fixture(scope="module")
def survival():
    spec = importlib.util.spec_from_file_location("survival", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_an_analysis_survives(survival, tmp_path):
    found = survival.survive(tmp_path, 1, ("analyze",))
    assert found.failures == []
    assert set(found.counts) == {
        *(f"analyze: kill {when} a write" for when in ("before", "within", "after")),
        *(f"analyze: {name} in the pass" for name in survival.SIGNALS),
        *("analyze: full disk", "analyze: file flipped", "analyze: file cut off"),
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_survives(survival, tmp_path):
    assert survival.survive(tmp_path, 1, ("prune",)).failures == []
