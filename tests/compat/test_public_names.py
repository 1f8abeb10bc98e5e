"""What ``import nodelens as nl`` offers in a notebook."""

import inspect
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import nodelens as nl
from nodelens.results.result import Result

DESIGN = [
    "analyze",
    "analyze_model",
    "prune",
    "load_pruned",
    "evaluate",
    "load",
    "load_runs",
    "run",
    "load_config",
    "list_metrics",
    "get_metric",
]
DESIGN += [
    "register_metric",
    "find_layers",
    "find_groups",
    "estimate_cost",
    "Schedule",
    "Allocation",
    "Finetune",
    "Supernodes",
    "PruningOptions",
]
DESIGN += ["Pruned", "Metric", "Need", "Result", "ModelWrapper", "PruningConfig", "get_pruning_strategy", "list_pruning_strategies"]


@pytest.mark.parametrize("name", nl.__all__)
def test_every_public_name_resolves_and_says_what_it_is(name):
    assert name in dir(nl)
    assert (inspect.getdoc(getattr(nl, name)) or "").strip()


def test_the_names_of_the_design_are_public():
    assert set(DESIGN) <= set(nl.__all__)
    with pytest.raises(AttributeError, match="module 'nodelens' has no attribute 'prun'"):
        _ = nl.prun


NOT_MADE_BY_USERS = {"Batch", "CostEstimate", "FineTuning", "Forecast", "Plan"}


def mentioned(hint):
    """Classes in a type hint."""
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        yield hint
    for inner in typing.get_args(hint):
        yield from mentioned(inner)


@pytest.mark.parametrize("name", [name for name in nl.__all__ if inspect.isfunction(getattr(nl, name))])
def test_what_a_signature_mentions_can_be_had_from_the_package(name):
    hints = typing.get_type_hints(inspect.unwrap(getattr(nl, name)))
    own = {kind for hint in hints.values() for kind in mentioned(hint) if kind.__module__.startswith("nodelens.")}
    public = {getattr(nl, each) for each in nl.__all__}
    assert {kind.__name__ for kind in own - public} <= NOT_MADE_BY_USERS


def test_the_import_is_light():
    code = "import time; t = time.perf_counter(); import nodelens; print(time.perf_counter() - t)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(nl.__file__).parents[1], capture_output=True, text=True, timeout=60, check=True
    )
    assert float(run.stdout) < 0.3


def test_a_result_says_what_is_there():
    index = pd.MultiIndex.from_tuples([("fc<1>", 0), ("fc<1>", 1)], names=["layer", "unit"])
    result = Result(
        pd.DataFrame({"rq": [0.1, 0.2], "rq_se": [0.01, 0.01]}, index=index),
        pd.DataFrame({"units": [2], "effective_rank": [1.5]}, index=pd.Index(["fc<1>"], name="layer")),
        {("fc<1>", "redundancy"): np.eye(2)},
        {"samples": 64, "missing": [{"layer": "fc<1>", "column": "rq", "count": 1, "reason": "constant"}]},
    )
    assert result.summary().splitlines() == [
        "1 layer, 2 units, 64 samples",
        "metrics of units: rq",
        "metrics of layers: effective_rank",
        "matrices: redundancy",
        "missing: rq of fc<1>",
        "plots: units, layers, scatter",
    ]
    assert repr(result) == f"Result: {result.summary()}"
    page = result._repr_html_()
    assert "missing: rq of fc&lt;1&gt;" in page
    assert "<table" in page
    assert repr(Result(pd.DataFrame(), pd.DataFrame())) == "Result: 0 layers, 0 units"


MISSPELT = {
    "nl.analyze has no option 'grops'. Did you mean 'groups'?": lambda: nl.analyze(
        nn.Linear(2, 3), [torch.ones(4, 2)], ["rq"], grops=4
    ),
    "nl.prune has no option 'allocaton'. Did you mean 'allocation'?": lambda: nl.prune(nn.Linear(2, 3), "l1", allocaton="global"),
    "nl.prune has no option 'precison'. Did you mean 'precision'?": lambda: nl.prune(nn.Linear(2, 3), "l1", precison="float64"),
}


@pytest.mark.parametrize("words", MISSPELT)
def test_an_option_that_nothing_reads_is_refused_with_the_nearest(words):
    with pytest.raises(TypeError, match=re.escape(words)):
        MISSPELT[words]()


def test_options_as_an_object_are_the_options_by_name():
    net, data = nn.Linear(4, 3).double(), [torch.randn(20, 4, dtype=torch.float64)]
    options = nl.AnalyzeOptions(groups=4, bias=True)
    assert nl.analyze(net, data, ["rq"], options=options).units.equals(nl.analyze(net, data, ["rq"], groups=4, bias=True).units)
    assert nl.analyze(net, data, ["rq"], options=options, groups=5).metadata["groups"] == 5


def test_a_pruned_network_says_what_was_removed():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert repr(nl.prune(net, "l1", 0.5, example_inputs=torch.ones(2, 4))) == (
        "Pruned: 4 of 8 units removed (slice)\nparameters: 67 -> 35, multiply-accumulate operations per sample: 56 -> 28"
    )


def test_pruning_options_as_an_object_are_the_options_by_name():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(20, 4)
    options = nl.PruningOptions(nl.Criterion.of("l1"), 0.25, freeze="0", mode="high")
    found = nl.prune(net, options=options, example_inputs=x).plan.removed
    assert found == nl.prune(net, "l1", 0.25, example_inputs=x, freeze="0", mode="high").plan.removed
    assert found.keys() == {"2"}
    assert len(nl.prune(net, amount=0.5, options=options, example_inputs=x).plan.removed["2"]) == 3
    before = {name: value + 1 for name, value in net.state_dict().items()}
    assert nl.prune(net, "delta_rq", 0.25, data=[(x, torch.arange(20) % 2)], initial=before).plan.removed


def test_options_of_another_kind_and_values_that_do_not_do_are_refused():
    net, x = nn.Linear(4, 3), torch.randn(20, 4)
    with pytest.raises(TypeError, match=r"nl.analyze takes options of the class AnalyzeOptions, not dict"):
        nl.analyze(net, [x], ["rq"], options={"groups": 4})
    with pytest.raises(TypeError, match=r"nl.prune takes options of the class PruningOptions, not AnalyzeOptions"):
        nl.prune(net, "l1", options=nl.AnalyzeOptions(), example_inputs=x)
    with pytest.raises(ValueError, match="groups is 0; it must be 1 or more"):
        nl.analyze(net, [x], ["rq"], groups=0)
    with pytest.raises(ValueError, match="layers is empty"):
        nl.analyze(net, [x], ["rq"], layers=[])
    assert nl.analyze(net, [x], ["rq"], budget="8GB").units.notna().all(axis=None)
    with pytest.raises(ValueError, match="not finite"):
        nl.get_metric("rq").compute(weights=net.weight, covariance=torch.full((4, 4), float("nan")))
