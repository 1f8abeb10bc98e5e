"""Statistics per class, compared with the rows of each class."""

import pytest
import torch
from compare import same
from laws import drifting, labels, target
from torch.testing import assert_close

from nodelens.statistics import Accumulator, ByClass, ClassCross, ClassGram, ClassSizes
from nodelens.statistics.rows import Rows

N = 90
X, Z = drifting(N), target(N)
Y = labels(N).where(torch.arange(N) % 9 != 4, -100)  # some have no class
MANY = torch.randn(12, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2  # samples of seven positions


def rows_of(c, y=Y, x=X):
    return x[y == c]


def test_moments_of_a_class_are_those_of_its_rows():
    found = ByClass.of(X, Y)
    for c in range(int(Y.max()) + 1):
        x = rows_of(c)
        assert_close(found.mean[c], x.mean(0), rtol=1e-12, atol=0)
        assert_close(found.variance()[c], x.var(0), rtol=1e-11, atol=0)
        assert_close(found.mean_square[c], x.square().mean(0), rtol=1e-12, atol=0)
        assert_close(ClassSizes.of(X, Y).mean[c], x.abs().mean(0), rtol=1e-12, atol=0)
    assert_close(found.moments.variance, X[Y >= 0].var(0), rtol=1e-11, atol=0)


def test_second_moments_of_a_class_are_those_of_its_rows():
    grams, crosses = ClassGram.of(X, Y), ClassCross.of(X, torch.cat([Y[:, None], Z], 1))
    for c in range(int(Y.max()) + 1):
        both = torch.cov(torch.cat([rows_of(c), rows_of(c, x=Z)], 1).T)
        assert_close(grams.covariance()[c], both[:5, :5], rtol=1e-11, atol=1e-11)
        assert_close(crosses.covariance()[c], both[:5, 5:], rtol=1e-11, atol=1e-11)
        assert_close(crosses.variance()[c], both.diagonal()[:5], rtol=1e-11, atol=0)
        assert_close(crosses.target_variance()[c], both.diagonal()[5:], rtol=1e-11, atol=0)
    assert_close(
        grams.covariance(0) * (grams.n / (grams.n.double() - 1))[:, None, None], grams.covariance(), rtol=1e-11, atol=1e-11
    )
    assert_close(grams.gram.covariance, torch.cov(X[Y >= 0].T), rtol=1e-11, atol=1e-11)
    for read_off in (grams.by_class, crosses.by_class):
        assert_close(read_off.variance(), ByClass.of(X, Y).variance(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("statistic", [ByClass, ClassSizes])
def test_sums_of_samples_are_added_in_place_unless_a_class_is_new(statistic):
    rows = Rows.of(MANY.repeat(3, 1, 1), shift=torch.ones(5, dtype=torch.float64)).by_sample(statistic.by_sample)
    y = torch.tensor([0, 1, 1, 0, -1, 1, 0, 0, 1, 0, 1, 0] * 2 + [2, 0, -1, 3, 1, 2, 0, 0, 1, 2, 3, 3])
    accumulator, held = Accumulator(statistic), []
    for a, b in ((0, 12), (12, 24), (24, 36)):
        accumulator.add_rows(rows.map(lambda t, a=a, b=b: t[a:b]), 0, y[a:b])
        held.append(accumulator.parts[0])
    assert held[0] is held[1]
    assert held[1] is not held[2]
    same(statistic.of(rows, y), accumulator.value)


@pytest.mark.parametrize("statistic", [ByClass, ClassSizes, ClassGram])
def test_the_label_of_a_sample_applies_to_all_its_positions(statistic):
    y = torch.tensor([0, 2, 2, 0, 1, -1, 0, 1, 2, 2, 0, 1])
    keep = torch.rand(12, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    keep[3] = False
    flat, label = MANY.transpose(1, 2).reshape(-1, 5), y.repeat_interleave(7)
    shift = torch.full((5,), 1.5, dtype=torch.float64)
    whole = statistic.of(flat, label, weights=keep.flatten(), shift=shift)
    rows = Rows.of(MANY, keep, shift)
    found = [statistic.of(rows, y)]
    if statistic.by_sample:
        found.append(statistic.of(rows.by_sample(statistic.by_sample), y))
    for one in found:
        for name, tensor in whole.tensors().items():
            assert_close(one.tensors()[name], tensor, rtol=1e-12, atol=1e-12)


def test_a_class_without_rows_has_no_mean_and_a_class_of_one_row_no_variance():
    y = torch.tensor([0, 0, 2, 3, 3, 3])
    found, grams = ByClass.of(X[:6], y), ClassGram.of(X[:6], y)
    assert found.n.tolist() == [2, 0, 1, 3]
    assert found.mean.isnan().all(1).tolist() == found.mean_square.isnan().all(1).tolist() == [False, True, False, False]
    assert found.variance().isnan().all(1).tolist() == [False, True, True, False]
    assert grams.covariance().isnan().flatten(1).all(1).tolist() == [False, True, True, False]
    assert found.only(found.n > 0).n.tolist() == [2, 1, 3]
    assert grams.widen(6).outer.shape == (6, 5, 5)
    assert ByClass.of(X[:0], y[:0]).n.tolist() == [0]


def test_a_row_without_target_or_class_is_left_out():
    paired = torch.cat([Y[:, None], Z], 1)
    paired[3, 0], paired[11, 1], paired[40, 2] = torch.nan, torch.inf, torch.nan
    keep = torch.ones(N, dtype=torch.bool)
    keep[[3, 11, 40]] = False
    found, right = ClassCross.of(X, paired), ClassCross.of(X[keep], paired[keep])
    assert_close(found.n, right.n)
    assert_close(found.covariance(), right.covariance(), rtol=1e-10, atol=1e-10)


def test_labels_of_a_wrong_shape_or_dtype_raise():
    with pytest.raises(ValueError, match=r"90 samples, but labels \(89,\) of torch.int64: give one integer class"):
        ByClass.of(X, Y[1:])
    with pytest.raises(ValueError, match=r"labels \(90,\) of torch.float64"):
        ClassSizes.of(X, Z[:, 0])
    with pytest.raises(ValueError, match=r"90 samples of 1 rows each, but targets \(90, 1\): give one row \(class, target, ...\)"):
        ClassCross.of(X, Z[:, :1])
