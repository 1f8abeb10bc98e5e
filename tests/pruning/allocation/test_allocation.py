import itertools
import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from nodelens.app.checks import check
from nodelens.network.groups import GroupSlice, PruningGroup, identity
from nodelens.pruning.allocation.allocate import Allocation, allocate
from nodelens.pruning.allocation.densities import NORMALIZERS, scopes_of, shapes_of_groups
from nodelens.pruning.allocation.selection import select
from nodelens.statistics.sample_hash import generator

RANKED = ("global", "isomorphic", "lamp")
KINDS = (*RANKED, "uniform", "erk", "dict")
SHAPES = {"a": (12, 3, 3, 3), "b": (20, 12, 3, 3), "c": (7, 20), "d": (30, 7)}


def group(name, n, kind="ffn", **options):
    return PruningGroup(name, kind, n, (), **options)


FOUR = [group("a", 12, "channel"), group("b", 20, "channel"), group("c", 7), group("d", 30)]


def scores(**columns):
    rows = [(name, unit, float(x)) for name, values in columns.items() for unit, x in enumerate(values)]
    return pd.DataFrame(rows, columns=["group", "unit", "score"]).set_index(["group", "unit"])["score"]


def drawn(groups, seed=0, signed=False):
    def values(a):
        x = torch.randn(a.n, generator=generator(seed, a.name), dtype=torch.float64)
        return (x if signed else x.abs()) * (1 + len(a.name) + a.n)

    return scores(**{a.name: values(a) for a in groups})


def allocation(kind, **options):
    return Allocation(kind, shares={"a": 0.2, "[bc]": 0.4, "ffn": 0.7} if kind == "dict" else None, **options)


def chain(kept):
    """A toy network of fully connected layers: three inputs, the groups in sequence, ten classes."""
    widths = [3, *kept.values(), 10]
    return float(sum(m * n for m, n in itertools.pairwise(widths)) + 50)


def dearest(groups, step=1):
    dense = {a.name: a.n for a in groups}
    return max(chain(dense) - chain(dense | {a.name: a.n - step}) for a in groups if a.n > step)


def removed_by(groups, kept):
    return [a.n - kept[a.name] for a in groups]


def half_up(x):
    return math.floor(x + 0.5)


# uniform


@pytest.mark.parametrize("amount", [0, 0.01, 0.25, 0.5, 0.9, 0.99])
def test_uniform_is_exact_in_total_and_within_one_unit_in_each_group(amount):
    groups = [group(f"x{n}", n) for n in (1, 2, 3, 4, 5, 6, 7, 10, 50, 101)]
    lost = removed_by(groups, allocate(groups, None, amount))
    asked = [min(amount * a.n, a.n - 1) for a in groups]
    assert sum(lost) == half_up(sum(asked))
    assert all(abs(x - y) < 1 for x, y in zip(lost, asked, strict=True))
    alike = [group(name, 16) for name in "abcdefghi"]
    assert sorted(removed_by(alike, allocate(alike, None, 0.3))) == [4, 4, 5, 5, 5, 5, 5, 5, 5], "43.2 of 144"


def test_uniform_leaves_as_many_as_asked():
    assert allocate([group("a", 10), group("b", 2)], None, 0.9, allocation=Allocation(min_keep=3)) == {"a": 3, "b": 2}


def test_other_groups_compensate_where_caps_bind():
    groups = [group("a", 10), group("b", 10), group("c", 10)]
    assert allocate(groups, None, 0.4, protected={"b": range(10)}) == {"a": 4, "b": 10, "c": 4}
    assert allocate(groups, None, 0.4, removed={"b": range(8)}) == {"a": 8, "b": 2, "c": 8}


# budgets


@pytest.mark.parametrize("kind", [*RANKED, "erk", "dict"])
@pytest.mark.parametrize("mode", ["low", "high", "random"])
@pytest.mark.parametrize("amount", [0, 0.013, 0.25, 0.5, 0.8])
def test_units_are_exact(kind, mode, amount):
    kept = allocate(FOUR, drawn(FOUR), amount, allocation=allocation(kind), mode=mode, shapes=SHAPES)
    assert sum(removed_by(FOUR, kept)) == half_up(amount * 69)
    assert list(kept) == ["a", "b", "c", "d"]
    assert all(1 <= kept[a.name] <= a.n for a in FOUR)


@pytest.mark.parametrize("kind", RANKED)
def test_units_are_exact_whatever_floors_caps_and_protected_units(kind):
    for trial in range(30):
        draw = np.random.default_rng(trial)
        groups = [group(f"x{k}", int(draw.integers(1, 30))) for k in range(draw.integers(1, 6))]
        protected = {a.name: draw.permutation(a.n)[: draw.integers(0, a.n + 1)] for a in groups}
        options = {"min_keep": int(draw.integers(1, 4)), "max_remove": float(draw.choice([0.5, 0.8, 1]))}
        most = [
            max(0, min(math.floor(options["max_remove"] * a.n), a.n - max(options["min_keep"], len(protected[a.name]))))
            for a in groups
        ]
        total, amount = sum(a.n for a in groups), float(draw.uniform(0, 0.9))
        wanted = half_up(amount * total)

        def counts(amount, groups=groups, protected=protected, options=options):
            return removed_by(
                groups, allocate(groups, drawn(groups), amount, allocation=Allocation(kind, **options), protected=protected)
            )

        if wanted <= sum(most):
            lost = counts(amount)
            assert sum(lost) == wanted
            assert all(x <= m for x, m in zip(lost, most, strict=True))
        else:
            with pytest.raises(ValueError, match="allow an amount of") as error:
                counts(amount)
            largest = float(str(error.value).split(" amount of ")[1].split()[0])
            assert largest == pytest.approx(sum(most) / total, abs=2e-6)
            assert counts(largest) == most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("amount", [0, 0.1, 0.33, 0.5, 0.75])
def test_a_price_is_met_within_half_the_dearest_unit(kind, budget, amount):
    kept = allocate(FOUR, drawn(FOUR), amount, budget, allocation(kind), chain, shapes=SHAPES)
    dense = chain({a.name: a.n for a in FOUR})
    assert abs(chain(kept) - (1 - amount) * dense) <= dearest(FOUR) / 2
    if kind == "uniform":
        lost = np.array(removed_by(FOUR, kept))
        share = (lost / [a.n for a in FOUR]).mean()
        assert all(abs(x - share * a.n) <= 2 for x, a in zip(lost, FOUR, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_multiples_are_kept_and_the_budget_within_half_a_step(kind, multiple):
    groups = [group("a", 44), group("b", 64), group("c", 3), group("d", 30)]
    for amount in (0.1, 0.3, 0.45, 0.6):
        for budget in ("units", "params"):
            options = allocation(kind, multiple=multiple)
            kept = allocate(groups, drawn(groups), amount, budget, options, chain, shapes=SHAPES)
            assert all(kept[a.name] % multiple == 0 or kept[a.name] == a.n for a in groups)
            if budget == "params":
                dense = chain({a.name: a.n for a in groups})
                assert abs(chain(kept) - (1 - amount) * dense) <= dearest(groups, multiple) / 2
            elif kind == "uniform":
                assert all(abs(a.n - kept[a.name] - amount * a.n) <= multiple / 2 for a in groups)
            else:
                assert abs(sum(removed_by(groups, kept)) - half_up(amount * 141)) <= multiple / 2


def test_a_group_has_its_own_multiple_and_the_allocation_overrides_it():
    groups = [group("a", 40, multiple=16), group("b", 40), group("c", 6, multiple=8)]
    assert allocate(groups, None, 0.5) == {"a": 16, "b": 20, "c": 6}
    assert allocate(groups, None, 0.5, allocation=Allocation(multiple=3)) == {"a": 21, "b": 21, "c": 3}


def test_groups_of_equal_width_keep_equal_counts_under_a_multiple():
    groups = [group(name, 44, multiple=8) for name in "abcd"]
    assert set(allocate(groups, None, 0.5).values()) == {24}


@pytest.mark.parametrize(("kind", "largest"), [("uniform", 0.3), ("global", 0.3), ("erk", 0.3), ("dict", 0.3)])
def test_an_impossible_budget_states_the_largest_amount(kind, largest):
    groups = [group("a", 10), group("b", 20), group("c", 10)]
    options = allocation(kind, max_remove=0.3)
    with pytest.raises(ValueError, match=r"amount 0.5 of the units cannot be removed: .* allow an amount of 0.3 at most"):
        allocate(groups, drawn(groups), 0.5, allocation=options, shapes=SHAPES)
    kept = allocate(groups, drawn(groups), largest, allocation=options, shapes=SHAPES)
    assert kept == {"a": 7, "b": 14, "c": 7}


def test_an_impossible_price_states_the_largest_amount():
    dense, least = chain({a.name: a.n for a in FOUR}), chain({a.name: 1 for a in FOUR})
    with pytest.raises(ValueError, match="of the params cannot be removed") as error:
        allocate(FOUR, None, 0.99, "params", price=chain)
    largest = float(str(error.value).split(" amount of ")[1].split()[0])
    assert largest == pytest.approx(1 - least / dense, abs=2e-6)
    assert set(allocate(FOUR, None, largest, "params", price=chain).values()) == {1}


def test_repair_asks_for_few_prices():
    groups = [group(f"x{k}", 64) for k in range(300)]
    asked = []
    kept = allocate(groups, None, 0.37, "params", price=lambda kept: asked.append(1) or chain(kept))
    assert abs(chain(kept) - 0.63 * chain({a.name: 64 for a in groups})) <= dearest(groups) / 2
    assert set(kept.values()) <= {min(kept.values()), min(kept.values()) + 1}
    assert len(asked) < 80


# global


def brute_force(groups, table, count, normalize, mode="low", seed=0, min_keep=1):
    """One unit after another, the lowest normalized score of those that may go."""
    rows = []
    for a in groups:
        values = table[a.name].to_numpy()
        draws = torch.rand(a.n, generator=generator(seed, a.name), dtype=torch.float64).tolist()
        scale = {
            "raw": lambda s: s,
            "mean": lambda s: s / s.mean(),
            "z": lambda s: (s - s.mean()) / s.std(),
            "robust_z": lambda s: (s - np.median(s)) / (1.4826 * np.median(abs(s - np.median(s)))),
            "l2": lambda s: s / np.sqrt((s**2).sum()),
            "sum": lambda s: s / s.sum(),
            "rank": lambda s: pd.Series(s).rank().to_numpy() / len(s) - 0.5 / len(s),
            "minmax": lambda s: (s - s.min()) / (s.max() - s.min()),
            "lamp": lambda s: np.array([x**2 / (s[s >= x] ** 2).sum() for x in s]),
        }[normalize](values)
        rows += [(x if mode == "low" else -x, d, a.name) for x, d in zip(scale, draws, strict=True)]
    left = {a.name: a.n for a in groups}
    for _, _, name in sorted(rows):
        if count and left[name] > min_keep:
            left[name] -= 1
            count -= 1
    return left


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("mode", ["low", "high"])
def test_global_is_a_sort(normalize, mode):
    for amount in (0.2, 0.5, 0.8):
        kept = allocate(FOUR, drawn(FOUR), amount, allocation=Allocation("global", normalize), mode=mode)
        assert kept == brute_force(FOUR, drawn(FOUR), half_up(amount * 69), normalize, mode)


@pytest.mark.parametrize("values", [[1.0] * 20, [0, 1] * 10])
def test_ties_are_broken_by_the_seed_and_never_remove_a_whole_group(values):
    groups = [group(name, 20) for name in "abcd"]
    table = scores(**{a.name: values for a in groups})
    for normalize in ("raw", "mean", "minmax", "z", "lamp", "rank"):
        kept = allocate(groups, table, 0.25, allocation=Allocation("global", normalize))
        assert sum(kept.values()) == 60
        assert max(kept.values()) < 20
        assert min(kept.values()) > 8
    plans = [allocate(groups, table, 0.25, allocation=Allocation("global", "raw"), seed=seed) for seed in range(5)]
    assert plans[0] == brute_force(groups, table, 20, "raw")
    assert len({tuple(plan.values()) for plan in plans}) > 1


@pytest.mark.parametrize("normalize", ["mean", "z", "robust_z", "l2", "sum", "rank", "minmax", "lamp"])
def test_normalized_scores_do_not_depend_on_a_layer_s_scale(normalize):
    groups = [group("a", 20), group("b", 20)]
    table = drawn(groups)
    louder = table.where(table.index.get_level_values("group") != "a", table * 1000)
    assert allocate(groups, louder, 0.4, allocation=Allocation("global", normalize)) == allocate(
        groups, table, 0.4, allocation=Allocation("global", normalize)
    )


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_normalizing_keeps_the_order_of_signed_scores_and_answers_for_constant_ones(normalize):
    signed = np.array([-9, -1, 0.5, 3]) if normalize != "lamp" else np.array([0, 0.5, 1, 3])
    assert (np.diff(NORMALIZERS[normalize](signed)) > 0).all()
    for constant in (0.0, 0.1, 7.3):
        for width in (1, 3, 10):
            assert np.isfinite(NORMALIZERS[normalize](np.full(width, constant))).all()


def test_normalizers_by_hand():
    x = np.array([1.0, 2.0, 6.0])
    found = {name: normalize(x).tolist() for name, normalize in NORMALIZERS.items()}
    assert found["mean"] == pytest.approx([1 / 3, 2 / 3, 2])
    assert found["z"] == pytest.approx(np.array([-2, -1, 3]) / math.sqrt(14 / 3))
    assert found["robust_z"] == pytest.approx(np.array([-1, 0, 4]) / 1.4826)
    assert found["l2"] == pytest.approx(x / math.sqrt(41))
    assert found["sum"] == pytest.approx(x / 9)
    assert found["rank"] == pytest.approx([1 / 6, 3 / 6, 5 / 6])
    assert found["minmax"] == pytest.approx([0, 0.2, 1])
    assert found["lamp"] == pytest.approx([1 / 41, 4 / 40, 1])
    assert NORMALIZERS["robust_z"](np.array([0.0, 0, 0, 4])) == pytest.approx([0, 0, 0, 4 / 1.2533])  # the median deviation is 0
    assert NORMALIZERS["lamp"](np.array([1.0, 1, 1])) == pytest.approx([1 / 3, 1 / 2, 1])  # ties too end in 1


def test_rank_is_uniform_up_to_rounding():
    for amount in (0.1, 0.33, 0.5, 0.9):
        kept = allocate(FOUR, drawn(FOUR, signed=True), amount, allocation=Allocation("global", "rank"))
        assert all(abs(a.n - kept[a.name] - amount * a.n) <= 1 for a in FOUR)


def test_raw_scores_collapse_the_group_with_the_smallest_scores_to_its_floor():
    groups, table = [group("a", 8), group("b", 8)], scores(a=np.arange(8) / 100, b=np.arange(1, 9))
    assert allocate(groups, table, 0.5, allocation=Allocation("global", "raw")) == {"a": 1, "b": 7}
    assert allocate(groups, table, 0.5, allocation=Allocation("global", "raw", min_keep=3)) == {"a": 3, "b": 5}
    assert allocate(groups, table, 0.5, allocation=Allocation("global", "raw", max_remove=0.5)) == {"a": 4, "b": 4}
    assert allocate(groups, table, 0.5, allocation=Allocation("global", "mean"))["a"] > 2


def test_constraints_count_before_scores():
    groups = [group("a", 4), group("b", 4)]
    table = scores(a=[1, 2, 3, 4], b=[11, 12, math.nan, 14])
    raw = Allocation("global", "raw")
    assert allocate(groups, table, 0.25, allocation=raw) == {"a": 3, "b": 3}
    assert allocate(groups, table, 0.25, allocation=raw, nan_policy="keep") == {"a": 2, "b": 4}
    assert allocate(groups, table, 0.25, allocation=raw, first={"b": [0, 3]}) == {"a": 4, "b": 2}
    assert allocate(groups, table, 0.25, allocation=raw, nan_policy="keep", protected={"a": [0, 1, 2]}) == {"a": 3, "b": 3}
    assert allocate(groups, table, 0.25, allocation=raw, removed={"b": [0, 1]}) == {"a": 4, "b": 2}


def test_a_unit_s_price_divides_its_score():
    groups, table = [group("a", 4), group("b", 4)], scores(a=[1, 2, 3, 4], b=[2, 4, 6, 8])

    def price(kept):
        return 10.0 * kept["a"] + 40.0 * kept["b"]

    raw = Allocation("global", "raw", per_cost="params")
    assert allocate(groups, table, 0.5, allocation=raw, price=price) == {"a": 3, "b": 1}  # b: .05 .1 .15, a: .1 .2
    assert allocate(groups, table, 0.5, allocation=replace(raw, per_cost=None), price=price) == {"a": 1, "b": 3}
    cheap = allocate(groups, table, 0.5, "params", replace(raw, per_cost="macs"), price, unit_price=lambda kept: sum(kept.values()))
    assert cheap["a"] == 1
    assert abs(price(cheap) - 100) <= 20
    with pytest.raises(ValueError, match=r"group 'a' has negative scores after normalize='z'.*reverses their order"):
        allocate(groups, table, 0.5, allocation=replace(raw, normalize="z"), price=price)
    with pytest.raises(ValueError, match="per_cost=macs with a budget of params needs unit_price="):
        allocate(groups, table, 0.5, "params", replace(raw, per_cost="macs"), price)
    with pytest.raises(ValueError, match="a unit of group 'b' costs 0"):
        allocate(groups, table, 0.5, allocation=raw, price=lambda kept: kept["a"])


def test_in_mode_random_draws_stand_in_for_scores():
    one = allocate(FOUR, None, 0.4, allocation=Allocation("global", "raw"), mode="random")
    assert one == allocate(FOUR, drawn(FOUR), 0.4, allocation=Allocation("global", "raw"), mode="random")
    assert one != allocate(FOUR, None, 0.4, allocation=Allocation("global", "raw"), mode="random", seed=1)


# lamp, isomorphic, erk, dict


def test_lamp_by_hand():
    groups, table = [group("a", 3), group("b", 3)], scores(a=[3, 1, 2], b=[10, 10.5, 30])
    # a: 1/14, 4/13, 1; b: 100/1110.25, 110.25/1010.25, 1
    for count, kept in enumerate([(3, 3), (2, 3), (2, 2), (2, 1), (1, 1)]):
        for mode in ("low", "high", "random"):
            found = allocate(groups, table, count / 6, allocation=Allocation("lamp"), mode=mode)
            assert (found["a"], found["b"]) == kept, "the counts do not depend on the mode"
    with pytest.raises(ValueError, match="lamp squares the scores, which misorders negative ones"):
        allocate(groups, -table, 0.5, allocation=Allocation("lamp"))


def test_isomorphic_compares_within_scopes_only():
    groups = [group("a", 10), group("b", 10), group("c", 4), group("d", 4), group("e", 4, "head")]
    table = scores(a=range(10), b=range(100, 110), c=[1, 2, 3, 4], d=[5, 6, 7, 8], e=[1, 2, 3, 4])
    kept = allocate(groups, table, 0.5, allocation=Allocation("isomorphic", "raw"))
    assert kept == {"a": 1, "b": 9, "c": 1, "d": 3, "e": 2}
    shapes = {"a": (10, 3), "b": (10, 4), "c": (4, 2), "d": (4, 2), "e": (4, 2)}
    kept = allocate(groups, table, 0.5, allocation=Allocation("isomorphic", "raw"), shapes=shapes)
    assert kept == {"a": 5, "b": 5, "c": 1, "d": 3, "e": 2}
    assert len(set(scopes_of(groups))) == 3


def test_isomorphic_with_one_scope_is_global():
    groups = [group(name, 25) for name in "abc"]
    for amount in (0.1, 0.5, 0.77):
        assert allocate(groups, drawn(groups), amount, allocation=Allocation("isomorphic")) == allocate(
            groups, drawn(groups), amount, allocation=Allocation("global")
        )


def test_erk_by_hand():
    groups = [group("a", 40), group("b", 80)]
    shapes = {"a": (40, 20), "b": (80, 40)}  # densities 60/800 = 0.075 and 120/3200 = 0.0375: two to one
    assert allocate(groups, None, 0.5, allocation=Allocation("erk"), shapes=shapes) == {"a": 30, "b": 30}  # 80 e + 80 e = 60
    assert allocate(groups, None, 0.25, allocation=Allocation("erk"), shapes=shapes) == {"a": 40, "b": 50}  # a is saturated
    kernels = {"a": (40, 20, 3, 3), "b": (80, 40, 1, 1)}  # 66/7200 and 122/3200, 1 to 4.159
    kept = allocate(groups, None, 0.75, allocation=Allocation("erk"), shapes=kernels)
    e = 30 / (40 * 66 / 7200 + 80 * 122 / 3200)
    assert kept == {"a": half_up(e * 40 * 66 / 7200), "b": half_up(e * 80 * 122 / 3200)}
    with pytest.raises(ValueError, match="b has none: give shapes"):
        allocate(groups, None, 0.5, allocation=Allocation("erk"), shapes={"a": (40, 20)})


def test_shapes_are_out_in_kernel_however_they_are_stored():
    model = nn.ModuleDict({"fc": nn.Linear(3, 5), "conv": nn.Conv2d(2, 4, 3), "up": nn.ConvTranspose2d(2, 4, 3)})
    model["gpt"], model["experts"] = nn.Module(), nn.Module()
    model["gpt"].weight = nn.Parameter(torch.zeros(3, 7))  # GPT-2 stores (in, out)
    model["experts"].gate_up_proj = nn.Parameter(torch.zeros(6, 8, 3))

    def made(name, module, tensor, dim, n, entry=None):
        bias = GroupSlice(module, "bias", 0, identity(n), "producer")
        slices = (*([bias] if tensor == "weight" else []), GroupSlice(module, tensor, dim, identity(n), "producer", entry=entry))
        return PruningGroup(name, "ffn", n, slices)

    model["gpt"].bias = nn.Parameter(torch.zeros(7))
    groups = [
        made("fc", "fc", "weight", 0, 5),
        made("conv", "conv", "weight", 0, 4),
        made("up", "up", "weight", 1, 4),
        made("gpt", "gpt", "weight", 1, 7),
        made("expert", "experts", "gate_up_proj", 1, 8, 2),
    ]
    expected = {"fc": (5, 3), "conv": (4, 2, 3, 3), "up": (4, 2, 3, 3), "gpt": (7, 3), "expert": (8, 3)}
    assert shapes_of_groups(model, groups) == expected


def test_shares_by_name_pattern_and_kind():
    groups = [group("a1", 10), group("a2", 10), group("b", 20, "head"), group("c", 5, "kv_group")]
    given = {"a*": 0.4, "a2": 0.1, "head": 0.25}
    assert allocate(groups, None, None, allocation=Allocation("dict", shares=given)) == {"a1": 6, "a2": 9, "b": 15, "c": 5}
    assert allocate(groups, None, 0.4, allocation=Allocation("dict", shares=given)) == {"a1": 3, "a2": 8, "b": 11, "c": 5}
    with pytest.raises(
        ValueError, match=r"shares name 'd', which matches no group.* There are a1, a2, b, c, of the kinds ffn, head"
    ):
        allocate(groups, None, 0.1, allocation=Allocation("dict", shares={"d": 0.5}))
    with pytest.raises(ValueError, match=r"shares.b is 1.5"):
        allocate(groups, None, 0.1, allocation=Allocation("dict", shares={"b": 1.5}))
    with pytest.raises(ValueError, match="shares are all 0"):
        allocate(groups, None, 0.1, allocation=Allocation("dict", shares={"b": 0}))
    with pytest.raises(ValueError, match=r"shares remove 8 of the 20 units of group 'b'; .* allow 0 to 5"):
        allocate(groups, None, None, allocation=Allocation("dict", shares={"b": 0.4}, max_remove=0.25))


# equal counts, and plans in steps


@pytest.mark.parametrize("kind", KINDS)
def test_groups_with_equal_counts_keep_the_same_number(kind):
    experts = [group(f"{layer}{k}", 32, "moe_ffn", equal_count=layer, multiple=8) for layer in "ab" for k in range(4)]
    groups = [*experts, group("d", 40)]
    shapes = {a.name: (a.n, 3 + len(a.name)) for a in groups}
    shares = Allocation("dict", shares={"a*": 0.5, "b*": 0.2, "d": 0.7}) if kind == "dict" else Allocation(kind)
    for budget, price in (("units", None), ("params", lambda kept: 5.0 * sum(kept.values()))):
        kept = allocate(groups, drawn(groups), 0.4, budget, shares, price, shapes=shapes)
        for layer in "ab":
            assert len({kept[f"{layer}{k}"] for k in range(4)}) == 1
            assert kept[f"{layer}0"] % 8 == 0
        if kind == "uniform" and budget == "units":  # rounds in each group
            assert set(kept.values()) == {16, 24}
        else:
            assert abs(sum(kept.values()) - 0.6 * 296) <= 4 * 8 / 2


def test_experts_get_the_mean_of_their_counts():
    groups = [group("e0", 4, equal_count="e"), group("e1", 4, equal_count="e"), group("f", 4)]
    table = scores(e0=[1, 2, 3, 4], e1=[101, 102, 103, 104], f=[50, 51, 52, 53])
    assert allocate(groups, table, 4 / 12, allocation=Allocation("global", "raw")) == {"e0": 2, "e1": 2, "f": 4}
    # three of e0 and one of f would go: 1.5 each, rounded to 2, is the budget already
    with pytest.raises(ValueError, match="the groups of e have to keep equal counts and differ in width: e0 4, e1 5"):
        allocate([group("e0", 4, equal_count="e"), group("e1", 5, equal_count="e")], None, 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", ["units", "params"])
def test_plans_are_nested_and_the_last_meets_the_target(kind, budget):
    removed = {}
    for step, amount in enumerate((0.15, 0.3, 0.45, 0.6)):
        table = drawn(FOUR, seed=step)
        for name, units in removed.items():
            table.loc[[(name, u) for u in units]] = math.nan
        kept = allocate(FOUR, table, amount, budget, allocation(kind), chain, removed=removed, shapes=SHAPES, seed=step)
        now = select(FOUR, table, kept, removed=removed, seed=step)
        assert all(set(units) <= set(now[name]) for name, units in removed.items())
        removed = now
    if budget == "units":
        assert abs(sum(map(len, removed.values())) - half_up(0.6 * 69)) <= (2 if kind == "uniform" else 0)
    else:
        assert abs(chain(kept) - 0.4 * chain({a.name: a.n for a in FOUR})) <= dearest(FOUR) / 2


def test_an_earlier_plan_that_took_more_stays():
    kept = allocate(FOUR, drawn(FOUR), 0.1, allocation=Allocation("global"), removed={"a": range(9)})
    assert removed_by(FOUR, kept) == [9, 0, 0, 0]
    with pytest.raises(
        ValueError, match="group 'a' has already lost more units than min_keep, max_remove and protected units allow"
    ):
        allocate(FOUR, None, 0.5, allocation=Allocation(max_remove=0.5), removed={"a": range(9)})


@pytest.mark.parametrize("kind", RANKED)
def test_relabelled_units_relabel_the_plan(kind):
    table, order = drawn(FOUR), {a.name: torch.randperm(a.n, generator=generator(1, a.name)).tolist() for a in FOUR}
    moved = scores(**{a.name: table[a.name].to_numpy()[order[a.name]] for a in FOUR})
    kept = allocate(FOUR, table, 0.4, allocation=Allocation(kind))
    assert kept == allocate(FOUR, moved, 0.4, allocation=Allocation(kind))
    before, after = select(FOUR, table, kept), select(FOUR, moved, kept)
    assert {name: sorted(order[name][u] for u in units) for name, units in after.items()} == before


# words


def test_a_config_builds_an_allocation():
    node = {
        "_target_": "nodelens.pruning.allocation.allocate.Allocation",
        "kind": "global",
        "normalize": "lamp",
        "per_cost": None,
        "multiple": 8,
    }
    check(node, "allocation")
    with pytest.raises(ValueError, match=r"allocation.kind is 'globl'"):
        check(node | {"kind": "globl"}, "allocation")
    assert asdict(Allocation())["kind"] == "uniform"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "globl"}, "allocation.kind is 'globl'; there are uniform, global"),
        ({"kind": "global", "normalize": "max"}, "allocation.normalize is 'max'; there are raw, mean"),
        ({"kind": "global", "per_cost": "units"}, "allocation.per_cost is 'units'; there are None, params, macs"),
        ({"kind": "dict"}, "dict needs shares, the others do not read them"),
        ({"kind": "erk", "shares": {"a": 0.5}}, "dict needs shares, the others do not read them"),
        ({"per_cost": "macs"}, "use per_cost with global, isomorphic, lamp"),
        ({"min_keep": 0}, "min_keep is 0, multiple None: both have to be at least 1"),
        ({"multiple": 0}, "multiple 0: both have to be at least 1"),
        ({"max_remove": 1.2}, "max_remove is 1.2: a share of a group, from 0 to 1"),
    ],
)
def test_an_allocation_that_makes_no_sense_stops_the_run(options, words):
    with pytest.raises(ValueError, match=words):
        Allocation(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"amount": 1.0}, "amount is 1.0: a share of the units to remove, from 0 up to"),
        ({"amount": -0.1}, "amount is -0.1"),
        ({"amount": math.nan}, "amount is nan"),
        ({"amount": None}, "allocation 'uniform' needs an amount; only dict"),
        ({"amount": 0.5, "budget": "flops"}, "budget is 'flops'; there are units, params, macs"),
        ({"amount": 0.5, "budget": "macs"}, "a budget of macs needs price="),
        ({"amount": 0.5, "budget": "macs", "price": lambda kept: 0}, "the dense model has 0 macs"),
        ({"amount": 0.5, "allocation": Allocation("global")}, "scores are a series with the index"),
    ],
)
def test_what_does_not_fit_stops_the_run(options, words):
    with pytest.raises(ValueError, match=words):
        allocate(FOUR, None, **options)


def test_infinite_scores_are_ranked_and_not_normalized():
    groups, table = [group("a", 3), group("b", 3)], scores(a=[-math.inf, 1, 2], b=[1, 2, math.inf])
    assert allocate(groups, table, 1 / 6, allocation=Allocation("global", "raw")) == {"a": 2, "b": 3}
    with pytest.raises(ValueError, match="group 'a' has infinite scores, which 'mean' cannot normalize: use rank or raw"):
        allocate(groups, table, 1 / 6, allocation=Allocation("global"))
