"""Modules that only training runs, and modules that no forward pass runs: nothing keeps the old width without a word."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.testing import assert_close

import nodelens as nl

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = [(X, torch.arange(8) % 4)]


class Aux(nn.Module):
    """A small GoogLeNet: a second head of convolutions, which only training runs, behind the first convolution."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.bn, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, padding=1)
            self.fc, self.drop = nn.Linear(12, 4), nn.Dropout(0.0)
            self.aux = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
            self.aux_fc = nn.Sequential(nn.Linear(96, 10), nn.ReLU(), nn.Linear(10, 4))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.bn(self.a(x)).relu()
        z = self.fc(self.drop(self.b(h).relu().mean((2, 3))))
        return (z, self.aux_fc(self.aux(h))) if self.training else z


class Flattened(nn.Module):
    """An auxiliary head of one linear layer that reads a flattened map."""

    def __init__(self):
        super().__init__()
        self.a, self.fc, self.aux = nn.Conv2d(3, 6, 3, stride=2), nn.Linear(6, 4), nn.Linear(54, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.a(x).relu()
        return (self.fc(h.mean((2, 3))), self.aux(h.flatten(1))) if self.training else self.fc(h.mean((2, 3)))


@pytest.mark.parametrize("build", [Aux, Flattened])
@pytest.mark.parametrize("criterion", ["magnitude", "group_l2", "taylor", "gradient"])
def test_an_auxiliary_head_loses_the_inputs_that_it_reads(build, criterion):
    """In training, the sliced model and the masked one give the same outputs at both heads."""
    model = build()
    sliced, masked = (nl.prune(model, criterion, 0.5, data=DATA, apply=how) for how in ("slice", "mask"))
    assert sliced.plan.removed == masked.plan.removed
    assert len(sliced.plan.removed["a"]) == sliced.groups.named("a").n // 2
    a, b = (pruned.model.train()(X) for pruned in (sliced, masked))
    for found, expected in zip(a, b, strict=True):
        assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


def test_scores_are_those_without_the_auxiliary_head():
    class Plain(Aux):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.b(self.bn(self.a(x)).relu()).relu().mean((2, 3)))

    plain = Plain()
    del plain.aux, plain.aux_fc
    for criterion in ("taylor", "group_l2", "redundancy"):
        found, expected = (nl.prune(model, criterion, 0.5, data=DATA).table for model in (Aux(), plain))
        assert found.equals(expected)


def test_the_layers_of_an_auxiliary_head_are_named_as_frozen():
    found = nl.find_groups(Aux(), DATA[0])
    assert [group.name for group in found] == ["a", "b"]
    frozen = {f.what: f.reason for f in found.frozen}
    assert frozen["aux.0"] == "6 units: only training runs aux.0"
    assert frozen["aux_fc.0"] == "10 units: only training runs aux_fc.0"


def test_a_pruned_model_with_an_auxiliary_head_is_fine_tuned(tmp_path):
    pruned = nl.prune(Aux(), "magnitude", 0.5, data=DATA, finetune=nl.Finetune(DATA, DATA, epochs=1, output=0))
    assert pruned.model.aux[0].in_channels == 4
    again = nl.load_pruned(pruned.save(tmp_path / "pruned"), Aux()).train()
    assert [tuple(z.shape) for z in again(X)] == [(8, 4), (8, 4)]


def test_tracing_changes_neither_statistics_nor_modes_nor_random_states():
    model = Aux().train()
    model.bn.eval()
    model.drop.p = 0.5
    before, states = copy.deepcopy(model.state_dict()), (torch.get_rng_state(), random.getstate(), np.random.get_state())
    nl.find_groups(model, DATA[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.training, model.bn.training, model.aux.training) == (True, False, True)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[2], strict=True))


class Uncalled(Aux):
    """A projection that a training loop calls, and no forward pass."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(12, 5)

    def project(self, x: Tensor) -> Tensor:
        return self.projection(self.b(self.bn(self.a(x)).relu()).relu().mean((2, 3)))


def test_what_no_forward_pass_reads_is_named_and_what_it_may_read_is_kept():
    pruned = nl.prune(Uncalled(), "magnitude", 0.5, data=DATA)
    frozen = {f.what: f.reason for f in pruned.groups.frozen}
    assert [group.name for group in pruned.groups] == ["a"]
    assert frozen["projection"] == "no forward pass reads its parameters: they keep their shapes"
    assert frozen["b"] == "12 units: projection (Linear) may read them, but no forward pass shows what it reads"
    assert pruned.model.project(X).shape == (8, 5)


class DataDependent(Aux):
    """In training, the path depends on values, which torch.export cannot trace."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.training and float(x.sum()) > 1e9:
            return self.fc(x)
        return super().forward(x)


def test_a_training_path_that_cannot_be_traced_freezes_what_it_may_read():
    pruned = nl.prune(DataDependent(), "magnitude", 0.5, data=DATA)
    frozen = {f.what: f.reason for f in pruned.groups.frozen}
    assert [group.name for group in pruned.groups] == ["b"]
    assert "aux.0 (Conv2d) may read them, but no forward pass shows what it reads, and training cannot be traced" in frozen["a"]
    assert [tuple(z.shape) for z in pruned.model.train()(X)] == [(8, 4), (8, 4)]


class OldWidth(nn.Module):
    """Training reshapes to a width that is a constant; there is no parameter that evaluation does not read."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x.mean((2, 3))).relu())
        return self.fc(F.relu(h.reshape(-1, 8) if self.training else h))


def test_a_group_without_which_training_does_not_run_is_frozen():
    pruned = nl.prune(OldWidth(), "magnitude", 0.5, data=DATA)
    assert [group.name for group in pruned.groups] == ["a"]
    frozen = {f.what: f.reason for f in pruned.groups.frozen}
    assert frozen["b"].startswith("8 units: without some of them training does not run: mat1 and mat2 shapes cannot")
    assert pruned.model.train()(X).shape == (8, 4)
