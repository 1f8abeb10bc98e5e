"""Pruning by the type of a unit: shares by type, protected types, types that go first, and labels that do not fit."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import nodelens as nl
from nodelens.pruning.criteria.criterion import Criterion
from nodelens.pruning.criteria.type_rules import TypeRules

TYPES = ("critical", "redundant", "synergistic", "background")
WIDTH = 40


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))


@pytest.fixture(scope="module")
def units():
    """Ten units of each type in both hidden layers, in an order of their own."""
    chance = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([["0", "2", "4"], range(WIDTH)], names=["layer", "unit"])
    kinds = np.concatenate([chance.permutation(np.repeat(TYPES, WIDTH // 4)) for _ in range(3)])
    return pd.DataFrame({"unit_type": kinds, "rq": chance.uniform(size=3 * WIDTH)}, index=index)


def pruned(net, amount=0.5, criterion="magnitude", **options):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    rules = {name: options.pop(name) for name in ("units", "rates", "protect", "first", "column", "permuted") if name in options}
    spec = {"terms": {criterion: 1.0}, "types": rules}
    return nl.prune(net, spec, amount, example_inputs=x, **options)


def counts(found, units):
    """{group: {type: number of removed units}}."""
    return {group: units.loc[group, "unit_type"].loc[ids].value_counts().to_dict() for group, ids in found.plan.removed.items()}


def test_removed_shares_are_in_proportion_to_the_rates(net, units):
    rates = {"critical": 0, "redundant": 3, "synergistic": 1, "background": 2}
    found = counts(pruned(net, 0.3, units=units, rates=rates), units)
    for group in ("0", "2"):  # 12 of 40 units: shares 0.6, 0.2 and 0.4 of ten units each
        assert found[group] == {"redundant": 6, "background": 4, "synergistic": 2}


def test_a_type_that_is_used_up_leaves_the_rest_to_the_others(net, units):
    rates = {"critical": 0, "redundant": 100, "synergistic": 1, "background": 1}
    found = counts(pruned(net, 0.5, units=units, rates=rates), units)
    assert found["0"] == {"redundant": 10, "background": 5, "synergistic": 5}


def test_within_a_type_the_scores_decide(net, units):
    own = units.loc["0", "unit_type"].to_numpy()
    scores = net[0].weight.detach().abs().sum(1).numpy()
    for mode, sign in (("low", 1), ("high", -1)):
        removed = pruned(net, 0.3, units=units, rates={"critical": 0, "redundant": 3, "background": 2}, mode=mode).plan.removed["0"]
        for kind, n in (("redundant", 6), ("background", 4), ("synergistic", 2)):
            ids = np.flatnonzero(own == kind)
            wanted = ids[np.argsort(sign * scores[ids])[:n]]
            assert set(removed) & set(ids) == set(wanted), (mode, kind)


def test_the_rates_hold_for_random_units_too(net, units):
    first, other = (
        pruned(net, 0.3, units=units, rates={"critical": 0, "redundant": 3, "background": 2}, mode="random", seed=seed)
        for seed in (0, 1)
    )
    assert counts(first, units) == counts(other, units)
    assert counts(first, units)["0"] == {"redundant": 6, "background": 4, "synergistic": 2}
    assert first.plan.removed != other.plan.removed


def test_a_global_budget_removes_the_same_share_of_a_type_everywhere(net, units):
    from nodelens.pruning.allocation.allocate import Allocation

    others = units.copy()
    others.loc["2", "unit_type"] = ["redundant"] * 30 + ["critical"] * 10
    spec = {"units": others, "rates": {"redundant": 2, "background": 0, "critical": 0, "synergistic": 0}}
    found = counts(pruned(net, 0.25, **spec, allocation=Allocation("global", "raw")), others)
    assert found == {"0": {"redundant": 5}, "2": {"redundant": 15}}


def test_types_that_go_first_are_removed_before_all_others(net, units):
    found = counts(pruned(net, 0.25, units=units, first=["redundant"]), units)
    assert found == {"0": {"redundant": 10}, "2": {"redundant": 10}}
    found = counts(pruned(net, 0.2, units=units, first="redundant", protect={"redundant": 0.5}), units)
    assert found["0"]["redundant"] == 5


def test_a_protected_share_keeps_the_best_of_a_type(net, units):
    own, scores = units.loc["0", "unit_type"].to_numpy(), net[0].weight.detach().abs().sum(1).numpy()
    best = np.flatnonzero(own == "critical")
    best = set(best[np.argsort(-scores[best])[:3]])
    for mode in ("low", "high", "random"):
        removed = pruned(net, 0.7, units=units, protect={"critical": 0.3}, mode=mode).plan.removed["0"]
        assert len(removed) == 28
        assert not best & set(removed), mode


def test_permuted_types_keep_as_many_units_that_are_drawn_anew_for_each_seed(net, units):
    names = units["unit_type"].unique()
    rules = {"units": units, "rates": {"critical": 0}, "permuted": True}
    labels = [TypeRules.of("a", rules).labels(nl.find_groups(net, torch.ones(2, 6)), seed) for seed in (0, 0, 1)]
    for group, own in labels[0].items():
        assert {name: (own == name).sum() for name in names} == dict.fromkeys(names, 10)
        assert (own == labels[1][group]).all()
        assert (own != labels[2][group]).any()
        assert (own != units.loc[group, "unit_type"].to_numpy()).any()
    for seed in (0, 3):
        kept = TypeRules.of("a", rules).labels(nl.find_groups(net, torch.ones(2, 6)), seed)["0"] == "critical"
        found = pruned(net, 0.75, **rules, seed=seed)
        assert set(found.plan.removed["0"]) == set(np.flatnonzero(~kept))
        assert found.plan.about["terms"]["types"]["permuted"]
    assert not Criterion.of({"terms": {"rq": 1.0}, "types": {"units": units}}).spec["types"]["permuted"]


def test_plans_of_several_steps_are_nested(net, units):
    found = pruned(net, 0.3, units=units, rates={"critical": 0, "redundant": 3, "background": 2}, schedule="iterative")
    assert counts(found, units)["2"] == {"redundant": 6, "background": 4, "synergistic": 2}


def test_an_amount_that_protected_types_do_not_allow_names_the_largest(net, units):
    with pytest.raises(ValueError, match=r"amount 0.9 of the units cannot be removed: .* allow an amount of 0.75 at most"):
        pruned(net, 0.9, units=units, rates={"critical": 0})


def test_the_types_of_a_finished_run_are_read(net, units, tmp_path):
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    nl.analyze(net, [(x, torch.arange(24) % 3)], metrics=[], analysis=["clusters"]).save(tmp_path)
    kinds = nl.load(tmp_path).units["unit_type"]
    found = pruned(net, 0.2, units=tmp_path, rates={kinds.loc["0"].iloc[0]: 0})
    assert kinds.loc["0"].loc[found.plan.removed["0"]].ne(kinds.loc["0"].iloc[0]).all()
    assert found.plan.about["terms"]["types"]["units"] == str(tmp_path)


def test_the_labels_are_part_of_the_options(units):
    one = Criterion.of({"terms": {"rq": 1.0}, "types": {"units": units}}).spec
    other = units.copy()
    other.iloc[0, 0] = "background" if other.iloc[0, 0] != "background" else "critical"
    assert one["types"]["labels"] != Criterion.of({"terms": {"rq": 1.0}, "types": {"units": other}}).spec["types"]["labels"]
    assert TypeRules.of("a", TypeRules(units)).column == "unit_type"


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (
            {},
            r"'magnitude': types needs units, the folder of a run with analysis=\[clusters\], <run>/supernodes, or a table of",
        ),
        ({"rates": {"critical": -1}}, "types.rates.critical is -1; it is a number, 0 or more"),
        ({"protect": {"critical": 2}}, "types.protect.critical is 2; it is a share of the units of a type, from 0 to 1"),
        (
            {"rate": {}},
            "criterion 'magnitude': types has rate; it takes units, column, rates, protect, first, permuted. Did you mean 'rates'",
        ),
        ({"permuted": 1}, "types.permuted is 1; it is true or false"),
        ({"column": "type"}, "the table of units has no column 'type'.*Run analyze.py with analysis=.clusters."),
        ({"rates": {"criticl": 1}}, "no unit has the unit_type 'criticl'. Did you mean 'critical'. There are background, critical"),
    ],
)
def test_wrong_rules_are_named(net, units, rules, words):
    given = {"units": units} if rules else {}
    with pytest.raises(ValueError, match=words):
        nl.prune(net, {"terms": {"magnitude": 1.0}, "types": given | rules}, 0.5, example_inputs=torch.ones(2, 6))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.loc[["4"]],
            "group '0' has no unit_type in the table of units, which has 4: measure its layers, or leave it out",
        ),
        (
            lambda t: t.drop(index=("0", 3)),
            "group '0' has 40 units, layer '0' in the table of units has 39: the types are of another",
        ),
        (lambda t: t.reset_index(drop=True), r"the table of units has no units: its index is \(layer, unit\)"),
    ],
)
def test_labels_that_do_not_fit_the_network_are_named(net, units, change, words):
    with pytest.raises(ValueError, match=words):
        pruned(net, units=change(units))
