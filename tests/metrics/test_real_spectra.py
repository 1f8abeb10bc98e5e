"""Spectra and canonical correlations of a trained ResNet-20, against float64 formulas on its raw activations."""

import itertools

import numpy as np
import pytest
import torch
from real import cifar_images, resnet20
from torch.testing import assert_close

import nodelens as nl

STAGES = [[f"layer{stage}.{block}.conv{k}" for block in range(3) for k in (1, 2)] for stage in (1, 2, 3)]
STAGES[0].insert(0, "conv1")  # one channel of it hardly varies
LAYERS = [*itertools.chain(*STAGES)]
PAIRS = [pair for stage in STAGES for pair in itertools.pairwise(stage)]  # maps of one size
SPECTRA = ("participation_ratio", "entropy_dimension", "effective_rank", "stable_rank", "alpha_req", "log_spectrum_slope")
EDGES = ("cca_mean", "pwcca", "svcca", "linear_cka")


@pytest.fixture(scope="module")
def measured():
    """The result of a pass with float64 products, and the rows of each layer, (images x positions, channels) float64."""
    net, images = resnet20(), cifar_images(60)
    maps: dict[str, list[torch.Tensor]] = {name: [] for name in LAYERS}
    hooks = [net.get_submodule(name).register_forward_hook(lambda _m, _x, y, n=name: maps[n].append(y)) for name in LAYERS]
    with torch.no_grad():
        for part in images.split(30):
            net(part)
    for hook in hooks:
        hook.remove()
    data = [{"x": part} for part in images.split(30)]
    found = nl.analyze(net, data, metrics=[*SPECTRA, *EDGES], layers=LAYERS, pairs=PAIRS, precision="float64", groups=1)
    return found, {name: torch.cat(y).permute(0, 2, 3, 1).flatten(0, 2).double().numpy() for name, y in maps.items()}


def standardized(rows):
    """Centred columns of standard deviation 1; columns that do not vary are left out."""
    centred = rows - rows.mean(0)
    spread = centred.std(0)
    return (centred[:, spread > 0] / spread[spread > 0]), spread[spread > 0]


def orthonormal(rows):
    """A basis of the columns, from singular vectors."""
    u, s, _ = np.linalg.svd(rows, full_matrices=False)
    return u[:, s > 1e-7 * s[0]]


def leading(rows, share):
    u, s, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return u[:, : int((np.cumsum(s**2) / np.sum(s**2) < share).sum()) + 1]


def test_canonical_correlations_and_cka_are_those_of_the_rows(measured):
    found, rows = measured
    for a, b in PAIRS:
        x, spread = standardized(rows[a])
        y, _ = standardized(rows[b])
        u, v = orthonormal(x), orthonormal(y)
        left, r, _ = np.linalg.svd(u.T @ v, full_matrices=False)
        weights = np.abs((u @ left).T @ (x * spread)).sum(1)
        cut = np.linalg.svd(leading(rows[a], 0.99).T @ leading(rows[b], 0.99), compute_uv=False)
        p, q = (rows[k] - rows[k].mean(0) for k in (a, b))
        cka = np.linalg.norm(p.T @ q) ** 2 / np.linalg.norm(p.T @ p) / np.linalg.norm(q.T @ q)
        expected = {"cca_mean": r.mean(), "pwcca": (weights * r).sum() / weights.sum(), "svcca": cut.mean(), "linear_cka": cka}
        for name, value in expected.items():
            assert found.edges.loc[(a, b), name] == pytest.approx(value, rel=1e-8), (a, b, name)


def test_spectra_are_those_of_the_rows(measured):
    found, rows = measured
    for name in LAYERS:
        s = np.linalg.svd(rows[name] - rows[name].mean(0), compute_uv=False)
        lam = s[s > 1e-7 * s[0]] ** 2 / (len(rows[name]) - 1)
        expected = {
            "participation_ratio": lam.sum() ** 2 / (lam**2).sum(),
            "entropy_dimension": entropy_count(lam),
            "effective_rank": entropy_count(np.sqrt(lam)),
            "stable_rank": lam.sum() / lam[0],
        }
        rank = np.arange(11, len(lam) + 1)
        expected["log_spectrum_slope"] = np.polyfit(rank, np.log(lam[10:]), 1)[0] if len(rank) > 5 else np.nan
        rank = rank[:40]
        fit = np.polyfit(np.log(rank), np.log(lam[10:50]), 1, w=rank**-0.5) if len(rank) > 5 else [np.nan]
        expected["alpha_req"] = -fit[0]
        for column, value in expected.items():
            assert_close(found.layers.loc[name, column], float(value), rtol=1e-8, atol=0, equal_nan=True, msg=f"{name} {column}")


def entropy_count(weights):
    share = weights / weights.sum()
    return np.exp(-(share * np.log(share)).sum())
