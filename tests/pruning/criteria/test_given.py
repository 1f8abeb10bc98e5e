"""Scores in hand rank the units as scores that are measured do."""

import copy

import pandas as pd
import pytest
import torch
from torch import nn

import nodelens as nl
from nodelens.pruning.criteria.given import given_scores
from nodelens.pruning.groups.find import find_groups


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


X = torch.rand(20, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def wanted(net):
    return nl.prune(net, "l1", 0.5, example_inputs=X)


def norms(net):
    return {name: net[int(name)].weight.detach().abs().sum(1) for name in ("0", "2", "4")}


def table(net):
    """One row per unit of every layer, in another order."""
    rows = [(name, u, float(v)) for name, values in norms(net).items() for u, v in enumerate(values)]
    return pd.DataFrame(rows, columns=["layer", "unit", "l1"]).sample(frac=1, random_state=0)


FORMS = {
    "tensors": norms,
    "lists": lambda net: {name: values.tolist() for name, values in norms(net).items()},
    "columns": table,
    "index": lambda net: table(net).set_index(["layer", "unit"]),
    "series": lambda net: table(net).set_index(["layer", "unit"])["l1"],
    "score": lambda net: table(net).rename(columns={"l1": "score"}).assign(more=1.0),
    "measured": lambda net: nl.analyze(net, [X], ["l1"]).units,
    "its own table": lambda net: nl.prune(net, "l1", 0.5, example_inputs=X).table,
    "function": lambda net: lambda group: norms(net)[group.name],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_removes_the_same_units(form, net, wanted):
    found = nl.prune(net, FORMS[form](net), 0.5, example_inputs=X)
    assert found.plan.removed == wanted.plan.removed
    assert found.plan.about["criterion"] == "given"
    assert list(found.table) == ["given"]


def test_scores_in_hand_go_with_the_other_options(net, tmp_path):
    scores = norms(net)
    high = nl.prune(net, scores, 0.5, example_inputs=X, mode="high", scope="0").plan.removed
    assert high == {"0": sorted(scores["0"].topk(4).indices.tolist())}
    steps = nl.prune(net, scores, 0.5, data=[X], schedule="iterative", compensate="bias")
    assert steps.plan.removed == nl.prune(net, scores, 0.5, example_inputs=X).plan.removed
    assert steps.plan.about["schedule"] == {"kind": "iterative", "steps": 5, "shape": "linear"}
    with pytest.raises(ValueError, match=r"schedule.kind is 'iterativ'; it is one_shot or iterative"):
        nl.prune(net, scores, 0.5, example_inputs=X, schedule="iterativ")
    part = scores["0"].clone()
    part[3] = float("nan")
    assert 3 in nl.prune(net, scores | {"0": part}, 0.25, example_inputs=X).plan.removed["0"], "a unit without a score goes first"
    steps.save(tmp_path)
    assert torch.equal(nl.load_pruned(tmp_path, copy.deepcopy(net))(X), steps.model(X))


def test_layers_that_make_the_same_units_are_combined():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.head((self.a(x) + self.b(x)).relu())

    groups = find_groups(Residual(), X)
    scores = {"a": torch.arange(5.0), "b": torch.tensor([5.0, 0, 0, 0, 0])}
    for reduce, values in (
        ("sum", [5, 1, 2, 3, 4]),
        ("mean", [2.5, 0.5, 1, 1.5, 2]),
        ("max", [5, 1, 2, 3, 4]),
        ("first", range(5)),
    ):
        assert given_scores(scores, groups, reduce)["given"].tolist() == list(values)
    assert given_scores(scores, groups, "prod")["given"].tolist() == [0] * 5
    assert given_scores({"b": scores["b"]}, groups)["given"].tolist() == [5, 0, 0, 0, 0]


def test_a_metric_object_and_a_criterion_are_criteria(net):
    by_name = nl.prune(net, {"terms": {"rq": 1.0}}, 0.5, data=[X]).plan.removed
    assert nl.prune(net, nl.get_metric("rq"), 0.5, data=[X]).plan.removed == by_name
    absolute = nl.get_metric("rq", relative=False)
    found = nl.prune(net, absolute, 0.5, data=[X])
    expected = nl.analyze(net, [X], [absolute], nl.find_groups(net, X)).units.iloc[:, 0]
    assert found.table["rayleigh_quotient"].tolist() == pytest.approx(expected.tolist())
    assert (
        nl.prune(net, nl.Criterion.of("l1"), 0.5, example_inputs=X).plan.removed
        == nl.prune(net, "l1", 0.5, example_inputs=X).plan.removed
    )
    with pytest.raises(ValueError, match="ranks units; effective_rank gives one value per layer"):
        nl.prune(net, nl.get_metric("effective_rank"), 0.5, data=[X])


REFUSED = {
    "no group": (
        lambda net: {"0": norms(net)["0"]},
        r"criterion has no scores for group '2'\. Give them by the name of the group or of a layer",
    ),
    "near": (lambda net: {"0": norms(net)["0"], "2.": norms(net)["2"]}, r"no scores for group '2'\. Did you mean '2\.'\?"),
    "number": (lambda net: norms(net) | {"2": torch.ones(8)}, r"'2' gives scores of the shape \(8,\), group '2' has 6 units"),
    "shape": (lambda net: norms(net) | {"2": torch.ones(6, 1)}, r"'2' gives scores of the shape \(6, 1\), group '2' has 6 units"),
    "function": (lambda net: lambda group: torch.ones(8), r"the function gives scores of the shape \(8,\), group '2' has 6 units"),
    "units": (lambda net: table(net).assign(unit=lambda t: t.unit + 1), r"'0' has 8 units, group '0' has 8, numbered from 0"),
    "index": (lambda net: table(net).drop(columns="unit"), r"a table without units: its index is \(layer, unit\)"),
    "columns": (
        lambda net: table(net).assign(l2=1.0),
        r"a table with the columns l1, l2: give one, as table\[\['rq'\]\], or call it score",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_scores_that_do_not_fit_are_refused(what, net):
    scores, words = REFUSED[what]
    with pytest.raises(ValueError, match=words):
        nl.prune(net, scores(net), 0.5, example_inputs=X)
