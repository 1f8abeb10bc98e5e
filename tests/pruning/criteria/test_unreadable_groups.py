"""Groups that no layer shows are left out of a pruning, with the reason; the others are pruned."""

import pytest
import torch
from torch import Tensor, nn

import nodelens as nl

X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


class Partly(nn.Module):
    """A second block that reads its input with the positions first, and keeps the state of the last pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.head = (nn.Linear(*s) for s in ((5, 8), (8, 6), (6, 7), (7, 6), (6, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        rows = torch.stack([x, x + 1, x - 1])  # (3, samples, units)
        self.state = self.d(self.c(rows).relu())
        return self.head(self.state.sum(0))


def test_the_rest_is_pruned_and_the_reason_is_reported():
    with pytest.warns(UserWarning, match=r"group '\w' is left out.*its first axis is not the samples") as told:
        pruned = nl.prune(Partly(), "taylor", 0.5, data=[(X, Y)])
    assert len(told) == 1
    assert [group.name for group in pruned.groups] == ["a", "d"]
    assert pruned.model.a.out_features == 4
    reasons = {f.what: f.reason for f in pruned.groups.frozen}
    assert reasons["c"].startswith("its units cannot be scored: 'd.input', where they are captured, puts out (3, 2, 7)")


def test_a_pruning_without_a_group_left_stops():
    with pytest.raises(ValueError, match=r"group .c. is read by .d.input., which puts out"):
        nl.prune(Partly(), "taylor", 0.5, data=[(X, Y)], scope="c")


def test_a_state_with_a_graph_is_copied():
    model = Partly()
    model(X)
    assert nl.prune(model, "magnitude", 0.5, data=[(X, Y)]).model.a.out_features == 4
