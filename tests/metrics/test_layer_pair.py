"""Edges between two layers: golden columns, known answers, twins on the raw rows."""

import json
import math

import numpy as np
import pytest
import torch
from real import folder
from torch.testing import assert_close

from nodelens.metrics import get_metric
from nodelens.statistics import Gram, Pair

CKA = ("linear_cka", "linear_cka_debiased")
SUBSPACE = ("feature_subspace_novelty", "subspace_overlap", "subspace_chordal", "energy_novelty")
LINEAR = ("cca_mean", "svcca", "pwcca")
EDGES = (*CKA, "layer_cosine_sim", *SUBSPACE, *LINEAR, "procrustes", "procrustes_angular")
UNITS = ("downstream_importance", "layer_transition_efficiency")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers(n=200, width=8, other=8, seed=0):
    """Two layers that have something in common, drift, and stand off zero."""
    x = normal(n, width, seed=seed) * 0.8 ** torch.arange(width) + torch.linspace(0, 1, n)[:, None] + 0.5
    y = x @ normal(width, other, seed=seed + 1) / width**0.5 + normal(n, other, seed=seed + 2) * 0.5
    return x, y - 0.3


def statistics(metric, x, y, batch=None):
    ports, found = {"output": x, "next": y}, {}
    for argument, need in metric.needs().items():
        rows = [ports[port].split(batch or len(x)) for port in (need.port, *((need.target,) if need.target else ()))]
        first, *rest = (need.statistic.of(*part) for part in zip(*rows, strict=True))
        found[argument] = sum(rest, first)
    return found


def measure(name, x, y, batch=None, **options):
    """An edge metric of the rows of two layers, fed in batches whose shifts differ."""
    metric = get_metric(name, **options)
    return metric(None, **statistics(metric, x, y, batch))


def counts(name, x, y, **options):
    metric = get_metric(name, **options)
    return metric.counts(None, **statistics(metric, x, y))


def rotation(width, seed=7):
    return torch.linalg.qr(normal(width, width, seed=seed))[0]


def test_golden_edges_agree():
    doc = json.loads((folder("NODELENS_GOLDEN") / "layer_edges.json").read_text())
    seen = 0
    for case, columns in doc["expected"].items():
        x, y = (torch.as_tensor(np.array(doc["inputs"][f"layer{k}"])) for k in case.split("->"))
        for column, expected in columns.items():
            options = doc["options"][case] if column == "feature_subspace_novelty" else {}
            assert_close(float(measure(column, x, y, **options)), expected, **doc["tolerance"][case])
            seen += 1
    assert seen == 8


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 7, 64, None])
@pytest.mark.parametrize("name", [*EDGES, *UNITS])
def test_batches_agree(name, batch):
    x, y = layers()
    whole = measure(name, x, y)
    assert whole.dtype == torch.float64
    assert whole.isfinite().all()
    assert tuple(whole.shape) == ((8,) if name in UNITS else ())
    assert_close(measure(name, x, y, batch), whole, rtol=1e-9, atol=1e-11)


def u_statistic(x, y):
    """HSIC over quadruples of different rows, from the n x n matrices of inner products."""
    n = len(x)
    k, m = ((about @ about.T).fill_diagonal_(0) for about in (x, y))
    one = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))
    return one / (n * (n - 3))


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("n", [65, 5])
def test_debiased_cka_is_the_u_statistic_of_the_rows(batch, n):
    x, y = layers(n, 6, 9)
    if n == 5:  # so few that a self term needs spread
        x, y = normal(5, 300), normal(5, 400, seed=3)
    expected = u_statistic(x, y) / (u_statistic(x, x) * u_statistic(y, y)).sqrt()
    assert_close(measure("linear_cka_debiased", x, y, batch), expected, rtol=1e-10, atol=1e-12, equal_nan=True)
    moved = measure("linear_cka_debiased", x + 20, y - 10, batch)
    assert_close(moved, expected, rtol=1e-8, atol=1e-10, equal_nan=True)


def test_unrelated_layers_read_nothing_without_bias_and_much_with_it():
    draws = [(normal(64, 64, seed=s), normal(64, 64, seed=s + 500)) for s in range(40)]
    debiased = torch.stack([measure("linear_cka_debiased", x, y) for x, y in draws])
    assert abs(float(debiased.mean())) < 0.02
    assert 10 < int((debiased < 0).sum()) < 30, "not clipped"
    biased = torch.stack([measure("linear_cka", x, y) for x, y in draws]).mean()
    assert_close(float(biased), 0.5, rtol=0.05, atol=0)


def test_a_rotated_and_scaled_copy_is_the_same_layer():
    x, _ = layers()
    y = 3 * x @ rotation(8)
    for name in (*CKA, *LINEAR):
        assert_close(float(measure(name, x, y)), 1.0, rtol=1e-9, atol=0)
    assert_close(float(measure("procrustes_angular", x, y)), 0.0, rtol=0, atol=1e-6)
    assert_close(float(measure("procrustes", x, y / 3)), 0.0, rtol=0, atol=1e-9)
    assert_close(measure("procrustes", x, y), 4 * (x - x.mean(0)).square().sum())


def test_the_next_layer_being_this_one_is_nothing_new():
    x, _ = layers()
    assert_close(float(measure("layer_cosine_sim", x, x)), 1.0)
    expected = {"feature_subspace_novelty": 0.0, "subspace_overlap": 1.0, "subspace_chordal": 0.0}
    for name, value in expected.items():
        assert_close(float(measure(name, x, x, novelty_k=3)), value, rtol=0, atol=1e-12)
    assert_close(float(measure("energy_novelty", x, x)), 0.0, rtol=0, atol=1e-12)


def test_directions_that_share_nothing_are_all_new():
    rows, zeros = normal(100, 4), torch.zeros(100, 4, dtype=torch.float64)
    x, y = torch.cat([rows, zeros], 1), torch.cat([zeros, normal(100, 4, seed=1)], 1)
    for k in (4, 32):  # beyond the rank axes are arbitrary: cut
        assert_close(float(measure("feature_subspace_novelty", x, y, novelty_k=k)), 1.0)
        assert_close(float(measure("subspace_overlap", x, y, novelty_k=k)), 0.0, rtol=0, atol=1e-12)
        assert_close(float(measure("subspace_chordal", x, y, novelty_k=k)), 2.0)
        assert_close(float(measure("energy_novelty", x, y, novelty_k=k)), 1.0)
    assert counts("feature_subspace_novelty", x, y) == {"close_eigenvalues": 0, "cut_to_rank": 1}


def test_subspaces_are_those_of_the_principal_axes():
    x, y = layers()
    u, v = (torch.linalg.svd(z - z.mean(0), full_matrices=False).Vh[:3].T for z in (x, y))
    s = torch.linalg.svdvals(u.T @ v)
    c = torch.cov(y.T)
    assert_close(measure("feature_subspace_novelty", x, y, novelty_k=3), (1 - s.square()).sqrt().mean())
    assert_close(measure("subspace_overlap", x, y, novelty_k=3), s.square().mean())
    assert_close(measure("subspace_chordal", x, y, novelty_k=3), (1 - s.square()).sum().sqrt())
    assert_close(measure("energy_novelty", x, y, novelty_k=3), 1 - (u.T @ c @ u).trace() / c.trace())


def test_a_cut_between_equal_eigenvalues_is_flagged():
    flat = torch.linalg.qr(normal(100, 8) - normal(100, 8).mean(0))[0]
    steep = flat * 2.0 ** torch.arange(8)
    assert counts("subspace_overlap", flat, flat, novelty_k=3)["close_eigenvalues"] == 2
    assert counts("subspace_overlap", flat, steep, novelty_k=3)["close_eigenvalues"] == 1
    assert counts("energy_novelty", steep, flat, novelty_k=3)["close_eigenvalues"] == 0
    assert counts("subspace_overlap", flat, flat, novelty_k=8) == {"close_eigenvalues": 0, "cut_to_rank": 0}


def canonical(x, y):
    """Canonical correlations by QR of the raw rows, and the variates of x."""
    q, p = (torch.linalg.qr(z - z.mean(0))[0] for z in (x, y))
    left, r, _ = torch.linalg.svd(q.T @ p, full_matrices=False)
    return r, q @ left


@pytest.mark.parametrize(("width", "other"), [(8, 8), (5, 9), (9, 5)])
def test_canonical_correlations_are_those_of_the_raw_rows(width, other):
    x, y = layers(200, width, other)
    r, variates = canonical(x, y)
    assert_close(measure("cca_mean", x, y), r.mean(), rtol=1e-9, atol=0)
    weights = (variates.T @ (x - x.mean(0))).abs().sum(1)
    assert_close(measure("pwcca", x, y), (weights * r).sum() / weights.sum(), rtol=1e-9, atol=0)


def test_svcca_keeps_the_directions_of_99_percent_first():
    x, y = (z * torch.logspace(0, -2, z.shape[1], dtype=torch.float64) for z in layers(200, 16, 12))

    def kept(z):
        u, s, _ = torch.linalg.svd(z - z.mean(0), full_matrices=False)
        k = int((s.square().cumsum(0) / s.square().sum() < 0.99).sum()) + 1
        assert k < z.shape[1]
        return u[:, :k] * s[:k]

    r, _ = canonical(kept(x), kept(y))
    assert_close(measure("svcca", x, y), r.mean(), rtol=1e-9, atol=0)


def test_too_few_rows_give_no_correlation_unless_the_layers_are_cut():
    x, y = layers(79)
    assert measure("cca_mean", x, y).isnan()
    assert measure("pwcca", x, y).isnan()
    assert counts("cca_mean", x, y) == {"too_few_rows": 1, "few_rows": 0, "unresolved": 0}
    assert measure("svcca", x, y).isfinite()
    assert counts("svcca", x, y) == {"too_few_rows": 0, "few_rows": 1, "unresolved": 0}
    assert measure("cca_mean", *layers(80)).isfinite()


def test_few_rows_are_said_where_unrelated_layers_would_not_read_0():
    for name in ("cca_mean", "pwcca"):
        assert counts(name, *layers(799))["few_rows"] == 1
        assert counts(name, *layers(800))["few_rows"] == 0
    unrelated = [measure("cca_mean", normal(800, 8, seed=s), normal(800, 8, seed=s + 50)) for s in range(20)]
    assert_close(float(torch.stack(unrelated).mean()), 0.085, rtol=0.05, atol=0)
    flat = normal(400, 10), normal(400, 12, seed=1)  # both participation ratios about 11: 0.027 without a relation
    assert counts("linear_cka", *flat) == {"few_rows": 0}
    assert counts("linear_cka", flat[0][:200], flat[1][:200]) == {"few_rows": 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_small_unit_is_a_direction_like_any_other(dtype):
    a, b, c = (normal(2_000, 1, seed=s) for s in range(3))
    x, y = torch.cat([a, b], 1), torch.cat([a, c], 1)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    for name in ("cca_mean", "pwcca"):
        for size in (1.0, 4e-4, 1e-6):
            small = torch.cat([a, size * b], 1)
            r, variates = canonical(small.to(dtype).double(), y.to(dtype).double())
            weights = (variates.T @ (small - small.mean(0))).abs().sum(1)
            expected = r.mean() if name == "cca_mean" else (weights * r).sum() / weights.sum()
            assert_close(measure(name, small.to(dtype), y.to(dtype)), expected, rtol=tolerance, atol=0)
    scales = torch.tensor([1e-5, 1e3], dtype=torch.float64)
    assert_close(measure("cca_mean", x * scales, y / scales), measure("cca_mean", x, y), rtol=1e-9, atol=0)


def test_collinear_units_are_counted():
    x, y = layers()
    wide = torch.cat([x, x[:, :2] - 1e3 * x[:, 2:4]], 1)
    assert counts("cca_mean", wide, y)["unresolved"] == 2
    assert counts("svcca", wide, y)["unresolved"] == 0


@pytest.mark.parametrize("width", [20, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cka_of_a_rotated_copy_is_at_most_1(width, dtype):
    for far in (0.0, 0.9, 100.0):
        for seed in range(5):
            x = normal(500, width, seed=seed) + far
            y = (3 * x @ rotation(width, seed)).to(dtype)
            for batch in (100, None):
                value = float(measure("linear_cka", x.to(dtype), y, batch))
                assert 0.999 < value <= 1


@pytest.mark.parametrize("name", [*CKA, *LINEAR, "procrustes", "procrustes_angular"])
def test_layers_whose_valid_rows_differ_are_not_compared(name):
    """Each layer has sums over its own valid rows: with 100 large rows missing in y, CKA of x with itself would exceed 1."""
    x, _ = layers()
    x[100:] *= 0.1
    y = x.clone()
    y[:100] = torch.nan
    assert measure(name, x, y).isnan()
    assert "valid in" in get_metric(name).nan
    y = x.clone()
    y[7] = torch.nan
    assert measure(name, x, y).isfinite()


def test_a_direction_without_variance_takes_no_part():
    x, y = layers()
    wide = torch.cat([x, x[:, :2] - x[:, 2:4], torch.full((200, 1), 1000.0, dtype=torch.float64)], 1)
    for name in LINEAR[:2]:
        assert_close(measure(name, wide, y), measure(name, wide[:, :10], y), rtol=1e-7, atol=0)
    assert_close(measure("cca_mean", wide, y), measure("cca_mean", x, y), rtol=1e-7, atol=0)


@pytest.mark.parametrize(("width", "other"), [(8, 8), (5, 9)])
def test_procrustes_is_the_distance_after_the_best_rotation(width, other):
    x, y = layers(200, width, other)
    a, b = (torch.nn.functional.pad(z - z.mean(0), (0, 9 - z.shape[1])) for z in (x, y))
    u, _, vh = torch.linalg.svd(a.T @ b)
    assert_close(measure("procrustes", x, y), (a @ u @ vh - b).square().sum(), rtol=1e-9, atol=0)
    a, b = a / a.norm(), b / b.norm()
    assert_close(measure("procrustes_angular", x, y), ((a @ u @ vh) * b).sum().arccos(), rtol=1e-9, atol=0)


def test_the_cosine_is_that_of_the_rows():
    x, y = layers()
    x[3] = 0  # without a direction: left out
    expected = torch.nn.functional.cosine_similarity(torch.cat([x[:3], x[4:]]), torch.cat([y[:3], y[4:]])).mean()
    assert_close(measure("layer_cosine_sim", x, y), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", [n for n in EDGES if n != "layer_cosine_sim"])
def test_a_shift_changes_nothing(name):
    x, y = layers()
    moved = measure(name, x + torch.arange(8), y - 5)
    assert_close(moved, measure(name, x, y), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [*CKA, *LINEAR[:2], "procrustes_angular"])
def test_a_rotation_and_a_scale_of_either_change_nothing(name):
    x, y = layers(200, 8, 6)
    assert_close(measure(name, 3 * x @ rotation(8), y @ rotation(6) / 5), measure(name, x, y), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["layer_cosine_sim", *SUBSPACE])
def test_a_rotation_of_both_changes_nothing(name):
    x, y = layers()
    turn = rotation(8)
    assert_close(measure(name, 3 * x @ turn, y @ turn / 5), measure(name, x, y), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [*EDGES, *UNITS])
def test_the_order_of_rows_and_of_units_changes_nothing(name):
    x, y = layers()
    lines, order = (torch.randperm(k, generator=torch.Generator().manual_seed(2)) for k in (200, 8))
    value = measure(name, x, y)
    moved = measure(name, x[lines][:, order], y[lines][:, order])
    assert_close(moved, value[order] if name in UNITS else value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [*CKA, *SUBSPACE, *LINEAR, *UNITS])
def test_a_mean_of_a_thousand_spreads_changes_nothing(name):
    x, y = (z.float().double() for z in layers(300))
    x, y = ((z / z.std() + 1000).float() for z in (x, y))
    options = {"novelty_k": 3} if name in SUBSPACE else {}
    near = measure(name, x.double() - 1000, y.double() - 1000, **options)
    assert_close(measure(name, x, y, 64, **options), near, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", EDGES)
def test_a_layer_without_variance_has_no_edge(name):
    x, y = layers()
    for still in (torch.full((200, 8), 0.1, dtype=torch.float64), torch.zeros(200, 8, dtype=torch.float64)):
        for pair in ((x, still), (still, y)):
            value = measure(name, *pair, 7)
            if name == "procrustes":
                assert_close(value, sum((z - z.mean(0)).square().sum() for z in pair), rtol=1e-9, atol=0)
            elif name == "layer_cosine_sim":
                assert bool(value.isnan()) == (float(still[0, 0]) == 0)
            else:
                assert value.isnan()


@pytest.mark.parametrize("name", EDGES)
def test_width_one_and_one_row(name):
    x, y = layers(200, 1, 1)
    assert measure(name, x, y).isfinite()
    assert measure(name, *layers(1)).isnan() == (name != "layer_cosine_sim")


@pytest.mark.parametrize("name", SUBSPACE)
def test_layers_of_different_width_share_no_basis(name):
    x, y = layers(200, 8, 6)
    assert measure(name, x, y).isnan()
    assert counts(name, x, y) == {"unequal_widths": 1}
    assert "width" in get_metric(name).nan


@pytest.mark.parametrize("name", [*CKA, *LINEAR, "procrustes", *UNITS])
def test_layers_of_different_width_compare_all_the_same(name):
    assert measure(name, *layers(200, 8, 6)).isfinite().all()


@pytest.mark.parametrize(("name", "least"), [("linear_cka_debiased", 4), ("linear_cka", 2), ("procrustes", 2)])
def test_few_rows(name, least):
    x, y = layers(least, 30, 30)
    assert measure(name, x, x @ rotation(30)).isfinite()
    assert measure(name, x[1:], y[1:]).isnan()


def test_downstream_importance_is_the_mean_information_with_all_units_of_the_next_layer():
    x, y = layers(200, 5, 7)
    x[:, 1], y[:, 2] = 3.0, -1.0
    rho = torch.zeros(5, 7, dtype=torch.float64)
    for i in range(5):
        for j in range(7):
            if i != 1 and j != 2:
                rho[i, j] = torch.corrcoef(torch.stack([x[:, i], y[:, j]]))[0, 1]
    told = (-0.5 * torch.log1p(-rho.square())).mean(1)
    assert_close(measure("cross_layer_redundancy", x, y), told, rtol=1e-9, atol=1e-12)
    redundancy = get_metric("redundancy")(None, y=Gram.of(x))
    assert_close(measure("layer_transition_efficiency", x, y), told / (1 + redundancy), rtol=1e-9, atol=1e-12)
    assert counts("downstream_importance", x, y) == {"constant": 1, "saturated": 0}


def test_a_copied_unit_tells_all_that_can_be_told():
    x, y = layers(200, 3, 1)
    y[:, 0] = -2 * x[:, 1] + 5
    assert_close(float(measure("downstream_importance", x, y)[1]), 6.9078, rtol=0, atol=1e-4)
    assert counts("downstream_importance", x, y)["saturated"] == 1
    assert measure("downstream_importance", x[:1], y[:1]).isnan().all()
    assert measure("layer_transition_efficiency", x[:, :1], y).isnan().all(), "no partners in a layer of one unit"


def test_a_pair_in_hand_is_the_covariance():
    x, y = layers(50, 3, 4)
    assert_close(Pair.of(x, y).covariance, torch.cov(torch.cat([x, y], 1).T)[:3, 3:])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("feature_subspace_novelty", {"novelty_k": 0}, "feature_subspace_novelty: novelty_k is 0; it takes 1 or more axes"),
        ("svcca", {"keep": 99}, "cca_mean: keep is 99; it takes a share of the variance above 0, at most 1"),
        ("pwcca", {"keep": math.inf}, "pwcca: keep is inf"),
    ],
)
def test_mistakes_are_named(name, options, words):
    with pytest.raises(ValueError, match=words):
        get_metric(name, **options)
