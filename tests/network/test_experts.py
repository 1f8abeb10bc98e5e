"""Hidden units of experts with stacked weights, compared with models whose experts are separate, hookable layers."""

import copy
import functools

import numpy as np
import pytest
import torch
import transformers
from ids import label
from torch import nn

import nodelens as nl
from nodelens.metrics import get_metric
from nodelens.network.experts import Call, Experts, Routed
from nodelens.network.find_layers import find_layers
from nodelens.network.groups import GroupSlice, PruningGroup, identity, offsets, span
from nodelens.network.hooks import Capture, Site
from nodelens.pruning.criteria.scoring import score_table
from nodelens.pruning.groups.families import family_groups
from nodelens.pruning.surgery.mask import masked

BASE = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
KV = {"num_key_value_heads": 1, "head_dim": 8}
ROTARY = BASE | IDS | KV
OWN = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 2}
NEMOTRON = {"layer_types": ["moe", "attention"], "moe_shared_expert_intermediate_size": 8, "n_routed_experts": 4}
PADDED = pytest.mark.filterwarnings("ignore:batches are padded on the left")  # positions are relative here


def silu_gate(raw):
    gate, up = raw.chunk(2, -1)
    return nn.functional.silu(gate) * up


def clamped(raw):
    gate, up = raw[..., ::2].clamp(max=7.0), raw[..., 1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


# name: (config, its options, the formula of the hidden units, where a unit's rows lie among those that make it)
BLOCKS, PAIRS, ONE = offsets((identity(8), 8 + identity(8))), span(8, 2), identity(8)
FAMILIES = {
    "mixtral": ("Mixtral", ROTARY | {"num_local_experts": 4}, silu_gate, BLOCKS),
    "qwen3 moe": ("Qwen3Moe", ROTARY | OWN | {"num_experts": 4}, silu_gate, BLOCKS),
    "olmoe": ("Olmoe", BASE | IDS | {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}, silu_gate, BLOCKS),
    "gpt oss": ("GptOss", ROTARY | {"num_local_experts": 4, "num_experts_per_tok": 2}, clamped, PAIRS),
    "deepseek v3": ("DeepseekV3", BASE | IDS | OWN | LATENT | GROUPS, silu_gate, BLOCKS),
    "granite": ("GraniteMoe", BASE | IDS | {"num_key_value_heads": 1, "num_local_experts": 4}, silu_gate, BLOCKS),
    "aria": ("AriaText", ROTARY | {"moe_num_experts": 4}, silu_gate, BLOCKS),
    "llama4": ("Llama4Text", ROTARY | {"num_local_experts": 4, "intermediate_size_mlp": 8}, silu_gate, BLOCKS),
    "nemotron": ("NemotronH", ROTARY | OWN | NEMOTRON, lambda raw: raw.relu().square(), ONE),
}


EAGER = {"gpt oss"}  # in float64, its rows of left padding are NaN


class Apart(nn.Module):
    """Experts as separate layers; their output projections read zeros for tokens routed elsewhere."""

    def __init__(self, fused, formula):
        super().__init__()
        self.formula, self.made, self.down = formula, nn.ModuleList(), nn.ModuleList()
        made = "gate_up_proj" if hasattr(fused, "gate_up_proj") else "up_proj"
        turned = fused.down_proj.shape[1] == 8
        for e in range(4):
            up, down = (getattr(fused, name)[e].detach() for name in (made, "down_proj"))
            up, down = (up.T, down.T) if turned else (up, down)
            bias = getattr(fused, f"{made}_bias", None)
            self.made.append(linear(up, None if bias is None else bias[e]))
            self.down.append(linear(down))
        self.bias = getattr(fused, "down_proj_bias", None)

    def forward(self, x, ids=None, weights=None):
        if ids is None:
            parts = x.unflatten(0, (4, -1))
            return torch.cat([self.down[e](self.formula(self.made[e](parts[e]))) for e in range(4)])
        total = 0
        for e in range(4):
            weight = ((ids == e) * weights).sum(1, keepdim=True)
            total = total + self.down[e](weight * self.formula(self.made[e](x)))
            total = total if self.bias is None else total + weight * self.bias[e]
        return total


def linear(weight, bias=None):
    layer = nn.Linear(*weight.T.shape, bias=bias is not None, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    if bias is not None:
        layer.bias.data = bias.detach().clone()
    return layer


@functools.cache
def build(name):
    """A random float64 model; the same with separate experts; groups of both, with equal names. Cached: do not modify."""
    config, options, formula, rows = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, f"{config}Config")(**options)
        chosen = {"attn_implementation": "eager" if name in EAGER else "sdpa", "experts_implementation": "eager"}
        model = transformers.AutoModelForCausalLM.from_config(made, **chosen).double().eval()
        for key, parameter in model.named_parameters():
            nn.init.normal_(parameter, 1.0 if "norm" in key.lower() else 0.0, 2.0 if "gate_up_proj" in key else 0.4)
    groups = [group for group in family_groups(model) if group.kind == "moe_ffn"]
    twin = copy.deepcopy(model)
    for path in dict.fromkeys(group.equal_count for group in groups):
        twin.set_submodule(path, Apart(model.get_submodule(path), formula))
    return model, twin, groups, [apart(group, rows, "gpt" in name) for group in groups]


def apart(group, rows, biased):
    path, e = group.equal_count, group.slices[0].entry
    made = [GroupSlice(f"{path}.made.{e}", "weight", 0, rows, "producer")]
    made += [GroupSlice(f"{path}.made.{e}", "bias", 0, rows, "producer")] if biased else []
    return PruningGroup(group.name, "moe_ffn", 8, (*made, GroupSlice(f"{path}.down.{e}", "weight", 1, identity(8), "consumer")))


def texts(lengths, side="right", total=None, seed=0):
    """One batch of token ids, padded."""
    g, total = torch.Generator().manual_seed(seed), total or max(lengths)
    ids = torch.zeros(len(lengths), total, dtype=torch.long)
    for row, n in zip(ids, lengths, strict=True):
        own = torch.randint(3, 40, (n,), generator=g)
        row[:n] = own
        if side == "left":
            row.copy_(row.roll(total - n))
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.where(ids > 0, -100)}


CRITERIA = {
    "wanda": get_metric("wanda"),
    "flap": get_metric("flap"),
    "power": get_metric("activation_power"),
    "minitron": get_metric("minitron"),
    "taylor": get_metric("taylor"),
    "size": get_metric("taylor", abs=True),
    "producer": get_metric("taylor_producer"),
    "proxy": get_metric("loss_proxy"),
    "proxy_token": get_metric("loss_proxy", unit="token"),
    "scar_prot": get_metric("scar_prot", connectivity_topk=4, halo_fraction=0.5),
    "scar_conn": get_metric("scar_conn", connectivity_topk=4, unit="sequence"),
}


def close(found, expected, rtol=1e-5):  # norms and routers are taken in float32
    assert list(found.index) == list(expected.index)
    for name in found:
        size = np.abs(expected[name]).max()
        assert size > 0, name
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=1e-7 * size, err_msg=name)


ALIKE = ("qwen3 moe", "olmoe")  # as mixtral, but for the norms of their queries and keys


@PADDED
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in FAMILIES])
def test_criteria_agree_with_those_of_separate_layers(name):
    model, twin, groups, same = build(name)
    batch = texts([9, 5, 7])
    with torch.no_grad():
        torch.testing.assert_close(twin(**batch).logits, model(**batch).logits)
    data = [batch, texts([4, 6], "right" if name in EAGER else "left", seed=1)]
    close(score_table(model, groups, CRITERIA, data), score_table(twin, same, CRITERIA, data))


def test_the_mean_loss_per_text_applies_to_experts_too():
    chosen = {name: get_metric(name, loss_reduction="mean") for name in ("scar_prot", "scar_conn")}
    for name in ("mixtral", "llama4"):
        model, twin, groups, same = build(name)
        found, summed = (score_table(model, groups, c, [texts([9, 5])]) for c in (chosen, {k: get_metric(k) for k in chosen}))
        close(found, score_table(twin, same, chosen, [texts([9, 5])]))
        assert (found.sum() < summed.sum()).all()


def test_experts_with_equal_routing_are_one_wide_ffn():
    """Every token is routed to every expert with weight 1/4."""
    model, _, groups, _ = build("mixtral")
    model, groups = copy.deepcopy(model), groups[:4]
    experts = model.model.layers[0].mlp.experts
    model.model.layers[0].mlp.gate.top_k = 4
    model.model.layers[0].mlp.gate.weight.data.zero_()
    dense = copy.deepcopy(model)
    gate, up = (part.flatten(0, 1) for part in experts.gate_up_proj.detach().chunk(2, 1))
    dense.model.layers[0].mlp = FFN(linear(gate), linear(up / 4), linear(experts.down_proj.detach().transpose(0, 1).flatten(1)))
    path, each = "model.layers.0.mlp", identity(32)
    cuts = [GroupSlice(f"{path}.{part}_proj", "weight", 0, each, "producer") for part in ("gate", "up")]
    wide = PruningGroup(path, "ffn", 32, (*cuts, GroupSlice(f"{path}.down_proj", "weight", 1, each, "consumer")))
    batch, chosen = texts([9, 6]), {k: v for k, v in CRITERIA.items() if "scar" not in k}
    with torch.no_grad():
        torch.testing.assert_close(dense(**batch).logits, model(**batch).logits)
    found, expected = score_table(model, groups, chosen, [batch]), score_table(dense, [wide], chosen, [batch])
    close(found.reset_index(drop=True), expected.reset_index(drop=True))


class FFN(nn.Module):
    def __init__(self, gate, up, down):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("name", ["mixtral", "gpt oss", "llama4"])
def test_q_is_the_slope_of_the_loss_in_a_gate(name):
    model, _, groups, _ = build(name)
    model, batch, step = copy.deepcopy(model), texts([12], seed=3), 0.02
    group = groups[5]  # of the last layer: no later router, which would be differentiated in float32
    found = score_table(model, [group], {"size": get_metric("taylor", abs=True)}, [batch])["size"].to_numpy()
    down = group.by_role("consumer")[0].of(model)

    def loss(unit, factor):
        column = down[unit] if name != "mixtral" else down[:, unit]
        kept = column.clone()
        column *= factor
        with torch.no_grad():
            z = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0, :-1]
        column.copy_(kept)
        return nn.functional.cross_entropy(z, batch["labels"][0, 1:], reduction="sum").item()

    slopes = np.abs([(loss(u, 1 + step) - loss(u, 1 - step)) / (2 * step) for u in range(8)])
    assert slopes.max() > 0.1
    np.testing.assert_allclose(found, slopes, rtol=0.01, atol=0.001 * slopes.max())  # the final norm is taken in float32


@PADDED
@pytest.mark.parametrize("name", ["mixtral", pytest.param("llama4", marks=pytest.mark.slow)])
def test_batches_padding_and_the_order_of_experts_do_not_matter(name):
    model, _, groups, _ = build(name)
    lengths = [9, 5, 7, 6]
    whole = texts(lengths)
    single = [{k: v[i : i + 1, :n] for k, v in whole.items()} for i, n in enumerate(lengths)]
    expected = score_table(model, groups, CRITERIA, single)
    close(score_table(model, groups, CRITERIA, [whole]), expected)
    left = {k: torch.stack([row.roll(9 - n) for row, n in zip(v, lengths, strict=True)]) for k, v in whole.items()}
    close(score_table(model, groups, CRITERIA, [left]), expected)
    if name == "mixtral":
        other = copy.deepcopy(model)
        for block in other.model.layers:
            block.mlp.gate.forward = functools.partial(swapped, block.mlp.gate.forward)
        close(score_table(other, groups, CRITERIA, single), expected)


def swapped(forward, x):
    logits, weights, ids = forward(x)
    return logits, weights.flip(1), ids.flip(1)


def test_an_expert_without_tokens_scores_zero():
    model, _, groups, _ = build("gpt oss")
    model = copy.deepcopy(model)
    model.model.layers[0].mlp.router.bias.data[2] = -1e9
    chosen = {k: v for k, v in CRITERIA.items() if "scar" not in k}
    found = score_table(model, groups, chosen, [texts([9, 5])])
    assert (found.loc["model.layers.0.mlp.experts[2]"] == 0).all().all()
    assert (found.drop("model.layers.0.mlp.experts[2]", level="group") > 0).any().all()
    units = nl.analyze(model, [texts([9, 5])], ["activation_rms", "scar_loss_proxy"], "blocks[0].mlp.hidden").units
    assert units.loc["model.layers.0.mlp.experts[2].hidden"].isna().all().all()
    assert units.loc["model.layers.0.mlp.experts[1].hidden", ["activation_rms", "scar_loss_proxy"]].notna().all().all()


def test_half_precision_is_close():
    model, _, groups, _ = build("mixtral")
    chosen = {k: v for k, v in CRITERIA.items() if "scar" not in k}
    found = score_table(copy.deepcopy(model).bfloat16(), groups, chosen, [texts([9, 5])])
    expected = score_table(model, groups, chosen, [texts([9, 5])])
    for name in found:
        some = expected[name] > 0
        assert np.corrcoef(np.log(found[name][some] + 1e-30), np.log(expected[name][some]))[0, 1] > 0.9, name


# --- unsupported experts


class Doubled(transformers.models.mixtral.modeling_mixtral.MixtralExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return 1.001 * super().forward(hidden_states, top_k_index, top_k_weights)


class Alone(transformers.models.mixtral.modeling_mixtral.MixtralExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states, top_k_index, top_k_weights)


def broken(kind):
    model = copy.deepcopy(build("mixtral")[0])
    model.model.layers[1].mlp.experts.__class__ = kind
    return model


@pytest.mark.parametrize("name", ["wanda", "taylor"])
def test_experts_with_another_formula_raise(name):
    groups, data = build("mixtral")[2], [texts([9, 5])]
    words = r"model.layers.1.mlp.experts \(Doubled\) returns another output than .*difference 1.0e-03.* is unknown"
    with pytest.raises(ValueError, match=words):
        score_table(broken(Doubled), groups, {name: get_metric(name)}, data)
    with pytest.raises(ValueError, match=words):
        nl.analyze(broken(Doubled), data, ["activation_rms"], "blocks.mlp.hidden")
    close(*(score_table(m, groups, {name: get_metric(name)}, data) for m in (broken(Alone), build("mixtral")[0])))


def test_experts_without_an_activation_raise():
    model = copy.deepcopy(build("mixtral")[0])
    del model.model.layers[0].mlp.experts.act_fn
    model.model.layers[0].mlp.experts._apply_gate = None
    experts = Experts.of(model.model.layers[0].mlp.experts)
    with pytest.raises(ValueError, match="MixtralExperts has no act_fn: the activation of its experts is unknown"):
        experts.hidden(torch.ones(2, 16))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((torch.ones(6, 16),), r"experts \(MixtralExperts\) is called with \(6, 16\) float32; supported are calls"),
        ((torch.ones(6, 16), torch.ones(6, 2), torch.ones(6, 2)), r"called with \(6, 16\) float32, \(6, 2\) float32, \(6, 2\)"),
        ((torch.ones(6, 16), torch.ones(6, 2, dtype=torch.long), torch.ones(6, 3)), r"\(6, 2\) int64, \(6, 3\) float32"),
        ((3,), r"called with no tensor"),
    ],
    ids=label,
)
def test_experts_with_another_signature_raise(given, words):
    experts = Experts.of(build("mixtral")[0].model.layers[0].mlp.experts)
    with pytest.raises(ValueError, match=words):
        Call.of(experts, "experts", given, {})


def test_criteria_of_feature_maps_reject_experts():
    model, _, groups, _ = build("mixtral")
    with pytest.raises(ValueError, match=r"hrank needs feature maps: group .*experts\[0\]' is read by .* by no two-dimensional"):
        score_table(model, groups, {"hrank": get_metric("hrank")}, [texts([9, 5])])


def test_experts_that_never_run_raise():
    model, _, groups, _ = build("mixtral")
    model = copy.deepcopy(model)
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"layer 'model.layers.1.mlp.experts\[0\].hidden' is never called by"):
        score_table(model, groups, {"wanda": get_metric("wanda")}, [texts([9, 5])])


# --- pruning


@pytest.mark.parametrize("criterion", ["wanda", "loss_proxy", "scar_prot"])
def test_a_mixture_is_pruned_by_activations(criterion):
    options = ROTARY | OWN | {"num_experts": 4, "moe_intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**options)).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
    groups, batch = family_groups(model), texts([9, 5])
    made = {"criterion": criterion, "amount": 0.5, "scope": "moe_ffn", "data": [batch]}
    found = nl.prune(copy.deepcopy(model), apply="slice", **made)
    ids = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad(), masked(model, groups, found.plan.removed):
        expected = model(**ids).logits
    with torch.no_grad():
        torch.testing.assert_close(found.model(**ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert (model(**ids).logits - expected).abs().max() > 1e-2
    assert {len(units) for units in found.plan.removed.values()} == {8}


# --- the engine


def directly(twin, batch, path):
    """{expert: u (r, 8) and q (r, 8) at the unpadded tokens routed to it, and their samples}, from separate layers."""
    shown, apart_ = {}, twin.get_submodule(path)

    def keep(site, x):
        shown[site.layer.name, site.port] = x

    layers = [layer for e in range(4) for layer in find_layers(twin, [f"{path}.made.{e}", f"{path}.down.{e}.input"])]
    sites = [Site(layer, port) for layer in layers for port in ("output", "output*grad")]
    with Capture(sites, keep) as capture:
        capture.gate = True
        ids = {k: v for k, v in batch.items() if k != "labels"}
        z = twin(**ids).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(z, batch["labels"][:, 1:].flatten(), reduction="sum").backward()
    real, found = batch["attention_mask"].bool().flatten(), {}
    sample = torch.arange(len(real)) // batch["input_ids"].shape[1]
    for e in range(4):
        there = real & (shown[f"{path}.down.{e}.input", "output"] != 0).any(1)
        u = apart_.formula(shown[f"{path}.made.{e}", "output"])[there].detach()
        found[e] = u, shown[f"{path}.down.{e}.input", "output*grad"][there], sample[there]
    return found


@pytest.mark.parametrize("length", [9, 16])  # 16 is also a length that routed tokens are padded to
@pytest.mark.parametrize("name", ["mixtral", "gpt oss", "deepseek v3"])
def test_units_are_measured_at_the_tokens_routed_to_their_expert(name, length):
    model, twin, _, _ = build(name)
    batch, path = texts([length, 5, 8], "left" if length == 16 else "right"), "model.layers.1.mlp.experts"
    batch["position_ids"] = torch.arange(length).expand(3, length)
    metrics = ["activation_rms", "activation_mean", "scar_loss_proxy", "scar_taylor", "scar_curvature"]
    result = nl.analyze(model, [batch], metrics, "blocks[1].mlp.hidden", groups=2, precision="float64")
    direct = directly(copy.deepcopy(twin), batch, path)
    assert len(direct) == 4
    for e, (u, q, _) in direct.items():
        rows = result.units.loc[f"{path}[{e}].hidden"]
        expected = {
            "activation_rms": u.square().mean(0).sqrt(),
            "activation_mean": u.abs().mean(0),
            "scar_loss_proxy": q.square().mean(0) / 2,
            "scar_taylor": q.abs().mean(0),
            "scar_curvature": (q / u).square().mean(0),
        }
        for metric, value in expected.items():
            np.testing.assert_allclose(rows[metric], value, rtol=1e-6, err_msg=f"{e} {metric}")
    seen = {row["layer"]: row["rows"] for row in result.metadata["rows"] if "output," in row["statistic"]}
    assert [seen[f"{path}[{e}].hidden"] for e in range(4)] == [len(u) for u, _, _ in direct.values()]
    assert sum(seen[f"{path}[{e}].hidden"] for e in range(4)) == 2 * (length + 5 + 8)
    shared = [layer for layer in result.units.index.unique("layer") if "[" not in layer]
    assert shared == (["model.layers.1.mlp.shared_experts.down_proj.input"] if name == "deepseek v3" else [])


def test_a_sample_counts_if_one_of_its_tokens_is_routed_to_the_expert():
    model, twin, _, _ = build("qwen3 moe")
    batch, path = texts([3, 2, 3, 4], seed=5), "model.layers.0.mlp.experts"
    metric = nl.get_metric("scar_loss_proxy", tokens="per_sequence")
    units = nl.analyze(model, [batch], {"lp": metric}, "blocks[0].mlp.hidden", groups=2).units
    missing = 0
    for e, (_, q, sample) in directly(copy.deepcopy(twin), batch, path).items():
        total = torch.zeros(4, 8, dtype=torch.float64).index_add_(0, sample, q)[sample.unique()]
        missing += 4 - len(total)
        np.testing.assert_allclose(units.loc[f"{path}[{e}].hidden", "lp"], total.square().mean(0) / 2, rtol=1e-6)
    assert missing


def test_the_pass_is_the_same_in_any_batches():
    model, _, _, _ = build("llama4")
    whole, metrics = texts([9, 5, 7, 6]), ["activation_rms", "scar_loss_proxy", "activation_variance"]
    found = nl.analyze(model, [whole], metrics, "blocks.mlp.hidden", groups=2).units
    single = [{k: v[i : i + 1, :n] for k, v in whole.items()} for i, n in enumerate([9, 5, 7, 6])]
    for batches in (single, [{k: v[:3] for k, v in whole.items()}, {k: v[3:] for k, v in whole.items()}]):
        other = nl.analyze(model, batches, metrics, "blocks.mlp.hidden", groups=2).units
        np.testing.assert_allclose(other[metrics], found[metrics], rtol=1e-6)


def test_only_routed_tokens_are_recomputed():
    model, _, _, _ = build("mixtral")
    batch, shown = texts([9, 5]), {}
    layers = find_layers(model, "*.1.mlp.experts[*].hidden")
    with torch.no_grad(), Capture([Site(la, "output") for la in layers], lambda site, x: shown.update({site: x})) as capture:
        capture.gate = True
        model(**batch)
    assert all(isinstance(x, Routed) and x.values.shape == (len(x.tokens), 8) and x.every == 18 for x in shown.values())
    assert sum(len(x.tokens) for x in shown.values()) == 2 * 18
    _, wrapped = nl.ModelWrapper(model, ["*.1.mlp.experts[*].hidden"]).forward_with_activations(batch)
    assert {name: x.shape for name, x in wrapped.items()} == {site.layer.name: x.values.shape for site, x in shown.items()}


def test_layer_pairs_of_experts_use_the_samples_view():
    model, _, _, _ = build("mixtral")
    batch = texts([16] * 6)
    result = nl.analyze(model, [batch], ["linear_cka"], "*.1.mlp.experts[*].hidden", groups=2)
    used = {row["statistic"] for row in result.metadata["plan"]["statistics"]}
    assert used
    assert all("samples" in statistic for statistic in used), used


def test_token_targets_are_rejected_at_routed_rows():
    model, _, _, _ = build("mixtral")
    metric = {"mi": nl.get_metric("mi", target="loss")}
    found = nl.analyze(model, [texts([16, 16])], metric, "blocks[1].mlp.hidden")
    assert found.units["mi"].isna().all()
    reason = found.metadata["missing"][0]["reason"]
    assert reason.startswith("the target has one value for each of 16 predictions of a sample, and ")
    assert reason.endswith("experts[0].hidden has rows for some tokens only")


@pytest.mark.parametrize("name", ["mixtral", "gpt oss", "llama4"])
def test_a_pass_can_be_planned_without_weights(name):
    config, options, _, _ = FAMILIES[name]
    with torch.device("meta"):
        made = getattr(transformers, f"{config}Config")(**options)
        model = transformers.AutoModelForCausalLM.from_config(made, experts_implementation="batched_mm").eval()
    layers, shown = find_layers(model, "blocks.mlp.hidden"), {}
    layers = [layer for layer in layers if "[" in layer.name]
    with torch.no_grad(), Capture([Site(la, "output") for la in layers], lambda site, x: shown.update({site: x})) as capture:
        capture.gate = True
        model(input_ids=torch.zeros(2, 12, dtype=torch.long, device="meta"))
    assert len(shown) == 8
    for site, x in shown.items():
        rows = site.layer.rows(x, 2)
        assert (rows.raw.is_meta, rows.raw.shape[:2], rows.grid) == (True, (2, 8), (16,))


def test_tokens_that_do_not_divide_into_samples_raise():
    (layer, *_) = find_layers(build("mixtral")[0], "*.1.mlp.experts[*].hidden")
    with pytest.raises(ValueError, match=r"layer 'model.layers.1.mlp.experts\[0\].hidden' has 9 tokens for a batch of 2 samples"):
        layer.rows(Routed(torch.ones(3, 8), torch.arange(3), 9), 2)


# --- heads


SPANS = {  # where the units of the heads lie in the input of their reader: width of a unit
    "grouped queries": ("Llama", ROTARY | {"num_attention_heads": 4, "num_key_value_heads": 2}, "self_attn.o_proj", 16),
    "gpt2": ("GPT2", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}, "attn.c_proj", 4),
    "fused": ("Phi3", ROTARY | {"num_attention_heads": 2}, "self_attn.o_proj", 16),
    "interleaved": ("GPTNeoX", BASE | {"num_attention_heads": 4}, "attention.dense", 4),
}


METRICS = ("scar_activation_power", "scar_curvature", "scar_taylor", "scar_loss_proxy")


@pytest.mark.parametrize("name", SPANS)
def test_scores_of_heads_are_those_of_their_whole_span(name):
    config, options, writer, width = SPANS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{config}Config")(**options)).double().eval()
    groups, batch = [group for group in family_groups(model) if group.kind in ("head", "kv_group")], texts([9, 5, 7])
    chosen = {k: CRITERIA[k] for k in ("power", "taylor", "size", "proxy", "proxy_token")}
    columns = chosen | {k: nl.get_metric(k) for k in METRICS}
    found = score_table(model, groups, columns, [batch], precision="float64")
    shown = {}
    for group in groups:
        (layer,) = find_layers(model, f"{group.name.rpartition('.')[0]}.{writer}.input")
        with Capture([Site(layer, p) for p in ("output", "output*grad")], lambda s, x: shown.update({s.port: x})) as capture:
            capture.gate = True
            z = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].flatten(0, 1)
        nn.functional.cross_entropy(z, batch["labels"][:, 1:].flatten(), reduction="sum").backward()
        real = batch["attention_mask"].bool()
        u, q = (shown[port].detach().unflatten(2, (-1, width)) for port in ("output", "output*grad"))
        parts = {
            "scar_activation_power": u.square(),
            "scar_curvature": (q / u).square(),
        }
        for column, value in parts.items():  # computed per input feature, then summed
            np.testing.assert_allclose(found.loc[group.name, column], value[real].mean(0).sum(1), rtol=1e-6, err_msg=column)
        q = q.sum(3)  # (samples, tokens, units): the change when the whole head goes
        expected = {
            "power": u[real].square().mean(0).sum(1),
            "taylor": q.sum(1).square().mean(0),
            "size": q.sum(1).abs().mean(0),
            "proxy": q.sum(1).square().mean(0) / 2,
            "proxy_token": q[real].square().mean(0) / 2,
            "scar_taylor": q[real].abs().mean(0),
            "scar_loss_proxy": q[real].square().mean(0) / 2,
        }
        for column, value in expected.items():
            np.testing.assert_allclose(found.loc[group.name, column], value, rtol=1e-7, err_msg=column)


def test_a_metric_of_the_catalogue_ranks_the_hidden_units_of_experts():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    net = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_local_experts=3, num_experts_per_tok=2, **sizes)).eval()
    ids = torch.randint(32, (6, 16))
    data = [{"input_ids": ids, "labels": ids}]
    units = nl.analyze(net, data, ["activation_rms"], "blocks.mlp.hidden").units["activation_rms"]
    pruned = nl.prune(net, "activation_rms", 0.34, data=data, scope="moe_ffn")
    for name, gone in pruned.plan.removed.items():
        values = torch.tensor(units.xs(f"{name}.hidden", level="layer").to_numpy())
        assert sorted(gone) == values.argsort()[: len(gone)].sort().values.tolist()
    assert len(pruned.plan.removed) == 3
