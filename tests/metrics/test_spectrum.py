"""Spectrum and row directions of a layer: golden columns, closed forms, slow twins."""

import json
import math

import numpy as np
import pytest
import torch
from real import folder
from torch.testing import assert_close

from nodelens.metrics import get_metric
from nodelens.statistics import Gram
from nodelens.statistics.linalg import eigenvalues, principal_axes, spectrum, symmetric_eigenvalues

SHARES = ["top1_share", "top10_share", "top32_share"]
COLUMNS = ["d_pr", "d_pr_norm", "d_entropy", "d_entropy_norm", "stable_rank", *SHARES, "k90", "k95", "log_spectrum_slope_10_200"]
SAMPLE = [
    "sv_effective_rank",
    "sv_stable_rank",
    "sv_participation_ratio",
    "cos_sim_mean",
    "cos_sim_std",
    *(f"ve_{k}" for k in (4, 8, 16, 32)),
]
EVERY = [*COLUMNS, *SAMPLE, "d_pr_debiased", "rankme", "alpha_req", "alpha_req_r2"]
SPECTRA = {
    "geometric_220": torch.exp(-0.05 * torch.arange(220, dtype=torch.float64)),
    "power_law_300": torch.arange(1, 301, dtype=torch.float64) ** -1.2,
    "flat_16": torch.ones(16, dtype=torch.float64),
    "short_4": torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64),
}


def rows(n=200, width=24, seed=0, dtype=torch.float64):
    """Rows that decay from unit to unit, drift, and stand off zero."""
    noise = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = noise @ torch.randn(width, width, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return (x * 0.9 ** torch.arange(width) + torch.linspace(0, 1, n)[:, None] + 0.5).to(dtype)


def measure(name, x, batch=None, **options):
    """A layer metric of rows, fed in batches whose shifts differ."""
    metric = get_metric(name, **options)
    statistics = {}
    for argument, need in metric.needs().items():
        first, *rest = (need.statistic.of(part) for part in x.split(batch or len(x)))
        statistics[argument] = sum(rest, first)
    return metric(None, **statistics)


def golden(name):
    doc = json.loads((folder("NODELENS_GOLDEN") / f"{name}.json").read_text())
    arrays = {k: torch.as_tensor(np.array(v)) for k, v in doc["inputs"].items()}
    for case, options in doc["options"].items():
        for column, value in doc["expected"][case].items():
            tolerance = doc["tolerance"].get(case, doc["tolerance"])
            expected = torch.tensor(math.nan if value is None else value, dtype=torch.float64)
            yield case, options, column, arrays, expected, tolerance


def check(seen, value, expected, tolerance, where):
    assert_close(value, expected, **tolerance, equal_nan=True, msg=lambda m: f"{where}: {m}")
    seen.append(where)


def test_golden_spectra_agree():
    seen = []
    for case, options, column, arrays, expected, tolerance in golden("spectrum"):
        value = get_metric(column).of(SPECTRA[case]) if "eigenvalues" in options else measure(column, arrays[case])
        check(seen, value, expected, tolerance, f"{case}.{column}")
    assert len(seen) == 7 * len(COLUMNS)


def test_golden_samples_agree():
    seen = []
    for case, _, column, arrays, expected, tolerance in golden("sample_geometry"):
        check(seen, measure(column, arrays[case]), expected, tolerance, f"{case}.{column}")
    assert len(seen) == 2 * len(SAMPLE)


def test_golden_normalizations_agree():
    seen = []
    for case, options, column, arrays, expected, tolerance in golden("normalization_ablation"):
        value = measure(column, arrays["layer0"], rows=options["variant"])
        check(seen, value, expected, tolerance, f"{case}.{column}")
    assert len(seen) == 4 * len(COLUMNS)


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("d_pr_debiased", "cos_sim_mean", "cos_sim_std", "rankme")])
def test_a_spectrum_metric_is_a_function_of_numpys_eigenvalues(name):
    x = rows()
    lam = torch.as_tensor(np.linalg.eigvalsh(np.cov(x.numpy().T))[::-1].copy())
    assert_close(measure(name, x), get_metric(name).of(lam), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scaled", ["token_l2", "token_rms", "feature_standardized"])
@pytest.mark.parametrize("name", COLUMNS)
def test_scaled_rows_are_rows_scaled_by_hand(name, scaled):
    x = rows()
    length = {
        "token_l2": x.norm(dim=1, keepdim=True),
        "token_rms": x.square().mean(1, keepdim=True).sqrt(),
        "feature_standardized": x.std(0),
    }
    assert_close(measure(name, x, rows=scaled), measure(name, x / length[scaled]), rtol=1e-9, atol=1e-12)


def test_a_power_law_has_its_exponent_and_lies_on_its_line():
    lam = SPECTRA["power_law_300"]
    assert_close(float(get_metric("alpha_req").of(lam)), 1.2)
    assert_close(float(get_metric("alpha_req", first=0, last=300).of(lam)), 1.2)
    assert_close(float(get_metric("alpha_req", value="slope", weights="none", last=200).of(lam)), -1.2)
    assert_close(float(get_metric("alpha_req_r2").of(lam)), 1.0)
    assert float(get_metric("alpha_req_r2", last=200).of(SPECTRA["geometric_220"])) < 0.95


def test_the_lines_are_numpys():
    lam = SPECTRA["power_law_300"] + 0.01 * SPECTRA["geometric_220"][0]
    place = np.arange(10, 200)
    slope, _ = np.polyfit(place, np.log(lam.numpy()[place]), 1)
    assert_close(float(get_metric("log_spectrum_slope").of(lam)), slope, rtol=1e-9, atol=0)
    x, y = np.log(place + 1), np.log(lam.numpy()[place])
    old = {"weights": "none", "last": 200}
    assert_close(float(get_metric("alpha_req", value="slope", **old).of(lam)), np.polyfit(x, y, 1)[0], rtol=1e-9, atol=0)
    assert_close(float(get_metric("alpha_req_r2", **old).of(lam)), np.corrcoef(x, y)[0, 1] ** 2, rtol=1e-9, atol=0)
    x, y, weights = x[:40], y[:40], 1 / (place[:40] + 1)  # ranks 11 to 50, as in the source
    design = np.stack([-x, np.ones(40)], 1)
    alpha = np.linalg.solve(design.T @ (design * weights[:, None]), (design * weights[:, None]).T @ y)[0]
    covariance = np.cov(x, y, aweights=weights)
    assert_close(float(get_metric("alpha_req").of(lam)), alpha, rtol=1e-9, atol=0)
    r2 = covariance[0, 1] ** 2 / covariance[0, 0] / covariance[1, 1]
    assert_close(float(get_metric("alpha_req_r2").of(lam)), r2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["log_spectrum_slope_10_200", "alpha_req", "alpha_req_r2"])
def test_lines_pass_through_the_eigenvalues_above_0(name):
    lam = SPECTRA["geometric_220"].clone()
    lam[40:] = 0
    assert_close(get_metric(name).of(lam), get_metric(name).of(lam[:40]), rtol=0, atol=0)
    assert get_metric(name).of(lam[:15]).isnan()
    x = rows()
    dead = torch.cat([x, torch.full((200, 5), 3.0, dtype=torch.float64)], 1)
    assert_close(measure(name, dead), measure(name, x), rtol=1e-9, atol=0)
    x = rows(width=18) @ rows(18, 12, seed=5) @ rows(12, 18, seed=6)  # rank 12 of 18: two in the range
    assert measure(name, x).isnan()


@pytest.mark.parametrize("name", ["d_entropy", "effective_rank", "stable_rank", "log_spectrum_slope", "alpha_req", "rankme"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1.0, 3e3, 1e5])
def test_a_massive_unit_hides_no_direction(name, dtype, size):
    """In float32, products of a wide layer are rounded relative to the units that they multiply, not to the largest."""
    x = torch.randn(2_000, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x @ torch.randn(48, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 7] *= size
    x = x.to(dtype)
    s = torch.linalg.svdvals(x.double() - (0 if name == "rankme" else x.double().mean(0)))
    lam = s.square() / 1_999
    share = s / s.sum() + 1e-7
    expected = torch.exp(-(share * share.log()).sum()) if name == "rankme" else get_metric(name).of(lam)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-5 if size == 1e5 else 1e-8  # an eigensolver is relative to the largest
    assert_close(measure(name, x, 500), expected, rtol=tolerance, atol=0)
    if name != "rankme":
        metric = get_metric(name)
        assert metric.counts(None, y=metric.needs()["y"].statistic.of(x))["unresolved"] == 0


@pytest.mark.parametrize(("width", "dtype"), [(24, torch.float32), (48, torch.float32), (48, torch.float64), (400, torch.float32)])
@pytest.mark.parametrize("far", [0.0, 0.9, 300.0])
def test_the_rank_of_collinear_units_is_found_and_what_is_missing_counted(width, dtype, far):
    x = rows(3_000, width // 2) @ rows(width // 2, width, seed=3)
    x = (x / x.std(0) + far).to(dtype)
    x[:, 3] *= 1_000
    metric = get_metric("effective_rank")
    parts = [Gram.of(part, shift=torch.zeros(width, dtype=torch.float64) if far < 1 else None) for part in x.split(1_000)]
    y = sum(parts[1:], parts[0])
    found = spectrum(metric.covariance(y), metric.rounding(y))
    assert int((found > 0).sum()) <= width // 2
    assert metric.counts(None, y=y) == {"constant": 0, "unresolved": width - int((found > 0).sum()), "few_rows": int(width == 400)}
    if dtype == torch.float64:
        assert int((found > 0).sum()) == width // 2


def test_few_rows_are_said():
    metric = get_metric("stable_rank")
    assert metric.counts(None, y=Gram.of(rows(240)))["few_rows"] == 0
    assert metric.counts(None, y=Gram.of(rows(239)))["few_rows"] == 1
    assert metric.counts(None, y=Gram.of(rows(10))) == {"constant": 0, "unresolved": 0, "few_rows": 1}
    assert metric.counts(None, y=Gram.of(rows(1))) == {"constant": 24, "unresolved": 0, "few_rows": 0}


def test_an_exponential_spectrum_has_the_participation_ratio_of_its_series():
    q = math.exp(-0.05)
    expected = (1 + q) * (1 - q**220) / ((1 - q) * (1 + q**220))
    assert_close(float(get_metric("d_pr").of(SPECTRA["geometric_220"])), expected)


def test_one_direction_is_one_dimension():
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1.0, 6)
    for name in ("d_pr", "d_entropy", "stable_rank", "effective_rank", "k90", "k95", "top1_share", "rankme"):
        assert_close(float(measure(name, x)), 1.0, rtol=1e-4, atol=0)
    assert_close(float(measure("d_pr_debiased", x)), 1.0, rtol=1e-2, atol=0)  # two estimates, each unbiased, of one number


def test_cosines_are_those_of_all_pairs():
    x = rows(60, 7)
    x[11] = 0  # without a direction: left out
    unit = torch.nn.functional.normalize(torch.cat([x[:11], x[12:]]), dim=1)
    pairs = (unit @ unit.T)[~torch.eye(59, dtype=torch.bool)]
    for batch in (1, 7, 60):
        assert_close(measure("cos_sim_mean", x, batch), pairs.mean(), rtol=1e-10, atol=0)
        assert_close(measure("cos_sim_std", x, batch), pairs.std(), rtol=1e-10, atol=0)


def test_rows_of_one_direction_and_of_two_opposite_ones():
    v = torch.arange(1.0, 6, dtype=torch.float64)
    along = torch.arange(1.0, 21, dtype=torch.float64)[:, None] * v
    assert_close(float(measure("cos_sim_mean", along)), 1.0)
    assert_close(float(measure("cos_sim_std", along)), 0.0, rtol=0, atol=1e-6)
    assert_close(float(measure("cos_sim_mean", torch.cat([along, -along]))), -1 / 39)


def test_the_debiased_ratio_is_that_of_unbiased_terms():
    x = rows(12, 30)
    about = x - x.mean(0)
    n, kernel = 12, (about @ about.T).fill_diagonal_(0)
    # the U-statistic over quadruples of different rows, written with the n x n matrix
    hsic = (kernel.square().sum() + kernel.sum() ** 2 / ((n - 1) * (n - 2)) - 2 * kernel.sum(1).square().sum() / (n - 2)) / (
        n * (n - 3)
    )
    e = about.square().sum(1)
    square = (e.sum() / (n - 1)) ** 2 - (n / (n - 1)) ** 2 * e.var() / n
    for batch in (1, 5, 12):
        assert_close(measure("d_pr_debiased", x, batch), square / hsic, rtol=1e-10, atol=0)


def test_few_rows_pull_the_plain_ratio_down_and_not_the_debiased_one():
    lam = torch.exp(-0.05 * torch.arange(60, dtype=torch.float64))
    truth = float(lam.sum() ** 2 / lam.square().sum())
    draws = [torch.randn(100, 60, generator=torch.Generator().manual_seed(s), dtype=torch.float64) * lam.sqrt() for s in range(40)]
    naive, debiased = (torch.stack([measure(name, x) for x in draws]).mean() for name in ("d_pr", "d_pr_debiased"))
    assert_close(1 / float(naive), 1 / 100 + 1 / truth, rtol=0.02, atol=0)
    assert_close(float(debiased), truth, rtol=0.02, atol=0)


def test_rankme_is_that_of_the_rows_as_they_are():
    x = rows()
    s = torch.linalg.svdvals(x)
    share = s / s.sum() + 1e-7
    assert_close(measure("rankme", x), torch.exp(-(share * share.log()).sum()), rtol=1e-9, atol=0)
    far = rows(dtype=torch.float32) + 1000
    s = torch.linalg.svdvals(far.double())
    share = s / s.sum() + 1e-7
    assert_close(measure("rankme", far).double(), torch.exp(-(share * share.log()).sum()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_batches_agree(name):
    x = rows()
    whole = measure(name, x)
    assert whole.shape == ()
    assert whole.dtype == torch.float64
    assert whole.isfinite()
    for batch in (1, 7, 64):
        assert_close(measure(name, x, batch), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_order_of_units_and_a_factor_change_nothing(name):
    x, order = rows(), torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert_close(measure(name, 3 * x[:, order]), measure(name, x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("cos_sim_mean", "cos_sim_std", "rankme")])
def test_a_mean_of_a_thousand_spreads_changes_nothing(name):
    x = rows(dtype=torch.float32)
    spread = float(x.std(0).mean())
    x = (x / spread + 1000).double() - 1000  # what float32 keeps of it
    far = (x + 1000).float()
    assert_close(measure(name, far, 64), measure(name, x), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_a_layer_that_does_not_vary_says_nan(name):
    still = torch.full((30, 20), 0.1, dtype=torch.float32) * torch.arange(1, 21)
    value = measure(name, still, 7)
    directed = {"cos_sim_mean": 1.0, "cos_sim_std": 0.0, "rankme": 1.0}  # rows that are equal still point somewhere
    assert_close(float(value), directed.get(name, math.nan), equal_nan=True, rtol=0, atol=1e-2)
    assert measure(name, torch.zeros(30, 20)).isnan()


@pytest.mark.parametrize("name", EVERY)
def test_one_row_says_nan(name):
    assert measure(name, rows(1)).isnan() == (name != "rankme")


def test_a_dead_unit_and_a_single_one():
    x = rows()
    dead = torch.cat([x, torch.full((200, 1), 3.0, dtype=torch.float64)], 1)
    for name in ("d_pr", "d_entropy", "stable_rank", "k90", "top10_share", "effective_rank", "d_pr_debiased"):
        assert_close(measure(name, dead), measure(name, x), rtol=1e-9, atol=0)
        assert_close(float(measure(name, x[:, :1])), 1.0, rtol=1e-3 if "debiased" in name else 1e-9, atol=0)
    metric = get_metric("d_pr")
    assert metric.counts(None, y=metric.needs()["y"].statistic.of(dead)) == {"constant": 1, "few_rows": 1}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("top_share", {"k": 0}, "top_share: k is 0; it takes 1 or more directions"),
        ("k90", {"share": 90}, "component_count: share is 90; it takes a number above 0"),
        ("alpha_req", {"first": -1}, "alpha_req: first is -1; indices count from 0"),
        ("d_pr", {"rows": "l2"}, "participation_ratio: rows is 'l2'; it takes 'raw', 'token_l2'"),
    ],
)
def test_mistakes_are_named(name, options, words):
    with pytest.raises(ValueError, match=words):
        get_metric(name, **options)


@pytest.mark.parametrize("uneven", [1.0, 1e4], ids=["even", "uneven"])
@pytest.mark.parametrize("rank", [0, 3, 9, 10])
def test_eigenvalues_need_eigenvectors_only_where_the_rounding_of_units_differs(rank, uneven):
    x = torch.randn(40, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.nn.functional.pad(x @ torch.randn(rank, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64), (0, 2))
    c = x.T @ x  # the last two units are always 0, and have no part in the other axes
    rounding = torch.full((12,), 1e-8, dtype=torch.float64)
    rounding[0], rounding[-1] = 1e-8 * uneven, 1e9
    found, expected = eigenvalues(c, rounding), principal_axes(c, rounding.where(c.diagonal() > 0, 1e-8))[0]
    assert int((expected > 0).sum()) == rank
    assert_close(found, expected, rtol=1e-9, atol=0)
    between = c + 1e-6 * torch.eye(12, dtype=torch.float64)  # eigenvalues above the rounding of one unit, below that of another
    if rank in (3, 9) and uneven > 1:
        assert eigenvalues(between, rounding) is None


def test_eigenvalues_are_those_of_either_solver_and_have_gradients():
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = (x.T @ x).requires_grad_()
    found = symmetric_eigenvalues(matrix.detach())
    assert_close(found, torch.linalg.eigvalsh(matrix.detach()), rtol=1e-12, atol=0)
    symmetric_eigenvalues(matrix).sum().backward()
    assert_close(matrix.grad, torch.eye(12).double())
