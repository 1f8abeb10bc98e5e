"""What weights alone say."""

import json
import math

import numpy as np
import pytest
import torch
from ids import metric_id
from real import folder
from torch.testing import assert_close

from nodelens.metrics import get_metric, weight
from nodelens.metrics.weight import GeometricMedian, Magnitude, NormScale, WeightCosine
from nodelens.metrics.weight_norms import L1Norm, L2Norm, NuclearNorm, Sparsity, SpectralGap, SpectralNormRatio
from nodelens.metrics.weight_values import shared

OF_UNITS = [Magnitude(p=2), Magnitude(), GeometricMedian(), WeightCosine()]
OF_LAYERS = [L1Norm(), L2Norm(), NuclearNorm(), Sparsity(eps=0.3), SpectralGap(), SpectralNormRatio()]
named = {"ids": metric_id}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_golden_norms_of_layers_and_of_the_model_agree():
    doc = json.loads((folder("NODELENS_GOLDEN") / "weight_norms.json").read_text())
    layers = [torch.tensor(w, dtype=torch.float64) for name, w in doc["inputs"]["state_dict"].items() if "weight" in name]
    for name in ("l1_norm", "l2_norm", "nuc_norm", "sparsity"):
        values = [get_metric(name)(w) for w in layers]
        assert_close(torch.stack(values), torch.tensor(doc["expected"][name], dtype=torch.float64), **doc["tolerance"])
    share = Sparsity.of_model(values, [w.numel() for w in layers])
    assert_close(float(share), doc["expected"]["sparsity_model"], **doc["tolerance"])


def test_the_model_s_number_is_that_of_its_weights_in_one():
    layers = [normal(6, 5), normal(4, 6, seed=1), normal(3, 2, 3, 3, seed=2)]
    sizes, every = [w.numel() for w in layers], torch.cat([w.flatten() for w in layers])
    for metric in (L1Norm(), L2Norm(), Sparsity(eps=0.5)):
        assert_close(metric.of_model([metric(w) for w in layers], sizes), metric(every))
    nuclear = NuclearNorm()
    values = [nuclear(w) for w in layers]
    assert values[2].isnan(), "a convolution's weight is no matrix"
    assert_close(nuclear.of_model(values, sizes), values[0] + values[1])
    assert nuclear.of_model(values[2:], sizes[2:]).isnan()


@pytest.mark.parametrize("metric", OF_UNITS, **named)
def test_permuted_units_permute_the_answer(metric):
    w, order = normal(7, 5), torch.tensor([3, 0, 6, 1, 2, 5, 4])
    assert_close(metric(w[order]), metric(w)[order])


@pytest.mark.parametrize("metric", OF_LAYERS, **named)
def test_a_layer_does_not_see_the_order_of_its_units(metric):
    w = normal(7, 5)
    assert metric(w).shape == ()
    assert_close(metric(w.flip(0).flip(1)), metric(w))


@pytest.mark.parametrize(
    ("metric", "power"),
    [
        (Magnitude(), 1),
        (GeometricMedian(), 1),
        (WeightCosine(), 0),
        (L1Norm(), 1),
        (L2Norm(), 2),
        (NuclearNorm(), 1),
        (SpectralGap(), 0),
        (SpectralNormRatio(), 0),
        (NormScale(), 1),
    ],
    ids=lambda m: m.names[0] if isinstance(m, weight.Metric) else str(m),
)
def test_scaled_weights_scale_the_answer(metric, power):
    w = normal(7, 5)
    assert_close(metric(3 * w), 3**power * metric(w))


@pytest.mark.parametrize("metric", [*OF_UNITS, *OF_LAYERS], **named)
def test_float32_weights_are_read_in_float64(metric):
    w = normal(6, 4).float()
    assert_close(metric(w), metric(w.double()), rtol=1e-12, atol=0)


def test_the_sum_of_distances_is_what_a_loop_gives():
    w = normal(40, 9) + 1000  # a common part takes nothing of the differences
    w[5], w[6], w[7] = w[3], 0, w[8] + 1e-9  # equal, dead and almost equal ones
    loop = torch.stack([torch.stack([(a - b).norm() for b in w]).sum() for a in w])
    assert_close(GeometricMedian()(w), loop, rtol=1e-10, atol=0)


def test_the_sum_of_distances_does_not_depend_on_the_chunk(monkeypatch):
    w = normal(40, 9)
    whole = GeometricMedian()(w)
    monkeypatch.setattr(weight, "CHUNK", 100)
    assert_close(GeometricMedian()(w), whole, rtol=1e-14, atol=0)


def test_the_unit_at_the_middle_is_nearest_to_all():
    ring = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1], [0, 0]])
    value = GeometricMedian()(ring)
    assert_close(value[4], torch.tensor(4.0, dtype=torch.float64))
    assert value.argmin() == 4
    assert_close(value[0], torch.tensor(1 + 2 + 2 * 2**0.5, dtype=torch.float64))


def test_equal_units_lie_at_no_distance_and_in_one_direction():
    w = normal(1, 300).expand(20, -1)
    assert GeometricMedian()(w).abs().max() == 0
    assert_close(WeightCosine()(w), torch.ones(20, dtype=torch.float64))
    assert_close(SpectralGap()(w), torch.tensor(1.0, dtype=torch.float64))
    assert_close(SpectralNormRatio()(w), torch.tensor(1.0, dtype=torch.float64))


def test_the_mean_cosine_is_what_a_loop_gives():
    w = normal(6, 5) + 0.5
    cosines = torch.nn.functional.cosine_similarity(w[:, None], w[None], dim=2)
    assert_close(WeightCosine()(w), (cosines.sum(1) - 1) / 5)
    assert_close(WeightCosine()(w * torch.arange(1, 7)[:, None]), WeightCosine()(w))


def test_a_unit_without_weights_has_no_direction_and_is_nobody_s_partner():
    w = normal(6, 5)
    without = WeightCosine()(w[[0, 1, 3, 4, 5]])
    w[2] = 0
    value = WeightCosine()(w)
    assert value[2].isnan()
    assert_close(value[[0, 1, 3, 4, 5]], without)
    assert WeightCosine().counts(w) == {"zero": 1}


def test_a_unit_alone():
    w = normal(1, 5)
    assert_close(GeometricMedian()(w), torch.zeros(1, dtype=torch.float64))
    assert WeightCosine()(w).isnan().all()
    assert_close(SpectralGap()(w), torch.tensor(1.0, dtype=torch.float64))


def test_orthonormal_rows_share_the_norm_evenly():
    w = torch.linalg.qr(normal(8, 4)).Q.T
    assert_close(SpectralGap()(w), torch.tensor(0.0, dtype=torch.float64))
    assert_close(SpectralNormRatio()(w), torch.tensor(0.5, dtype=torch.float64))
    assert_close(NuclearNorm()(w), torch.tensor(4.0, dtype=torch.float64))
    assert_close(WeightCosine()(w), torch.zeros(4, dtype=torch.float64))


def test_singular_values_by_hand():
    w = torch.diag(torch.tensor([-4.0, 3, 0]))
    assert_close(SpectralGap()(w), torch.tensor(0.25, dtype=torch.float64))
    assert_close(SpectralNormRatio()(w), torch.tensor(0.8, dtype=torch.float64))
    assert_close(NuclearNorm()(w), torch.tensor(7.0, dtype=torch.float64))
    for metric in (SpectralGap(), SpectralNormRatio()):
        assert metric(torch.zeros(3, 2)).isnan(), "no weights, no direction"


def test_the_size_of_a_norm_s_factor():
    gamma = torch.tensor([0.5, -2.0, 0.0])
    assert_close(NormScale()(gamma), torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64))
    assert NormScale.parameter == "norm"


def test_sparsity_counts_what_is_smaller_than_eps():
    w = torch.tensor([[0.0, 5e-4, -5e-4, 1e-3], [1.0, -1.0, 0.0, 2e-3]], dtype=torch.float64)
    assert float(Sparsity()(w)) == 0.5
    assert float(Sparsity(eps=3.0)(w)) == 1


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan")])
def test_sparsity_wants_a_size_above_zero(eps):
    with pytest.raises(ValueError, match=r"sparsity: eps is .*; it must be above 0"):
        Sparsity(eps=eps)


@pytest.mark.parametrize(
    ("alias", "metric"),
    [
        ("network_slimming", NormScale),
        ("fpgm", GeometricMedian),
        ("cosine_similarity", WeightCosine),
        ("magnitude", Magnitude),
        ("spectral_gap", SpectralGap),
        ("spectral_norm_ratio", SpectralNormRatio),
    ],
)
def test_names(alias, metric):
    assert type(get_metric(alias)) is metric


@pytest.mark.parametrize("second", [0.9, 1e-2, 1e-5, 1e-9, 0.0])
def test_the_spectral_gap_is_that_of_singular_values_however_small_the_second_one(second):
    g = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 3, generator=g, dtype=torch.float64)).Q for n in (8, 20))
    weight = left @ torch.tensor([2.0, 2 * second, second], dtype=torch.float64).diag() @ right.T
    assert_close(SpectralGap()(weight), torch.tensor(1 - second, dtype=torch.float64), rtol=1e-12, atol=0)
    assert_close(SpectralGap()(weight.T.contiguous()), SpectralGap()(weight), rtol=1e-12, atol=0)


def test_the_spectral_gap_of_one_unit_is_one_and_of_zeros_unknown():
    assert float(SpectralGap()(torch.randn(1, 7))) == 1
    assert SpectralGap()(torch.zeros(3, 7)).isnan()


def test_weights_are_decomposed_once_for_a_table_and_again_when_they_have_changed(monkeypatch):
    taken, solve = [], np.linalg.eigvalsh
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda matrix: taken.append(len(matrix)) or solve(matrix))
    weight = torch.randn(6, 9)
    held = shared(weight)
    first = SpectralGap()(held), SpectralNormRatio()(held)
    assert taken == [6]
    assert (SpectralGap()(weight), SpectralNormRatio()(weight)) == first
    weight[0] *= 5
    assert SpectralGap()(weight) != first[0]
    assert SpectralNormRatio()(shared(weight)) != first[1]


@pytest.mark.parametrize("name", ["spectral_gap", "spectral_norm_ratio"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_singular_values_of_weights_that_are_not_finite_are_nan(name, value):
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    assert 0 < float(get_metric(name)(weight)) < 1
    weight[2, 3] = value
    assert math.isnan(float(get_metric(name)(weight)))
