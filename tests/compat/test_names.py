"""The names of the original systems. The tests hold before and after the registry takes the table over."""

import pytest

from nodelens.compat.names import METRIC_ALIASES, RENAMED, with_aliases
from nodelens.metrics import get_metric, list_metrics

OLD = {new: old for old, new in RENAMED.items()}
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


def standard(name, **options):
    return get_metric(name if name in list_metrics() else OLD[name], **options)


@pytest.mark.parametrize("name", IN_CALLS)
def test_names_of_the_original_calls_are_known(name):
    assert get_metric(name).names


@pytest.mark.parametrize("alias", METRIC_ALIASES)
def test_an_alias_is_the_standard_metric_with_its_options(alias):
    name, options = METRIC_ALIASES[alias]
    assert name not in METRIC_ALIASES, "an alias of an alias"
    found, wanted = get_metric(alias), standard(name, **options)
    assert type(found) is type(wanted)
    assert found.options == wanted.options


def test_old_names_stay_as_aliases():
    assert RENAMED.keys() <= METRIC_ALIASES.keys()
    assert len(set(RENAMED.values())) == len(RENAMED)


def test_aliases_join_a_registry_or_say_why_not():
    plain = {name: (name.upper(), {"a": 1}) for name, _ in METRIC_ALIASES.values()}
    found = with_aliases(plain)
    assert found.keys() == plain.keys() | METRIC_ALIASES.keys()
    assert found["mi_0"] == ("MUTUAL_INFORMATION_GAUSSIAN", {"a": 1})
    assert found["k90"] == ("COMPONENT_COUNT", {"a": 1, "share": 0.9})
    with pytest.raises(ValueError, match="the alias 'ixy' of 'relative_channel_information' is the name of a metric"):
        with_aliases(plain | {"ixy": ("IXY", {})})
    with pytest.raises(ValueError, match="the alias 'k90' stands for 'component_count', which no metric is called"):
        with_aliases({name: value for name, value in plain.items() if name != "component_count"})
