"""Sets of metrics by name: in Python they are what the command line makes of the same files."""

import pytest
import torch
from torch import nn

import nodelens as nl
from nodelens.app.config import build, load_config
from nodelens.engine.request import as_metrics
from nodelens.metrics import get_metric
from nodelens.metrics.sets import list_sets, metric_set


def described(metric):
    """Class and options; a config has lists where Python has tuples."""
    return type(metric), {name: list(value) if isinstance(value, tuple) else value for name, value in metric.options.items()}


@pytest.mark.parametrize("name", list_sets())
def test_a_set_has_the_metrics_of_the_command_line(name):
    cfg = load_config("analyze", [f"metrics={name}"])
    found = {column: build(node, "metrics") for column, node in cfg.metrics.items()}
    assert {column: described(m) for column, m in found.items()} == {column: described(m) for column, m in metric_set(name).items()}


def test_a_set_a_name_and_lists_of_both_are_metrics():
    assert as_metrics("scar") == dict(metric_set("scar"))
    assert as_metrics("rq") == {"rq": get_metric("rq")}
    assert as_metrics(get_metric("rq")).keys() == {get_metric("rq").names[-1]}
    both = as_metrics(["default", "spectrum", "rq", "mi_binning"])
    assert both == {
        **metric_set("default"),
        **metric_set("spectrum"),
        "rq": get_metric("rq"),
        "mi_binning": get_metric("mi_binning"),
    }


def test_a_call_takes_a_set_by_name():
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(40, 4)
    found = nl.analyze(net, [(x, torch.randint(3, (40,)))], "activation")
    assert {*metric_set("activation")} <= {*found.units, *found.layers}


def test_an_unknown_name_is_an_error():
    with pytest.raises(
        ValueError, match=r"no metric or set of metrics is called 'forwards'. Did you mean 'forward'\? Sets are acti"
    ):
        as_metrics("forwards")
    with pytest.raises(ValueError, match="no metric is called 'rqq'; did you mean 'rq'"):
        as_metrics("rqq")
    with pytest.raises(ValueError, match="no set of metrics is called 'forwards'; there are activation, default"):
        metric_set("forwards")
