"""Laws over every metric."""

import pytest
import torch
from ids import label, metric_id
from laws import EVERY_METRIC, everything
from torch.testing import assert_close

from nodelens.compat.names import METRIC_ALIASES
from nodelens.metrics import METRICS, PairwiseRedundancy, Synergy, get_metric, list_metrics

every = pytest.mark.parametrize(
    "metric",
    [*(m for m in EVERY_METRIC if not m.grouped), PairwiseRedundancy(reduce="none"), Synergy(reduce="none")],
    ids=metric_id,
)
INFORMATION = (
    "pairwise_redundancy_gaussian",
    "average_redundancy",
    "mutual_information_gaussian",
    "mutual_information_binning",
    "gaussian_mi_analytic",
    "mi_in_proxy",
    "conditional_mi",
    "conditional_mutual_information",
    "pid_redundancy",
    "pid_unique",
    "gaussian_pid_synergy_mmi",
    "synergy_gaussian_mmi",
    "mi_about_class",
    "multi_redundancy",
    "downstream_importance",
)
FREE_OF_THE_MEAN = (
    *INFORMATION,
    "activation_variance",
    "activation_kurtosis",
    "layer_redundancy",
    "total_correlation",
    "o_information",
    "effective_rank",
    "d_pr",
    "d_entropy",
    "stable_rank",
    "top1_share",
    "k90",
    "d_pr_debiased",
    "linear_cka",
    "linear_cka_debiased",
    "cca_mean",
    "procrustes_angular",
    "feature_subspace_novelty",
)
SCALED = ("activation_variance", "gaussian_mi_analytic")
FREE_OF_SCALE = (*(n for n in FREE_OF_THE_MEAN if n not in SCALED), "zero_fraction", "cos_sim_mean", "rankme")


def by_column(tensors, change):
    """The tensors of a layer, its outputs changed column by column."""
    return {k: change(t) if k in ("outputs", "next_outputs") else t for k, t in tensors.items() if k != "inputs"}


def explained(metric, value):
    """No NaN without a word about it."""
    return bool(value.isfinite().all()) or metric.nan != "never"


@every
def test_permuted_units_permute_the_answer(metric):
    t, order = everything(), torch.tensor([2, 0, 3, 1])
    value = metric.compute(**t)
    for name, axis in (("weights", 0), ("initial_weights", 0), ("norm_weights", 0), ("outputs", 1), ("gradients", 1)):
        t[name] = t[name].index_select(axis, order)
    t["next_outputs"] = t["next_outputs"][:, order] if metric.kind == "edge" else t["next_outputs"]
    moved = metric.compute(**t)
    expected = {"unit": lambda v: v[order], "pair": lambda v: v[order][:, order]}.get(metric.shape, lambda v: v)(value)
    assert_close(moved, expected, rtol=1e-9, atol=1e-12, equal_nan=True)


@every
def test_shapes_and_finite_numbers(metric):
    value = metric.compute(**everything(n=200, units=16, fan_in=20))
    assert tuple(value.shape) == {"unit": (16,), "pair": (16, 16), "layer": (), "edge": (), "input": (20,)}[metric.shape]
    assert value.isfinite().all()


@every
@pytest.mark.parametrize(("n", "units", "fan_in"), [(60, 1, 1), (5, 8, 9), (1, 4, 6), (2, 4, 6)], ids=label)
def test_small_layers_and_few_rows_have_a_value_or_say_why_not(metric, n, units, fan_in):
    value = metric.compute(**everything(n=n, units=units, fan_in=fan_in))
    assert explained(metric, value)
    assert not value.isinf().any()
    if n == 60 and metric.shape == "unit" and metric.names[0] in ("pairwise_redundancy_gaussian", "gaussian_pid_synergy_mmi"):
        assert value.isnan().all(), "a unit alone has no partner"


@every
def test_a_dead_unit_and_two_equal_ones_spoil_nobody(metric):
    t = everything(n=200, units=16)
    for name, axis in (("weights", 0), ("outputs", 1), ("gradients", 1)):
        t[name].select(axis, 1).zero_()
        t[name].select(axis, 3).copy_(t[name].select(axis, 2))
    value = metric.compute(**t)
    rest = torch.arange(16) != 1
    if metric.shape == "unit" and metric.names[0] != "multi_redundancy":  # which has no answer where one unit follows from another
        assert value[rest].isfinite().all()
        assert value[1].isfinite() or metric.nan != "never"
        assert value[1] == 0 or metric.names[0] not in INFORMATION, "a unit that does not vary tells nothing"
        assert_close(value[2], value[3], rtol=1e-9, atol=1e-12) if metric.parameter not in ("norm", "change") else None
    else:
        assert explained(metric, value)


@pytest.mark.parametrize("name", FREE_OF_THE_MEAN)
def test_a_constant_added_to_the_units_changes_nothing(name):
    metric, t = get_metric(name), everything(n=300)
    far = torch.tensor([5.0, -3.0, 100.0, 0.5], dtype=torch.float64)
    value, moved = metric.compute(**by_column(t, lambda y: y)), metric.compute(**by_column(t, lambda y: y + far))
    assert_close(moved, value, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", FREE_OF_THE_MEAN)
def test_a_mean_of_a_thousand_spreads_costs_float32_rows_little(name):
    """Rows at 1,000 spreads hold the spread to 6e-5 each; what is left of that in a value of 300 of them is some 1e-5."""
    metric, t = get_metric(name), everything(n=300)
    value = metric.compute(**by_column(t, lambda y: y))
    far = metric.compute(**by_column(t, lambda y: (y + 1000 * y.std(0)).float()))
    assert_close(far, value, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", FREE_OF_SCALE)
def test_scaled_rows_change_nothing(name):
    metric, t = get_metric(name), everything()
    scaled = metric.compute(**by_column(t, lambda y: y * 3))
    assert_close(scaled, metric.compute(**by_column(t, lambda y: y)), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "power"), [("activation_variance", 2), ("activation_mean", 1), ("activation_rms", 1), ("scar_activation_power", 2)]
)
def test_scaled_rows_scale_the_answer(name, power):
    metric, t = get_metric(name), everything()
    scaled = metric.compute(**by_column(t, lambda y: y * 3))
    assert_close(scaled, metric.compute(**by_column(t, lambda y: y)) * 3**power, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["taylor", "fisher_information", "scar_taylor", "scar_curvature", "scar_loss_proxy", "scar_loss_proxy_factored"]
)
def test_a_loss_doubled_doubles_a_slope_and_quadruples_its_squares(name):
    metric, t = get_metric(name), everything()
    power = 1 if name in ("taylor_saliency", "scar_taylor") else 2
    doubled = metric.compute(**t | {"gradients": 2 * t["gradients"]})
    assert_close(doubled, 2**power * metric.compute(**t), rtol=1e-12, atol=0)


def test_every_name_is_one_metric_s_and_finds_it():
    names = [name for metric in METRICS for name in (*metric.names, *metric.presets)]
    names += METRIC_ALIASES
    assert sorted(names) == list_metrics()
    assert len(set(names)) == len(names)
    assert all(type(get_metric(name)) in METRICS for name in names)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.__name__)
def test_the_docstring_says_what_a_reader_needs(metric):
    for word in ("Formula:", "Shapes:", "Unit:", "NaN:", "Source:"):
        assert word in metric.__doc__, f"{metric.__name__} does not say {word}"
    assert metric.source()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: get_metric("synergi"), "no metric is called 'synergi'; did you mean 'synergy'"),
        (lambda: get_metric("rq", relativ=False), "rq has no option 'relativ'; did you mean 'relative'"),
        (lambda: get_metric("taylor_saliency", mode="max"), "mode is 'max'; it takes 'abs_mean', 'mean_abs', 'sq_mean'"),
        (lambda: get_metric("rq").compute(), "rayleigh_quotient needs inputs= and weights=; given: nothing"),
        (lambda: get_metric("rq").compute(torch.ones(3, 2)), r"compute\(\) takes its tensors by name, as compute\(inputs="),
        (lambda: get_metric("rq").compute(inputs=torch.ones(2), weights=torch.ones(3, 2)), r"inputs is \(2,\); it has two axes"),
        (lambda: get_metric("rq").compute(inputs=torch.ones(4, 2), weights=torch.ones(2)), r"weights is \(2,\); it has two axes"),
        (lambda: get_metric("rq").compute(inputs="x", weights=torch.ones(3, 2)), "rayleigh_quotient: inputs is str; give a tensor"),
        (
            lambda: get_metric("rq").compute(inputs=torch.ones(4, 5), weights=torch.ones(3, 2)),
            "reads 2 inputs, the rows are 5 wide",
        ),
        (
            lambda: get_metric("mi").compute(outputs=torch.ones(4, 2), targets=torch.ones(3)),
            r"outputs is \(4, 2\) and targets \(3,\): give as many rows of both",
        ),
        (lambda: get_metric("rq").compute(inputs=torch.ones(3, 2)), "rayleigh_quotient needs inputs= and weights=; given: inputs="),
        (lambda: get_metric("rq", regularization=-1.0).compute(**everything()), "regularization is -1.0; .* 0 or more"),
        (lambda: get_metric("taylor").compute(outputs=torch.ones(3, 2)), "taylor needs outputs= and gradients=; given: outputs="),
        (lambda: get_metric("class_mi").compute(outputs=torch.ones(3, 2)), "needs outputs= and labels=; given: outputs="),
        (
            lambda: get_metric("synergy").compute(outputs=torch.ones(3, 2)),
            "needs outputs=, labels= and logits=, or targets= in place of logits= and labels=; given: outputs=",
        ),
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
    ids=label,
)
def test_mistakes_are_named(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()
