"""Published criteria: values by hand, identities, and what no criterion may depend on."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from cases_criteria import EVERY, NOT_OF_MAPS, OF_EXPERTS, OF_WEIGHTS, SCAR, ConvNet, conv_data, conv_groups, conv_net, linear, of
from nets import batches, generator
from published import PUBLISHED
from torch import Tensor, nn
from torch.testing import assert_close

from nodelens.metrics import get_metric, list_metrics
from nodelens.metrics import model_sums as per_weight
from nodelens.metrics.feature_maps import HRank
from nodelens.network.groups import GroupSlice, PruningGroup, identity
from nodelens.pruning.criteria.criterion import Criterion, Term
from nodelens.pruning.criteria.scoring import score_table
from nodelens.statistics import map_ranks as of_maps


def gate_slopes(model: nn.Module, group: PruningGroup, x: Tensor, y: Tensor) -> Tensor:
    """q a sample and unit, (samples, units), by one gate and one sample at a time, at the consumers' inputs."""
    from nodelens.pruning.surgery.mask import scaled

    rows = []
    for k in range(len(x)):
        gate = torch.ones(group.n, dtype=torch.float64, requires_grad=True)
        with scaled(model.eval(), [group], {group.name: gate}):
            loss = nn.functional.cross_entropy(model(x[k : k + 1]), y[k : k + 1])
        rows.append(torch.autograd.grad(loss, gate)[0])
    return torch.stack(rows)


# --- values by hand


def by_hand() -> tuple[nn.Sequential, PruningGroup, list, object]:
    """Two samples, hidden values (1, 2, 1) and (0, 4, 4), their slopes (1, -1, 2) and (0, 3, 1): the loss is the label's logit."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2, bias=False)).double()
    net[0].weight.data = torch.tensor([[1.0, 0], [0, 2], [-1, 1]], dtype=torch.float64)
    net[0].bias.data = torch.tensor([0.0, 0, 1], dtype=torch.float64)
    net[2].weight.data = torch.tensor([[1.0, -1, 2], [0, 3, 1]], dtype=torch.float64)
    data = [(torch.tensor([[1.0, 1], [-1, 2]], dtype=torch.float64), torch.tensor([0, 1]))]
    return net, linear("0", identity(3), "2"), data, lambda z, y: z.gather(1, y[:, None]).sum()


VALUES = [
    ("magnitude", {}, [1, 2, 2]),
    ("l1", {}, [1, 2, 2]),
    ("l2", {}, [1, 2, math.sqrt(2)]),
    ("group_l2", {}, [2, 14, 7]),
    ("fpgm", {}, [2 * math.sqrt(5), math.sqrt(5) + math.sqrt(2), math.sqrt(5) + math.sqrt(2)]),
    ("lamp", {}, [1 / 7, 1, 1 / 3]),
    ("wanda", {}, [0.5, 2 * math.sqrt(20), 1.5 * math.sqrt(17)]),
    ("flap", {}, [0.5, 20, 22.5]),
    ("activation_power", {}, [0.5, 10, 8.5]),
    ("minitron", {}, [1, math.sqrt(20), math.sqrt(17)]),
    ("taylor", {}, [0.5, 74, 10]),
    ("taylor", {"abs": True}, [0.5, 7, 3]),
    ("taylor_producer", {}, [0.5, 74, 10]),
    ("loss_proxy", {}, [0.25, 37, 5]),
    ("loss_proxy", {"unit": "token"}, [0.25, 37, 5]),
    ("gradient", {}, [1, 10, 5]),
    ("fisher", {}, [0.25, 37, 3.25]),
    ("llm_pruner", {}, [2, 24, 11]),
    ("llm_pruner", {"form": "vector"}, [2, 20, 9]),
    ("llm_pruner", {"form": "el2"}, [1, 148, 16.5]),
    ("llm_pruner", {"form": "mix"}, [0.5, 64, 3.75]),
    ("movement", {}, [-0.5, -5, -1.5]),
]


@pytest.mark.parametrize(
    ("name", "options", "expected"), VALUES, ids=[f"{n}{'-'.join(map(str, o.values()))}" for n, o, _ in VALUES]
)
def test_values_by_hand(name, options, expected):
    net, group, data, loss = by_hand()
    assert_close(of(group, net, name, data, loss, **options), torch.tensor(expected, dtype=torch.float64))


def test_every_criterion_has_a_value_by_hand():
    elsewhere = {"hrank", "chip", "bn_scale", "random", *SCAR, *OF_EXPERTS}
    assert {name for name, *_ in VALUES} | elsewhere == set(PUBLISHED)


def test_maps_by_hand():
    """One sample of three 2 x 2 maps: the unit matrix, ones, nothing. Their singular values are sqrt(3 +- sqrt(5))."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 1, 2), nn.Flatten()).double()
    net[0].weight.data = torch.eye(3, dtype=torch.float64)[:, :, None, None]
    net[0].bias.data.zero_()
    x = torch.tensor([[[[1.0, 0], [0, 1]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]]], dtype=torch.float64)
    group = linear("0", identity(3), "2", kind="channel")
    assert of(group, net, "hrank", [x]).tolist() == [2, 1, 0]
    expected = torch.tensor([math.sqrt(10) - 2, math.sqrt(10) - math.sqrt(2), 0], dtype=torch.float64)
    assert_close(of(group, net, "chip", [x]), expected)


def test_the_scale_of_a_batch_norm_is_its_size_and_summed_over_those_that_are_tied():
    net, (group, other) = conv_net(), conv_groups()
    net.bn.weight.data = torch.tensor([-2.0, 0.5, 0], dtype=torch.float64)
    assert of(group, net, "bn_scale").tolist() == [2, 0.5, 0]
    twice = PruningGroup("a", "channel", 3, (*group.slices, GroupSlice("bn", "weight", 0, identity(3), "tied")))
    assert of(twice, net, "bn_scale").tolist() == [4, 1, 0]
    with pytest.raises(ValueError, match="bn_scale: no batch norm with a weight is tied to group 'b'"):
        of(other, net, "bn_scale")


def test_what_moves_towards_zero_goes_first():
    """w = 1 and g = +1 give -1; the second step has 0.9 for both."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, bias=False)).double()
    for p in net.parameters():
        p.data.fill_(1)
    net[0].bias.data.zero_()
    group, data = linear("0", identity(1), "1"), [(torch.ones(1, 1, dtype=torch.float64), torch.tensor([0]))]

    def loss(z, y):
        return z.sum()

    assert of(group, net, "movement", data, loss).tolist() == [-1]
    net[0].weight.data.fill_(-1)
    assert of(group, net, "movement", data, loss).tolist() == [1]
    net[0].weight.data.fill_(1)
    # both weights go to 0.9, and the bias to -0.1, which no step of the score reads
    assert of(group, net, "movement", data, loss, lr=0.1, epochs=2).tolist() == pytest.approx([-1 - 0.9 * 0.9])
    assert net[0].weight.item() == 1


def test_chance_belongs_to_seed_draw_and_axis_and_leaves_the_global_generator_alone():
    net, groups = conv_net(), conv_groups()
    before = torch.random.get_rng_state()
    first = of(groups[0], net, "random", seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, of(groups[0], net, "random", seed=3))
    assert ((first >= 0) & (first < 1)).all()
    others = [
        of(groups[0], net, "random", seed=4),
        of(groups[0], net, "random", seed=3, draw=1),
        of(groups[1], net, "random", seed=3)[:3],
    ]
    assert all(not torch.equal(first, other) for other in others)


def test_ties_share_a_lamp_score_and_an_axis_of_zeros_has_none():
    net = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))
    net[0].weight.data = torch.tensor([[1.0], [2], [-2], [0]])
    group = linear("0", identity(4), "1")
    assert of(group, net, "lamp").tolist() == pytest.approx([1 / 9, 0.5, 0.5, 0])
    net[0].weight.data.zero_()
    assert of(group, net, "lamp").isnan().all()


# --- identities


@pytest.mark.parametrize("which", [0, 1])
def test_gates_are_the_consumers_weights_times_their_gradient(which):
    net, group, (x, y) = conv_net().eval(), conv_groups()[which], conv_data(1)
    piece = group.by_role("consumer")[0]
    weight = net.get_submodule(piece.module).weight
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), weight)
    q = (weight * g).detach().movedim(1, 0)[piece.index].flatten(1).sum(1)
    assert_close(of(group, net, "taylor", [(x, y)]), q.square())


@pytest.mark.parametrize("which", [0, 1])
def test_the_producer_form_is_the_producers_weights_and_bias_times_their_gradients(which):
    net, group, (x, y) = conv_net().eval(), conv_groups()[which], conv_data(1)
    made = net.get_submodule(group.name)
    loss = nn.functional.cross_entropy(net(x), y)
    g, g_bias = torch.autograd.grad(loss, (made.weight, made.bias))
    q = ((made.weight * g).flatten(1).sum(1) + made.bias * g_bias).detach()
    assert_close(of(group, net, "taylor_producer", [(x, y)]), q.square())


def test_behind_a_batch_norm_and_a_relu_the_gate_is_the_norms_own_gradient():
    net, group, (x, y) = conv_net().eval(), conv_groups()[0], conv_data(1)
    g, g_bias = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), (net.bn.weight, net.bn.bias))
    q = (net.bn.weight * g + net.bn.bias * g_bias).detach()
    assert_close(of(group, net, "taylor", [(x, y)]), q.square())


@pytest.mark.parametrize("which", [0, 1])
def test_gates_of_many_samples_are_those_of_each_alone(which):
    net, group, (x, y) = conv_net(), conv_groups()[which], conv_data()
    q = gate_slopes(net, group, x, y)
    assert_close(of(group, net, "taylor", [(x, y)]), q.square().mean(0))
    assert_close(of(group, net, "taylor", [(x, y)], abs=True), q.abs().mean(0))
    assert_close(of(group, net, "loss_proxy", [(x, y)]), 0.5 * q.square().mean(0))


class Branches(nn.Module):
    """Units that two layers read, of which one is called twice."""

    def __init__(self):
        super().__init__()
        self.make, self.left, self.right = nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.make(x))
        return self.left(h) + self.right(h) * self.left(h**2)


def test_what_several_consumers_read_is_added_before_any_square():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Branches().double()
    slices = linear("make", identity(3), "left").slices
    group = PruningGroup("make", "ffn", 3, (*slices, GroupSlice("right", "weight", 1, identity(3), "consumer")))
    x, y = torch.randn(6, 4, generator=generator(), dtype=torch.float64), torch.arange(6) % 5
    assert_close(of(group, net, "taylor", [(x, y)]), gate_slopes(net, group, x, y).square().mean(0))
    h = torch.tanh(net.make(x)).detach()
    left, right = torch.cat([h, h**2]), h
    k_left, k_right = net.left.weight.detach(), net.right.weight.detach()
    assert_close(of(group, net, "activation_power", [x]), (left.square().mean(0) + right.square().mean(0)) / 2)
    wanda = k_left.abs().mean(0) * left.norm(dim=0) + k_right.abs().mean(0) * right.norm(dim=0)
    assert_close(of(group, net, "wanda", [x]), wanda)
    flap = left.var(0) * k_left.square().sum(0) + right.var(0) * k_right.square().sum(0)
    assert_close(of(group, net, "flap", [x]), flap)
    both = (h.square() + h.pow(4)).sum(0).sqrt() + h.norm(dim=0)  # a second call is one more row of the sample's position
    assert_close(of(group, net, "minitron", [x]), both)


def test_maps_and_their_flattened_places_are_read_as_they_are_consumed():
    net, (first, second), (x, y) = conv_net().eval(), conv_groups(), conv_data()
    with torch.no_grad():
        u = torch.relu(net.bn(net.a(x)))
        v = torch.relu(net.b(u)).flatten(2)  # (samples, 4, 9): 9 places a unit
    kernel, columns = net.b.weight.detach(), net.fc.weight.detach().unflatten(1, (4, 9))
    data = [(x, y)]
    assert_close(of(first, net, "wanda", data), kernel.abs().sum((2, 3)).mean(0) * u.square().sum((0, 2, 3)).sqrt())
    assert_close(of(second, net, "wanda", data), (columns.abs().mean(0) * v.square().sum(0).sqrt()).sum(1))
    assert_close(of(first, net, "flap", data), u.transpose(0, 1).flatten(1).var(1) * kernel.square().sum((0, 2, 3)))
    assert_close(of(second, net, "flap", data), (columns.square().sum(0) * v.var(0)).mean(1))
    assert_close(of(first, net, "activation_power", data), u.square().mean((0, 2, 3)))
    assert_close(of(second, net, "activation_power", data), v.square().mean(0).sum(1))
    assert_close(of(first, net, "minitron", data), u.square().sum(0).sqrt().mean((1, 2)))
    assert_close(of(second, net, "minitron", data), v.square().sum((0, 2)).sqrt())


# --- slow and obvious seconds


def test_rounding_is_no_rank():
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1))
    net[0].weight.data = torch.tensor([1 / 3, 0.7])[:, None, None, None]
    u, v = torch.rand(2, 8, generator=generator())
    group = PruningGroup(
        "0", "channel", 2, tuple(piece for piece in linear("0", identity(2), "1").slices if piece.tensor != "bias")
    )
    assert of(group, net, "hrank", [u.outer(v)[None, None]]).tolist() == [1, 1]
    assert torch.linalg.matrix_rank((u.outer(v) / 3).double()) > 1


@pytest.mark.parametrize("budget", [1 << 24, 50])
def test_ranks_and_nuclear_norms_are_those_of_a_loop(monkeypatch, budget):
    monkeypatch.setattr(of_maps, "BUDGET", budget)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 2), nn.Flatten()).eval()
    net[0].weight.data[4] = net[0].weight.data[1]
    group = linear("0", identity(6), "2", kind="channel")
    for size in (4, 7):  # 6 maps of 4 pixels, and of 25: either side of A is the smaller one
        x = torch.randn(5, 2, size, size, generator=generator())
        maps = torch.relu(net[0](x)).detach()
        ranks = torch.stack([torch.stack([torch.linalg.matrix_rank(m) for m in sample]) for sample in maps]).double().mean(0)
        assert_close(of(group, net, "hrank", [x[:2], x[2:]]), ranks)
        lost = torch.zeros(6, dtype=torch.float64)
        for a in maps.double().flatten(2):
            for u in range(6):
                without = a.clone()
                without[u] = 0
                lost[u] += torch.linalg.matrix_norm(a, "nuc") - torch.linalg.matrix_norm(without, "nuc")
        assert_close(of(group, net, "chip", [x[:2], x[2:]]), lost / 5, rtol=1e-6, atol=1e-6)


class Reading(ConvNet):
    """A network whose forward pass asks a tensor for its value: no vmap bears that."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1.0 if float(x.detach().sum()) < math.inf else 0.0))


@pytest.mark.parametrize("chunk", [1 << 26, 600, 1])
@pytest.mark.parametrize("kind", [ConvNet, Reading])
def test_fisher_is_that_of_samples_shown_alone(monkeypatch, chunk, kind):
    monkeypatch.setattr(per_weight, "CHUNK", chunk)
    net, (x, y) = conv_net(), conv_data()
    net.__class__ = kind
    found = score_table(net, conv_groups(), {"fisher": EVERY["fisher"], "el2": EVERY["el2"]}, batches(x, y, 6))
    net.eval()
    h = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for k in range(len(x)):
        loss = nn.functional.cross_entropy(net(x[k : k + 1]), y[k : k + 1])
        for (name, p), g in zip(net.named_parameters(), torch.autograd.grad(loss, net.parameters()), strict=True):
            h[name] += (p * g).detach().square() / len(x)
    for group, reads in (("a", "b"), ("b", "fc")):
        made = h[f"{group}.weight"].flatten(1).sum(1)
        read = h[f"{reads}.weight"].sum(0).reshape(len(made), -1).sum(1)
        assert_close(torch.from_numpy(found.loc[group, "fisher"].to_numpy().copy()), made / 2)
        assert_close(torch.from_numpy(found.loc[group, "el2"].to_numpy().copy()), made + read)


def test_a_batch_in_a_vmap_and_samples_one_by_one_agree(monkeypatch):
    net, (x, y) = conv_net(), conv_data()
    calls = []
    together = per_weight.SampleGradients._at_once
    monkeypatch.setattr(per_weight.SampleGradients, "_at_once", lambda self, *a: calls.append(len(a[0])) or together(self, *a))
    first = of(conv_groups()[0], net, "fisher", batches(x, y, 7))
    assert calls == [7]
    net.__class__ = Reading
    assert_close(of(conv_groups()[0], net, "fisher", batches(x, y, 3)), first)
    assert calls == [7, 3], "a model that does not bear it is asked once"


# --- what scores do not depend on


def table(net: nn.Module, groups: list[PruningGroup], data, chosen=NOT_OF_MAPS, **options) -> dict[str, np.ndarray]:
    frame = score_table(net, groups, chosen, data, **options)
    return {name: frame[name].to_numpy() for name in frame}


@pytest.mark.parametrize("size", [1, 3])
def test_batch_size_and_order_change_nothing(size):
    x, y = conv_data()
    chosen = {k: v for k, v in NOT_OF_MAPS.items() if k != "movement"}  # whose steps are batches
    expected = table(conv_net(), conv_groups(), [(x, y)], chosen)
    order = torch.randperm(7, generator=generator())
    for name, values in table(conv_net(), conv_groups(), batches(x[order], y[order], size), chosen).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-10, atol=1e-14, err_msg=name)
    maps = {k: EVERY[k] for k in ("hrank", "chip")}
    expected = table(conv_net(), conv_groups()[:1], [(x, y)], maps)
    for name, values in table(conv_net(), conv_groups()[:1], batches(x[order], y[order], size), maps).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, err_msg=name)


def test_permuted_units_permute_the_scores():
    net, (group, _), data = conv_net(), conv_groups(), [conv_data()]
    chosen = {k: v for k, v in EVERY.items() if k != "random"}  # drawn by place
    before = table(net, [group], data, chosen)
    order = [2, 0, 1]
    for piece in group.slices:
        tensor = piece.of(net)
        tensor.copy_(tensor.index_select(piece.dim, torch.tensor(order)))
    for name, values in table(net, [group], data, chosen).items():
        np.testing.assert_allclose(values, before[name][order], rtol=1e-7, err_msg=name)


def test_a_scaled_loss_changes_no_order():
    net, groups, data = conv_net(), conv_groups(), [conv_data()]
    powers = {"taylor": 2, "taylor_abs": 1, "taylor_producer": 2, "loss_proxy": 2, "fisher": 2, "gradient": 1, "llm_pruner": 1}
    powers |= {"el2": 2, "vector": 1, "wanda": 0, "flap": 0}
    chosen = {k: EVERY[k] for k in powers}
    plain = table(net, groups, data, chosen)
    scaled = table(net, groups, data, chosen, loss=lambda z, y: 3 * nn.functional.cross_entropy(z, y, reduction="sum"))
    for name, power in powers.items():
        np.testing.assert_allclose(scaled[name], 3**power * plain[name], rtol=1e-10, err_msg=name)


def test_a_dead_filter_scores_lowest():
    net, groups, data = conv_net(), conv_groups(), batches(*conv_data(), 4)
    for tensor in (net.a.weight, net.a.bias, net.bn.weight, net.bn.bias):
        tensor.data[1] = 0
    net.b.weight.data[2], net.b.bias.data[2] = 0, 0
    left_out = {
        *OF_WEIGHTS,  # read no data
        "movement",  # a dead unit does not move, others may move towards zero
    }
    chosen = {k: v for k, v in EVERY.items() if k not in left_out}
    found = score_table(net, groups[:1], chosen, data)
    assert (found.loc["a"].loc[1] == 0).all()
    assert (found.loc["a"].drop(1) > 0).all().all()
    assert (score_table(net, groups[:1], {k: EVERY[k] for k in ("l1", "l2", "bn_scale", "lamp")}).loc["a"].loc[1] == 0).all()
    second = {k: v for k, v in chosen.items() if not isinstance(v, HRank)}
    found = score_table(net, groups, second, data).loc["b"]
    assert (found.loc[2] == 0).all()
    assert (found.drop(2) > 0).all().all()


# --- the model, the data, the table


def test_the_model_is_as_it_was():
    net, data = conv_net(), [conv_data()]
    net.a.weight.requires_grad_(False)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    net.bn.eval()
    before, flags = copy.deepcopy(net.state_dict()), [(m.training, len(m._forward_pre_hooks)) for m in net.modules()]
    table(net, conv_groups()[:1], data, EVERY)
    assert all(torch.equal(before[k], t) for k, t in net.state_dict().items())
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["a.weight"]
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["fc.weight"]
    assert (net.fc.weight.grad == 1).all()
    assert flags == [(m.training, len(m._forward_pre_hooks)) for m in net.modules()]

    def broken(z, y):
        raise RuntimeError("no loss")

    with pytest.raises(ValueError, match=r"batch 0 of the data .*: no loss"):
        table(net, conv_groups(), data, {"taylor": EVERY["taylor"], "llm_pruner": EVERY["llm_pruner"]}, loss=broken)
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["a.weight"]
    assert flags == [(m.training, len(m._forward_pre_hooks)) for m in net.modules()]


def test_the_data_are_read_once_and_a_table_has_a_row_a_unit():
    seen = []

    def watched(data):
        for batch in data:
            seen.append(len(batch[0]))
            yield batch

    x, y = conv_data()
    once = {k: v for k, v in NOT_OF_MAPS.items() if k not in SCAR}
    found = score_table(conv_net(), conv_groups(), once, iter(batches(x, y, 4)), progress=watched)
    assert seen == [4, 3]
    assert found.index.names == ["group", "unit"]
    assert found.index.tolist() == [("a", u) for u in range(3)] + [("b", u) for u in range(4)]
    assert list(found) == list(once)
    assert (found.dtypes == "float64").all()
    assert found.notna().all().all()


def test_weights_alone_need_no_data_and_read_none():
    def unread():
        raise AssertionError("the data were read")
        yield

    chosen = {k: EVERY[k] for k in OF_WEIGHTS - {"bn_scale"}}
    without = score_table(conv_net(), conv_groups(), chosen)
    assert score_table(conv_net(), conv_groups(), chosen, unread()).equals(without)


@pytest.mark.parametrize("name", [k for k, v in EVERY.items() if k not in OF_WEIGHTS])
def test_data_that_are_missing_or_empty_stop_the_run(name):
    net, groups = conv_net(), conv_groups()[:1]
    with pytest.raises(ValueError, match=f"{name} is measured on data: give data="):
        score_table(net, groups, {name: EVERY[name]})
    with pytest.raises(ValueError, match="the data are empty"):
        score_table(net, groups, {name: EVERY[name]}, [])


def test_options_and_names():
    assert set(PUBLISHED) <= set(list_metrics())
    for kind in {type(metric) for metric in EVERY.values()}:
        assert all(f"    {part}" in kind.__doc__ for part in ("Formula:", "Shapes:", "Unit:", "NaN:", "Source:")), kind
    assert get_metric("l2") == get_metric("magnitude", p=2)
    assert get_metric("l2").options == {"p": 2}
    with pytest.raises(ValueError, match="no metric is called 'tailor'; did you mean 'taylor'"):
        get_metric("tailor")
    with pytest.raises(ValueError, match="taylor has no option 'form'; it takes abs"):
        get_metric("taylor", form="producer")
    with pytest.raises(ValueError, match="magnitude: p is 3; it takes 1, 2"):
        get_metric("magnitude", p=3)
    with pytest.raises(ValueError, match="movement: lr is 0, epochs 1; both must be above 0"):
        get_metric("movement", lr=0)


def test_what_cannot_be_scored_is_an_error_that_says_why():
    net, (first, second), data = conv_net(), conv_groups(), [conv_data()]
    for name in ("hrank", "chip"):
        with pytest.raises(ValueError, match=rf"{name} needs feature maps: group 'b' is read by fc \(Linear\)"):
            of(second, net, name, data)
    row = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1))
    with pytest.raises(ValueError, match="group '0' has maps of 1 x 4"):
        of(linear("0", identity(2), "1"), row, "hrank", [torch.ones(2, 1, 1, 4)])
    with pytest.raises(ValueError, match=r"group 'a' has no tokens of its own: it is read by b \(Conv2d\)"):
        of(first, net, "loss_proxy", data, unit="token")
    with pytest.raises(ValueError, match=r"the data are read 2 times, .* and are an iterator"):
        of(first, net, "movement", iter(data), epochs=2)
    with pytest.raises(ValueError, match="taylor: loss= gives a number without a gradient: compute it from the logits"):
        of(first, net, "taylor", data, loss=lambda z, y: z.detach().sum())
    with pytest.raises(ValueError, match="taylor: group 'a' has no producer or no consumer"):
        of(PruningGroup("a", "channel", 3, first.slices[:1]), net, "taylor", data)


class Bypassing(nn.Module):
    """A parent that reads its child's weight, as attention of torch does."""

    def __init__(self):
        super().__init__()
        self.make, self.read = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.make(x), self.read.weight)


@pytest.mark.parametrize("name", ["wanda", "taylor", "minitron"])
def test_a_consumer_that_is_never_called_stops_the_run(name):
    with pytest.raises(ValueError, match=r"layer 'read.input' is never called by Bypassing.*leave its group out .freeze=."):
        of(linear("make", identity(3), "read"), Bypassing(), name, [(torch.ones(2, 2), torch.tensor([0, 1]))])


def test_a_product_takes_zeros_but_nothing_below():
    index = pd.MultiIndex.from_product([["g"], range(4)], names=["group", "unit"])
    table = pd.DataFrame({"a": [0.0, 1, 4, 9], "b": [2.0, 2, 0, 1], "c": [-1.0, 1, 1, 1]}, index=index)
    product = Criterion.of({"terms": {"a": 0.5, "b": 2.0, "c": 0.0}, "combine": "product"})
    with pytest.raises(ValueError, match=r"multiplies, and c has values below 0: use combine: sum"):
        product.score(table)
    found = product.score(table.assign(c=[0.0, 1, 1, 1]))
    np.testing.assert_allclose(found, [0, 4, 0, 3], rtol=1e-12)
    with pytest.raises(ValueError, match=r"multiplies, and b has values of 0, and a weight below 0: use combine: sum"):
        Criterion.of({"terms": {"a": 1, "b": -1}, "combine": "product"}).score(table)


def test_a_criterion_of_an_object_is_checked_as_one_of_a_dictionary():
    assert Criterion("x", {"rq": 1, "taylor": Term(-2.0, "log")}) == Criterion.of(
        {"terms": {"rq": 1.0, "taylor": {"weight": -2.0, "transform": "log"}}}, "x"
    )
    cases = [
        ({"terms": {}}, "has no term"),
        ({"terms": {"rq": "much"}}, "rq is 'much'; it is a weight, a number, or"),
        ({"terms": {"rq": Term(1.0, "cube")}}, "transform of rq is 'cube'; it is none, log, sqrt, abs, rank"),
        ({"terms": {"rq": 1.0}, "normalize": "foo"}, "normalize is 'foo'; it is none, rank"),
        ({"terms": {"rq": 1.0}, "combine": "foo"}, "combine is 'foo'; it is sum, product"),
        ({"terms": {"rq": 1.0}, "protect": {"rq": 2}}, "protect.rq is 2; it is a share"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            Criterion("x", **given)
