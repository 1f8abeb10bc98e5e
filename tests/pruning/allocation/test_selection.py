import math

import numpy as np
import pandas as pd
import pytest
import torch

from nodelens.network.groups import PruningGroup
from nodelens.pruning.allocation.selection import by_group, select, ties
from nodelens.pruning.schedule import kept_shares
from nodelens.statistics.sample_hash import generator

SIGNED = [-9.0, -1.0, 0.5, 3.0]


def group(name, n):
    return PruningGroup(name, "ffn", n, ())


def scores(**columns):
    rows = [(name, unit, float(x)) for name, values in columns.items() for unit, x in enumerate(values)]
    return pd.DataFrame(rows, columns=["group", "unit", "score"]).set_index(["group", "unit"])["score"]


def chosen(values, count, **options):
    return select([group("a", len(values))], scores(a=values), {"a": len(values) - count}, **options).get("a", [])


@pytest.mark.parametrize(("mode", "gone"), [("low", [0, 1]), ("high", [2, 3])])
def test_the_sign_counts_not_the_size(mode, gone):
    assert chosen(SIGNED, 2, mode=mode) == gone


@pytest.mark.parametrize("mode", ["low", "high", "random"])
@pytest.mark.parametrize("seed", range(4))
def test_protected_units_stay_and_first_ones_are_removed_in_every_mode(mode, seed):
    gone = chosen([5, 1, 4, 2, 3], 3, mode=mode, seed=seed, protected={"a": [1, 0]}, first={"a": [4, 0]})
    assert 4 in gone
    assert not {0, 1} & set(gone)
    assert chosen([5, 1, 4, 2, 3], 1, mode=mode, seed=seed, first={"a": [2]}) == [2]


def test_within_first_units_the_score_decides():
    assert chosen([5, 1, 4, 2], 2, first={"a": [0, 2, 3]}) == [2, 3]
    assert chosen([5, 1, 4, 2], 2, first={"a": [0, 2, 3]}, mode="high") == [0, 2]


@pytest.mark.parametrize(("policy", "mode", "gone"), [("drop", "low", [1, 2]), ("keep", "low", [0, 3]), ("drop", "high", [1, 2])])
def test_units_without_a_score_are_removed_first_or_last(policy, mode, gone):
    assert chosen([3, math.nan, math.nan, 1], 2, nan_policy=policy, mode=mode) == gone


def test_units_without_a_score_are_removed_after_first_ones_and_stay_if_protected():
    values = [3, math.nan, 1, math.nan]
    assert chosen(values, 2, first={"a": [0]}, protected={"a": [3]}) == [0, 1]
    assert {0, 2} < set(chosen(values, 3, nan_policy="keep"))


def test_ties_are_broken_by_the_seed_and_the_group():
    plans = {(seed, name): tuple(select([group(name, 20)], scores(**{name: [1] * 20}), {name: 10}, seed=seed)[name])
             for seed in range(3) for name in ("a", "b")}  # fmt: skip
    assert len(set(plans.values())) == 6
    assert plans[0, "a"] == tuple(chosen([1] * 20, 10))
    assert plans[0, "a"] != tuple(range(10))


@pytest.mark.parametrize(
    ("values", "count", "options", "tied"),
    [
        ([0, 0, 0, 1, 2], 2, {}, 3),
        ([0, 0, 0, 1, 2], 3, {}, None),  # the cut lies between two scores
        ([0, 0, 1, 1, 1, 2], 3, {}, 3),
        ([0, 0, 1, 1, 1, 2], 3, {"mode": "high"}, 3),
        ([0, 0, 1, 1, 1, 2], 3, {"mode": "random"}, None),
        ([1, 1, 1, 1], 2, {"protected": {"a": [0]}}, 3),
        ([1, 1, 1, 1], 2, {"removed": {"a": [0]}}, 3),
        ([1, 1, 1, 1], 2, {"removed": {"a": [0, 1]}}, None),  # nothing is left to choose
        ([math.nan, math.nan, 1, 2], 1, {}, 2),
        ([math.nan, math.nan, 1, 2], 2, {}, None),
        ([math.nan, math.nan, 1, 2], 3, {"nan_policy": "keep"}, 2),
    ],
)
def test_ties_at_the_cut_are_counted(values, count, options, tied):
    """Exactly the units of the count differ between seeds."""
    groups, table = [group("a", len(values))], scores(a=values)
    plans = [select(groups, table, {"a": len(values) - count}, seed=seed, **options) for seed in range(60)]
    found = {str(ties(groups, table, plan, seed=seed, **options)) for seed, plan in enumerate(plans)}
    assert found == {str({} if tied is None else {"a": tied})}
    if options.get("mode") != "random":
        gone = [set(plan["a"]) for plan in plans]
        assert len(set.union(*gone) - set.intersection(*gone)) == (tied or 0)


def test_random_reads_no_score_and_no_global_generator():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    a = select([group("a", 50), group("b", 50)], None, {"a": 25, "b": 25}, mode="random")
    assert (torch.get_rng_state() == before[0]).all()
    assert (np.random.get_state()[1] == before[1]).all()
    torch.manual_seed(7)
    assert a == select([group("b", 50), group("a", 50)], scores(a=range(50), b=range(50)), {"a": 25, "b": 25}, mode="random")
    assert a["a"] != a["b"]
    assert a != select([group("a", 50), group("b", 50)], None, {"a": 25, "b": 25}, mode="random", seed=1)


def test_random_takes_every_unit_equally_often():
    counts = np.zeros(10)
    for seed in range(400):
        counts[select([group("a", 10)], None, {"a": 7}, mode="random", seed=seed)["a"]] += 1
    assert abs(counts - 120).max() < 5 * math.sqrt(400 * 0.3 * 0.7)


def test_a_permutation_of_the_units_permutes_the_plan():
    values = torch.randn(30, generator=generator(0, "values")).tolist()
    order = torch.randperm(30, generator=generator(0, "order")).tolist()
    for mode in ("low", "high"):
        gone = chosen(values, 11, mode=mode)
        assert chosen([values[u] for u in order], 11, mode=mode) == sorted(order.index(u) for u in gone)


def test_the_order_of_rows_and_groups_does_not_matter():
    one = scores(a=[3, 1, 2], b=[1, 2, 3])
    assert select([group("a", 3), group("b", 3)], one, {"a": 1, "b": 2}) == {"a": [1, 2], "b": [0]}
    assert select([group("b", 3), group("a", 3)], one[::-1], {"b": 2, "a": 1}) == {"a": [1, 2], "b": [0]}


@pytest.mark.parametrize("mode", ["low", "high", "random"])
def test_plans_are_nested_though_the_scores_change(mode):
    gone = []
    for step in range(1, 8):
        values = torch.randn(10, generator=generator(step, "values"))
        values[gone] = math.nan if step % 2 else 100.0
        now = chosen(values.tolist(), step, mode=mode, seed=step, removed={"a": gone}, nan_policy="keep")
        assert len(now) == step
        assert set(gone) <= set(now)
        gone = now


def test_groups_that_lose_nothing_are_absent():
    assert select([group("a", 2), group("b", 2), group("c", 2)], scores(a=[1, 2]), {"a": 1, "b": 2}) == {"a": [0]}
    assert select([group("a", 1)], scores(a=[1]), {"a": 1}) == {}


def test_a_generator_belongs_to_seed_and_words():
    def first(*words):
        return torch.rand(1, generator=generator(*words)).item()

    assert len({first(0, "ab", "c"), first(0, "a", "bc"), first(0, "abc"), first(1, "abc"), first(0, "abc", "")}) == 5
    assert first(3, "layer1.0.conv1") == first(3, "layer1.0.conv1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "lowest"}, "mode is 'lowest': low removes the smallest scores"),
        ({"nan_policy": "remove"}, "nan_policy is 'remove': units without a score are removed first"),
        ({"protected": {"b": [0]}}, "protected names the group 'b'.* There are a"),
        ({"first": {"a": [4]}}, "first names unit 4 of group 'a', which has the units 0 to 3"),
        ({"removed": {"a": [-1]}}, "removed names unit -1 of group 'a'"),
        ({"removed": {"a": [1]}, "protected": {"a": [1]}}, "group 'a': unit 1 is protected, and an earlier plan has removed it"),
        ({"removed": {"a": [0, 1, 2]}}, "group 'a': 2 of 4 units are to be removed, but an earlier plan has removed 3"),
        ({"protected": {"a": [0, 1, 2]}}, "group 'a': 2 of 4 units are to be removed, but 3 are protected"),
    ],
)
def test_what_does_not_fit_stops_the_run(options, words):
    with pytest.raises(ValueError, match=words):
        chosen(SIGNED, 2, **options)


def test_counts_and_scores_that_do_not_fit_stop_the_run():
    with pytest.raises(ValueError, match="group 'a' has 4 units, kept says 0: give 1 to 4"):
        chosen(SIGNED, 4)
    with pytest.raises(ValueError, match="group 'a' has 4 units, kept says 5"):
        chosen(SIGNED, -1)
    with pytest.raises(ValueError, match="kept names the group 'c'"):
        select([group("a", 4)], scores(a=SIGNED), {"c": 1})
    with pytest.raises(ValueError, match="group 'a' has the units 0 to 4, the scores have 4 rows for it"):
        by_group([group("a", 5)], scores(a=SIGNED))
    with pytest.raises(ValueError, match="group 'b' has the units 0 to 3, the scores have 0 rows for it"):
        by_group([group("b", 4)], scores(a=SIGNED))
    with pytest.raises(ValueError, match="scores are a series with the index"):
        select([group("a", 4)], None, {"a": 2})


def test_shares_that_stay_after_each_step():
    assert kept_shares(0.5, 4) == pytest.approx([0.875, 0.75, 0.625, 0.5])
    assert kept_shares(0.75, 2, "geometric") == pytest.approx([0.5, 0.25])
    assert kept_shares(0.8, 2, "cubic") == pytest.approx([1 - 0.8 * (1 - 0.125), 0.2])


@pytest.mark.parametrize("shape", ["linear", "geometric", "cubic"])
@pytest.mark.parametrize("amount", [0, 0.1, 0.3, 0.99])
def test_the_last_step_is_the_target_and_no_step_gives_back(shape, amount):
    for steps in (1, 2, 7):
        shares = kept_shares(amount, steps, shape)
        assert len(shares) == steps
        assert shares[-1] == 1 - amount
        assert shares == sorted(shares, reverse=True)
        assert shares[0] <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1.0, 2), "amount is 1.0"),
        ((0.5, 0), "steps is 0"),
        ((0.5, 2, "square"), "shape is 'square'; there are linear, geometric, cubic"),
    ],
)
def test_a_schedule_that_makes_no_sense_stops_the_run(arguments, words):
    with pytest.raises(ValueError, match=words):
        kept_shares(*arguments)
