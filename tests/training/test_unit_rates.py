"""Learning rates by the type of a unit in fine-tuning: equal to parameter groups, for SGD and Adam, sliced and masked."""

import copy

import pandas as pd
import pytest
import torch
from torch import nn

import nodelens as nl
from nodelens.pruning.criteria.type_rules import TypeRules
from nodelens.training.unit_rates import scaled_updates, update_factors


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def table(kinds_0, kinds_2):
    index = [("0", u) for u in range(6)] + [("2", u) for u in range(5)]
    index = pd.MultiIndex.from_tuples(index, names=["layer", "unit"])
    return pd.DataFrame({"unit_type": [*kinds_0, *kinds_2]}, index=index)


def batches(n=6):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 4, generator=g), torch.randint(3, (16,), generator=g)) for _ in range(n)]


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_scaled_updates_are_those_of_a_parameter_group_with_that_rate(kind):
    def optimizer(groups):
        if kind == "sgd":
            return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)

    rate = 0.1 if kind == "sgd" else 0.01
    plain, scaled = network(), network()
    reference = optimizer(
        [{"params": plain[0].parameters(), "lr": rate * 0.25}, {"params": [*plain[2].parameters(), *plain[4].parameters()]}]
    )
    other = optimizer(scaled.parameters())
    factors = {"0.weight": torch.tensor([[0.25]]), "0.bias": torch.tensor([0.25])}
    for x, y in batches():
        for net, step in ((plain, reference), (scaled, other)):
            step.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            with scaled_updates(net, factors if net is scaled else {}):
                step.step()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_factors_lie_at_the_rows_of_the_units_that_are_left():
    net, x = network(), torch.ones(2, 4)
    groups = nl.find_groups(net, x)
    rules = TypeRules(table("aabbcc", "aabbc"), rates={"a": 0.0, "b": 0.5})
    whole = update_factors(net, groups, rules, {"0": [1, 2]}, sliced=False)
    assert whole["0.weight"].flatten().tolist() == [0, 0, 0.5, 0.5, 1, 1]
    assert whole["0.weight"].shape == (6, 1)
    assert whole["2.bias"].tolist() == [0, 0, 0.5, 0.5, 1]
    assert set(whole) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    small = nl.prune(net, {"0": torch.tensor([9.0, 0, 1, 9, 9, 9]), "2": torch.arange(5.0)}, 0.2, example_inputs=x, scope="0")
    removed = small.plan.removed
    cut = update_factors(small.model, groups, rules, removed, sliced=True)
    kept = [u for u in range(6) if u not in removed["0"]]
    assert cut["0.bias"].tolist() == [[0, 0, 0.5, 0.5, 1, 1][u] for u in kept]
    assert cut["0.weight"].shape == (len(kept), 1)


@pytest.mark.parametrize("apply", ["slice", "mask"])
def test_units_with_a_rate_of_zero_stay_as_they_were(apply):
    net, data = network(), batches()
    kinds = table("ccbbbb", "ccbbb")
    tune = nl.Finetune(data, data, epochs=1, lr=0.2, types={"units": kinds, "rates": {"c": 0.0}})
    scores = {"0": torch.tensor([9.0, 9, 0, 5, 5, 5]), "2": torch.tensor([9.0, 9, 5, 5, 0])}
    found = nl.prune(net, scores, 0.17, data=data, finetune=tune, apply=apply)
    assert found.plan.removed == {"0": [2], "2": [4]}
    assert found.finetuned["best_epoch"] == 1, "a training that does not improve shows nothing"
    torch.testing.assert_close(found.model[0].weight[:2], net[0].weight[:2], rtol=0, atol=0)
    assert not torch.equal(found.model[0].weight[-1], net[0].weight[-1])
    assert not torch.equal(found.model[4].weight[:, :2], net[4].weight[:, :2])  # readers of the units learn


def test_the_tuning_that_was_given_is_not_changed():
    net, data = network(), batches(2)
    tune = nl.Finetune(data, data, epochs=1, types={"units": table("abbbbb", "abbbb"), "rates": {"a": 0.1}})
    before = copy.copy(tune.factors)
    nl.prune(net, "magnitude", 0.2, data=data, finetune=tune)
    assert tune.factors == before == {}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d: nl.Finetune(d, d, types={"rates": {"a": 1}}), "finetune: types needs units, the folder of a run"),
        (
            lambda d: nl.Finetune(d, d, types={"units": table("a" * 6, "a" * 5)}),
            "fine-tuning reads units, column and rates of types: give rates, such as {critical: 0.1}, and no others",
        ),
        (
            lambda d: nl.Finetune(d, d, types={"units": table("a" * 6, "a" * 5), "rates": {"a": 1}})(network(), lambda m: None),
            "types= needs the units of a pruning: give Finetune",
        ),
        (
            lambda d: nl.prune(
                network(),
                "magnitude",
                0.2,
                data=d,
                finetune=nl.Finetune(d, d, types={"units": table("a" * 6, "a" * 5).loc[["0"]], "rates": {"a": 1}}),
            ),
            "group '2' has no unit_type in the table of units, which has 0",
        ),
    ],
)
def test_rates_without_units_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(batches(2))
