"""The back end that an option names, and loops that are compiled once."""

import os

import pytest
import torch

from nodelens.statistics import compiled, kernels

CPU = torch.device("cpu")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache of compiled loops."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = dict(compiled.seconds)
    compiled.library.cache_clear()
    yield tmp_path / "nodelens"
    compiled.library.cache_clear()
    compiled.seconds.clear()
    compiled.seconds.update(before)


@pytest.fixture
def compiler(back_end):
    """Skips the test where there is no C compiler."""
    if back_end != "compiled":
        pytest.skip("compiles nothing")


def test_auto_compiles_for_many_rows_of_a_cpu_only(compiler):
    assert kernels.chosen("auto", CPU, kernels.WORTH) == "compiled"
    assert kernels.chosen("auto", CPU, kernels.WORTH - 1) == "torch"
    assert kernels.chosen("auto", torch.device("meta"), kernels.WORTH) == "torch"
    assert kernels.chosen("compiled", CPU, 0) == "compiled"
    assert kernels.chosen("torch", CPU, kernels.WORTH) == "torch"


def test_loops_are_compiled_once_and_kept(fresh, compiler):
    compiled.library.cache_clear()
    compiled.library("float32")
    (file,) = fresh.iterdir()  # and nothing half made
    stamp = file.stat().st_mtime_ns
    assert kernels.seconds() > 0
    compiled.library.cache_clear()
    compiled.library("float32")
    assert file.stat().st_mtime_ns == stamp
    compiled.library("float64")
    assert len([*fresh.iterdir()]) == 2


def test_a_compiler_that_fails_is_named_and_auto_does_without(fresh, monkeypatch):
    monkeypatch.setenv("CC", "false")
    assert kernels.chosen("auto", CPU, kernels.WORTH) == "torch"
    with pytest.raises(
        ValueError, match=r"kernels is compiled, but loops.c cannot be compiled: false ended with status 1: install"
    ):
        kernels.chosen("compiled", CPU, 0)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no-such-compiler.*install a C compiler"):
        kernels.chosen("compiled", CPU, 0)
    assert not [*fresh.iterdir()]


def test_an_unknown_name_and_another_device_are_refused():
    with pytest.raises(ValueError, match=r"kernels is 'numba'; it is auto, torch, compiled"):
        kernels.chosen("numba", CPU, 0)
    with pytest.raises(ValueError, match=r"kernels is compiled, which are loops for a CPU, but the model is on meta"):
        kernels.chosen("compiled", torch.device("meta"), 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_home_that_cannot_be_written_to_is_no_obstacle(fresh, compiler):
    fresh.parent.chmod(0o500)
    compiled.library("float32")
    fresh.parent.chmod(0o700)


def test_wrong_shapes_are_refused_before_memory_is_read(compiler):
    raw, keep = torch.ones(3, 4, 9), torch.ones(2, 9, dtype=torch.bool)
    with pytest.raises(RuntimeError):
        compiled.reduce(raw, keep, None, ("sums",))
    with pytest.raises(RuntimeError):
        compiled.reduce(raw, None, torch.zeros(3), ("sums",))
    with pytest.raises(ValueError, match=r"counts of shape \(3, 5\) are not those of 4 units"):
        compiled.add_bins(torch.zeros(3, 5, dtype=torch.int64), raw, None, 1)
