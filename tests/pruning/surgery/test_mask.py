import copy

import pytest
import torch
from torch import nn

from nodelens.network.batch import Batch
from nodelens.network.groups import GroupSlice, PruningGroup, PruningGroups, identity, span
from nodelens.pruning.cost import Cost
from nodelens.pruning.groups.find import custom_group, find_groups
from nodelens.pruning.surgery.mask import gates_of, masked, scale, scaled, zero
from nodelens.pruning.surgery.slice import slice_units

CUSTOM = {"name": "body", "producer": ["0.weight"], "tied": ["1.weight", "1.bias", "1.running_mean", "1.running_var"]}


def network(seed=0):
    """Two convolutions with a norm in between and a head on flattened maps; a wrong mask would leave the norm's shifts."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = (nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten())
        net = nn.Sequential(*parts, nn.Linear(5 * 4, 3))
        for t in net.state_dict().values():
            if t.is_floating_point():
                t.copy_(torch.rand_like(t) + 0.3 if t.ndim == 1 else torch.randn_like(t))
    return net.double().eval()


def groups_of(net):
    producers = [GroupSlice("3", tensor, 0, identity(5), "producer") for tensor in ("weight", "bias")]
    flat = PruningGroup("3", "channel", 5, (*producers, GroupSlice("6", "weight", 1, span(5, 4), "consumer")))
    return PruningGroups((custom_group(net, CUSTOM | {"consumer": ["3.weight"]}), flat))


X = torch.randn(4, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
REMOVED = {"body": [0, 4], "3": [1, 2, 3]}


def test_a_mask_a_slice_zeros_and_gates_of_zero_give_the_same_output():
    net = network()
    groups = groups_of(net)
    dense = net(X)
    with masked(net, groups, REMOVED):
        wanted = net(X)
    assert torch.equal(net(X), dense), "nothing is left behind"
    assert (wanted - dense).abs().max() > 0.1
    sliced = slice_units(copy.deepcopy(net), groups, REMOVED)
    zeroed, gated = copy.deepcopy(net), copy.deepcopy(net)
    zero(zeroed, groups, REMOVED)
    scale(gated, groups, gates_of(groups, REMOVED))
    for other in (sliced, zeroed, gated):
        assert torch.allclose(other(X), wanted, rtol=1e-12)
    assert [tuple(p.shape) for p in sliced.parameters()] == [(4, 2, 3, 3), (4,), (4,), (2, 4, 3, 3), (2,), (3, 8), (3,)]
    assert (sliced[0].out_channels, sliced[1].num_features, sliced[3].in_channels, sliced[6].in_features) == (4, 4, 4, 8)
    assert not zeroed[0].weight[[0, 4]].any()
    assert not zeroed[1].bias[[0, 4]].any()


def test_gates_scale_what_is_read_and_take_gradients():
    net = network()
    groups = groups_of(net)
    seen = []
    net[3].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    net(X)
    gate = torch.tensor([1.0, 0.5, 0, 2, 1, 1], dtype=torch.float64, requires_grad=True)
    with scaled(net, groups, {"body": gate}):
        net(X).sum().backward()
    assert torch.allclose(seen[1], seen[0] * gate.detach()[:, None, None])
    step = 1e-6
    with scaled(net, groups, {"body": (gate + step * torch.eye(6, dtype=torch.float64)[3]).detach()}):
        up = net(X).sum().detach()
    with scaled(net, groups, {"body": gate.detach()}):
        here = net(X).sum().detach()
    assert float((up - here) / step) == pytest.approx(float(gate.grad[3]), rel=1e-5)


def test_costs_follow_from_kept_counts():
    net = network().float()
    groups = groups_of(net)
    cost = Cost.of(net, groups, Batch.of(X.float()))
    assert cost.params() == sum(p.numel() for p in net.parameters()) == 108 + 12 + 275 + 63
    assert cost.macs() == 16 * 108 + 4 * 270 + 60
    kept = {"body": 4, "3": 2}
    sliced = slice_units(copy.deepcopy(net), groups, REMOVED)
    assert cost.params(kept) == sum(p.numel() for p in sliced.parameters())
    assert cost.macs(kept) == Cost.of(sliced, [], Batch.of(X.float())).macs() == 16 * 72 + 4 * 72 + 24
    assert cost.price("units", kept) == 6
    assert Cost.of(net, groups).macs() == 0


def test_what_does_not_fit_is_refused():
    net = network()
    groups = groups_of(net)
    for removed, said in (
        ({"head": [0]}, "the plan names the group 'head'; the model has body, 3"),
        ({"3": [5]}, "group '3' has 5 units, the plan removes unit 5"),
        ({"3": [-1]}, "the plan removes unit -1"),
    ):
        for act in (lambda r=removed: masked(net, groups, r).__enter__(), lambda r=removed: slice_units(net, groups, r)):
            with pytest.raises(ValueError, match=said):
                act()
    with pytest.raises(ValueError, match="group '3' would lose all of its 5 units"):
        slice_units(net, groups, {"3": range(5)})
    with (
        pytest.raises(ValueError, match="group 'body' has 6 units, there are 4 gates"),
        scaled(net, groups, {"body": torch.ones(4)}),
    ):
        pass


def test_scopes_choose_by_name_pattern_and_kind_and_report_what_they_leave_out():
    groups = PruningGroups(
        (
            PruningGroup("a.ffn", "ffn", 4, ()),
            PruningGroup("a.attn", "head", 2, ()),
            PruningGroup("b.ffn", "ffn", 4, (), exact=False),
        )
    )
    assert [a.name for a in groups.chosen("ffn")] == ["a.ffn"]
    assert [a.name for a in groups.chosen("ffn", allow_approximate=True)] == ["a.ffn", "b.ffn"]
    assert [a.name for a in groups.chosen(["a.*"], freeze="head")] == ["a.ffn"]
    assert {(f.what, f.reason.split(":")[0]) for f in groups.chosen(freeze=["head"]).frozen} == {
        ("a.attn", "named by freeze"),
        ("b.ffn", "a norm reduces over its units; allow_approximate=True includes it"),
    }
    with pytest.raises(ValueError, match=r"scope 'c\.\*' matches no group; there are a.ffn, a.attn, b.ffn, of the kinds ffn, head"):
        groups.chosen("c.*")
    with pytest.raises(ValueError, match=r"leaves no group to prune: b\.ffn: a norm reduces over its units; allow_approx"):
        groups.chosen("b.*")


def test_custom_groups_are_checked_and_replace_groups_of_the_same_name():
    net = network()
    found = find_groups(net, Batch.of(X), [CUSTOM | {"consumer": ["3.weight"], "name": "0"}])
    assert [(a.name, a.n) for a in found] == [("3", 5), ("0", 6)]
    assert custom_group(net, {"name": "t", "producer": ["6.weight@1"], "consumer": ["6.weight"]}).n == 20
    for wrong, said in (
        ({"name": "a"}, "needs producers and consumers, all of the same length"),
        ({"producer": ["0.weight"]}, "a custom group has the keys name, kind, producer, consumer, tied"),
        (CUSTOM | {"consumer": ["9.weight"]}, "Sequential has no tensor '9.weight'"),
        (CUSTOM | {"consumer": ["6.weight"]}, "all of the same length, not"),
    ):
        with pytest.raises(ValueError, match=said):
            custom_group(net, wrong)
    with pytest.raises(ValueError, match="are found from one forward pass, which needs an input"):
        find_groups(net)
