"""Sums of rows are those of slow and obvious loops, by every back end."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from nodelens.statistics import Quantiles
from nodelens.statistics.bins import BINS
from nodelens.statistics.group_slices import copy_order, taken
from nodelens.statistics.linalg import gram_of_rows
from nodelens.statistics.reductions import SUMS, Bins, reduce
from nodelens.statistics.rows import Rows

EVERY = (*SUMS, "norms", "skews")
LAYOUTS = ("maps", "tokens", "slice")

pytestmark = pytest.mark.usefixtures("back_end")


def values(layout, dtype=torch.float32, samples=5, width=37, positions=600):
    x = torch.randn(samples, width, positions, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    x[1, 2] = 0
    x[:, :, 7] = -0.0
    if layout == "tokens":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "slice":  # of a larger tensor: no axis but the last is dense
        return torch.nn.functional.pad(x, (1, 2, 1, 1, 1, 0))[1:, 1:-1, 1:-2]
    return x


def twin(raw, keep, shift, samples):
    """Loops of numpy in float64."""
    x, n = raw.double().numpy(), range(len(raw)) if samples is None else samples.tolist()
    about = np.zeros(raw.shape[1]) if shift is None else shift.to(raw.dtype).double().numpy()
    found = {name: np.zeros((len(n), raw.shape[1])) for name in (*SUMS, "skews")} | {"norms": np.zeros((len(n), raw.shape[2]))}
    for i, s in enumerate(n):
        for p in range(raw.shape[2]):
            if keep is not None and not keep[s, p]:
                continue
            v, size = x[s, :, p] - about, np.abs(x[s, :, p])
            found["skews"][i] += v * (v**2).sum()
            for power, name in enumerate(("sums", "squares", "cubes", "fourths"), 1):
                found[name][i] += v**power
            found["absolutes"][i] += size
            found["nonzeros"][i] += size != 0
            found["largest"][i] = np.maximum(found["largest"][i], size)
            found["norms"][i, p] = (v**2).sum()
    return {name: torch.from_numpy(t) for name, t in found.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("chosen", [False, True])
def test_sums_are_those_of_slow_loops(layout, masked, shifted, chosen):
    raw = values(layout)
    keep = torch.rand(raw.shape[0], raw.shape[2], generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    shift = torch.linspace(-1, 1, raw.shape[1], dtype=torch.float64) if shifted else None
    samples = torch.tensor([3, 0, 3, 1]) if chosen else None
    found = reduce(raw, keep, shift, EVERY, samples)
    expected = twin(raw, keep, shift, samples)
    for name in EVERY:
        size = expected[name].abs().amax().clamp_min(1)  # a sum that cancels has the rounding of its terms
        assert_close(found[name].double() / size, expected[name] / size, rtol=0, atol=raw.shape[2] * 2**-24, msg=name)
    assert torch.equal(found["nonzeros"].double(), expected["nonzeros"])
    assert torch.equal(found["largest"].double(), expected["largest"])
    taken = raw if samples is None else raw[samples]
    kept = (
        torch.ones_like(taken[:, :1], dtype=torch.bool) if keep is None else (keep if samples is None else keep[samples])[:, None]
    )
    about = taken if shift is None else taken - shift.float()[:, None]
    if "x" in found:
        assert torch.equal(found["x"], about.where(kept, 0))
    assert torch.equal(found["raw"].where(kept, 0), taken.where(kept, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_rows_have_float64_sums(layout):
    raw = values(layout, torch.float64)
    found, expected = reduce(raw, None, None, EVERY), twin(raw, None, None, None)
    for name in EVERY:
        assert found[name].dtype == torch.float64
        assert_close(found[name], expected[name], rtol=1e-12, atol=1e-10, msg=name)


def test_long_sums_of_squares_are_as_precise_as_stated():
    raw = torch.rand(2, 3, 200_000, generator=torch.Generator().manual_seed(0)) + 1
    exact = raw.double().square().sum(2)
    (squares,) = Rows(raw).sums("squares")
    bound = 2**-24 * 200
    assert float(((squares.double() - exact) / exact).abs().max()) < bound


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_that_are_not_finite_spoil_the_sums_of_their_unit_only(layout, value):
    raw = values(layout)
    raw[2, 4, 5] = value
    found = reduce(raw, None, None, EVERY)
    for name in ("sums", "squares", "absolutes", "largest"):
        finite = found[name].isfinite()
        assert not finite[2, 4], name
        assert int(finite.sum()) == finite.numel() - 1, name
    keep = torch.ones(len(raw), raw.shape[2], dtype=torch.bool)
    keep[2, 5] = False
    assert all(t.isfinite().all() for name, t in reduce(raw, keep, None, EVERY).items() if name != "raw")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bins_are_those_of_a_search(layout, masked, dtype):
    raw = values(layout, dtype) * torch.logspace(-12, 12, 37, dtype=dtype)[:, None]
    keep = torch.arange(600) % 3 > 0 if masked else None
    keep = None if keep is None else keep.expand(len(raw), -1)
    counts = torch.ones(37, BINS, dtype=torch.int64)
    Bins(raw, keep).add_to(counts, 1)
    rows = int(keep.sum()) if masked else raw.shape[0] * raw.shape[2]
    assert torch.equal((counts - 1).sum(1), torch.full((37,), rows))
    one = raw[:, 18].double().abs() if keep is None else raw[:, 18].double().abs()[keep]
    largest = raw.double().abs().amax((0, 2))
    found = Quantiles(torch.tensor([rows]), torch.tensor([1]), counts - 1, largest).quantile(0.5)[18]
    assert_close(found, one.median(), rtol=0.01, atol=0)


def test_several_threads_return_what_one_does():
    raw, before = values("maps", samples=9, width=64, positions=4096), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            counts = torch.zeros(64, BINS, dtype=torch.int64)
            Bins(raw).add_to(counts, 1)
            found.append(reduce(raw, None, None, EVERY) | {"counts": counts})
    finally:
        torch.set_num_threads(before)
    for name, one in found[0].items():
        assert_close(one, found[1][name], rtol=1e-6, atol=1e-3, msg=name)


@pytest.mark.parametrize("shape", [(0, 4, 9), (3, 4, 0), (3, 4, 1), (1, 1, 2)])
def test_few_or_no_values(shape):
    raw = torch.ones(shape)
    found = reduce(raw, None, None, EVERY)
    assert torch.equal(found["sums"], raw.sum(2))
    assert torch.equal(found["norms"], raw.sum(1))
    assert torch.equal(found["largest"], torch.full(shape[:2], float(shape[2] > 0)))
    Bins(raw).add_to(counts := torch.zeros(shape[1], BINS, dtype=torch.int64), 1)
    assert int(counts.sum()) == raw.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_of_copied_rows_are_those_of_the_rows(layout):
    rows = Rows(values(layout, positions=40), shifted=False)
    copied = rows.prepared({"sums", "norms"}, torch.tensor([4, 1, 2]))
    assert_close(copied.outer, rows.index(torch.tensor([4, 1, 2])).double().outer, rtol=1e-5, atol=1e-4)
    assert_close(copied.take(1, 3).outer, rows.take(1, 3).double().outer, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", ["maps", "tokens"])
def test_sums_over_few_positions_are_those_of_slow_loops(layout):
    raw, samples = values(layout, samples=6, positions=9), torch.tensor([4, 1, 2])
    found, expected = reduce(raw, None, None, EVERY, samples), twin(raw, None, None, samples)
    assert found["raw"].stride(1) == 1  # copied with the units side by side
    for name, value in expected.items():
        assert_close(found[name].double(), value, rtol=1e-5, atol=1e-4, msg=name)


@pytest.mark.parametrize("width", [63, 64, 100, 300, 1100])
def test_a_product_in_bands_is_the_whole_product(width):
    a = torch.randn(width, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = gram_of_rows(a)
    assert_close(found, a @ a.T, rtol=1e-12, atol=1e-12)


def test_samples_are_copied_in_the_order_of_their_groups_or_where_units_are_far_apart():
    few, many, tokens = (values(layout, positions=p) for layout, p in (("maps", 9), ("maps", 40), ("tokens", 9)))
    mixed, ordered = torch.tensor([1, 0, 1, 0, 2]), torch.tensor([0, 0, 1, 1, 2])
    assert copy_order(many, mixed).tolist() == [1, 3, 0, 2, 4]
    assert copy_order(few, ordered).tolist() == [0, 1, 2, 3, 4]
    assert copy_order(many, ordered) is None
    assert copy_order(tokens, ordered) is None
    assert taken(mixed, copy_order(many, mixed)).tolist() == [0, 0, 1, 1, 2]
    assert taken(mixed, None) is mixed


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("width", "other"), [(7, 7), (7, 40), (40, 40)])
def test_products_of_maps_are_those_of_all_their_rows(layout, width, other):
    """Narrow rows are converted to float64 a few samples at a time."""
    x, z = values(layout, samples=90, width=width), values(layout, samples=90, width=other) + 1
    keep = torch.rand(90, 600, generator=torch.Generator().manual_seed(1)) > 0.2
    mine, theirs = (Rows(t, keep, shifted=False) for t in (x, z))
    kept = [t.double().where(keep[:, None], 0) for t in (x, z)]
    tolerance = {"rtol": 1e-12, "atol": 1e-9} if width == 7 else {"rtol": 1e-4, "atol": 0.1}
    assert_close(mine.products(theirs), torch.einsum("sip,sjp->ij", *kept), **tolerance)
    assert_close(mine.products(mine), torch.einsum("sip,sjp->ij", kept[0], kept[0]), **tolerance)
    first = torch.einsum("sip,sjp->ij", kept[0][:50], kept[1][:50])
    assert_close(mine.products_by_run(theirs, [(0, 50), (50, 90)])[0], first, **tolerance)
