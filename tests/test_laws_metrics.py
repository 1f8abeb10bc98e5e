"""Laws over every metric."""

import pytest
import torch
from laws import EVERY_METRIC, everything
from torch.testing import assert_close

from nodelens.metrics import METRICS, PairwiseRedundancy, Synergy, get_metric, list_metrics

every = pytest.mark.parametrize(
    "metric",
    [*EVERY_METRIC, PairwiseRedundancy(reduce="none"), Synergy(reduce="none")],
    ids=lambda m: m.names[-1] + ("_pairs" if m.shape == "pair" else ""),
)
INFORMATION = ("redundancy", "synergy", "synergy_continuous_target", "class_mi")


@every
def test_permuted_units_permute_the_answer(metric):
    t, order = everything(), torch.tensor([2, 0, 3, 1])
    value = metric.compute(**t)
    t |= {"weights": t["weights"][order], "outputs": t["outputs"][:, order], "gradients": t["gradients"][:, order]}
    moved = metric.compute(**t)
    expected = {"unit": lambda v: v[order], "pair": lambda v: v[order][:, order], "layer": lambda v: v}[metric.shape](value)
    assert_close(moved, expected, rtol=1e-10, atol=1e-12)


@every
def test_shapes_and_finite_numbers(metric):
    value = metric.compute(**everything(units=5))
    assert tuple(value.shape) == {"unit": (5,), "pair": (5, 5), "layer": ()}[metric.shape]
    assert value.isfinite().all()


@every
def test_width_one_has_a_value_or_says_nan(metric):
    value = metric.compute(**everything(units=1, fan_in=1))
    assert value.shape[:1] == () or len(value) == 1
    alone = metric.shape == "unit" and metric.kind == "pair"
    assert bool(value.isnan().all()) == alone


@every
def test_a_dead_unit_and_two_equal_ones_spoil_nobody(metric):
    t = everything(units=5)
    t["outputs"][:, 1] = 0
    t["outputs"][:, 3] = t["outputs"][:, 2]
    value = metric.compute(**t)
    assert value.isfinite().all()
    if metric.shape == "unit" and metric.names[-1] in INFORMATION:
        assert value[1] == 0, "a unit that does not vary tells nothing"


@pytest.mark.parametrize("name", ["activation_variance", "redundancy", "synergy", "class_mi", "effective_rank", "d_pr", "rq"])
def test_a_constant_added_to_the_units_changes_nothing(name):
    t = everything()
    moved = t | {"outputs": t["outputs"] + torch.tensor([5.0, -3.0, 100.0, 0.5])}
    assert_close(get_metric(name).compute(**t), get_metric(name).compute(**moved), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "power"),
    [
        ("activation_variance", 2),
        ("activation_mean", 1),
        ("activation_rms", 1),
        ("redundancy", 0),
        ("synergy", 0),
        ("class_mi", 0),
        ("effective_rank", 0),
        ("d_pr", 0),
        ("zero_fraction", 0),
    ],
)
def test_scaled_rows_scale_the_answer(name, power):
    t = everything()
    scaled = t | {"outputs": t["outputs"] * 3}
    assert_close(get_metric(name).compute(**scaled), get_metric(name).compute(**t) * 3**power, rtol=1e-9, atol=1e-12)


def test_every_name_is_one_metric_s_and_finds_it():
    names = [name for metric in METRICS for name in metric.names]
    assert sorted(names) == list_metrics()
    assert len(set(names)) == len(names)
    assert all(type(get_metric(name)) in METRICS for name in names)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.__name__)
def test_the_docstring_says_what_a_reader_needs(metric):
    for word in ("Shapes:", "Unit:", "NaN:", "Source:"):
        assert word in metric.__doc__, f"{metric.__name__} does not say {word}"
    assert metric.source()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: get_metric("synergi"), "no metric is called 'synergi'; did you mean 'synergy'"),
        (lambda: get_metric("rq", relativ=False), "rq has no option 'relativ'; did you mean 'relative'"),
        (lambda: get_metric("taylor", mode="max"), "mode is 'max'; it takes 'abs_mean', 'mean_abs', 'sq_mean'"),
        (lambda: get_metric("rq").compute(inputs=torch.ones(3, 2)), "needs weights="),
        (lambda: get_metric("rq", regularization=-1.0).compute(**everything()), "regularization is -1.0; .* 0 or more"),
        (lambda: get_metric("taylor").compute(outputs=torch.ones(3, 2)), "needs gradients="),
        (lambda: get_metric("class_mi").compute(outputs=torch.ones(3, 2)), "target 'label' needs labels"),
        (lambda: get_metric("synergy").compute(outputs=torch.ones(3, 2)), "target 'logit_margin' needs logits"),
        (lambda: get_metric("rq").compute(activations=torch.ones(3, 2)), "compute\\(\\) takes inputs"),
        (
            lambda: get_metric("rq").compute(inputs=torch.randn(9, 5), outputs=torch.randn(9, 2), weights=torch.ones(2, 6)),
            "the weight reads 6 inputs, the rows are 5 wide",
        ),
        (
            lambda: get_metric("rq").compute(outputs=torch.randn(9, 3), inputs=torch.randn(9, 6), weights=torch.ones(2, 6)),
            "the weight has 2 units, the rows are 3 wide",
        ),
    ],
    ids=str,
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
