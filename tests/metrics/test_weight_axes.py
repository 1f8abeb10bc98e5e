"""Weights and the principal axes of the input, products and distances of weights, absolute correlations: closed forms."""

import math

import pytest
import torch
from planted import planted
from torch import nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.metrics import get_metric

LAM = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_weights_along_an_axis_have_its_deviation_and_a_cosine_of_one():
    axes = torch.linalg.qr(normal(3, 3)).Q
    rows = planted(axes @ torch.diag(LAM) @ axes.T)
    found = get_metric("spectral_alignment").compute(inputs=rows, weights=3 * axes.T)
    assert_close(found, LAM / LAM.sum().sqrt())
    assert_close(
        get_metric("weight_activation_alignment").compute(inputs=rows, weights=-axes.T), torch.ones(3, dtype=torch.float64)
    )
    one = get_metric("weight_activation_alignment", n_components=1).compute(inputs=rows, weights=axes.T)
    assert_close(one, torch.tensor([1.0, 0, 0], dtype=torch.float64), atol=1e-7, rtol=0)


def test_white_input_aligns_all_weights_alike():
    found = get_metric("spectral_alignment").compute(inputs=planted(4 * torch.eye(5)), weights=normal(7, 5))
    assert_close(found, torch.full((7,), 2 / math.sqrt(5), dtype=torch.float64))


def test_components_beyond_the_first_are_left_out():
    rows = planted(torch.diag(LAM))
    w = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    found = get_metric("spectral_alignment", n_components=1).compute(inputs=rows, weights=w)
    assert_close(found, torch.tensor([math.sqrt(16 * 0.5 / 4)], dtype=torch.float64))


def test_axes_without_variance_and_weights_of_zero_have_no_value():
    rows = normal(40, 1) * torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    w = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert_close(get_metric("weight_activation_alignment").compute(inputs=rows, weights=w)[0], torch.tensor(0.0).double())
    for name in ("spectral_alignment", "weight_activation_alignment"):
        assert get_metric(name).compute(inputs=rows, weights=w)[1].isnan()
        assert get_metric(name).compute(inputs=torch.ones(5, 2).double(), weights=w + 1).isnan().all()


def test_kernels_have_a_reason_and_one_by_one_convolutions_a_value():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)).double()
    found = nl.analyze(net, [normal(6, 3, 6, 6)], ["spectral_alignment", "weight_activation_alignment"])
    assert found.units.loc["0"].isna().all(axis=None)
    assert found.units.loc["1", ["spectral_alignment", "weight_activation_alignment"]].notna().all(axis=None)
    assert {(m["layer"], m["column"]) for m in found.metadata["missing"]} >= {("0", "spectral_alignment")}


@pytest.mark.parametrize("name", ["spectral_alignment", "weight_activation_alignment"])
def test_no_components_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: n_components is 0; it takes 1 or more axes"):
        get_metric(name, n_components=0)


def test_products_and_distances_are_means_over_all_partners():
    w = normal(6, 4)
    dot = torch.stack([torch.stack([a @ b for k, b in enumerate(w) if k != i]).mean() for i, a in enumerate(w)])
    far = torch.stack([torch.stack([(a - b).norm() for k, b in enumerate(w) if k != i]).mean() for i, a in enumerate(w)])
    assert_close(get_metric("weight_dot_product").compute(weights=w), dot)
    assert_close(get_metric("weight_euclidean_distance").compute(weights=w), far)
    same = torch.ones(3, 4, dtype=torch.float64)
    assert get_metric("weight_dot_product").compute(weights=same).tolist() == [4, 4, 4]
    assert get_metric("weight_euclidean_distance").compute(weights=same).tolist() == [0, 0, 0]
    for name in ("weight_dot_product", "weight_euclidean_distance"):
        assert get_metric(name).compute(weights=w[:1]).isnan().all()


def test_the_absolute_correlation_does_not_see_signs():
    covariance = torch.tensor([[1.0, -0.6, 0.0], [-0.6, 1.0, 0.2], [0.0, 0.2, 1.0]], dtype=torch.float64)
    found = get_metric("node_correlation").compute(outputs=planted(covariance))
    assert_close(found, torch.tensor([0.3, 0.4, 0.1], dtype=torch.float64), atol=1e-9, rtol=0)
    pairs = get_metric("node_correlation", reduce="none").compute(outputs=planted(covariance))
    assert_close(pairs, covariance.abs().fill_diagonal_(0), atol=1e-9, rtol=0)
    still = torch.cat([planted(covariance), torch.ones(400, 1).double()], 1)
    assert_close(get_metric("node_correlation").compute(outputs=still)[3], torch.tensor(0.0).double())
    assert get_metric("node_correlation").compute(outputs=normal(5, 1)).isnan().all()
