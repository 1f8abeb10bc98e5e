"""How weights lie to the variance of what they read."""

import json

import numpy as np
import pytest
import torch
from real import folder
from torch import nn
from torch.testing import assert_close

from nodelens.metrics import get_metric
from nodelens.metrics.alignment import ConditionalRayleighQuotient, DeltaAlignment, DeltaRayleighQuotient, RayleighQuotient
from nodelens.statistics import ByClass
from nodelens.statistics.patches import PatchesByClass

BY_CLASS = [
    metric(relative=relative) for metric in (ConditionalRayleighQuotient, DeltaRayleighQuotient) for relative in (True, False)
]
named = {"ids": lambda m: f"{m.names[0]}-{'relative' if m.relative else 'raw'}"}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def white(n: int, width: int) -> torch.Tensor:
    """Rows whose covariance is the identity, their mean zero."""
    x = normal(n, width)
    x = x - x.mean(0)
    return torch.linalg.qr(x).Q * (n - 1) ** 0.5


def batch(n: int = 60, fan_in: int = 6, units: int = 4) -> dict[str, torch.Tensor]:
    labels = torch.arange(n) % 3
    x = normal(n, fan_in) * torch.linspace(0.5, 2, fan_in) + labels[:, None] * normal(fan_in, seed=5)
    return {"inputs": x, "weights": normal(units, fan_in, seed=1), "labels": labels}


def quotient(x: torch.Tensor, w: torch.Tensor, relative: bool, r: float = 0.0) -> torch.Tensor:
    c = torch.cov(x.T).reshape(x.shape[1], -1)
    raw = torch.einsum("ui,ij,uj->u", w, c, w) / w.square().sum(1) + r
    return raw / (c.trace() + r * len(c)) if relative else raw


@pytest.mark.parametrize("name", ["conditional_rayleigh_quotient", "delta_alignment"])
def test_golden_quotients_agree(name):
    doc = json.loads((folder("NODELENS_GOLDEN") / f"{name}.json").read_text())
    arrays = {k: torch.as_tensor(np.array(doc["inputs"][v])) for k, v in doc["arguments"]["*"].items()}
    for case, options in doc["options"].items():
        options = dict(options)
        value = get_metric(options.pop("metric", doc["metric"]), **options).compute(**arrays)
        tolerance = doc["tolerance"].get(case, doc["tolerance"])
        assert_close(value, torch.tensor(doc["expected"][case], dtype=torch.float64), **tolerance, msg=case)


@pytest.mark.parametrize("regularization", [0.0, 0.1])
@pytest.mark.parametrize("relative", [True, False])
def test_the_quotients_are_what_a_loop_over_the_classes_gives(relative, regularization):
    t, options = batch(), {"relative": relative, "regularization": regularization}
    x, w, labels = t["inputs"], t["weights"], torch.arange(60) // 40  # unequal classes
    shares = [(labels == c).double().mean() for c in range(2)]
    within = sum(p * quotient(x[labels == c], w, relative, regularization) for c, p in enumerate(shares))
    every = quotient(x, w, relative, regularization)
    t["labels"] = labels
    assert_close(ConditionalRayleighQuotient(**options).compute(**t), within)
    assert_close(DeltaRayleighQuotient(**options).compute(**t), every - within)
    assert_close(RayleighQuotient(**options).compute(inputs=x, weights=w), every)


def test_white_inputs():
    x, w = white(200, 6), normal(4, 6)
    assert_close(RayleighQuotient().compute(inputs=3 * x, weights=w), torch.full((4,), 1 / 6, dtype=torch.float64))
    assert_close(RayleighQuotient(relative=False).compute(inputs=3 * x, weights=w), torch.full((4,), 9.0, dtype=torch.float64))
    basis = torch.linalg.qr(normal(6, 6)).Q
    assert_close(float(RayleighQuotient().compute(inputs=x * torch.arange(1, 7), weights=basis).sum()), 1.0)


def test_inputs_of_rank_one():
    v, w = normal(6), normal(4, 6, seed=1)
    value = RayleighQuotient().compute(inputs=normal(50, 1) * v, weights=w)
    assert_close(value, torch.nn.functional.cosine_similarity(w, v[None]).square())


def test_white_classes_with_equal_means_have_no_delta():
    t = {"inputs": white(100, 6).repeat(2, 1), "labels": torch.arange(2).repeat_interleave(100), "weights": normal(4, 6)}
    assert_close(DeltaRayleighQuotient().compute(**t), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    raw = DeltaRayleighQuotient(relative=False).compute(**t)
    assert_close(raw, torch.full((4,), 198 / 199 - 1, dtype=torch.float64))  # 2 x 99 degrees of freedom in the classes


def test_the_classes_means_along_a_weight():
    """Two classes of one covariance, w along the means: p (1 - p) D^2 with ddof 0."""
    n, distance = (60, 140), 3.0
    x = torch.cat([white(n[0], 5), white(n[1], 5)])
    labels = torch.arange(2).repeat_interleave(torch.tensor(n))
    x[labels == 1, 0] += distance
    w = torch.eye(5, dtype=torch.float64)[:2]
    raw = DeltaRayleighQuotient(relative=False).compute(inputs=x, weights=w, labels=labels)
    p, every = n[0] / sum(n), sum(n)
    between = p * (1 - p) * distance**2
    rows = sum(m - 1 for m in n)  # each class adds n_c - 1 to the scatter within
    assert_close(raw, torch.tensor([rows / (every - 1) - 1 + between * every / (every - 1), rows / (every - 1) - 1]).double())
    assert_close(float(raw[0] - raw[1]) * (every - 1) / every, between)


def test_a_relative_delta_may_be_negative():
    t = batch()
    w = torch.eye(6, dtype=torch.float64)
    t["inputs"][:, 0] += 10 * t["labels"]  # takes the trace away from the other directions
    value = DeltaRayleighQuotient().compute(**t | {"weights": w})
    assert value[0] > 0
    assert (value[1:] < 0).all()


@pytest.mark.parametrize("metric", BY_CLASS, **named)
def test_a_convolution_s_classes_are_those_of_its_patches(metric):
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False).double()
    x, labels = normal(12, 4, 7, 6) + torch.arange(12)[:, None, None, None] % 3, torch.arange(12) % 3
    geometry = {"stride": 2, "padding": 1, "groups": 2}
    value = metric.compute(inputs=x, weights=conv.weight.detach(), labels=labels, **geometry)
    patches = nn.functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2)
    places = patches.shape[1]
    for group in range(2):
        own = {
            "inputs": patches[..., 18 * group : 18 * group + 18].flatten(0, 1),
            "weights": conv.weight.detach().flatten(1)[3 * group : 3 * group + 3],
            "labels": labels.repeat_interleave(places),
        }
        assert_close(value[3 * group : 3 * group + 3], metric.compute(**own), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("metric", [RayleighQuotient(), *BY_CLASS], **named)
def test_what_changes_nothing_and_what_scales(metric):
    t = batch() if metric in BY_CLASS else {k: v for k, v in batch().items() if k != "labels"}
    value, order = metric.compute(**t), torch.tensor([2, 0, 3, 1])
    moved = t | {"inputs": t["inputs"] + torch.linspace(-100, 1000, 6)}
    assert_close(metric.compute(**moved), value, rtol=1e-8, atol=1e-10)
    assert_close(metric.compute(**t | {"weights": t["weights"][order]}), value[order])
    rescaled = t["weights"] * torch.tensor([[2.0], [-3.0], [0.1], [1.0]])
    assert_close(metric.compute(**t | {"weights": rescaled}), value)
    assert_close(metric.compute(**t | {"inputs": 3 * t["inputs"]}), value if metric.relative else 9 * value)


@pytest.mark.parametrize("metric", BY_CLASS, **named)
def test_float32_rows_far_from_zero_keep_their_digits(metric):
    t = batch(n=600)
    t["inputs"] = t["inputs"] + 1000
    exact = metric.compute(**t)
    t["outputs"] = (t["inputs"] @ t["weights"].T).float()
    value = metric.compute(**t | {"inputs": t["inputs"].float()})
    assert_close(value, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("metric", BY_CLASS, **named)
def test_a_dead_unit_equal_units_and_a_single_one(metric):
    t = batch()
    t["weights"][1], t["weights"][3] = 0, t["weights"][2]
    value = metric.compute(**t)
    assert value.isnan().tolist() == [False, True, False, False]
    assert_close(value[2], value[3])
    assert metric.compute(**t | {"weights": t["weights"][:1]}).shape == (1,)
    assert metric.compute(**t | {"weights": t["weights"][:1, :1], "inputs": t["inputs"][:, :1]}).isfinite().all()


def test_fewer_rows_than_units():
    t = batch(n=8, units=20)
    for metric in BY_CLASS:
        assert metric.compute(**t).isfinite().all()


def test_classes_of_a_single_row_are_left_out_and_counted():
    t = batch()
    metric, want = ConditionalRayleighQuotient(), ConditionalRayleighQuotient().compute(**t)
    one = {"inputs": torch.cat([t["inputs"], normal(1, 6) * 50]), "labels": torch.cat([t["labels"], torch.tensor([4])])}
    assert_close(metric.compute(**t | one), want)
    rows, labels = one["inputs"], one["labels"]
    y, x = ByClass.of(rows @ t["weights"].T, labels), PatchesByClass.of(rows, labels)
    assert metric.counts(t["weights"], y=y, x=x) == {"classes_left_out": 1}
    assert_close(metric(t["weights"], y=y, x=x), want)
    alone = ByClass.of(rows[-1:] @ t["weights"].T, labels[-1:])
    assert metric(t["weights"], y=alone, x=PatchesByClass.of(rows[-1:], labels[-1:])).isnan().all()


def test_inputs_that_do_not_vary_in_a_class_leave_no_share():
    t = batch()
    t["inputs"][t["labels"] == 1] = 0.1
    assert ConditionalRayleighQuotient().compute(**t).isnan().all()
    assert ConditionalRayleighQuotient(relative=False).compute(**t).isfinite().all()
    assert RayleighQuotient().compute(inputs=torch.full((20, 6), 0.1), weights=t["weights"].float()).isnan().all()


def test_the_change_of_the_weights_has_a_quotient_of_its_own():
    t = batch()
    change = normal(4, 6, seed=7)
    trained = t["weights"] + change
    for options in ({}, {"relative": False}, {"relative": False, "regularization": 0.1}, {"regularization": 0.1}):
        value = DeltaAlignment(**options).compute(inputs=t["inputs"], weights=trained, initial_weights=t["weights"])
        assert_close(value, RayleighQuotient(**options).compute(inputs=t["inputs"], weights=change), rtol=1e-10, atol=0)


def test_weights_that_have_not_changed_have_no_alignment():
    t = batch()
    trained = t["weights"].clone()
    trained[0] += 1
    value = DeltaAlignment().compute(inputs=t["inputs"], weights=trained, initial_weights=t["weights"])
    assert value.isnan().tolist() == [False, True, True, True]


def test_the_weights_at_the_start_are_needed():
    t = batch()
    with pytest.raises(ValueError, match="initial_weights"):
        DeltaAlignment().compute(inputs=t["inputs"], weights=t["weights"])


@pytest.mark.parametrize("metric", [RayleighQuotient, ConditionalRayleighQuotient, DeltaRayleighQuotient, DeltaAlignment])
def test_a_negative_regularization_is_no_variance(metric):
    with pytest.raises(ValueError, match=rf"{metric.names[0]}: regularization is -1.0; .* 0 or more"):
        metric(regularization=-1.0)


def test_widths_that_differ_are_named():
    t, metric = batch(), ConditionalRayleighQuotient()
    y, x = ByClass.of(normal(60, 4), t["labels"]), PatchesByClass.of(t["inputs"], t["labels"])
    with pytest.raises(ValueError, match="the weight reads 5 inputs, the rows are 6 wide"):
        metric(t["weights"][:, :5], y=y, x=x)
    with pytest.raises(ValueError, match="the weight has 3 units, the rows are 4 wide"):
        metric(t["weights"][:3], y=y, x=x)


@pytest.mark.parametrize(
    ("alias", "metric"),
    [
        ("conditional_rq", ConditionalRayleighQuotient),
        ("cond_rq", ConditionalRayleighQuotient),
        ("delta_rayleigh_quotient", DeltaRayleighQuotient),
        ("delta_alignment", DeltaAlignment),
    ],
)
def test_names(alias, metric):
    assert type(get_metric(alias)) is metric


@pytest.mark.parametrize("name", ["rayleigh_quotient", "input_side_redundancy", "input_feature_redundancy"])
def test_a_covariance_stands_for_the_inputs(name):
    x, w = torch.randn(40, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    found = get_metric(name).compute(covariance=x.T.cov(), weights=w)
    assert_close(found, get_metric(name).compute(inputs=x, weights=w), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "tensors", "words"),
    [
        ("rq", {"inputs": torch.ones(2, 3)}, "leave inputs= out, or covariance="),
        ("activation_kurtosis", {}, "reads more of the data than the covariance"),
        ("rq", {"covariance": torch.ones(2, 3)}, r"covariance is \(2, 3\); it must be a symmetric matrix"),
        ("rq", {"covariance": -torch.eye(3)}, "it must have none below 0"),
    ],
)
def test_a_covariance_that_does_not_do_is_refused(name, tensors, words):
    with pytest.raises(ValueError, match=words):
        get_metric(name).compute(**{"weights": torch.ones(2, 3), "covariance": torch.eye(3)} | tensors)
