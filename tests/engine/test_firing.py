"""Metrics about firing read behind the activation that follows a layer, found in the operations of a forward pass."""

from functools import partial

import numpy as np
import pytest
import torch
from nets import Mixed, build, images
from torch import nn

import nodelens as nl
from nodelens.engine import captured_rows, collector
from nodelens.engine.dry_run import DryRun
from nodelens.engine.firing import Firing
from nodelens.network.batch import Batch
from nodelens.network.find_layers import find_layers
from nodelens.network.groups import PruningGroups


def net_of(forward, **modules):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, module in modules.items():
                setattr(self, name, module())

        def forward(self, x):
            return forward(self, x)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().double().eval()


def measured(net, x, layers="*", size=7):
    return nl.analyze(net, x.split(size), ["zero_fraction"], layers)


def behind(result):
    return result.metadata["metrics"]["zero_fraction"]["read_behind"]


def share_of_zeros(y):
    return (y == 0).double().mean([k for k in range(y.ndim) if k != 1])


CONV = partial(nn.Conv2d, 3, 4, 3)
CASES = {
    "relu": ([CONV, nn.ReLU], "relu"),
    "in place": ([CONV, partial(nn.ReLU, inplace=True)], "relu"),
    "behind a norm": ([CONV, partial(nn.BatchNorm2d, 4), partial(nn.ReLU, inplace=True)], "batch_norm, relu"),
    "behind a group norm": ([CONV, partial(nn.GroupNorm, 2, 4), nn.ReLU6], "group_norm, hardtanh"),
    "behind pooling": ([CONV, partial(nn.MaxPool2d, 2), nn.ReLU], "max_pool2d, relu"),
    "dropout": ([CONV, nn.Dropout, nn.Identity, nn.ReLU], "relu"),
    "softshrink": ([CONV, nn.Softshrink], "softshrink"),
    "clamp": ([CONV, partial(nn.Hardtanh, 0, 1)], "hardtanh"),
    "no zeros": ([CONV, partial(nn.PReLU, 4)], "prelu"),
}


@pytest.mark.parametrize("name", CASES)
def test_zeros_are_counted_behind_the_activation(name):
    makers, path = CASES[name]
    net = net_of(lambda net, x: net.layers(x), layers=lambda: nn.Sequential(*(make() for make in makers)))
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.copy_(torch.tensor([0.5, -0.5, 0.2, 0.0]))
    x = torch.randn(23, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = measured(net, x, ["layers.0"])
    np.testing.assert_array_equal(result.units["zero_fraction"], share_of_zeros(net(x)))
    assert behind(result) == {"layers.0": path}
    assert (0 < float(result.units["zero_fraction"].mean()) < 1) == (name != "no zeros")


def test_functions_count_like_modules_and_a_dead_unit_reads_1():
    net = net_of(lambda net, x: net.last(torch.relu(net.fc(x))), fc=partial(nn.Linear, 4, 3), last=partial(nn.Linear, 3, 2))
    with torch.no_grad():
        net.fc.bias[1] = -100
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = measured(net, x)
    assert result.units.loc[("fc", 1), "zero_fraction"] == 1
    np.testing.assert_array_equal(result.units.loc["fc"]["zero_fraction"], share_of_zeros(torch.relu(net.fc(x)).detach()))
    assert behind(result) == {"fc": "relu", "last": ""}


NOT_FOLLOWED = {
    "a swish: two readers": lambda net, x: net.last((lambda y: y * torch.sigmoid(y))(net.fc(x))),
    "two calls, one without": lambda net, x: net.last(net.fc(x) * torch.sigmoid(net.fc(x))),
    "two calls, two activations": lambda net, x: net.last(torch.relu(net.fc(torch.tanh(net.fc(x))))),
    "a sum that is not the layer's own": lambda net, x: net.last(torch.relu(net.fc(x) + x)),
    "units change places": lambda net, x: net.last(torch.relu(net.fc(x)[:, [1, 0, 2]])),
    "no activation": lambda net, x: net.last(net.fc(x)),
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_where_no_activation_follows_the_output_is_read_and_the_metadata_say_so(name):
    net = net_of(NOT_FOLLOWED[name], fc=partial(nn.Linear, 3, 3), last=partial(nn.Linear, 3, 2))
    result = measured(net, torch.randn(20, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    assert behind(result) == {"fc": "", "last": ""}
    assert (result.units["zero_fraction"] == 0).all()


def test_an_activation_is_read_at_its_own_output():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Hardtanh(0.0, 0.1), nn.Linear(4, 2)).double()
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = measured(net, x, ["0", "1"])
    assert behind(result) == {"0": "relu", "1": ""}
    np.testing.assert_array_equal(result.units.loc["0"]["zero_fraction"], result.units.loc["1"]["zero_fraction"])


def test_every_layer_of_a_mixed_network_against_the_values_that_pass():
    """Twin: the network's own operations, written out; batches of another size change nothing."""
    net, (x, _) = build(Mixed).double(), images(30, dtype=torch.float64)
    expected = {}
    with torch.no_grad():
        y = torch.relu(net.bn(net.stem(x)))
        expected["stem"], y = y, torch.relu(net.grouped(y))
        expected["grouped"], z = y, torch.relu(net.dilated(y))
        expected["dilated"] = z
        expected["up"] = torch.relu(net.up(y + z))
    for size in (30, 7):
        result = measured(net, x, size=size)
        for name, value in expected.items():
            np.testing.assert_array_equal(result.units.loc[name]["zero_fraction"], share_of_zeros(value), err_msg=name)
    relu = dict.fromkeys(("grouped", "dilated", "up"), "relu")
    assert behind(result) == {"stem": "batch_norm, relu"} | relu | {"point": "", "head": ""}


def test_the_model_computes_what_it_did():
    net, (x, _) = build(Mixed), images(12)
    before = net(x)
    measured(net, x)
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)


def test_a_pruning_group_is_read_where_its_units_are_read():
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups: PruningGroups = nl.find_groups(net, x[:2])
    result = nl.analyze(net, x.split(8), ["zero_fraction"], groups)
    np.testing.assert_array_equal(result.units["zero_fraction"], share_of_zeros(net[1](net[0](x))))


def test_tokens_of_padding_do_not_count():
    net = net_of(lambda net, x: net.last(torch.relu(net.fc(x))), fc=partial(nn.Linear, 3, 4), last=partial(nn.Linear, 4, 2))
    x = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 1, 2, 5])[:, None]

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, attention_mask):
            return self.net(x)

    found = nl.analyze(Masked().double(), [{"x": x, "attention_mask": mask}], ["zero_fraction"], ["net.fc"]).units
    np.testing.assert_allclose(found["zero_fraction"], (torch.relu(net.fc(x))[mask] == 0).double().mean(0), rtol=1e-12)


def test_the_trace_of_a_model_without_memory_is_the_same():
    """On the meta device, where a tensor has no address, the same activations are found as on a real one."""
    found = []
    for device in ("cpu", "meta"):
        net = build(Mixed).to(device)
        dry_run = DryRun.of(net, find_layers(net), Batch.of(torch.zeros(2, 3, 9, 9, device="cpu")).to(torch.device(device)))
        found.append({name: str(firing) for name, firing in dry_run.firing.items()})
    assert found[0] == found[1] == {"stem": "batch_norm, relu", "grouped": "relu", "dilated": "relu", "up": "relu"}


def test_in_training_a_batch_norm_on_the_way_uses_the_batch_and_keeps_its_running_statistics():
    net, (x, _) = build(Mixed), images(12)
    firing = DryRun.of(net, find_layers(net, "stem"), Batch.of(x)).bound(net).firing["stem"]
    before, y = net.bn.running_mean.clone(), net.stem(x).detach()
    found = firing(y, training=True)
    torch.testing.assert_close(net.bn.running_mean, before, rtol=0, atol=0)
    torch.testing.assert_close(found, net.train().bn(y).relu().detach(), rtol=1e-6, atol=1e-6)


class InTraining(nn.Conv2d):
    training = property(lambda self: True, lambda self, mode: None)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_large_maps_are_read_behind_the_activation_a_few_samples_at_a_time(training, monkeypatch):
    net = net_of(
        lambda self, x: self.pool(self.relu(self.norm(self.conv(x)))).mean((2, 3)),
        conv=lambda: (InTraining if training else nn.Conv2d)(3, 5, 3),
        norm=lambda: nn.BatchNorm2d(5),
        relu=nn.ReLU,
        pool=lambda: nn.MaxPool2d(2),
    )
    net.norm.bias.data = torch.linspace(-1, 1, 5).double()
    x, seen = images(20, size=9, dtype=torch.float64)[0], []
    firing = Firing.__call__
    monkeypatch.setattr(Firing, "__call__", lambda self, x, *given: (seen.append(len(x)), firing(self, x, *given))[1])
    whole = measured(net, x, "conv", size=20)
    assert max(seen) == 20
    seen.clear()
    monkeypatch.setattr(captured_rows, "CHUNK", 3 * 5 * 7 * 7 * 8)
    monkeypatch.setattr(collector, "CHUNK", 3 * 5 * 7 * 7 * 8)
    found = measured(net, x, "conv", size=20)
    assert max(seen) == (20 if training else 3)  # a norm in training reads the whole batch
    assert found.units["zero_fraction"].tolist() == whole.units["zero_fraction"].tolist()
    assert 0 < found.units["zero_fraction"].min() < found.units["zero_fraction"].max() < 1
