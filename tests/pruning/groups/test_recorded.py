"""Operations recorded while a model runs are those that torch.export finds, and give the same groups."""

import re
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu
from torch.utils._pytree import tree_leaves

from nodelens.models import resnet
from nodelens.network.batch import Batch
from nodelens.network.eval_mode import eval_mode
from nodelens.pruning.groups import recorded
from nodelens.pruning.groups.graph import graph_groups
from nodelens.pruning.groups.graph_walk import op_of, stack_of

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """Operations of many kinds: in place, with several results, a looked-up table, a constant, and a module called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.twice = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.table, self.plain = nn.Parameter(torch.randn(5, 8)), torch.ones(8)
        self.register_buffer("ids", torch.tensor([0, 2, 4, 1]))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.twice(self.a(x)).relu_()
        x += self.twice(self.b(x))
        left, right = x.chunk(2, 1)
        tokens = torch.cat([gelu(left), right * torch.tensor(2.0)], 1).flatten(2).transpose(1, 2)
        tokens = self.attention(tokens, tokens, tokens)[0] + self.table[self.ids].mean(0) * self.plain
        unused = self.b(x)  # noqa: F841
        return {"logits": self.out(dropout(tokens, 0.5, self.training).mean(1)), "size": x.shape[1]}


def described(found: recorded.Operations) -> list[tuple]:
    """The operations, each with its module and the shapes of its results, without those that make a constant."""
    constant = ("lift_fresh", "lift_fresh_copy", "detach_")
    calls = [node for node in found.nodes if node.op == "call_function" and op_of(node) not in constant]
    return [(op_of(node), stack_of(node), [value.shape for value in tree_leaves(node.meta["val"])]) for node in calls]


@pytest.mark.parametrize("train", [False, True])
def test_the_operations_are_those_of_torch_export(train):
    model, batch = Mixed().train(train), Batch.of(X)
    with eval_mode(model, train=train):
        one, other = recorded._recorded(model, batch), recorded._exported(model, batch)
    ours, exported = described(one), described(other)
    assert ours == exported
    assert len(ours) > 20
    used = [{found.stored[node.name] for node in found.nodes if node.name in found.stored and node.users} for found in (one, other)]
    assert used[0] == used[1]


@pytest.mark.parametrize("make", [Mixed, lambda: resnet(depth=18, classes=4, channels=3, size=8, width=8)])
def test_the_groups_are_those_of_the_exported_graph(make, monkeypatch):
    torch.manual_seed(0)
    model, batch = make(), Batch.of(X)
    one = graph_groups(model, batch)
    monkeypatch.setattr("nodelens.pruning.groups.graph.operations", recorded._exported)
    other = graph_groups(model, batch)
    assert [g.describe() for g in one] == [g.describe() for g in other]
    reasons = [[(f.what, re.sub(r"the constant \w+", "a constant", f.reason)) for f in found.frozen] for found in (one, other)]
    assert reasons[0] == reasons[1]
    for ours, exported in zip(one, other, strict=True):
        assert all(p.index.equal(q.index) for p, q in zip(ours.slices, exported.slices, strict=True))


def by_value(x: Tensor) -> Tensor:
    return x if float(x.sum()) > 0 else -x


def as_list(x: Tensor) -> Tensor:
    return x if x.sum().tolist() > 0 else -x


def as_array(x: Tensor) -> Tensor:
    return x * float(x.detach().numpy().max())


def by_mask(x: Tensor) -> Tensor:
    return x * x[x > 0].mean()


def of_unknown_origin(x: Tensor) -> Tensor:
    return x * SCALE  # which neither the model holds nor an operation makes


SCALE = torch.ones(1)


@pytest.mark.parametrize("step", [by_value, as_list, as_array, by_mask, of_unknown_origin])
def test_what_one_run_does_not_tell_is_left_to_torch_export(step, monkeypatch):
    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(step(x))

    exported = SimpleNamespace(nodes=[])
    monkeypatch.setattr(recorded, "_exported", lambda *_: exported)
    assert recorded.operations(Model(8, 2), Batch.of(X)) is exported


def test_recording_leaves_tensors_that_can_be_trained_with():
    class Cached(nn.Linear):
        cache = None

        def forward(self, x: Tensor) -> Tensor:
            self.cache = torch.arange(8.0) if self.cache is None else self.cache
            return super().forward(x * self.cache)

    model = Cached(8, 2)
    recorded.operations(model, Batch.of(X))
    assert not model.cache.is_inference()
    model(X).sum().backward()
    assert model.weight.grad is not None


def test_another_thread_may_read_values_meanwhile():
    read = []

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: read.append(torch.ones(2).tolist()))
            thread.start()
            thread.join()
            return super().forward(x)

    assert isinstance(recorded.operations(Model(8, 2), Batch.of(X)).nodes[0], recorded.Operation)
    assert read == [[1.0, 1.0]]


def test_an_error_of_the_model_stays_what_it_is():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        recorded.operations(nn.Linear(5, 2), Batch.of(X))
    assert not nn.modules.module._global_forward_hooks


class Routed(nn.Module):
    def __init__(self, choose):
        super().__init__()
        self.router, self.experts, self.choose = nn.Linear(8, 2), nn.ModuleList([nn.Linear(8, 8) for _ in range(2)]), choose

    def forward(self, x):
        counts = self.choose(self.router(x).argmax(1))
        return torch.cat([expert(part) for expert, part in zip(self.experts, x.split(counts), strict=True)])


@pytest.mark.parametrize(
    ("choose", "operation"),
    [
        (lambda chosen: torch.bincount(chosen, minlength=2).tolist(), "bincount"),
        (lambda chosen: [int((chosen == k).sum()) for k in range(2)], "item"),
    ],
)
def test_the_module_that_cannot_be_traced_is_named_with_the_way_out(choose, operation, capfd):
    model = nn.Sequential(nn.Linear(8, 8), Routed(choose), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"torch.export cannot trace the forward pass of Sequential: in 1 \(Routed\), ") as raised:
        graph_groups(model, Batch.of(torch.randn(6, 8)))
    message = str(raised.value)
    assert f"{operation} lets values decide what runs, or a shape" in message
    assert message.endswith("; give its groups yourself (custom_groups=), or prune a submodule that can be exported")
    assert "\n" not in message
    assert capfd.readouterr().err == ""  # torch.export prints its graph otherwise


def test_what_runs_one_way_is_not_unclear():
    assert recorded.why_unclear(Mixed().eval(), Batch.of(X)) == ""
    assert recorded.why_unclear(nn.Linear(2, 2), Batch.of(X)) == ""  # it fails in another way
