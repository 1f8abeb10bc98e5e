"""Recurrent layers: what they read is pruned, and what they feed back is frozen with the reason."""

import copy

import pytest
import torch
from graphs import assert_exact, rows, seeded
from torch import nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.network.batch import Batch
from nodelens.pruning.cost import Cost

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Tagger(nn.Module):
    """A linear layer of 6 units, a recurrent layer of 7, and a head on its last step."""

    def __init__(self, kind, **options):
        super().__init__()
        both = 2 if options.get("bidirectional") else 1
        self.enter, self.rnn, self.head = nn.Linear(5, 6), kind(6, 7, batch_first=True, **options), nn.Linear(7 * both, 3)

    def forward(self, x):
        return self.head(self.rnn(self.enter(x).relu())[0][:, -1])


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=["one", "deep", "no bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_units_that_a_recurrent_layer_reads_are_pruned_exactly(kind, options):
    model, x = seeded(Tagger(KINDS[kind], **options)), rows(3, 4, 5)
    groups = nl.find_groups(model, x)
    assert [(group.name, group.n, group.exact) for group in groups] == [("enter", 6, True)]
    assert_exact(model, groups, x)
    (reason,) = [each.reason for each in groups.frozen if each.what == "rnn"]
    n = 14 if options.get("bidirectional") else 7
    assert reason.startswith(f"{n} units: {kind}")
    assert reason.endswith("in rnn feeds its hidden units back inside one kernel, where they cannot be masked")


def test_a_layer_with_a_projection_is_frozen_as_a_whole():
    model = seeded(Tagger(nn.LSTM))
    model.rnn, model.head = nn.LSTM(6, 7, proj_size=4, batch_first=True).double(), nn.Linear(4, 3).double()
    groups = nl.find_groups(model, rows(3, 4, 5))
    assert not len(groups)
    assert any("with a projection" in each.reason for each in groups.frozen if each.what == "enter")


def test_a_pruned_recurrent_network_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model, x, y = Tagger(nn.LSTM), torch.randn(12, 4, 5), torch.arange(12) % 3
    pruned = nl.prune(model, "taylor", 0.5, data=[(x, y)])
    assert pruned.model.rnn.input_size == pruned.model.enter.out_features == 3
    again = nl.load_pruned(pruned.save(tmp_path / "pruned"), copy.deepcopy(model))
    assert_close(again(x), pruned.model(x))


def test_scores_of_units_are_the_changes_without_them():
    """The Taylor score of a unit of float64 weights, against the gradient of a gate on the layer's output."""
    model, x, y = seeded(Tagger(nn.GRU)), rows(4, 3, 5), torch.arange(4) % 3
    gate = torch.ones(4, 6, dtype=torch.float64, requires_grad=True)
    out = model.head(model.rnn(model.enter(x).relu() * gate[:, None])[0][:, -1])
    (per_sample,) = torch.autograd.grad(nn.functional.cross_entropy(out, y, reduction="sum"), gate)
    (group,) = nl.find_groups(model, x)
    found = nl.analyze(model, [(x, y)], ["taylor"], layers=[group]).units["taylor"]
    assert_close(torch.tensor(found.to_numpy()), per_sample.square().mean(0), rtol=1e-6, atol=0)


def test_the_cost_counts_every_matrix_at_every_step():
    model, x = seeded(Tagger(nn.LSTM)), rows(3, 4, 5)
    groups = nl.find_groups(model, x)
    cost = Cost.of(model, groups, Batch.of(x))
    assert cost.macs() == 4 * (5 * 6 + 28 * 6 + 28 * 7) + 7 * 3
    assert cost.macs({"enter": 2}) == 4 * (5 * 2 + 28 * 2 + 28 * 7) + 7 * 3


def test_a_recurrent_reader_is_not_compensated():
    model, x, y = Tagger(nn.LSTM), torch.randn(12, 4, 5), torch.arange(12) % 3
    with pytest.raises(
        ValueError, match=r"'enter' is read by rnn, a LSTM, which is not compensated; use compensate=none or freeze="
    ):
        nl.prune(model, "magnitude", data=[(x, y)], compensate="bias")
