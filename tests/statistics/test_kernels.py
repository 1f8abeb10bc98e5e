"""The back end that an option names, and loops that are compiled once."""

import ctypes
import os
from pathlib import Path

import pytest
import torch

import nodelens as nl
from nodelens.statistics import compiled, compiler, kernels, triangle

CPU = torch.device("cpu")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache of compiled loops."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = dict(compiler.seconds)
    forget()
    yield tmp_path / "nodelens"
    forget()
    compiler.seconds.clear()
    compiler.seconds.update(before)


def forget():
    """As in a new process."""
    compiled.library.cache_clear()
    compiler.load.cache_clear()


def test_auto_compiles_for_many_rows_of_a_cpu_only(compiler):
    assert kernels.chosen("auto", CPU, kernels.WORTH) == "compiled"
    assert kernels.chosen("auto", CPU, kernels.WORTH - 1) == "torch"
    assert kernels.chosen("auto", torch.device("meta"), kernels.WORTH) == "torch"
    assert kernels.chosen("compiled", CPU, 0) == "compiled"
    assert kernels.chosen("torch", CPU, kernels.WORTH) == "torch"


def test_loops_are_compiled_once_and_kept(compiler, fresh):
    compiled.library("float32")
    (file,) = fresh.iterdir()  # and nothing half made
    stamp = file.stat().st_mtime_ns
    assert kernels.seconds() > 0
    forget()
    compiled.library("float32")
    assert file.stat().st_mtime_ns == stamp
    compiled.library("float64")
    assert len([*fresh.iterdir()]) == 2


def test_what_a_killed_compiler_left_is_removed(compiler, fresh):
    left, new = fresh / "part-old", fresh / "part-new"
    for folder in (left, new):
        folder.mkdir(parents=True)
        (folder / "part.so").touch()
    os.utime(left, (0, 0))
    compiled.library("float32")
    assert not left.exists()
    assert new.exists(), "another process may be compiling there"


def test_a_result_says_how_long_compiling_took(compiler, fresh):
    model, data = torch.nn.Linear(3, 2), [torch.randn(8, 3)]
    first, again = (
        nl.analyze(model, data, ["activation_mean"], task="none", kernels="compiled").metadata["seconds"]["kernels"]
        for _ in range(2)
    )
    assert first > 0
    assert again == 0


def test_a_damaged_library_is_removed_and_another_one_made(compiler, fresh, monkeypatch):
    load, refused = ctypes.CDLL, []

    def once(path):
        if not refused:
            refused.append(Path(path))
            raise OSError("invalid ELF header")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", once)
    compiled.library("float32")
    assert refused[0].parent == fresh
    assert not refused[0].exists()


@pytest.mark.skipif(os.name == "nt", reason="the compiler that writes empty files is a shell script")
def test_loops_that_cannot_be_loaded_are_named(fresh, tmp_path, monkeypatch):
    empty = tmp_path / "cc"
    empty.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n')
    empty.chmod(0o755)
    monkeypatch.setenv("CC", str(empty))
    assert kernels.chosen("auto", CPU, kernels.WORTH) == "torch"
    with pytest.raises(ValueError, match=r"loops-\w+.so: file too short"):
        kernels.chosen("compiled", CPU, 0)
    assert not [*fresh.iterdir()]


def test_a_compiler_may_have_a_launcher(compiler, fresh, monkeypatch):
    monkeypatch.setenv("CC", "env cc")
    compiled.library("float32")
    assert len([*fresh.iterdir()]) == 1


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
def test_a_home_that_cannot_be_written_to_is_no_obstacle(compiler, fresh):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("width", "positions"), [(33, 17), (70, 49), (257, 16), (300, 5), (40, 9000)])
@pytest.mark.parametrize("masked", [False, True])
def test_products_are_those_of_all_pairs_of_units(compiler, width, positions, masked, dtype):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(5, width, positions, generator=generator, dtype=dtype) + 1
    keep = torch.rand(5, positions, generator=generator) < 0.6 if masked else None
    shift = torch.linspace(0, 2, width, dtype=torch.float64) if masked else None
    scale = torch.rand(5, positions, generator=generator) if masked else None
    chosen, x = [4, 0, 2] if masked else None, raw.double()
    if keep is not None and shift is not None and scale is not None:
        x = ((x - shift[:, None]).where(keep[:, None], 0) * scale[:, None].double())[[4, 0, 2]]
        raw = raw.where(keep[:, None], torch.nan)  # a masked row may hold what is not finite
    held = torch.ones(triangle.size(width), dtype=torch.float64)
    compiled.add_products(held, raw, keep, shift, scale, chosen)
    exact = torch.einsum("sip,sjp->ij", x, x)
    rtol = 2e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(triangle.unpack(held, width) - 1, exact, rtol=0, atol=rtol * float(exact.diagonal().max()))


def test_maps_are_added_to_their_group(compiler):
    raw, group = torch.randn(6, 7, 300, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0, 2, 1, 0, 2])
    shift, sums = torch.linspace(-1, 1, 7, dtype=torch.float64), torch.ones(2, 3, 2100)
    compiled.add_maps(sums, raw, shift, group)
    about = (raw - shift.float()[:, None]).flatten(1)
    for power, found in enumerate(sums, 1):
        torch.testing.assert_close(found, torch.ones(3, 2100).index_add_(0, group, about**power))
    with pytest.raises(IndexError, match="cannot be added to 3 groups"):
        compiled.add_maps(sums, raw, shift, group + 1)
    with pytest.raises(ValueError, match="cannot be added to sums of shape"):
        compiled.add_maps(sums[:, :, :-1].contiguous(), raw, shift, group)


def test_products_and_patches_of_other_shapes_are_refused(compiler):
    raw = torch.ones(2, 4, 9)
    with pytest.raises(ValueError, match="products of 4 units cannot be added"):
        compiled.add_products(torch.zeros(3, dtype=torch.float64), raw)
    with pytest.raises(IndexError, match=r"samples \[2\] of 2"):
        compiled.add_products(torch.zeros(triangle.size(4), dtype=torch.float64), raw, chosen=[2])
    with pytest.raises(ValueError, match="maps of 9 positions are not those of 3 by 4"):
        compiled.patches(raw, None, [torch.ones(2, 3), torch.ones(2, 4)])
