import json
import math

import numpy as np
import pytest
import torch
from real import folder
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import nodelens as nl
from nodelens.metrics import get_metric
from nodelens.metrics.supernode import (
    concentration,
    concentration_curve,
    connectivity,
    correlations,
    gini,
    halo,
    largest,
    overlap,
    protection,
    redundancy_to_supernodes,
    share_of,
)
from nodelens.metrics.supernode_scores import ScarProt
from nodelens.network.batch import Batch
from nodelens.pruning.criteria.scoring import score_table
from nodelens.pruning.groups.find import find_groups


def document(name):
    return json.loads((folder("NODELENS_GOLDEN") / f"{name}.json").read_text())


def scored(net, axis, data, **options):
    """The parts of a scar score on one axis, and its two scores."""
    kept = {}

    class Kept(ScarProt):
        def __call__(self, weight, q):
            kept.update(self.parts(weight, q))
            return super().__call__(weight, q)

    table = score_table(net, [axis], {"prot": Kept(**options), "conn": get_metric("scar_conn", **options)}, data)
    return kept, [torch.tensor(table[name].to_numpy()) for name in table]


@pytest.mark.parametrize("size", [1, 3])
def test_the_numbers_of_another_system(size):
    doc, wanted = document("scar_llama"), document("scar_supernodes")
    options = {k: v for k, v in doc["config"].items() if k not in ("class", "rope_theta")}
    net = LlamaForCausalLM(LlamaConfig(**options, attn_implementation="eager")).eval()
    state = {k: torch.as_tensor(np.array(v, float)).float() for k, v in doc["inputs"]["state_dict"].items()}
    net.load_state_dict(state, strict=False)
    texts, data = [torch.tensor(t) for t in doc["inputs"]["input_ids"]], []
    for k in range(0, len(texts), size):
        ids = nn.utils.rnn.pad_sequence(texts[k : k + size], batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in texts[k : k + size]], batch_first=True)
        data.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    axes = [axis for axis in find_groups(net) if axis.kind == "ffn"]
    for case, axis in zip(("layer0", "layer1"), axes, strict=True):
        own = wanted["options"][case]
        parts, scores = scored(
            net,
            axis,
            data,
            supernode_fraction=own["core_fraction"],
            **{k: own[k] for k in ("halo_fraction", "connectivity_topk", "redundancy_topk", "redundancy_reduce")},
        )
        expected = wanted["expected"][case]
        assert parts["core"].tolist() == expected["supernodes"]
        assert parts["halo"].tolist() == expected["halo"]
        keys = ("connectivity", "redundancy", "protection")
        for key, name in zip(keys, ("connectivity", "redundancy_to_core", "protection"), strict=True):
            value = torch.as_tensor(np.array(expected[name], float))
            assert_close(parts[key].double(), value, **wanted["tolerance"], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
        outside = [u for u in range(axis.n) if u not in expected["supernodes"]]
        for score, name in zip(scores, ("supernode_protection_score", "supernode_connectivity_score"), strict=True):
            value = torch.as_tensor(np.array(expected[name], float))
            assert_close(score[outside], value[outside], **wanted["tolerance"], msg=lambda m, n=name: f"{n}: {m}")


def test_counts_and_ties():
    assert [share_of(10, s) for s in (0.01, 0.14, 0.15, 0.5, 1)] == [1, 1, 2, 5, 10]
    assert largest(torch.tensor([1.0, 3, 3, math.nan, 2]), 2).tolist() == [1, 2]
    assert largest(torch.tensor([3.0, 3, 3]), 2).tolist() == [0, 1], "ties to the lower id"


def test_connectivity_by_hand():
    weights = torch.tensor([[4.0, 1, 0, 0], [0, -1, 2, 0], [-1, 2, 2, 0]])  # (width 3, units 4)
    core = torch.tensor([0])  # writes 4, 0, 1: the two largest places are 0 and 2
    assert_close(connectivity(weights, core, 2), torch.tensor([1.0, 0.75, 0.5, math.nan]), equal_nan=True)
    assert_close(connectivity(weights, core, mass=0.8), torch.tensor([0.8, 0.25, 0, math.nan]), equal_nan=True)
    even = torch.ones(8, 5)
    assert connectivity(even, core, 2).tolist() == [0.25] * 5
    assert connectivity(even, core, 100).tolist() == [1.0] * 5
    connected = torch.tensor([0.9, 0.2, 0.8, 0.7])
    assert halo(connected, core, 0.5).tolist() == [2, 3]
    assert halo(connected, core, 0.01).tolist() == [2]


def test_redundancy_and_protection_by_hand():
    rho = torch.tensor([[0.6, -0.9, 0], [0, 0, 0]], dtype=torch.float64)
    information = -0.5 * math.log(1 - 0.36)
    assert_close(redundancy_to_supernodes(rho, topk=2)[0].item(), information / 2)
    assert_close(redundancy_to_supernodes(rho, reduce="max")[0].item(), information)
    assert_close(redundancy_to_supernodes(rho, topk=1, positive=False)[0].item(), -0.5 * math.log(1 - 0.81))
    redundancy, members = torch.tensor([9.0, 0.1, 0.3, 0.2]), torch.tensor([1, 2, 3])
    assert protection(redundancy, members).tolist() == pytest.approx([1, 1, 0.2, 0.2 + 0.8 * (1 - 0.5**8)])
    assert protection(redundancy, members, "rank").tolist() == pytest.approx([1, 1, 0, 0.5])
    assert protection(redundancy, members, "minmax").tolist() == pytest.approx([1, 1, 0, 0.5])
    tied = protection(torch.tensor([1.0, 1, 2]), torch.tensor([0, 1, 2]), "rank")
    assert tied.tolist() == [0.75, 0.75, 0.0], "ranks of ties are averaged"
    assert protection(redundancy, members[:1]).tolist() == [1, 1, 1, 1]


def test_concentration_and_overlap():
    assert concentration(torch.ones(100), 0.01) == pytest.approx(0.01)
    assert concentration(torch.tensor([97.0, 1, 1, 1]), 0.25) == pytest.approx(0.97)
    assert overlap(torch.tensor([1, 2, 3]), torch.tensor([2, 3, 4])) == 0.5
    assert math.isnan(overlap(torch.tensor([]), torch.tensor([])))


class Ffn(nn.Module):
    """Tokens through one hidden layer of 8: channel 0 carries the loss, channel 1 repeats it, the others are noise."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


def test_a_channel_that_repeats_the_core_is_less_worth_and_the_core_stays():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Ffn().double()
    net.fc1.weight.data[1] = net.fc1.weight.data[0]
    net.fc1.bias.data[1] = net.fc1.bias.data[0]
    net.fc2.weight.data[:, 0] *= 8
    net.fc2.weight.data[:, 1] = net.fc2.weight.data[:, 0] * 0.6
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    data = [(x[:40], (x[:40].sum(1) > 0).long()), (x[40:], (x[40:].sum(1) > 0).long())]
    options = {"unit": "sequence", "supernode_fraction": 0.125, "halo_fraction": 0.3, "connectivity_topk": 3}
    axis = find_groups(net, Batch.of(x))[0]
    parts, (prot, conn) = scored(net, axis, data, **options)
    core = parts["core"].tolist()
    assert core in ([0], [1])
    twin = 1 - core[0]
    assert twin in parts["halo"]
    assert parts["protection"][twin] == pytest.approx(0.2)
    assert prot[twin] == pytest.approx(float(0.2 * parts["proxy"][twin]))
    assert prot[twin] <= conn[twin] <= parts["proxy"][twin]
    alone = scored(net, axis, [(torch.cat([d[0] for d in data]), torch.cat([d[1] for d in data]))], **options)
    assert_close(alone[1][0], prot, rtol=1e-9, atol=0)
    spec = {"terms": {"loss_proxy": 1.0}, "protect": {"loss_proxy": 0.125}}
    for mode in ("low", "high", "random"):
        assert core[0] not in nl.prune(net, spec, 0.8, data=data, mode=mode).plan.removed[axis.name]
    with pytest.raises(ValueError, match=r"protect\.loss_proxy is 1\.5"):
        nl.prune(net, {"terms": {"loss_proxy": 1.0}, "protect": {"loss_proxy": 1.5}}, 0.5, data=data)


def test_gini_and_the_curve_by_hand():
    assert gini(torch.ones(10)) == pytest.approx(0)
    assert gini(torch.tensor([0.0, 0, 0, 5])) == pytest.approx(0.75)
    assert gini(torch.tensor([1.0, 3])) == pytest.approx(0.25)
    share, held = concentration_curve(torch.tensor([1.0, 6, 3]))
    assert share.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert held.tolist() == pytest.approx([0, 0.6, 0.9, 1])
    share, held = concentration_curve(torch.ones(5000), 50)
    assert len(share) <= 51
    assert_close(share, held)
    assert concentration_curve(torch.tensor([math.nan]))[1].tolist() == [0]


def test_correlations_of_what_hardly_varies_have_no_epsilon():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64) * 1e-6
    c = torch.cov(x.T, correction=0)
    assert_close(correlations(c, c.diagonal(), c.diagonal()), torch.corrcoef(x.T))
    assert correlations(c, c.diagonal(), c.diagonal(), 1e-8).abs().max() < 1e-7
