"""Norms, pairs and directions compared with the rows, and the debiased similarity with its n x n form."""

import pytest
import torch
from ids import label
from laws import drifting
from torch.testing import assert_close

from nodelens.statistics import Cosines, Directions, Gram, NormedGram, NormedPair, Pair
from nodelens.statistics.rows import NARROW, Rows


def rows(n=90, width=6, seed=0, dtype=torch.float64):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sites(n=90, mean=3.0):
    x = rows(n, 6) + mean
    y = x @ rows(6, 4, 1) + 2 * rows(n, 4, 2) - mean
    return x, y


def truth(x, y):
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    e, f = x.square().sum(1), y.square().sum(1)
    return {
        "cross": x.T @ y,
        "e": e.sum().reshape(1),
        "f": f.sum().reshape(1),
        "mixed": (e @ f).reshape(1),
        "left": e @ y,
        "right": f @ x,
        "skew": e @ x,
        "quartic": (e @ e).reshape(1),
    }


def added(parts):
    parts = list(parts)
    return sum(parts[1:], parts[0])


@pytest.mark.parametrize("far", [0.0, 20.0, -150.0])
def test_mixed_sums_about_any_shift_agree_with_the_centred_rows(far):
    x, y = sites()
    right = truth(x, y)
    shift = torch.full((6,), far, dtype=torch.float64)
    gram = NormedGram.of(x, shift=shift).about(shift=shift / 2).centred()
    pair = NormedPair.of(x, Rows.of(y, shift=-shift[:4]), shift=shift).about(shift=shift / 2, target_shift=shift[:4]).centred()
    for statistic, names in ((gram, ("skew", "quartic")), (pair, ("cross", "e", "f", "mixed", "left", "right"))):
        for name in names:
            scale = float(right[name].abs().max())
            loss = 1e-10 if abs(far) < 100 else 1e-7  # the error of a fourth power grows with the fourth power of the shift
            assert_close(
                getattr(statistic, name), right[name], rtol=loss, atol=loss * scale, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_the_squares_of_the_norms_are_those_of_the_centred_rows():
    x, _ = sites()
    e = (x - x.mean(0)).square().sum(1)
    statistic = NormedGram.of(x, shift=torch.full((6,), 9.0, dtype=torch.float64))
    assert_close(statistic.centred().quartic, e.square().sum().reshape(1), rtol=1e-10, atol=0)


def hsic(n, square, e, f, mixed):
    n = n.double()
    return (square + e * f / ((n - 1) * (n - 2)) - n / (n - 2) * mixed) / (n * (n - 3))


def u_statistic(x, y):
    """Song et al. 2012, eq. 5, of n x n Gram matrices."""
    k, h = ((z @ z.T).fill_diagonal_(0) for z in (x.double(), y.double()))
    n = len(x)
    return ((k * h).sum() + k.sum() * h.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ h.sum(0))) / (n * (n - 3))


@pytest.mark.parametrize("splits", [[90], [1, 89], [30, 0, 60], [10] * 9, [1] * 90], ids=label)
def test_the_debiased_similarity_is_the_u_statistic_of_gram_matrices(splits):
    x, y = sites()
    x = x + torch.arange(90)[:, None] / 30
    parts = list(zip(x.split(splits), y.split(splits), strict=True))
    pair, gram = added(NormedPair.of(a, b) for a, b in parts).centred(), added(NormedGram.of(a) for a, _ in parts).centred()
    own = hsic(gram.n, gram.outer.square().sum(), gram.outer.trace(), gram.outer.trace(), gram.quartic)
    both = hsic(pair.n, pair.cross.square().sum(), pair.e, pair.f, pair.mixed)
    assert_close(own, u_statistic(x, x).reshape(1), rtol=1e-10, atol=0)
    assert_close(both, u_statistic(x, y).reshape(1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("width", [6, 40])
def test_a_mean_of_a_thousand_standard_deviations_costs_a_pair_no_precision(width):
    x = (rows(3000, width) + 1000).float()
    y = (x.double() - 1000 + rows(3000, width, 1) + 1000).float()
    shift = x[:64].double().mean(0)
    parts = [
        (Rows.of(a, shift=shift), Rows.of(b, shift=y[:64].double().mean(0))) for a, b in zip(x.split(64), y.split(64), strict=True)
    ]
    pair, gram = added(NormedPair.of(a, b) for a, b in parts), added(NormedGram.of(a) for a, _ in parts)
    right = truth(x, y)
    assert float((pair.covariance - right["cross"] / 2999).abs().max()) < 1e-5
    assert float((gram.covariance - torch.cov(x.double().T)).abs().max()) < 1e-5
    assert_close(pair.centred().mixed, right["mixed"], rtol=1e-6, atol=0)
    assert_close(gram.centred().quartic, right["quartic"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["maps", "tokens", "few"])
def test_products_do_not_depend_on_the_layout(layout):
    x, z = rows(8 * 50, NARROW + 3), rows(8 * 50, NARROW + 9, 1)
    a, b = (t.unflatten(0, (8, 50)).transpose(1, 2) for t in (x, z))
    if layout == "maps":
        a, b = a.contiguous(), b.contiguous()
    if layout == "few":
        a, b = (t.unflatten(0, (40, 10)).transpose(1, 2).contiguous() for t in (x, z))
    zero = torch.zeros(1, dtype=torch.float64)
    assert_close(Rows(a, None, zero).products(Rows(b, None, zero)), x.T @ z, rtol=1e-12, atol=1e-12)
    assert_close(Rows(a, None, zero).outer, x.T @ x, rtol=1e-12, atol=1e-12)
    assert_close(Rows(a.float(), None, zero).products(Rows(b.float(), None, zero)), x.T @ z, rtol=1e-4, atol=1e-4)


def test_a_pair_counts_rows_that_both_sites_keep():
    x, y = sites(12)
    x[2, 1], y[5, 0] = torch.nan, torch.inf
    keep = torch.arange(12) != 7
    both = keep & (torch.arange(12) != 2) & (torch.arange(12) != 5)
    for statistic in (Pair, NormedPair):
        one, other = statistic.of(x, y, weights=keep), statistic.of(x[both], y[both])
        assert one.n.item() == 9
        for name, value in other.centred().tensors().items():
            assert_close(one.centred().tensors()[name], value, rtol=1e-10, atol=1e-10)
    assert_close(Cosines.of(x, y[:, [0, 1, 2, 3, 0, 1]], weights=keep).n, torch.tensor([9]))


def test_a_pair_s_covariance_is_torch_s_own():
    x, y = sites()
    both = torch.cov(torch.cat([x, y], 1).T)
    assert_close(Pair.of(x, y).covariance, both[:6, 6:], rtol=1e-12, atol=1e-12)
    x, y = x.unflatten(0, (9, 10)).mT, y.unflatten(0, (9, 10)).mT  # rows of maps
    assert_close(Pair.of(x, y).covariance, both[:6, 6:], rtol=1e-12, atol=1e-12)


def test_sites_with_different_rows_raise():
    with pytest.raises(ValueError, match="5 samples of 1 rows each cannot be paired with 4 samples of 1"):
        Pair.of(torch.ones(5, 2), torch.ones(4, 3))
    with pytest.raises(ValueError, match="5 samples of 2 rows each cannot be paired with 5 samples of 1"):
        NormedPair.of(torch.ones(5, 2, 2), torch.ones(5, 3))


def test_directions_use_the_rows_without_a_shift():
    x = drifting(40) - 3
    x[4], x[9] = 0, 1e-30
    unit = x[x.abs().sum(1) > 0]
    unit = unit / unit.norm(dim=1, keepdim=True)
    for shift in (None, torch.full((5,), 7.0, dtype=torch.float64)):
        found = Directions.of(x, shift=shift)
        assert found.n.item() == 39
        assert_close(found.total, unit.sum(0), rtol=1e-12, atol=1e-12)
        assert_close(found.outer, unit.T @ unit, rtol=1e-12, atol=1e-12)
        assert_close(found.covariance, torch.cov(unit.T), rtol=1e-11, atol=1e-12)
    assert found.about() is found
    with pytest.raises(ValueError, match="always about zero"):
        found.about(shift=torch.ones(5))


@pytest.mark.parametrize(
    "derived",
    {
        "take": lambda rows: rows.take(1, 4),
        "index": lambda rows: rows.index(torch.tensor([3, 0])),
        "at": lambda rows: rows.at(torch.tensor([[1, 4]] * 5)),
        "about": lambda rows: rows.about(torch.ones(NARROW + 1, dtype=torch.float64)),
        "copy": Rows.copy,
        "kept": lambda rows: rows.kept(torch.ones(5, 6).triu().bool()),
        "only": lambda rows: rows.only(torch.tensor([True, False, True, True, False])),
        "double": Rows.double,
        "finite": Rows.finite,
    }.items(),
    ids=lambda case: case[0],
)
def test_what_is_made_of_directions_stays_scaled(back_end, derived):
    maps = 1 + torch.randn(5, NARROW + 1, 6, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(maps, dim=1)
    of_directions, plain = Rows(maps).directions, Rows(unit, shift=torch.zeros(NARROW + 1, dtype=torch.float64), shifted=False)
    found, expected = derived[1](of_directions), derived[1](plain)
    assert_close(found.x, expected.x, rtol=1e-5, atol=1e-6)
    assert_close(found.outer, expected.outer, rtol=1e-5, atol=1e-5)
    assert_close(found.sample_sums, expected.sample_sums, rtol=1e-5, atol=1e-5)


def test_cosines_are_torch_s_own():
    x = rows(30)
    y = x + rows(30, seed=3)
    right = torch.nn.functional.cosine_similarity(x, y)
    assert_close(Cosines.of(x, y).mean, right.mean().reshape(1), rtol=1e-12, atol=0)
    x[3], y[8] = 0, 0
    left = torch.ones(30, dtype=torch.bool)
    left[[3, 8]] = False
    found = Cosines.of(x, y, shift=torch.ones(6, dtype=torch.float64))
    assert found.n.item() == 28
    assert_close(found.mean, right[left].mean().reshape(1), rtol=1e-12, atol=0)
    assert Cosines.of(x * 0, y).mean.isnan().all()
    assert Cosines.of(x, y[:, :4]).n.item() == 0  # no cosine between rows of different width


def test_one_row_has_no_covariance_with_another_site():
    one = torch.ones(1, 3)
    assert Pair.of(one, one).covariance.isnan().all()
    assert Gram.of(one[:0]).mean.isnan().all()
