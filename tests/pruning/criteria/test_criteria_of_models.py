"""Published criteria on texts, attention heads, groups, experts, several processes, and a trained network."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases_criteria import EVERY, FORMS, NOT_OF_MAPS, OF_WEIGHTS, conv_data, conv_groups, conv_net, linear, of
from ids import label
from nets import Tokens, batches, build, generator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.metrics import get_metric, model_sums
from nodelens.metrics.feature_maps import HRank
from nodelens.network.groups import GroupSlice, PruningGroup, identity, offsets, span
from nodelens.pruning.criteria.scoring import score_table
from nodelens.pruning.surgery.mask import masked

TOKEN = {"proxy_token": get_metric("loss_proxy", unit="token")}
OF_WEIGHT_GRADIENTS = {"gradient", "fisher", "llm_pruner", "movement", "el2", "mix", "vector"}
ON_DATA = {k: v for k, v in {**NOT_OF_MAPS, **TOKEN}.items() if k not in OF_WEIGHTS and k != "movement"}


def llama() -> tuple[nn.Module, list[PruningGroup]]:
    """Two layers of 8 query and 2 key heads of 4, hidden 12."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 12, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 23}
    net = _built(LlamaForCausalLM, LlamaConfig(**sizes, num_hidden_layers=2, use_cache=False))
    groups = []
    for k in range(2):
        path = f"model.layers.{k}.self_attn"
        widths = {"q_proj": 16, "k_proj": 4, "v_proj": 4}
        made = [GroupSlice(f"{path}.{name}", "weight", 0, span(2, width), "producer") for name, width in widths.items()]
        groups.append(
            PruningGroup(path, "kv_group", 2, (*made, GroupSlice(f"{path}.o_proj", "weight", 1, span(2, 16), "consumer")))
        )
        path, i = f"model.layers.{k}.mlp", identity(12)
        made = [GroupSlice(f"{path}.{name}", "weight", 0, i, "producer") for name in ("gate_proj", "up_proj")]
        groups.append(PruningGroup(path, "ffn", 12, (*made, GroupSlice(f"{path}.down_proj", "weight", 1, i, "consumer"))))
    return net, groups


def gpt2() -> tuple[nn.Module, list[PruningGroup]]:
    """One layer of 4 heads of 4: one tensor for queries, keys and values, stored as (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    net = _built(GPT2LMHeadModel, GPT2Config(vocab_size=23, n_positions=16, n_embd=16, n_layer=1, n_head=4, use_cache=False))
    path, places = "transformer.h.0.attn", offsets([span(4, 4, start) for start in (0, 16, 32)])
    made = (
        GroupSlice(f"{path}.c_attn", "weight", 1, places, "producer"),
        GroupSlice(f"{path}.c_attn", "bias", 0, places, "producer"),
    )
    return net, [PruningGroup(path, "head", 4, (*made, GroupSlice(f"{path}.c_proj", "weight", 0, span(4, 4), "consumer")))]


def _built(kind, config) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = kind(config).double()
        for p in net.parameters():
            p.data += 0.3 * torch.randn_like(p)  # biases are not zero, losses not flat
    return net


def texts(lengths: list[int], padded: bool = True) -> list[dict[str, Tensor]]:
    """Token ids, in one batch padded to the longest, or each alone."""
    rows = [torch.randint(1, 23, (n,), generator=generator(k)) for k, n in enumerate(lengths)]
    if not padded:
        return [{"input_ids": row[None], "labels": row[None]} for row in rows]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return [{"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids}]


def close(a, b, rtol: float = 1e-9) -> None:
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=1e-14, err_msg=name)


# --- heads and texts


@pytest.mark.parametrize("build_model", [llama, gpt2])
def test_a_dead_head_scores_lowest(build_model):
    net, groups = build_model()
    for group in groups:
        for piece in group.by_role("producer"):
            piece.of(net).index_fill_(piece.dim, piece.index[1], 0)
    found = score_table(net, groups, ON_DATA, texts([6, 6, 6]))
    for group in groups:
        assert (found.loc[group.name].loc[1] == 0).all(), group.name
        assert (found.loc[group.name].drop(1) > 0).all().all(), group.name
    chosen = {k: v for k, v in EVERY.items() if k in OF_WEIGHTS - {"bn_scale", "random", "group_l2", "fpgm"}}
    assert (score_table(net, groups, chosen).xs(1, level="unit") == 0).all().all()


@pytest.mark.parametrize("build_model", [llama, gpt2])
def test_a_head_is_its_whole_span(build_model):
    """The slope of a gate on all of its places; its weights beside their gradient, added up before the square."""
    net, groups = build_model()
    net.eval()
    batch = texts([7])[0]
    found = score_table(net, groups, {"taylor": EVERY["taylor"], "producer": EVERY["taylor_producer"]}, [batch])
    for group in groups:
        for name, role in (("taylor", "consumer"), ("producer", "producer")):
            slices = group.by_role(role)
            tensors = [getattr(net.get_submodule(piece.module), piece.tensor) for piece in slices]
            logits = net(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum")
            q = torch.zeros(group.n, dtype=torch.float64)
            for piece, w, g in zip(slices, tensors, torch.autograd.grad(loss, tensors), strict=True):
                q += (w * g).detach().movedim(piece.dim, 0)[piece.index].flatten(1).sum(1)
            assert_close(torch.from_numpy(found.loc[group.name, name].to_numpy().copy()), q.square(), msg=f"{group.name} {name}")


def test_scores_of_padded_texts_are_those_of_each_text_alone():
    net, groups = llama()
    chosen = ON_DATA | FORMS
    close(score_table(net, groups, chosen, texts([5, 8, 6])), score_table(net, groups, chosen, texts([5, 8, 6], padded=False)))


def test_fisher_of_texts_is_that_of_each_alone_whatever_a_vmap_bears(monkeypatch):

    net, groups = llama()
    chosen = {"fisher": EVERY["fisher"], "el2": FORMS["el2"]}
    found = score_table(net, groups, chosen, texts([6, 6, 6]))
    monkeypatch.setattr(model_sums, "CHUNK", 1)
    close(score_table(net, groups, chosen, texts([6, 6, 6])), found)


def token_axis() -> PruningGroup:
    return linear("ffn", identity(7), "head")


class EachToken(Tokens):
    """Its head reads every token, where a mean over tokens follows."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.head(torch.tanh(self.ffn(self.embed(input_ids))))
        mask = attention_mask[..., None].to(h.dtype)
        return (h * mask).sum(1) / mask.sum(1)


def test_padding_on_either_side_and_none_agree():
    net, lengths = build(EachToken).double(), [3, 5, 4]
    rows, y = [torch.randint(1, 11, (n,), generator=generator(n)) for n in lengths], torch.tensor([0, 2, 1])

    def batch(side: str) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": y}

    whole = [torch.ones(1, n, dtype=torch.long) for n in lengths]
    alone = [
        {"input_ids": r[None], "attention_mask": m, "labels": y[k][None]} for k, (r, m) in enumerate(zip(rows, whole, strict=True))
    ]
    expected = score_table(net, [token_axis()], ON_DATA, alone)
    for side in ("left", "right"):
        close(score_table(net, [token_axis()], ON_DATA, [batch(side)]), expected)
    h = [torch.tanh(net.ffn(net.embed(row))).detach() for row in rows]
    power = torch.stack([nn.functional.pad(x, (0, 0, 0, 5 - len(x))) for x in h]).square()
    assert_close(torch.from_numpy(expected["minitron"].to_numpy().copy()), power.sum(0).sqrt().mean(0))
    assert_close(torch.from_numpy(expected["activation_power"].to_numpy().copy()), torch.cat(h).square().mean(0))
    assert_close(
        torch.from_numpy(expected["wanda"].to_numpy().copy()), net.head.weight.detach().abs().mean(0) * torch.cat(h).norm(dim=0)
    )


def test_the_proxy_of_tokens_squares_each_token():
    net = build(EachToken).double()
    ids, y = torch.randint(1, 11, (4, 5), generator=generator()), torch.tensor([0, 2, 1, 0])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": y}
    h = torch.tanh(net.ffn(net.embed(ids))).detach().requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(net.head(h).mean(1), y, reduction="sum"), h)
    q = (h * g).detach()
    assert_close(of(token_axis(), net, "loss_proxy", [batch], unit="token"), 0.5 * q.square().mean((0, 1)))
    assert_close(of(token_axis(), net, "loss_proxy", [batch]), 0.5 * q.sum(1).square().mean(0))
    assert_close(of(token_axis(), folded(net), "taylor", [batch]), q.sum(1).square().mean(0))
    assert_close(of(token_axis(), folded(net), "loss_proxy", [batch], unit="token"), 0.5 * q.square().mean((0, 1)))


def folded(net: nn.Module) -> nn.Module:
    """The same network, with tokens folded into the batch before its layers see them."""

    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.ffn, self.head = net.embed, net.ffn, net.head

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            rows = self.head(torch.tanh(self.ffn(self.embed(input_ids).flatten(0, 1))))
            return rows.unflatten(0, input_ids.shape).mean(1)

    return Folded()


def test_rows_that_belong_to_no_sample_stop_the_run():
    class Cut3(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn, self.head = nn.Linear(2, 7), nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.ffn(x[:3])).sum(0).expand(len(x), -1)

    for name in ("taylor", "wanda"):
        with pytest.raises(ValueError, match=r"shows 3 rows .*for a batch of 4 samples"):
            of(token_axis(), Cut3(), name, [(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))])


# --- groups, experts, precision


def test_a_grouped_convolution_reads_a_unit_in_each_group():
    """The same network with the groups' kernels spread over a dense one, whose outputs read twice as many inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        grouped = nn.Sequential(
            nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 3)
        ).double()
    dense = nn.Sequential(grouped[0], nn.ReLU(), nn.Conv2d(6, 4, 2), nn.Flatten(), grouped[4]).double()
    dense[2].weight.data.zero_()
    for g in range(2):
        dense[2].weight.data[2 * g : 2 * g + 2, 3 * g : 3 * g + 3] = grouped[2].weight.data[2 * g : 2 * g + 2]
    dense[2].bias.data = grouped[2].bias.data
    both = torch.tensor([[0, 3], [1, 4], [2, 5]])
    made = linear("0", both, "2").slices[:2]
    narrow = PruningGroup("0", "channel", 3, (*made, GroupSlice("2", "weight", 1, identity(3), "consumer", reads=both)))
    wide = PruningGroup("0", "channel", 3, (*made, GroupSlice("2", "weight", 1, both, "consumer")))
    x, y = torch.randn(5, 2, 3, 3, generator=generator(), dtype=torch.float64), torch.arange(5) % 3
    chosen = {k: v for k, v in EVERY.items() if k != "bn_scale"}
    found, expected = (score_table(n, [a], chosen, [(x, y)]) for n, a in ((grouped, narrow), (dense, wide)))
    expected["wanda"] *= 2  # the mean runs over the outputs that can read the unit
    close(found, expected)


class Experts(nn.Module):
    """Two experts in fused tensors, mixed by a router; the groups are their hidden units."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(3, 2)
        self.gate_up, self.down = nn.Parameter(torch.randn(2, 8, 3)), nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("nh,eih->nei", x, self.gate_up).chunk(2, -1)
        each = torch.einsum("nei,ehi->neh", torch.nn.functional.silu(gate) * up, self.down)
        return (self.router(x).softmax(-1)[..., None] * each).sum(1)


def expert_groups() -> list[PruningGroup]:
    rows = offsets([identity(4), 4 + identity(4)])
    return [
        PruningGroup(
            f"[{e}]",
            "moe_ffn",
            4,
            (GroupSlice("", "gate_up", 1, rows, "producer", entry=e), GroupSlice("", "down", 2, identity(4), "consumer", entry=e)),
        )
        for e in range(2)
    ]


def test_fused_experts_are_scored_by_weights_and_their_gradients_alone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Experts().double()
    x, y = torch.randn(6, 3, generator=generator(), dtype=torch.float64), torch.arange(6) % 3
    unseen = [k for k in EVERY if k not in OF_WEIGHTS and k not in OF_WEIGHT_GRADIENTS]
    for name in unseen:
        words = (
            "needs feature maps"
            if isinstance(EVERY[name], HRank)
            else "reads activations, but no hook captures.*magnitude, group_l2.*llm_pruner"
        )
        with pytest.raises(ValueError, match=rf"{name} {words}"):
            score_table(net, expert_groups(), {name: EVERY[name]}, [(x, y)])
    chosen = {k: v for k, v in EVERY.items() if k not in (*unseen, "bn_scale")}
    found = score_table(net, expert_groups(), chosen, batches(x, y, 4))
    assert found.notna().all().all()
    g_up, g_down = torch.autograd.grad(nn.functional.cross_entropy(net(x), y, reduction="sum"), (net.gate_up, net.down))
    for e in range(2):
        made, read = (net.gate_up * g_up)[e].abs().sum(1), (net.down * g_down)[e].abs().sum(0)
        expected = made[:4] + made[4:]
        assert_close(torch.from_numpy(found.loc[f"[{e}]", "gradient"].to_numpy().copy()), expected.detach())
        assert_close(torch.from_numpy(found.loc[f"[{e}]", "llm_pruner"].to_numpy().copy()), (expected + read).detach())
        size = net.gate_up[e].abs().sum(1).detach()
        assert_close(torch.from_numpy(found.loc[f"[{e}]", "magnitude"].to_numpy().copy()), size[:4] + size[4:])


@pytest.mark.parametrize("name", ["rq", "redundancy_gaussian", "taylor_producer"])
def test_heads_inside_torch_attention_are_refused_where_units_are_made(name):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)).eval()
    data = [(torch.randn(8, 3, 8, generator=generator()), torch.arange(8) % 3)]
    says = (
        rf"{name} reads units where they are made, but no module outputs those of group '0.self_attn': '0.self_attn' is a "
        r"MultiheadAttention, which makes its heads inside; score it where its units are read \(taylor\), by weights"
    )
    with pytest.raises(ValueError, match=says):
        nl.prune(net, name, data=data)
    assert nl.prune(net, "taylor", data=data, allocation="uniform").plan.removed["0.self_attn"]
    assert nl.prune(net, name, data=data, freeze="*self_attn").plan.removed


def test_half_precision_is_close_and_adds_up_in_more():
    net, groups = llama()
    data = texts([6, 6, 6])
    expected = score_table(net, groups, ON_DATA, data)
    found = score_table(net.bfloat16(), groups, ON_DATA, data)
    for name in found:
        a, b = np.log(found[name].to_numpy()), np.log(expected[name].to_numpy())
        assert np.corrcoef(a, b)[0, 1] > 0.98, name


# --- several processes


def _work(rank, world, folder, shares):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    start, stop = sum(shares[:rank]), sum(shares[: rank + 1])
    for name, (net, groups, data, chosen) in _cases().items():
        frame = score_table(net, groups, chosen, data[start:stop])
        if rank == world - 1:
            frame.to_pickle(f"{folder}/{name}.pkl")
    dist.destroy_process_group()


def _cases():
    """Networks, groups, seven batches of one sample, of which each process has its share."""
    net = build(EachToken).double()
    rows = [torch.randint(1, 11, (1, 2 + n), generator=generator(n)) for n in range(7)]  # the longest text is the last
    words = [{"input_ids": r, "attention_mask": torch.ones_like(r), "labels": torch.tensor([n % 3])} for n, r in enumerate(rows)]
    once = {k: v for k, v in EVERY.items() if k != "movement"}  # processes take steps of their own
    return {
        "images": (conv_net(), conv_groups()[:1], batches(*conv_data(), 1), once),
        "words": (net, [token_axis()], words, ON_DATA),
    }


@pytest.mark.parametrize("shares", [[5, 0, 2]], ids=label)
def test_processes_add_up(tmp_path, shares):
    method = "fork" if not torch.cuda.is_initialized() else "spawn"
    mp.start_processes(_work, (len(shares), str(tmp_path), shares), len(shares), start_method=method)
    for name, (net, groups, data, chosen) in _cases().items():
        close(pd.read_pickle(tmp_path / f"{name}.pkl"), score_table(net, groups, chosen, data))


# --- a trained network

ACCURACY = {  # of 500 test images, a quarter of the inner channels of each block removed; dense 91.0
    "l1": 73.2, "l2": 62.0, "group_l2": 77.0, "bn_scale": 44.6, "fpgm": 72.0, "taylor": 62.4, "taylor_producer": 37.4,
    "fisher": 49.0, "wanda": 72.4, "flap": 73.8, "llm_pruner": 43.4, "activation_power": 70.8, "hrank": 60.0, "chip": 60.2,
}  # fmt: skip


@pytest.mark.slow
def test_a_trained_network_loses_what_other_implementations_of_the_criteria_lose(real_data, monkeypatch):
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.syspath_prepend(str(real_data))
    import nets as stored

    folder = real_data / "models/cifar_resnet20"
    net, config = stored.CifarResNet(20), json.loads((folder / "config.json").read_text())
    net.load_state_dict(load_file(folder / "model.safetensors"))
    x, y = images(stored, config, f"{real_data}/images/cifar10_train4000.npz", 1000)
    shown, labels = images(stored, config, f"{real_data}/images/cifar10_test_first500.npz", 500)
    groups = []
    for path in [name for name, module in net.named_modules() if hasattr(module, "conv2")]:
        i = identity(net.get_submodule(path).conv1.out_channels)
        norm = [GroupSlice(f"{path}.bn1", t, 0, i, "tied") for t in ("weight", "bias", "running_mean", "running_var")]
        made, read = (
            GroupSlice(f"{path}.conv1", "weight", 0, i, "producer"),
            GroupSlice(f"{path}.conv2", "weight", 1, i, "consumer"),
        )
        groups.append(PruningGroup(path, "channel", len(i), (made, *norm, read)))
    maps = [name for name in ACCURACY if isinstance(EVERY[name], HRank)]
    found = score_table(net, groups, {k: EVERY[k] for k in ACCURACY if k not in maps}, batches(x, y, 100))
    found = found.join(score_table(net, groups, {k: EVERY[k] for k in maps}, batches(x[:200], y[:200], 50)))
    for name, expected in ACCURACY.items():
        removed = {a.name: found.loc[a.name, name].sort_values().index[: a.n // 4].tolist() for a in groups}
        with masked(net.eval(), groups, removed), torch.no_grad():
            accuracy = (net(shown).argmax(1) == labels).double().mean()
        assert 100 * accuracy.item() == pytest.approx(expected, abs=0.41), name  # two images


def images(stored, config, path: str, n: int) -> tuple[Tensor, Tensor]:
    with np.load(path) as held:
        return stored.prep(held["x"][:n], config), torch.from_numpy(held["y"][:n].astype(np.int64))
