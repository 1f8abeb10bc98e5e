"""The names of the original systems."""

import pytest
import torch
from nets import generator

from nodelens.compat.names import LEFT_OUT, METRIC_ALIASES, RENAMED
from nodelens.metrics import get_metric, list_metrics
from nodelens.metrics.registry import find_metrics

IN_CALLS = [
    "activation_l2_norm",
    "activation_variance",
    "activation_outlier_index",
    "rayleigh_quotient",
    "delta_alignment",
    "mutual_information_gaussian",
    "pairwise_redundancy_gaussian",
    "average_redundancy",
    "gaussian_pid_synergy_mmi",
    "synergy_gaussian_mmi",
    "taylor_saliency",
    "gradient_alignment",
    "scar_activation_power",
    "scar_taylor",
    "scar_curvature",
    "scar_loss_proxy",
]


@pytest.mark.parametrize("name", IN_CALLS)
def test_names_of_the_original_calls_are_known(name):
    assert get_metric(name).names


@pytest.mark.parametrize("alias", METRIC_ALIASES)
def test_an_alias_is_the_standard_metric_with_its_options(alias):
    name, options = METRIC_ALIASES[alias]
    assert name not in METRIC_ALIASES, "an alias of an alias"
    found, wanted = get_metric(alias), get_metric(name, **options)
    assert type(found) is type(wanted)
    assert found.options == wanted.options


def test_old_names_stay_as_aliases():
    assert RENAMED.keys() <= METRIC_ALIASES.keys()
    assert len(set(RENAMED.values())) == len(RENAMED)


def test_an_alias_that_is_taken_or_stands_for_nothing_is_refused():
    with pytest.raises(ValueError, match=r"the alias 'rq' of 'stable_rank' is the name of .*RayleighQuotient"):
        find_metrics("none", [], {"rq": ("stable_rank", {})})
    with pytest.raises(ValueError, match="the alias 'fresh' stands for 'stale', which is no metric's name"):
        find_metrics("none", [], {"fresh": ("stale", {})})


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_name_that_is_left_out_says_what_to_take(name):
    assert name not in list_metrics()
    with pytest.raises(ValueError, match=f"no metric is called '{name}', a name of NodeLens that is left out: {LEFT_OUT[name]}"):
        get_metric(name)
    instead = LEFT_OUT[name].removeprefix("take ").split(" or ")
    if not any(" " in each or "." in each for each in instead):  # metrics, no analysis, criterion or function
        assert set(instead) <= set(list_metrics())


def test_every_metric_of_the_calls_is_computed_from_tensors():
    seed = generator()
    weights, start = torch.randn(3, 4, generator=seed), torch.randn(3, 4, generator=seed)
    inputs, labels = torch.randn(60, 4, generator=seed), torch.arange(60) % 2
    inputs[:, 0] += labels
    tensors = {"inputs": inputs, "weights": weights, "outputs": inputs @ weights.T, "gradients": torch.randn(60, 3, generator=seed)}
    target = {"targets": inputs[:, 1] + inputs[:, 2]}
    more = {"delta_alignment": {"initial_weights": start}, "synergy_gaussian_mmi": {"labels": labels}}
    more |= {"mutual_information_gaussian": target, "gaussian_pid_synergy_mmi": target}
    for name in IN_CALLS:
        found = get_metric(name).compute(**tensors, **more.get(name, {}))
        assert found.shape[0] == 3, name
        assert found.isfinite().all(), name
    assert {"rayleigh_quotient", "delta_alignment", "taylor"} <= set(list_metrics())
