"""Sizes, spreads and tails of units, over all rows and within classes."""

import json
import math

import numpy as np
import pytest
import torch
from real import folder
from torch.testing import assert_close

from nodelens.metrics import get_metric
from nodelens.metrics.activation import (
    ActivationCosine,
    ActivationKurtosis,
    ActivationMaxRatio,
    ActivationMean,
    ActivationNorm,
    ActivationOutlierIndex,
    ActivationVariance,
    ActivationZeroFraction,
)
from nodelens.metrics.class_activation import ClassSelectivity, ConditionalActivationNorm
from nodelens.statistics import ByClass, ClassSizes, Gram, Higher, MeanSizes, Quantiles, Sizes

BY_CLASS = [ConditionalActivationNorm(aggregation=a) for a in ("mean", "max", "variance", "ratio")] + [ClassSelectivity()]
OVERALL = [
    ActivationMean(),
    ActivationVariance(),
    ActivationNorm(),
    ActivationOutlierIndex(quantile=0.9),
    ActivationKurtosis(),
    ActivationMaxRatio(),
    ActivationZeroFraction(),
    ActivationCosine(),
]
SCALE = {
    "activation_mean": 1,
    "activation_variance": 2,
    "activation_rms": 1,
    "conditional_activation_norm-variance": 1,
}


def name_of(metric) -> str:
    return (
        "-".join([metric.names[0], *filter(None, [getattr(metric, "aggregation", "")])])
        if hasattr(metric, "names")
        else str(metric)
    )


named = {"ids": name_of}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(n: int = 200_000) -> torch.Tensor:
    """Rows at the quantiles of N(0, 1): its moments without a sample's error."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]


def batch(n: int = 60, units: int = 5) -> dict[str, torch.Tensor]:
    return {"outputs": normal(n, units), "labels": torch.arange(n) % 3}


@pytest.mark.parametrize("name", ["activations", "activations_conv"])
def test_golden_activations_agree(name):
    doc = json.loads((folder("NODELENS_GOLDEN") / f"{name}.json").read_text())
    for case, options in doc["options"].items():
        options = dict(options)
        wanted = doc["arguments"].get("*") or doc["arguments"][case]
        arrays = {k: torch.as_tensor(np.array(doc["inputs"][v])) for k, v in wanted.items()}
        value = get_metric(options.pop("metric"), **options).compute(**arrays)
        assert_close(value, torch.tensor(doc["expected"][case], dtype=torch.float64), **doc["tolerance"][case], msg=case)


@pytest.mark.parametrize(
    ("metric", "expected", "tolerance"),
    [
        (ActivationNorm(), 1, 1e-3),
        (ActivationMean(), 0.7979, 1e-4),
        (ActivationVariance(), 1, 1e-3),
        (ActivationKurtosis(), 3, 2e-3),
        (ActivationOutlierIndex(), 4.124, 1e-2),
    ],
    **named,
)
def test_gaussian_rows(metric, expected, tolerance):
    assert_close(float(metric.compute(outputs=gaussian())), float(expected), rtol=tolerance, atol=0)


@pytest.mark.parametrize(("metric", "expected"), [(ActivationNorm(), 0.7071), (ActivationVariance(), 0.3408)], **named)
def test_gaussian_rows_behind_a_relu(metric, expected):
    assert_close(float(metric.compute(outputs=gaussian().relu())), expected, rtol=1e-3, atol=0)


def test_the_largest_of_gaussian_rows_over_their_median():
    value = float(ActivationMaxRatio().compute(outputs=gaussian(10_000)))
    assert_close(value, 3.8906 / 0.67449, rtol=0.01, atol=0)


def test_tails_are_those_of_sorted_rows():
    y = normal(500, 4) * torch.tensor([1e-3, 1.0, 50.0, 1e4])
    size = y.abs()
    for q in (0.5, 0.9, 0.99):
        expected = size.quantile(q, dim=0) / size.mean(0)
        assert_close(ActivationOutlierIndex(quantile=q).compute(outputs=y), expected, rtol=0.01, atol=0)
    assert_close(ActivationMaxRatio().compute(outputs=y), size.amax(0) / size.quantile(0.5, dim=0), rtol=0.02, atol=0)


def test_a_quantile_that_the_rows_cannot_tell_from_the_largest_is_flagged():
    metric = ActivationOutlierIndex()
    for n, flag in ((900, 1), (1100, 0)):
        y = normal(n, 2)
        assert metric.counts(None, tails=Quantiles.of(y), y=Sizes.of(y)) == {"largest_value": flag}


@pytest.mark.parametrize("quantile", [0, 1, -0.5, 99.9, float("nan")])
def test_a_quantile_is_a_share(quantile):
    words = r"activation_outlier_index: quantile is .*; it must be a share of the rows, between 0 and 1"
    with pytest.raises(ValueError, match=words):
        ActivationOutlierIndex(quantile=quantile)


def test_kurtosis_by_hand():
    two = torch.tensor([-1.0, 1]).repeat(50)[:, None] + 7
    assert_close(float(ActivationKurtosis().compute(outputs=two.double())), 1.0)
    spike = torch.zeros(1000, 1, dtype=torch.float64)
    spike[3] = 5
    p = 1 / 1000
    assert_close(float(ActivationKurtosis().compute(outputs=spike)), (1 - 3 * p + 3 * p * p) / (p * (1 - p)))
    far = 1000 + normal(2000, 3)
    centred = far - far.mean(0)
    expected = centred.pow(4).mean(0) / centred.square().mean(0).square()
    assert_close(ActivationKurtosis().compute(outputs=far), expected, rtol=1e-9, atol=0)
    assert_close(ActivationKurtosis().compute(outputs=far.float()), expected, rtol=1e-3, atol=0)
    assert ActivationKurtosis().compute(outputs=torch.full((50, 1), 0.1)).isnan().all()


def test_of_a_map_mean_sizes_come_first():
    y = normal(6, 3, 4, 5)
    sizes = y.abs().mean((2, 3))
    metric = ActivationNorm(spatial="mean_abs")
    assert_close(metric.compute(outputs=y), sizes.square().mean(0).sqrt())
    assert_close(ActivationNorm(spatial="mean_abs", normalize="none").compute(outputs=y), sizes.square().sum(0).sqrt())
    assert_close(ActivationNorm(spatial="mean_abs", view="samples").compute(outputs=y), metric.compute(outputs=y))
    assert metric.needs()["y"].statistic is MeanSizes
    assert_close(metric.compute(outputs=y[:, :, 0, 0]), ActivationNorm().compute(outputs=y[:, :, 0, 0]))


def test_cosines_are_of_rows_about_zero():
    y = normal(40, 6) + torch.linspace(-2, 2, 6)
    u = y / y.norm(dim=0)
    pairs = u.T @ u - torch.eye(6)
    assert_close(ActivationCosine(reduce="none").compute(outputs=y), pairs)
    assert_close(ActivationCosine().compute(outputs=y), pairs.sum(1) / 5)
    assert_close(ActivationCosine().compute(outputs=1000 + y.float()), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-4)


def test_cosines_of_equal_opposite_and_rectified_units():
    y = gaussian(2000)
    assert_close(ActivationCosine().compute(outputs=y.expand(-1, 3)), torch.ones(3, dtype=torch.float64))
    assert_close(ActivationCosine().compute(outputs=torch.cat([y, -y], 1)), -torch.ones(2, dtype=torch.float64))
    a, b = torch.meshgrid(gaussian(300)[:, 0].relu(), gaussian(300)[:, 0].relu(), indexing="ij")
    value = ActivationCosine().compute(outputs=torch.stack([a.flatten(), b.flatten()], 1))
    assert_close(value, torch.full((2,), 1 / math.pi, dtype=torch.float64), rtol=1e-2, atol=0)


def test_a_unit_that_is_always_0_has_no_direction_and_is_nobody_s_partner():
    y = normal(40, 5)
    without = ActivationCosine().compute(outputs=y[:, [0, 1, 3, 4]])
    y[:, 2] = 0
    value = ActivationCosine().compute(outputs=y)
    assert value[2].isnan()
    assert_close(value[[0, 1, 3, 4]], without)
    assert ActivationCosine().counts(None, y=Gram.of(y)) == {"zero": 1}
    assert ActivationCosine().compute(outputs=y[:, 2:4]).isnan().all()
    assert ActivationCosine(reduce="none").compute(outputs=y).diagonal().abs().max() == 0


@pytest.mark.parametrize(
    ("metric", "answer"),
    [
        (ActivationMean(), 0),
        (ActivationVariance(), 0),
        (ActivationNorm(), 0),
        (ActivationZeroFraction(), 1),
        (ActivationOutlierIndex(), math.nan),
        (ActivationKurtosis(), math.nan),
        (ActivationMaxRatio(), math.nan),
        (ConditionalActivationNorm(), math.nan),
        (ConditionalActivationNorm(normalize=False), 0),
        (ConditionalActivationNorm(aggregation="ratio"), math.nan),
        (ClassSelectivity(), math.nan),
    ],
    **named,
)
def test_a_dead_unit_spoils_nobody_and_two_equal_ones_agree(metric, answer):
    t = batch()
    t["outputs"][:, 1], t["outputs"][:, 3] = 0, t["outputs"][:, 2]
    t = t if metric.needs()["y"].target else {"outputs": t["outputs"]}
    value = metric.compute(**t)
    assert_close(value[1], torch.tensor(answer, dtype=torch.float64), equal_nan=True)
    assert value[[0, 2, 3, 4]].isfinite().all()
    assert value[2] == value[3]


@pytest.mark.parametrize("metric", [*OVERALL, *BY_CLASS], **named)
def test_units_keep_their_places_and_scales_their_powers(metric):
    t = batch()
    t = t if metric in BY_CLASS else {"outputs": t["outputs"]}
    value, order = metric.compute(**t), torch.tensor([3, 0, 4, 1, 2])
    assert_close(metric.compute(**t | {"outputs": t["outputs"][:, order]}), value[order])
    scaled = metric.compute(**t | {"outputs": 3 * t["outputs"]})
    exact = not isinstance(metric, (ActivationOutlierIndex, ActivationMaxRatio))
    assert_close(scaled, 3 ** SCALE.get(name_of(metric), 0) * value, rtol=1e-9 if exact else 0.02, atol=1e-12)


@pytest.mark.parametrize("metric", [ActivationVariance(), ActivationKurtosis()], **named)
def test_a_constant_changes_no_shape(metric):
    y = normal(60, 4)
    moved = metric.compute(outputs=y + torch.tensor([5.0, -3.0, 1000.0, 0.5]))
    assert_close(moved, metric.compute(outputs=y), rtol=1e-9, atol=0)


@pytest.mark.parametrize("metric", [*OVERALL, *BY_CLASS], **named)
def test_one_unit_and_fewer_rows_than_units(metric):
    alone = {"outputs": normal(30, 1), "labels": torch.arange(30) % 3}
    few = {"outputs": normal(6, 20), "labels": torch.arange(6) % 2}
    for t, width in ((alone, 1), (few, 20)):
        t = t if metric in BY_CLASS else {"outputs": t["outputs"]}
        value = metric.compute(**t)
        assert value.shape == (width,)
        assert bool(value.isnan().all()) == (width == 1 and isinstance(metric, ActivationCosine))


# within classes


def test_norms_within_classes_are_what_a_loop_gives():
    t = batch()
    norms = torch.stack([t["outputs"][t["labels"] == c].square().mean(0).sqrt() for c in range(3)])
    norms = norms * torch.tensor([1.0, 2.0, 4.0])[:, None]
    t["outputs"] = t["outputs"] * torch.tensor([1.0, 2.0, 4.0])[t["labels"]][:, None]
    whole = t["outputs"].square().mean(0).sqrt()
    expected = {"mean": norms.mean(0), "max": norms.amax(0), "variance": norms.var(0)}
    for aggregation, value in expected.items():
        metric = ConditionalActivationNorm(aggregation=aggregation, normalize=False)
        assert_close(metric.compute(**t), value)
        assert_close(ConditionalActivationNorm(aggregation=aggregation).compute(**t), value / whole)
    for normalize in (True, False):
        metric = ConditionalActivationNorm(aggregation="ratio", normalize=normalize)
        assert_close(metric.compute(**t), norms.amax(0) / norms.amin(0))


def test_classes_that_do_not_differ():
    y = normal(20, 3).repeat(3, 1)
    labels = torch.arange(3).repeat_interleave(20)
    for aggregation, value in {"mean": 1.0, "max": 1.0, "variance": 0.0, "ratio": 1.0}.items():
        found = ConditionalActivationNorm(aggregation=aggregation).compute(outputs=y, labels=labels)
        assert_close(found, torch.full((3,), value, dtype=torch.float64))
    assert_close(ClassSelectivity().compute(outputs=y, labels=labels), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_class_in_which_the_unit_is_silent():
    y, labels = torch.ones(20, 1, dtype=torch.float64), torch.arange(20) % 2
    y[labels == 1] = 0
    assert ConditionalActivationNorm(aggregation="ratio").compute(outputs=y, labels=labels).isnan()
    assert_close(float(ConditionalActivationNorm().compute(outputs=y, labels=labels)), 0.5 * math.sqrt(2))
    assert float(ClassSelectivity().compute(outputs=y, labels=labels)) == 1


def test_selectivity_is_between_the_first_class_and_the_mean_of_the_rest():
    y = torch.tensor([1.0, -1, 2, -2, 6, -6], dtype=torch.float64)[:, None]
    labels = torch.tensor([0, 0, 2, 2, 1, 1])
    assert_close(float(ClassSelectivity().compute(outputs=y, labels=labels)), (6 - 1.5) / (6 + 1.5))


def test_classes_without_rows_are_no_classes():
    t = batch()
    gaps = t | {"labels": torch.tensor([1, 4, 9])[t["labels"]]}
    for metric in BY_CLASS:
        assert_close(metric.compute(**gaps), metric.compute(**t))


def test_one_class_is_nothing_to_differ_from():
    y, labels = normal(20, 3), torch.zeros(20, dtype=torch.int64)
    assert ClassSelectivity()(None, y=ClassSizes.of(y, labels)).isnan().all()
    assert ConditionalActivationNorm(aggregation="variance")(None, y=ByClass.of(y, labels)).isnan().all()
    assert_close(ConditionalActivationNorm()(None, y=ByClass.of(y, labels)), torch.ones(3, dtype=torch.float64))
    none = torch.full_like(labels, -1)
    for metric in BY_CLASS[:4]:
        assert metric(None, y=ByClass.of(y, none)).isnan().all()
    assert ClassSelectivity()(None, y=ClassSizes.of(y, none)).isnan().all()


def test_parts_add_up_to_the_same_value():
    y, labels = normal(60, 3) + 5, torch.arange(60) // 25
    for metric in BY_CLASS[:4]:
        parts = ByClass.of(y[:20], labels[:20]) + ByClass.of(y[20:], labels[20:])
        assert_close(metric(None, y=parts), metric(None, y=ByClass.of(y, labels)))
    parts = ClassSizes.of(y[:20], labels[:20]) + ClassSizes.of(y[20:], labels[20:])
    assert_close(ClassSelectivity()(None, y=parts), ClassSelectivity()(None, y=ClassSizes.of(y, labels)))
    assert_close(ActivationKurtosis()(None, y=Higher.of(y[:20]) + Higher.of(y[20:])), ActivationKurtosis()(None, y=Higher.of(y)))


@pytest.mark.parametrize("metric", BY_CLASS, **named)
def test_labels_are_needed(metric):
    with pytest.raises(ValueError, match="needs outputs= and labels="):
        metric.compute(outputs=normal(20, 3))
