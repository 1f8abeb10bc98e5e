import pytest
import torch
from torch import nn

from nodelens.interventions.replay import Recording, tiled


class Steps(nn.Module):
    """Two layers inside a block, one ReLU for all that writes in place, and a module that returns an object."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
        self.relu, self.boxed, self.last = nn.ReLU(inplace=True), Boxed(), nn.Linear(4, 2)

    def forward(self, x):
        x = self.relu(self.block(x))
        return self.last(self.relu(self.boxed(x).value))


class Box:
    def __init__(self, value):
        self.value = value


class Boxed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(4, 4)

    def forward(self, x):
        return Box(self.inside(x))


@pytest.fixture
def recorded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Steps().eval()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return net, x, Recording.of(net, lambda: net(x))


def call_of(recording, module):
    return next(call for call in recording.calls if call.module is module)


@torch.no_grad()
def test_a_replay_runs_only_what_comes_after(recorded):
    net, x, recording = recorded
    site = call_of(recording, net.last)
    skipped = recording.before(site.start)
    assert [call.module for call in skipped] == [net.block, net.boxed.inside]
    assert call_of(recording, net.block).written, "the ReLU behind it writes into it"
    ran = []
    handles = [m.register_forward_hook(lambda m, a, o: ran.append(m)) for m in (net.block[0], net.block[1], net.relu)]
    for _ in range(2):
        with recording.replayed({call: call.output for call in skipped}):
            assert torch.equal(net(torch.zeros_like(x)), recording.output), "no input is read any more"
    assert ran == [net.relu] * 4, "a module that changes its input runs again"
    for handle in handles:
        handle.remove()
    assert torch.equal(net(x), recording.output)
    assert not any("forward" in module.__dict__ for module in net.modules())


@torch.no_grad()
def test_a_call_computes_what_is_given(recorded):
    net, x, recording = recorded
    call = call_of(recording, net.last)
    with recording.replayed({}, {call: lambda args, kwargs: args[0].sum(1)}):
        assert net(x).shape == (5,)


def test_modules_run_as_before_after_an_error(recorded):
    net, x, recording = recorded
    calls = recording.before(call_of(recording, net.last).start)
    with pytest.raises(ValueError, match="stop"), recording.replayed({call: call.output for call in calls}):
        raise ValueError("stop")
    assert not any("forward" in module.__dict__ for module in net.modules())
    with pytest.raises(RuntimeError):
        Recording.of(net, lambda: net(x[:, :2]))
    assert not any("forward" in module.__dict__ for module in net.modules())


def test_only_tensors_with_one_row_per_sample_are_repeated():
    given = {"a": torch.arange(6).reshape(2, 3), "b": (torch.ones(3), 4, None), "c": torch.ones(1, 2)}
    found = tiled(given, 2, 2)
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert found["b"][0].shape == (3,)
    assert found["c"].shape == (1, 2)
    assert tiled(given, 1, 2) is given
    maps = torch.arange(48.0).reshape(2, 3, 2, 4).contiguous(memory_format=torch.channels_last)
    assert tiled(maps, 2, 2).is_contiguous(memory_format=torch.channels_last)
    assert tiled(maps, 2, 2).equal(maps.repeat(2, 1, 1, 1))
