"""The law of every statistic: the parts of any split add up to the whole."""

import pytest
import torch
from compare import same
from ids import label
from laws import drifting, make
from torch.testing import assert_close

from nodelens.statistics import (
    STATISTICS,
    Accumulator,
    ClassStatistic,
    Cosines,
    Cross,
    Directions,
    Gram,
    Moments,
    NormedGram,
    Pair,
    Quantiles,
    Sample,
)
from nodelens.statistics.rows import Rows

pytestmark = pytest.mark.usefixtures("back_end")
every = pytest.mark.parametrize("statistic", STATISTICS, ids=lambda s: s.__name__)


def whole_and_parts(statistic, splits, width=5):
    x = drifting(sum(splits), width)
    parts, start = [], 0
    for n in splits:
        parts.append(make(statistic, x[start : start + n], start))
        start += n
    return make(statistic, x), parts


@every
@pytest.mark.parametrize("splits", [[101], [1, 100], [0, 37, 64], [50, 0, 1, 50], [1] * 40], ids=label)
def test_parts_add_to_the_whole(statistic, splits):
    whole, parts = whole_and_parts(statistic, splits)
    same(whole, sum(parts[1:], parts[0]))


@every
@pytest.mark.parametrize("splits", [[30, 40, 31], [1, 1, 99], [20, 20, 20, 20, 21]], ids=label)
def test_sums_without_a_group_are_sums_of_the_others(statistic, splits):
    """Also of parts about other shifts, and with other numbers of classes."""
    _, parts = whole_and_parts(statistic, splits)
    accumulator = Accumulator(statistic, len(parts) + 1)  # nothing is added to the last group
    for group, part in enumerate(parts):
        accumulator.add(part, group)
    for group in range(len(parts)):
        others = parts[:group] + parts[group + 1 :]
        found, expected = accumulator.without(group), sum(others[1:], others[0])
        if isinstance(found, ClassStatistic):  # it has the classes of all groups
            expected = expected.widen(len(found.n))
        same(found, expected)
    same(accumulator.value, sum(parts[1:], parts[0]))
    same(accumulator.without(len(parts)), accumulator.value)


@every
def test_order_does_not_matter(statistic):
    whole, (a, b, c) = whole_and_parts(statistic, [20, 50, 31])
    same(whole, c + (a + b))
    same(whole, (b + c) + a)


@every
def test_width_one(statistic):
    whole, parts = whole_and_parts(statistic, [40, 61], width=1)
    same(whole, parts[0] + parts[1])


@every
def test_another_shift_is_the_same_statistic(statistic):
    x = drifting()
    s = make(statistic, x)
    shifted = s.about(**{name: s.tensors()[name] + 3.5 for name in s.shifts})
    same(s, shifted)


@every
def test_masked_and_non_finite_rows_are_left_out(statistic):
    x = drifting(60)
    keep = torch.arange(60) % 3 != 1
    if issubclass(statistic, (Cross, Pair, Cosines, ClassStatistic, Sample)):  # paired targets are looked up by row
        rows = [k for k in range(60) if keep[k]]
        parts = [make(statistic, x[k : k + 1], k) for k in rows]
        kept = sum(parts[1:], parts[0])
    else:
        kept = make(statistic, x[keep])
    same(kept, make(statistic, x, weights=keep))
    spoiled = x.clone()
    spoiled[~keep] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 2.0], dtype=torch.float64)
    same(kept, make(statistic, spoiled))


@every
def test_an_accumulator_resumes_from_a_saved_state(statistic):
    whole, parts = whole_and_parts(statistic, [30, 40, 31])
    first = Accumulator(statistic, groups=2)
    first.add(parts[0], 0)
    first.add(parts[1], 1)
    second = Accumulator(statistic, groups=2)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    second.add(parts[2], 0)
    same(whole, second.value)
    same(parts[1], second.without(0))


@every
def test_every_field_has_a_dimension_and_a_lasting_dtype(statistic):
    for name, tensor in make(statistic, drifting(dtype=torch.float32)).widest().tensors().items():
        assert tensor.ndim >= 1, name
        assert tensor.dtype in (torch.int64, torch.float64), name


@every
def test_an_accumulator_changes_no_value_it_was_given(statistic):
    _, parts = whole_and_parts(statistic, [30, 71])
    kept = {k: t.clone() for k, t in parts[0].tensors().items()}
    first, second = Accumulator(statistic), Accumulator(statistic)
    for accumulator in (first, second):
        accumulator.add(parts[0])
        accumulator.add(parts[1].about(**{s: parts[0].tensors()[s] for s in statistic.shifts}))
    assert all(torch.equal(t, kept[k]) for k, t in parts[0].tensors().items())
    same(first.value, second.value)


@pytest.mark.parametrize("width", [5, 40])
@pytest.mark.parametrize("statistic", [Gram, NormedGram, Directions, Moments, Quantiles], ids=lambda s: s.__name__)
def test_adding_rows_equals_the_statistic_of_all_rows(statistic, width):
    x = drifting(300, width)
    rows = Rows.of(x, torch.arange(300) % 7 != 0).about(x.mean(0))
    accumulator = Accumulator(statistic)
    for a, b in ((0, 5), (5, 6), (6, 250), (250, 300)):
        accumulator.add_rows(rows.take(a, b))
    same(statistic.of(rows), accumulator.value)


@pytest.mark.parametrize("statistic", [NormedGram, Directions], ids=lambda s: s.__name__)
def test_rows_whose_sums_are_prepared_add_the_same(statistic):
    """Of samples in another order, with several positions each, and one row of zeros."""
    x = drifting(240, 40).reshape(20, 12, 40).transpose(1, 2).clone()
    x[3, :, 5] = 0
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    rows = Rows(x, torch.arange(240).reshape(20, 12) % 7 != 0, x.mean((0, 2)))
    accumulator, prepared = Accumulator(statistic), rows.prepared({"sums", *statistic.by_row}, order)
    for a, b in ((0, 6), (6, 20)):
        accumulator.add_rows(prepared.take(a, b))
    same(statistic.of(rows), accumulator.value)


def test_a_saved_state_of_more_groups_raises():
    accumulator = Accumulator(Moments, groups=3)
    accumulator.add(Moments.of(drifting()), 2)
    with pytest.raises(ValueError, match="saved state has group 2, but this accumulator has 1 groups"):
        Accumulator(Moments).load_state_dict(accumulator.state_dict())


def test_permuted_units_permute_a_covariance():
    x, order = drifting(), torch.tensor([3, 0, 4, 1, 2])
    assert_close(Gram.of(x[:, order]).covariance, Gram.of(x).covariance[order][:, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 7, 64, 5000])
def test_a_mean_of_a_thousand_standard_deviations_costs_no_precision(batch):
    x = torch.randn(5000, 6, generator=torch.Generator().manual_seed(1)) @ torch.randn(
        6, 6, generator=torch.Generator().manual_seed(2)
    )
    x = (x + 1000 * x.std(0)).float()
    shift = x[:batch].double().mean(0)
    grams = [Gram.of(part, shift=shift) for part in x.split(batch)]
    covariance = sum(grams[1:], grams[0]).covariance
    truth = torch.cov(x.double().T)
    assert float((covariance - truth).abs().max() / truth.abs().max()) < 1e-5


def test_moments_and_covariance_are_torch_s_own():
    x = drifting()
    assert_close(Gram.of(x).covariance, torch.cov(x.T), rtol=1e-12, atol=1e-12)
    assert_close(Moments.of(x).variance, x.var(0), rtol=1e-12, atol=0)
    assert_close(Gram.of(x).moments.mean_square, x.square().mean(0), rtol=1e-12, atol=0)
    z = torch.randn(len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cross = Cross.of(x, z)
    assert_close(cross.covariance[:, 0], torch.cov(torch.cat([x, z[:, None]], 1).T)[:-1, -1], rtol=1e-11, atol=1e-12)


def test_one_row_has_no_variance():
    assert Moments.of(torch.ones(1, 3)).variance.isnan().all()
    assert Gram.of(torch.ones(1, 3)).covariance.isnan().all()


def test_a_wrong_number_of_targets_raises():
    with pytest.raises(ValueError, match="5 samples of 1 rows, but 4 targets"):
        Cross.of(torch.ones(5, 2), torch.ones(4))
