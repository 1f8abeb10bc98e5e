"""One pass against slow twins: the same numbers from all rows at once, in float64."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from compare import close
from nets import Mixed, Tokens, batches, build, images
from torch import nn
from torch.nn import functional

import nodelens as nl
from nodelens.metrics import get_metric
from nodelens.metrics.sets import metric_set
from nodelens.network.find_layers import find_layers
from nodelens.statistics.sample_hash import content_hashes, mix

LAYERS = ["stem", "grouped", "dilated", "up", "point", "head"]
FIRING = ["stem", "grouped", "dilated", "up"]  # a ReLU follows


def outputs_of(net, x, names=LAYERS):
    seen = {}
    handles = [
        net.get_submodule(n).register_forward_hook(lambda m, a, o, n=n: seen.__setitem__(n, (a[0].clone(), o.clone())))
        for n in names
    ]
    with torch.no_grad():
        logits = net(x)
    for handle in handles:
        handle.remove()
    return seen, logits


def rows(t):
    return t.movedim(1, -1).reshape(-1, t.shape[1]) if t.ndim == 4 else t


@pytest.fixture(scope="module")
def net():
    return build(Mixed)


@pytest.fixture(scope="module")
def result(net):
    return nl.analyze(net, batches(*images(), 16))


def test_every_unit_of_every_layer_has_a_row_and_what_is_never_called_is_said(net, result):
    assert list(dict.fromkeys(result.units.index.get_level_values("layer"))) == LAYERS
    assert len(result.units) == 8 + 12 + 12 + 6 + 5 + 4
    assert result.metadata["never_called"] == ["unused"]
    assert result.metadata["outputs"] == ["head"]
    assert not result.units.isna().any().any()
    assert result.metadata["missing"] == []
    assert {f"{m}_se" for m in metric_set("default") if m not in ("magnitude", "effective_rank", "participation_ratio")} <= set(
        result.units.columns
    )


def test_activation_metrics_are_those_of_all_rows(net, result):
    seen, _ = outputs_of(net.double(), images(dtype=torch.float64)[0])
    for name in LAYERS:
        y, table = rows(seen[name][1]), result.units.loc[name]
        fired = rows(net.bn(seen[name][1]).detach().relu()) if name == "stem" else y.relu() if name in FIRING else y
        for column, truth in (
            ("activation_mean", y.abs().mean(0)),
            ("activation_variance", y.var(0)),
            ("activation_rms", y.square().mean(0).sqrt()),
            ("zero_fraction", (fired == 0).double().mean(0)),
        ):
            np.testing.assert_allclose(table[column], truth, rtol=2e-6, atol=1e-9, err_msg=f"{name} {column}")
    net.float()


@pytest.mark.parametrize("name", ["stem", "grouped", "dilated", "point"])
def test_rayleigh_quotient_is_the_unfold_definition(net, name):
    result = nl.analyze(
        net.double(),
        batches(*images(dtype=torch.float64), 17),
        {"raw": get_metric("rq", relative=False), "rq": get_metric("rq")},
        name,
    )
    x = outputs_of(net, images(dtype=torch.float64)[0])[0][name][0]
    module = net.get_submodule(name)
    net.float()
    padding = (
        [(0, 0), (0, 0)]
        if module.padding == 0
        else [(2, 2), (1, 1)]
        if module.padding == "same"
        else [(p, p) for p in module.padding]
    )
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, (*padding[1], *padding[0]), mode=mode)
    patches = functional.unfold(x, module.kernel_size, module.dilation, 0, module.stride).movedim(1, -1).flatten(0, 1)
    w = module.weight.detach().double().flatten(1)
    per_group, units = w.shape[1], len(w) // module.groups
    for unit in range(len(w)):
        k = unit // units
        c = torch.cov(patches[:, k * per_group : (k + 1) * per_group].T)
        raw = float(w[unit] @ c @ w[unit] / w[unit].square().sum())
        assert result.units.loc[(name, unit), "raw"] == pytest.approx(raw, rel=1e-10)
        assert result.units.loc[(name, unit), "rq"] == pytest.approx(raw / float(c.trace()), rel=1e-10)


def test_rayleigh_quotient_of_a_transposed_convolution_sees_the_spread_input(net):
    found = nl.analyze(net.double(), batches(*images(dtype=torch.float64), 17), ["rq"], "up").units["rq"]
    x = outputs_of(net, images(dtype=torch.float64)[0])[0]["up"][0]
    up = net.up
    net.float()
    spread = x.new_zeros(*x.shape[:2], 2 * x.shape[2] - 1, 2 * x.shape[3] - 1)
    spread[:, :, ::2, ::2] = x
    spread = functional.pad(spread, (1, 2, 1, 2))  # kernel - 1 - padding, and output_padding after
    for unit in range(6):
        k = unit // 3
        patches = functional.unfold(spread[:, 6 * k : 6 * k + 6], 3).movedim(1, -1).flatten(0, 1)
        w = up.weight.detach().double()[6 * k : 6 * k + 6, unit % 3].flip(1, 2).flatten()
        c = torch.cov(patches.T)
        assert found.loc[("up", unit)] == pytest.approx(float(w @ c @ w / w.square().sum() / c.trace()), rel=1e-10)


def test_synergy_and_redundancy_are_a_double_loop_over_all_pairs(net):
    x, labels = images(dtype=torch.float64)
    result = nl.analyze(net.double(), batches(x, labels, 17), ["synergy", "redundancy"])
    seen, logits = outputs_of(net.double(), x)
    net.float()
    own = logits.gather(1, labels[:, None])[:, 0]
    z = own - logits.scatter(1, labels[:, None], -math.inf).amax(1)
    for name in LAYERS:
        means = seen[name][1].flatten(2).mean(2) if seen[name][1].ndim == 4 else seen[name][1]
        every = rows(seen[name][1])
        for i, (loop, column) in itertools.product(
            range(min(4, means.shape[1])), ((synergy_loop, "synergy"), (redundancy_loop, "redundancy"))
        ):
            truth = loop(means if column == "synergy" else every, z, i)
            assert result.units.loc[(name, i), column] == pytest.approx(truth, rel=1e-8, abs=1e-12), (name, column)


def synergy_loop(y, z, i):
    def information(*columns):
        c = torch.cov(torch.stack([*columns, z]))
        return 0.5 * math.log(float(torch.det(c[:-1, :-1]) * c[-1, -1] / torch.det(c)))

    pairs = [information(y[:, i], y[:, j]) - max(information(y[:, i]), information(y[:, j])) for j in range(y.shape[1]) if j != i]
    return sum(pairs) / len(pairs)


def redundancy_loop(y, z, i):
    pairs = [-0.5 * math.log(1 - float(torch.corrcoef(y[:, [i, j]].T)[0, 1]) ** 2) for j in range(y.shape[1]) if j != i]
    return sum(pairs) / len(pairs)


def test_class_information_and_taylor_are_their_definitions(net):
    x, labels = images(dtype=torch.float64)
    result = nl.analyze(
        net.double(),
        batches(x, labels, 17),
        {"taylor": get_metric("taylor"), "class_mi": get_metric("class_mi", method="gaussian")},
    )
    values, _ = outputs_of(net, x)
    gates = {n: torch.ones(len(x), values[n][1].shape[1], dtype=torch.float64, requires_grad=True) for n in LAYERS}

    def gated(name):
        return lambda m, a, o: o * gates[name].reshape(*gates[name].shape, *[1] * (o.ndim - 2))

    handles = [net.get_submodule(n).register_forward_hook(gated(n)) for n in LAYERS]
    functional.cross_entropy(net(x), labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    net.float()
    net.zero_grad()
    for name in LAYERS:
        y, q = values[name][1], gates[name].grad  # dL/d(gate) is the sum of y dL/dy over positions
        np.testing.assert_allclose(result.units.loc[name]["taylor"], q.square().mean(0), rtol=1e-9, err_msg=name)
        m = y.flatten(2).mean(2) if y.ndim == 4 else y
        within = sum((labels == c).double().mean() * m[labels == c].var(0).log() for c in range(4))
        np.testing.assert_allclose(
            result.units.loc[name]["class_mi"], 0.5 * (m.var(0).log() - within), rtol=1e-9, atol=1e-12, err_msg=name
        )


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 7, 64])  # 1 in float64 below
def test_batch_size_changes_no_column_of_any_table(net, result, size):
    other = nl.analyze(net, batches(*images(), size))
    values = [c for c in result.units if not c.endswith("_se")]
    close(other.layers[["effective_rank", "participation_ratio"]], result.layers[["effective_rank", "participation_ratio"]], 1e-5)
    close(other.units[values].iloc[:-4], result.units[values].iloc[:-4], 1e-5)
    # the forward's own float32 rounding differs with the batch, and shows in differences of nearly equal numbers: standard
    # errors, and the head, whose units vary little about a large mean
    close(other.units, result.units, 1e-4)
    close(other.layers, result.layers, 1e-4)


def test_batch_size_changes_nothing_in_float64(net):
    found = [nl.analyze(net.double(), batches(*images(dtype=torch.float64), size)) for size in (1, 7, 64)]
    net.float()
    for other in found[1:]:
        close(other.units, found[0].units, 1e-9)
        close(other.layers, found[0].layers, 1e-9)


def test_order_of_the_data_changes_nothing(net, result):
    x, y = images()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    close(nl.analyze(net, batches(x[order], y[order], 16)).units, result.units, 5e-5)


def test_standard_errors_are_the_jackknife_s(net):
    x, y = images(dtype=torch.float64)
    net.double()
    found = nl.analyze(net, batches(x, y, 16), ["activation_variance"], "point", groups=4)
    order = mix(content_hashes(x), 0).argsort()  # a list of batches is divided by the rank of the hashes
    group = torch.empty(len(x), dtype=torch.long)
    group[order] = torch.arange(len(x)) * 4 // len(x)
    left = torch.stack([rows(outputs_of(net, x[group != g])[0]["point"][1]).var(0) for g in range(4)])
    whole = rows(outputs_of(net, x)[0]["point"][1]).var(0)
    net.float()
    h = (len(x) / torch.bincount(group).double())[:, None]
    centre = 4 * whole - ((1 - 1 / h) * left).sum(0)
    se = (((h * whole - (h - 1) * left - centre).square() / (h - 1)).mean(0)).sqrt()
    np.testing.assert_allclose(found.units["activation_variance_se"], se, rtol=1e-8)


def test_a_sample_of_positions_is_the_same_in_any_batch_and_all_of_them_is_all(net, result):
    few = [nl.analyze(net, batches(*images(), size), ["redundancy", "activation_variance"], positions=10).units for size in (7, 96)]
    close(*few, 1e-5)
    assert not np.allclose(few[0].loc["stem"]["redundancy"], result.units.loc["stem"]["redundancy"], rtol=1e-4)
    np.testing.assert_allclose(few[0]["activation_variance"], result.units["activation_variance"], rtol=1e-5)
    every = nl.analyze(net, batches(*images(), 16), ["redundancy"], positions=10_000).units
    np.testing.assert_allclose(every["redundancy"], result.units["redundancy"], rtol=1e-5)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_does_not_count(pad):
    net, g = build(Tokens), torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (40,), generator=g)
    texts = [torch.randint(1, 11, (int(n),), generator=g) for n in lengths]
    labels = torch.randint(3, (40,), generator=g)
    names = ["activation_variance", "redundancy", "effective_rank", "synergy", "class_mi", "taylor", "rq"]

    def padded(width, value):
        shift = [width - len(t) if pad == "left" else 0 for t in texts]
        ids, mask = torch.full((40, width), value), torch.zeros(40, width, dtype=torch.long)
        for k, t in enumerate(texts):
            ids[k, shift[k] : shift[k] + len(t)] = t
            mask[k, shift[k] : shift[k] + len(t)] = 1
        return [
            {
                "input_ids": ids[k : k + 8],
                "attention_mask": mask[k : k + 8],
                "labels": labels[k : k + 8],
                "ids": torch.arange(k, k + 8),
            }
            for k in range(0, 40, 8)
        ]

    bare = [
        {
            "input_ids": t[None],
            "attention_mask": torch.ones(1, len(t), dtype=torch.long),
            "labels": labels[k : k + 1],
            "ids": torch.tensor([k]),
        }
        for k, t in enumerate(texts)
    ]
    truth = nl.analyze(net, bare, names)
    for width, value in ((8, 0), (13, 5)):
        found = nl.analyze(net, padded(width, value), names)
        close(found.units, truth.units, 2e-5)
        rank = ["effective_rank", "effective_rank_se"]  # an eigenvalue near the rounding of float32 counts, or not
        close(found.layers.drop(columns=rank), truth.layers.drop(columns=rank), 2e-5)
        assert found.layers["effective_rank"].to_numpy() == pytest.approx(truth.layers["effective_rank"].to_numpy(), rel=2e-4)
        assert found.layers[rank[1]].to_numpy() == pytest.approx(truth.layers[rank[1]].to_numpy(), rel=1e-2)


def test_rows_that_are_not_finite_are_left_out_and_counted():
    net = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    bad = x.clone()
    bad[3, 1], bad[20, 0] = torch.nan, torch.inf
    keep = [k for k in range(50) if k not in (3, 20)]
    names = ["activation_mean", "activation_variance", "redundancy", "zero_fraction", "rq"]
    with pytest.warns(UserWarning, match="2 of 50 rows"):
        found = nl.analyze(net, bad.split(7), names)
    close(found.units[names], nl.analyze(net, x[keep].split(7), names).units[names], 1e-5)
    assert {e["site"]: e["rows"] for e in found.metadata["left_out"]} == {"0.output": 2, "0.input": 2}


def test_a_module_called_twice_counts_both_calls_and_an_activation_can_be_named():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(5, 5), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.act(self.fc(self.act(self.fc(x))))

    net, x = build(Twice), torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    found = nl.analyze(net, x.split(9), ["activation_mean", "activation_variance", "zero_fraction"], ["fc", "act"]).units
    with torch.no_grad():
        first = net.fc(x)
        second = net.fc(first.relu())
    both = torch.cat([first, second])
    np.testing.assert_allclose(found.loc["act"]["zero_fraction"], (both <= 0).double().mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.loc["fc"]["activation_variance"], both.var(0), rtol=1e-5)


def test_channels_last_and_one_dimensional_convolutions():
    net = build(Mixed)
    plain = nl.analyze(net, batches(*images(), 16), ["activation_variance", "redundancy", "rq", "taylor"])
    x, y = images()
    last = nl.analyze(
        net.to(memory_format=torch.channels_last),
        batches(x.to(memory_format=torch.channels_last), y, 16),
        ["activation_variance", "redundancy", "rq", "taylor"],
    )
    close(last.units, plain.units, 1e-4)
    line = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 2, 2))
    x = torch.randn(30, 3, 11, generator=torch.Generator().manual_seed(0))
    found = nl.analyze(line, x.split(4), ["activation_variance", "rq"]).units
    with torch.no_grad():
        np.testing.assert_allclose(found.loc["0"]["activation_variance"], line[0](x).movedim(1, -1).flatten(0, 1).var(0), rtol=1e-5)


def test_layers_in_a_float64_model_keep_float64():
    net = nn.Linear(6, 4).double()
    x = torch.randn(100, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e6
    found = nl.analyze(net, x.split(9), ["activation_variance"], "Linear").units["activation_variance"]
    np.testing.assert_allclose(found, net(x).var(0).detach(), rtol=1e-8)


def test_find_layers_names_what_there_is():
    net = Mixed()
    assert [layer.name for layer in find_layers(net, ["head", "stem"])] == ["stem", "head"]
    assert [layer.name for layer in find_layers(net, "b*")] == ["bn"]
    with pytest.raises(ValueError, match=r"no layer matches 'stam'; did you mean 'stem'\? the model has: stem, grouped"):
        find_layers(net, "stam")


def test_products_in_float64_where_they_are_asked_for(net):
    exact = nl.analyze(net, batches(*images(), 16), ["redundancy", "rq"], precision="float64").units
    other = nl.analyze(net, batches(*images(), 64), ["redundancy", "rq"], precision="float64").units
    close(other, exact, 2e-5)
    with pytest.raises(ValueError, match="precision is 'float16'; products are formed in float32 or float64"):
        nl.analyze(net, batches(*images(), 16), ["rq"], precision="float16")


class Made(list):
    """A list that makes each batch when it is asked for, so that a later batch may have the id of an earlier one."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield x.clone(), y.clone()


def test_batches_that_are_made_when_asked_for_have_their_own_groups():
    net, data = build(Mixed), batches(*images(), 16)
    one, other = nl.analyze(net, data, ["rq"]), nl.analyze(net, Made(data), ["rq"])
    pd.testing.assert_frame_equal(one.units, other.units, check_exact=True)
    assert one.units["rq_se"].gt(0).all()
