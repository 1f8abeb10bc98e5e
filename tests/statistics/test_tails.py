"""Higher moments, quantiles, mean absolute values and the sample of rows, compared with numpy and the rows."""

import numpy as np
import pytest
import torch
from laws import drifting
from real import folder
from torch.testing import assert_close

from nodelens.statistics import Accumulator, Higher, MeanSizes, Quantiles, Sample, Sizes
from nodelens.statistics.bins import BINS
from nodelens.statistics.rows import Rows
from nodelens.statistics.sample import ROWS
from nodelens.statistics.sample_hash import mix


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def central(x, power):
    return (x.double() - x.double().mean(0)).pow(power).mean(0)


@pytest.mark.parametrize("far", [0.0, 30.0])
def test_kurtosis_and_skewness_are_those_of_the_rows(far):
    x = drifting(400).exp2().clamp_max(50) + far
    found = Higher.of(x, shift=torch.full((5,), 1.0, dtype=torch.float64))
    assert_close(found.kurtosis, central(x, 4) / central(x, 2) ** 2, rtol=1e-9, atol=0)
    assert_close(found.skewness, central(x, 3) / central(x, 2) ** 1.5, rtol=1e-9, atol=0)


def test_float32_maps_keep_their_higher_moments():
    x = (normal(64, 3, 49) + torch.tensor([0.0, 1.0, 7.0], dtype=torch.float64)[:, None]).float()
    flat = x.transpose(1, 2).reshape(-1, 3)
    keep = torch.arange(49) % 5 > 0
    for rows, right in ((Rows(x), flat), (Rows(x, keep.expand(64, -1)), x[:, :, keep].transpose(1, 2).reshape(-1, 3))):
        rows = rows.about(torch.zeros(3, dtype=torch.float64))
        for found in (Higher.of(rows), Higher.of(rows.by_sample("fourths"))):
            assert_close(found.kurtosis, central(right, 4) / central(right, 2) ** 2, rtol=1e-4, atol=0)
    assert abs(float(Higher.of(normal(200_000, 1)).kurtosis) - 3) < 0.05


def test_a_constant_and_a_single_row_have_no_kurtosis():
    assert Higher.of(torch.full((9, 2), 0.1)).kurtosis.isnan().all()
    assert Higher.of(torch.ones(1, 2)).kurtosis.isnan().all()
    assert Higher.of(torch.ones(0, 2)).skewness.isnan().all()


@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["normal", "far", "lognormal", "relu", "signs", "levels", "few"])
def test_quantiles_are_numpy_s_to_one_percent(kind, q):
    x = normal(5 if kind == "few" else 3000, 4) * torch.tensor([1, 1e-3, 30, 4e4], dtype=torch.float64)
    if kind == "far":
        x = x + 100
    if kind == "lognormal":
        x = normal(3000, 4).mul(3).exp()
    if kind == "relu":
        x = x.relu()
    if kind == "signs":
        x = x.sign()
    if kind == "levels":
        x = x.div(10).round()
    right = np.quantile(x.abs().numpy(), q, axis=0)
    assert_close(Quantiles.of(x).quantile(q), torch.from_numpy(right), rtol=1e-2, atol=1e-8)


def test_quantiles_of_smooth_rows_are_far_closer_than_a_bin():
    x = normal(200_000, 2)
    right = torch.from_numpy(np.quantile(x.abs().numpy(), [0.5, 0.9, 0.99], axis=0))
    found = Quantiles.of(x.float())
    assert_close(torch.stack([found.quantile(q) for q in (0.5, 0.9, 0.99)]), right, rtol=1e-3, atol=0)


def test_values_outside_the_bins_are_counted_in_the_outermost_bins():
    x = torch.tensor([[0.0, 1e-12, -1e30, 1e300, 5.0]], dtype=torch.float64).T
    found = Quantiles.of(x)
    assert found.widest().counts.shape == (1, BINS)
    assert found.counts.shape[1] < BINS / 2
    assert found.counts[0, 0] == found.counts[0, -1] == 2
    assert found.counts.sum() == found.n == 5
    assert found.quantile(0).item() == 0
    assert abs(found.quantile(0.5).item() - 5) < 0.05
    assert abs(found.quantile(0.75).item() / 1e8 - 1) < 0.02
    assert found.quantile(1).item() == 1e300


def test_only_bins_between_the_smallest_and_the_largest_value_are_held():
    x = normal(500, 3).abs() + 1
    found, wide = Quantiles.of(x), Quantiles.of(torch.cat([x, x / 1000, x * 1000]))
    assert found.counts.shape[1] <= 1 + 5 * 64
    for parts in ([x, x / 1000, x * 1000], [x * 1000, x / 1000, x], [x[:0], x / 1000, x[:0], x * 1000, x]):
        sums = Accumulator(Quantiles)
        for part in parts:
            sums.add_rows(Rows.of(part, shift=torch.zeros(3, dtype=torch.float64)))
        assert torch.equal(sums.value.counts, wide.counts)
        assert torch.equal(sums.value.first, wide.first)
        assert_close(sums.value.quantile(0.3), wide.quantile(0.3), rtol=0, atol=0)


def test_counts_take_more_bytes_only_when_one_of_them_does():
    x = normal(20_000, 1).exp()
    sums, rows = Accumulator(Quantiles), Rows.of(x, shift=torch.zeros(1, dtype=torch.float64))
    for _ in range(8):
        sums.add_rows(rows)
    assert sums.value.n == 160_000
    assert sums.value.counts.dtype == torch.int16, "the fullest bin has about 2,000 rows"
    ones = Rows.of(torch.ones(20_000, 1, dtype=torch.float64), shift=torch.zeros(1, dtype=torch.float64))
    for k in (1, 2, 3):
        sums.add_rows(ones)
        held = sums.value
        assert held.counts.dtype == (torch.int16 if k < 2 else torch.int32)
        assert held.counts.sum() == held.n == 160_000 + 20_000 * k


@pytest.mark.parametrize("batch", [1, 7, 3000])
def test_the_largest_value_is_exact(batch):
    x = normal(3000, 4).mul(3).exp() * torch.tensor([1, -1e-3, 30, 4e4], dtype=torch.float64)
    accumulator = Accumulator(Quantiles)
    for part in x.split(batch):
        accumulator.add_rows(Rows.of(part, shift=torch.zeros(4, dtype=torch.float64)))
    assert torch.equal(accumulator.value.quantile(1.0), x.abs().amax(0))


def test_masked_rows_do_not_count_as_zeros():
    x, keep = normal(6, 3, 50).float(), torch.rand(6, 50, generator=torch.Generator().manual_seed(1)) > 0.4
    found = Quantiles.of(Rows(x, keep))
    kept = x.transpose(1, 2)[keep]
    assert torch.equal(found.counts, Quantiles.of(kept).counts)
    assert torch.equal(found.largest, kept.abs().amax(0).double())
    assert found.n.item() == len(kept)
    assert Quantiles.of(x[:0]).quantile(0.5).isnan().all()


def test_the_outlier_index_of_recorded_activations():
    import json

    golden = json.loads((folder("NODELENS_GOLDEN") / "activations.json").read_text())
    x = torch.tensor(golden["inputs"]["outputs"], dtype=torch.float64)
    for name in ("outlier_index", "outlier_index_q"):
        right = torch.tensor(golden["expected"][name], dtype=torch.float64)
        sizes = Sizes.of(x)
        found = Quantiles.of(x).quantile(golden["options"][name]["quantile"]) / (sizes.absolute / sizes.n)
        assert_close(found, right, rtol=1e-2, atol=0)


def test_mean_sizes_square_the_mean_of_each_sample():
    x, keep = normal(9, 3, 8), torch.rand(9, 8, generator=torch.Generator().manual_seed(1)) > 0.4
    keep[4] = False
    means = torch.stack([s[:, k].abs().mean(1) for s, k in zip(x, keep, strict=True) if k.any()])
    for rows in (Rows(x, keep), Rows(x, keep).by_sample("absolutes")):
        found = MeanSizes.of(rows)
        assert found.n.item() == 8
        assert_close(found.square, means.square().sum(0), rtol=1e-12, atol=0)


def test_a_sample_is_the_rows_of_the_smallest_hashes_in_any_batches():
    n = 3 * ROWS
    x, z, hashes = normal(n, 3), normal(n, 2, seed=1), mix(torch.arange(n))
    x[5], z[17, 1] = torch.nan, torch.inf
    whole = Sample.of(x, z, hashes=hashes)
    good = torch.ones(n, dtype=torch.bool)
    good[[5, 17]] = False
    first = torch.argsort(hashes.where(good, torch.iinfo(torch.int64).max))[:ROWS]
    assert torch.equal(whole.rows, x[first])
    assert torch.equal(whole.target, z[first])
    assert whole.seen.item() == n - 2
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    accumulator = Accumulator(Sample, groups=2)
    for k, part in enumerate(order.split(100)):
        accumulator.add(Sample.of(x[part], z[part], hashes=hashes[part]), k % 2)
    for name, tensor in accumulator.value.tensors().items():
        assert torch.equal(tensor, whole.tensors()[name]), name


def test_each_position_of_a_sample_has_its_own_hash():
    x, hashes = normal(4, 2, 6), mix(torch.arange(4))
    whole = Sample.of(x, hashes=hashes)
    assert whole.rows.shape == (24, 2)
    assert whole.target.shape == (24, 0)
    assert len(whole.hashes.unique()) == 24
    parts = Sample.of(x[2:], hashes=hashes[2:]) + Sample.of(x[:2], hashes=hashes[:2])
    assert torch.equal(parts.rows, whole.rows)
    assert_close(whole.rows.sum(0), x.sum((0, 2)))
    with_target = Sample.of(x, torch.arange(4), hashes=hashes)
    place = with_target.target[:, 0].long()
    assert all((row == x[p].T).all(1).any() for row, p in zip(with_target.rows, place, strict=True))


def test_a_sample_without_hashes_raises():
    with pytest.raises(ValueError, match="5 samples, but no hashes and 5 targets"):
        Sample.of(torch.ones(5, 2))
    with pytest.raises(ValueError, match="5 samples, but 5 hashes and 4 targets"):
        Sample.of(torch.ones(5, 2), torch.ones(4), hashes=torch.arange(5))


def test_rows_that_do_not_vary_far_from_the_shift_leave_no_rounding_behind():
    """For example, the only sample in which a unit is active is left out: zeros about another mean remain."""
    for shift in (0.0029, 0.1, 3.7):
        zeros = Higher.of(torch.zeros(57, 4), shift=torch.full((4,), shift, dtype=torch.float64))
        assert zeros.kurtosis.isnan().all()
        assert zeros.skewness.isnan().all()
        assert zeros.mean_square.tolist() == [0.0] * 4
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * 1e-2
    far = Higher.of(x, shift=torch.ones(4, dtype=torch.float64))  # a hundredth of the distance is not rounding
    near = Higher.of(x, shift=torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(far.mean_square, near.mean_square, rtol=1e-2, atol=0)
    assert far.kurtosis.isfinite().all()


@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "parts"])
def test_counts_are_held_in_the_smallest_whole_numbers_and_never_overflow(by_rows):
    x = Rows.of(torch.full((20_000, 2, 1), 3.0), shift=torch.zeros(2, dtype=torch.float64))  # all in one bin
    accumulator = Accumulator(Quantiles, 2)
    for group, dtype in [(0, torch.int16), (0, torch.int32), (1, torch.int16)]:
        accumulator.add_rows(x, group) if by_rows else accumulator.add(Quantiles.of(x), group)
        assert accumulator.parts[group].counts.dtype == dtype
    for found, n in ((accumulator.value, 60_000), (accumulator.without(1), 40_000), (accumulator.without(0), 20_000)):
        assert found.counts.amax(1).tolist() == found.counts.sum(1).tolist() == [n, n]
    assert accumulator.value.counts.dtype == torch.int32
    assert_close(accumulator.value.quantile(0.5), torch.full((2,), 3.0, dtype=torch.float64), rtol=0.01, atol=0)


def test_counts_widen_once_more_where_rows_exceed_those_of_int32():
    few = Quantiles.of(torch.full((4, 1), 3.0))
    many = Quantiles(few.n + (1 << 31) - 6, few.first, few.counts.int() * ((1 << 29) - 1), few.largest)
    assert (few + many).counts.dtype == (many + few).counts.dtype == torch.int64
    assert int((few + many).counts.max()) == (1 << 31)
    assert not many.add_in_place(few)
    assert few.widest().counts.dtype == torch.int64
