"""What many units share: closed forms, identities, shrinkage, bias."""

import math

import pytest
import torch
from planted import equal, planted, sums
from torch.testing import assert_close

from nodelens.metrics import get_metric
from nodelens.metrics.multivariate import shrunk
from nodelens.statistics import Gram

NAMES = ("total_correlation", "dual_total_correlation", "o_information", "s_information", "multi_redundancy")
SHRUNK = {"shrinkage": "schaefer_strimmer"}


def near(value, expected, tolerance=1e-9):
    assert_close(value, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance, equal_nan=True)


def of(name, y, bias="none", **options):
    return get_metric(name, bias=bias, **options).compute(outputs=y)


def mixed(n=100, units=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, units, generator=g, dtype=torch.float64) @ torch.randn(units, units, generator=g, dtype=torch.float64) + 2


@pytest.mark.parametrize(
    ("covariance", "expected"),
    [
        (equal(3, 0.5), (0.3466, 0.2616, 0.0849, 0.6082, [0.2027] * 3)),
        (sums((1, 0, 0), (0, 1, 0), (1, 1, 1)), (0.5493, 0.6931, -0.1438, 1.2425, [0.3466, 0.3466, 0.5493])),
        (equal(2, 0.6), (0.2231, 0.2231, 0, 0.4463, [0.2231] * 2)),
        (equal(1, 0.0), (0, 0, 0, 0, [0])),
    ],
    ids=["equal", "sum", "pair", "alone"],
)
def test_closed_forms(covariance, expected):
    y = planted(covariance, mean=30)
    for name, value in zip(NAMES, expected, strict=True):
        near(of(name, y), value, 5e-5)
    if len(covariance) == 2:
        near(of("total_correlation", y), of("redundancy", y)[0], 1e-10)


def test_what_the_others_tell_of_each_by_regression():
    y = mixed()
    value = of("multi_redundancy", y)
    for k in range(5):
        others = torch.cat([y[:, [j for j in range(5) if j != k]], torch.ones(100, 1)], 1)
        left = y[:, k] - others @ torch.linalg.lstsq(others, y[:, k]).solution
        near(value[k], 0.5 * math.log(float(y[:, k].var(correction=0) / left.square().mean())), 1e-10)


def test_the_sums_hold():
    tc, dual, o, s, each = (of(name, mixed()) for name in NAMES)
    near(o, tc - dual)
    near(s, tc + dual)
    near(s, each.sum())
    near(tc, -0.5 * torch.logdet(torch.corrcoef(mixed().T)), 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_shifts_scales_and_order_change_nothing(name):
    y = mixed()
    value = of(name, y)
    scale = torch.tensor([1e-3, -2.0, 5.0, 1.0, 100.0], dtype=torch.float64)
    near(of(name, y * scale + 1000 * scale), value, 1e-8)
    near(of(name, (y + 1000 * y.std(0)).float()), value, 2e-2)
    units = torch.tensor([3, 0, 4, 1, 2])
    near(of(name, y[:, units]), value[units] if value.ndim else value, 1e-10)
    for few, options in ((12, {"bias": "auto"}), (12, SHRUNK), (4, SHRUNK)):
        near(of(name, mixed(few) * scale + 5, **options), of(name, mixed(few), **options), 1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [12, 100])
def test_units_that_do_not_vary_are_left_out(name, n):
    y = mixed(n)
    more = torch.cat([y[:, :2], torch.full((n, 1), 1e4), y[:, 2:]], 1)
    for options in ({"bias": "none"}, {"bias": "auto"}, SHRUNK):
        value, plain = of(name, more, **options), of(name, y, **options)
        near(value if not value.ndim else value[[0, 1, 3, 4, 5]], plain, 1e-9)
        near(of(name, torch.ones(n, 3), **options), torch.zeros(3) if value.ndim else 0)
    metric = get_metric(name)
    assert metric.counts(None, y=Gram.of(more)) == {"constant": 1, "few_rows": int(n == 12)}


@pytest.mark.parametrize("name", NAMES)
def test_singular_correlations_have_no_answer(name):
    y = mixed()
    y[:, 3] = y[:, 0] - 2 * y[:, 1]
    assert of(name, y).isnan().all()
    for bias in ("none", "auto"):
        assert of(name, mixed(4), bias).isnan().all()
        assert of(name, mixed(5), bias).isnan().all()
        assert of(name, mixed(6), bias).isfinite().all()
    assert of(name, mixed(1)).isnan().all()
    assert of(name, mixed(4), **SHRUNK).isfinite().all()


@pytest.mark.parametrize("n", [4, 30, 300])
def test_shrinkage_is_that_of_schaefer_and_strimmer(n):
    y = mixed(n)
    r = torch.corrcoef(y.T)
    chance = total = 0.0
    for i in range(5):
        for j in range(5):
            if i != j:
                chance += float(1 - r[i, j] ** 2) ** 2 / (n - 1)
                total += float(r[i, j]) ** 2
    share = min(1, chance / total)
    assert 0 < share <= 1
    expected = (1 - share) * r + share * torch.eye(5, dtype=torch.float64)
    near(shrunk(r, torch.tensor([n])), expected, 1e-12)
    near(of("total_correlation", y, **SHRUNK), -0.5 * torch.logdet(expected), 1e-9)
    near(shrunk(torch.eye(3, dtype=torch.float64), torch.tensor([n])), torch.eye(3), 0)


@pytest.mark.parametrize(
    ("n", "draws"), [pytest.param(100, 400, marks=pytest.mark.slow), (200, 200), pytest.param(1_000, 100, marks=pytest.mark.slow)]
)
def test_independent_units_have_no_information_in_common(n, draws):
    """Of 64 units, the O-information without a correction is -5.4, -0.76 and -0.02."""
    g = torch.Generator().manual_seed(n)
    scale = torch.logspace(-3, 3, 64, dtype=torch.float64)
    for name, errors in (("o_information", 2), ("total_correlation", 4), ("dual_total_correlation", 4)):
        metric = get_metric(name)
        rows = torch.randn(draws, n, 64, generator=g, dtype=torch.float64)
        found = torch.stack([metric.compute(outputs=y) for y in rows])
        assert abs(float(found.mean())) < errors * float(found.std()) / math.sqrt(draws)
        near(metric.compute(outputs=rows[0] * scale), found[0], 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_bias_whatever_the_truth(name):
    """The mean of independent draws lies within five of its standard errors of the truth."""
    covariance, n, draws = equal(4, 0.5), 20, 400
    truth = of(name, planted(covariance))
    x = (
        torch.randn(draws, n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        @ torch.linalg.cholesky(covariance).T
    )
    found = torch.stack([get_metric(name).compute(outputs=rows) for rows in x]) - truth
    assert bool((found.mean(0).abs() < 5 * found.std(0) / math.sqrt(draws)).all())


def test_a_bias_of_a_shrunk_estimate_is_not_known():
    with pytest.raises(ValueError, match="bias: gaussian is for plain correlations only; set shrinkage: none, or bias: auto"):
        get_metric("o_information", bias="gaussian", **SHRUNK)
    with pytest.raises(ValueError, match="shrinkage is 'ledoit_wolf'; it takes 'none', 'schaefer_strimmer'"):
        get_metric("total_correlation", shrinkage="ledoit_wolf")
    near(of("o_information", mixed(), "gaussian"), of("o_information", mixed(), "auto"), 0)
