"""Where the influence of a unit goes: closed forms, several readers, convolutions, and slow twins."""

import math

import numpy as np
import pytest
import torch
from cases_criteria import conv_data, conv_groups, conv_net, linear, of
from torch import nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.metrics import get_metric
from nodelens.network.group_layer import GroupLayer
from nodelens.network.groups import identity

NAN = math.nan
NAMES = ["fanout_entropy", "fanout_effective", "bottleneck_out_max", "bottleneck_out_topk_mass", "bottleneck_in_max"]
NAMES += ["bottleneck_in_topk_mass", "output_redundancy"]


def by_hand():
    """Units of deviation 1, 2, 1, 1 that send to four outputs: one of them, all alike, two of them, none."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    net[0].weight.data = torch.diag(torch.tensor([1.0, 2, 1, 1], dtype=torch.float64))
    net[1].weight.data = torch.tensor([[-2.0, 1, 1, 0], [0, 1, -1, 0], [0, 1, 0, 0], [0, -1, 0, 0]], dtype=torch.float64)
    return net, linear("0", identity(4), "1"), [torch.tensor([[1.0] * 4, [-1.0] * 4], dtype=torch.float64)]


VALUES = [
    ("fanout_entropy", {}, [0, math.log(4), math.log(2), NAN]),
    ("fanout_effective", {}, [1, 4, 2, NAN]),
    ("bottleneck_out_max", {}, [1, 0.25, 0.5, NAN]),
    ("bottleneck_out_max", {"topk": 2}, [1, 0.5, 1, NAN]),
    ("bottleneck_out_topk_mass", {}, [1, 1, 1, NAN]),
    ("bottleneck_in_max", {}, [2 / 5, 1, 1 / 3, NAN]),  # inputs of the outputs: 2 + 2 + 1, 2 + 1, 2, 2
    ("bottleneck_in_topk_mass", {}, [2 / 5, 2 / 5 + 2 / 3 + 1 + 1, 1 / 5 + 1 / 3, NAN]),
    ("output_redundancy", {}, [(0.25 + 0.5) / 2, (0.25 + 0.5) / 2, 0.5, NAN]),
    ("output_redundancy", {"topk": 1}, [0.5, 0.5, 0.5, NAN]),
]


@pytest.mark.parametrize(
    ("name", "options", "expected"), VALUES, ids=[f"{n}{'-'.join(map(str, o.values()))}" for n, o, _ in VALUES]
)
def test_values_by_hand(name, options, expected):
    net, group, data = by_hand()
    assert_close(of(group, net, name, data, **options), torch.tensor(expected, dtype=torch.float64), equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_scaled_weights_of_the_reader_change_nothing(name):
    net, group, data = by_hand()
    before = of(group, net, name, data)
    net[1].weight.data *= 7
    assert_close(of(group, net, name, data), before, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(7, marks=pytest.mark.slow)])
def test_batches_change_no_value(name, size):
    net, (x, y) = conv_net().eval(), conv_data()
    data = list(zip(x.split(size), y.split(size), strict=True))
    for group in conv_groups():
        assert_close(of(group, net, name, data), of(group, net, name, [(x, y)]), rtol=1e-9, atol=1e-12)


def test_maps_and_flattened_maps_are_the_slow_sum():
    net, (x, y) = conv_net().eval(), conv_data()
    with torch.no_grad():
        a = torch.relu(net.bn(net.a(x)))
        b = torch.relu(net.b(a))
    sd = a.transpose(0, 1).flatten(1).std(1, correction=0)
    first = net.b.weight.detach().abs().sum((2, 3)) * sd
    second = (net.fc.weight.detach().abs() * b.flatten(1).std(0, correction=0)).reshape(5, 4, 9).sum(2)
    for group, influence in zip(conv_groups(), (first, second), strict=True):
        p, r = influence / influence.sum(0), influence / influence.sum(1, keepdim=True)
        slow = {
            "fanout_entropy": -(p * p.log()).sum(0),
            "bottleneck_out_max": p.max(0).values,
            "bottleneck_in_max": r.max(0).values,
        }
        for name, wanted in slow.items():
            assert_close(of(group, net, name, [(x, y)]), wanted, msg=lambda m, n=name: f"{n}: {m}")


def test_receivers_of_a_grouped_convolution_are_told_apart():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(4 * 9, 2)).double()
    net[1].weight.data.fill_(1.0)  # every unit sends the same to the two outputs of its group, and nothing to the others
    x = torch.randn(20, 1, 3, 3, dtype=torch.float64)
    found = nl.analyze(net, [x], ["fanout_effective", "output_redundancy"], layers=["1.input"])
    assert found.units["fanout_effective"].to_numpy() == pytest.approx(2)
    one = nl.analyze(net, [x], {"o": get_metric("output_redundancy", topk=1)}, layers=["1.input"])
    assert one.units["o"].to_numpy() == pytest.approx(1)
    assert found.units["output_redundancy"].to_numpy() == pytest.approx(1 / 3)  # one unit alike, two without a common output


def test_several_readers_count_together():
    net, group, data = by_hand()
    twice = linear("0", identity(4), "1")
    both = type(group)("0", "ffn", 4, (*group.slices, twice.slices[-1]))
    assert_close(of(both, net, "fanout_effective", data), 2 * of(group, net, "fanout_effective", data), equal_nan=True)


def test_wide_layers_are_compared_in_parts(monkeypatch):
    from nodelens.metrics import fanout

    influence = torch.rand(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = get_metric("outred").of(influence)
    monkeypatch.setattr(fanout, "CHUNK", 50)
    assert_close(get_metric("outred").of(influence), whole)
    p = (influence / influence.sum(0)).T.numpy()
    slow = [np.sort([1 - np.abs(a - b).sum() / 2 for k, b in enumerate(p) if k != i])[-8:].mean() for i, a in enumerate(p)]
    assert whole.tolist() == pytest.approx(slow)


def test_transformers_and_pruning_read_them():
    net, group, data = by_hand()
    assert GroupLayer.of(net, group).readers[0].piece.module == "1"
    found = nl.prune(net, "bottleneck_in_max", 0.25, data=data, custom_groups=[group], scope=["0"])
    assert found.plan.removed == {"0": [3]}  # the unit without influence


@pytest.mark.parametrize("name", ["bottleneck_out_max", "bottleneck_in_max", "output_redundancy"])
def test_a_topk_below_one_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: topk is 0; it is 1 or more"):
        get_metric(name, topk=0)
