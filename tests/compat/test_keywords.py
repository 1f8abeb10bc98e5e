"""A keyword that nothing reads is an error that names it and the nearest one that is read."""

import inspect
import pickle

import pytest
import torch
from command import command
from torch import nn

import nodelens as nl
from nodelens.messages import keywords_of
from nodelens.pruning.sweep.sweep import cells

NET = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
X = torch.rand(8, 4)
OPEN = {  # functions that take **options: what they are called with, and one of their options
    "analyze": (lambda **k: nl.analyze(NET, [X], ["rq"], **k), ["groups", "covariance", "progress", "analysis"]),
    "get_analysis": (lambda **k: nl.get_analysis("supernodes", **k), ["scope", "halo_fraction"]),
    "analyze_model": (lambda **k: nl.analyze_model(model=NET, **k), ["max_tokens"]),
    "estimate_cost": (lambda **k: nl.estimate_cost(NET, ["rq"], batch=X, **k), ["groups", "machine"]),
    "get_metric": (lambda **k: nl.get_metric("rq", **k), ["relative", "regularization"]),
    "get_pruning_strategy": (lambda **k: nl.get_pruning_strategy("precomputed", **k), ["scores"]),
    "prune": (lambda **k: nl.prune(NET, "l1", 0.5, **k), ["amount", "allocation", "precision", "initial", "finetune"]),
    "Metric.compute": (lambda **k: nl.get_metric("rq").compute(inputs=X, weights=NET[0].weight, **k), ["targets", "padding_mode"]),
    "PruningStrategy.scores": (lambda **k: nl.get_pruning_strategy("l1").scores(NET[0], **k), ["gradients"]),
    "PruningStrategy.prune": (lambda **k: nl.get_pruning_strategy("l1").prune(NET[0], **k), ["inputs"]),
    "RepresentationContext.clone_with_overrides": (
        lambda **k: nl.RepresentationContext("a prompt").clone_with_overrides(**k),
        ["prompt", "layer", "position"],
    ),
    "Result.plot": (None, []),  # its keywords are those of the figure
    "RemovalPlan.save": (None, []),  # its keywords are further keys of the file
    "Statistic.about": (None, []),  # its keywords are the shifts
    "Analysis": (None, []),  # an abstract class without options
    "Metric.beside": (None, []),
    "Metric.__call__": (None, []),  # its keywords are the statistics that it needs
    "Metric.counts": (None, []),
}


def callables():
    """Every public name, and the public methods of the classes, as (title, callable)."""
    for name in nl.__all__:
        found = getattr(nl, name)
        yield name, found
        if inspect.isclass(found):
            own = [m for m in vars(found) if not m.startswith("_") and m not in getattr(found, "__dataclass_fields__", ())]
            yield from ((f"{name}.{m}", getattr(found, m)) for m in own if callable(getattr(found, m)))


def misspelt(name):
    """Two letters of the name in the other order, or one doubled where they are alike."""
    k = len(name) // 2
    swapped = name[: k - 1] + name[k] + name[k - 1] + name[k + 1 :]
    return swapped if swapped != name else name + name[-1]


CALLABLES = dict(callables())


@pytest.mark.parametrize("title", CALLABLES)
def test_an_unknown_keyword_is_named_with_the_nearest_one(title):
    function, options = CALLABLES[title], []
    if title in OPEN:
        function, options = OPEN[title]
    else:
        options = keywords_of(function)
        with pytest.raises(TypeError, match=r"has no option 'qqqq'\. Options are "):
            function(qqqq=1)
    for option in options:
        wrong = misspelt(option)
        with pytest.raises((TypeError, ValueError)) as raised:
            function(**{wrong: 1})
        assert wrong in str(raised.value)
        if len(option) > 3:
            assert f"id you mean '{option}'?" in str(raised.value), option


def test_the_list_of_open_functions_is_complete():
    variadic = {t for t, f in CALLABLES.items() if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(f).parameters.values())}
    assert variadic | {"analyze_model"} <= OPEN.keys() | {"Metric"}


def test_what_was_reported_is_refused():
    with pytest.raises(TypeError, match=r"nl\.prune has no option 'amuont'\. Did you mean 'amount'\?"):
        nl.prune(NET, "taylor", 0.5, data=[(X, torch.zeros(8).long())], amuont=0.25, alocation="global")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: cells(criterion=["l1"], amonut=[0.5]), "cells has no option 'amonut'. Did you mean 'amount'?"),
        (lambda: nl.Criterion.of({"terms": {"l1": 1.0}, "normalise_": "z"}), "it takes terms, .* Did you mean 'normalize'?"),
        (
            lambda: nl.get_pruning_strategy("l1", nl.PruningConfig(structured=False)).prune(NET[0], aply=False),
            "l1 reads no 'aply'",
        ),
    ],
    ids=["sweep", "criterion", "single weights"],
)
def test_options_below_the_public_names_are_refused_too(call, said):
    with pytest.raises((TypeError, ValueError), match=said):
        call()


def test_a_data_set_that_passes_its_options_on_is_checked_on_the_command_line(quiet_home):
    ended = command("analyze", "dataset=npz", "dataset.path=a.npz", "+dataset.batch_sise=3")
    assert ended.code == 1
    assert "dataset.batch_sise: nodelens.data.Npz takes no 'batch_sise'. Did you mean 'batch_size'?" in ended.err


def test_public_names_keep_their_signatures_and_can_be_pickled():
    assert list(inspect.signature(nl.load).parameters) == ["folder"]
    assert list(inspect.signature(nl.Schedule).parameters) == ["kind", "steps", "shape"]
    assert pickle.loads(pickle.dumps(nl.load)) is nl.load
    assert pickle.loads(pickle.dumps(nl.Schedule("iterative", 2))) == nl.Schedule("iterative", 2)
    assert nl.AnalyzeOptions().loss is nl.AnalyzeOptions.loss, "a function that is an option's default is no method"
