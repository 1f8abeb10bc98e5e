import copy
import functools
import math
import random

import pytest
import torch
from families import APPROXIMATE, FAMILIES, MOE, build
from torch import nn

import nodelens as nl
from nodelens.network.groups import PruningGroups
from nodelens.network.outputs import answer_of
from nodelens.pruning.groups.families import family_groups
from nodelens.pruning.surgery.mask import masked, zero
from nodelens.pruning.surgery.slice import slice_units


def batch_of(name, samples=2, length=7):
    g = torch.Generator().manual_seed(1)
    if FAMILIES[name][2] == "ImageClassification":
        return {"pixel_values": torch.randn(samples, 3, 16, 16, generator=g)}
    ids, mask = torch.randint(3, 64, (samples, length), generator=g), torch.ones(samples, length, dtype=torch.long)
    mask[1, 5:] = 0
    decoder = {"decoder_input_ids": ids[:, :4]} if FAMILIES[name][2] == "Seq2SeqLM" else {}
    return {"input_ids": ids, "attention_mask": mask, **decoder}


def logits(model, batch):
    with torch.no_grad():
        return answer_of(model(**batch))


def tokens(model, batch):
    ids = {k: v[:1] for k, v in batch.items()}
    return model.generate(**ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)


def some(groups, amount, multiple=True, seed=0):
    """Random units of each group to remove; a multiple of the group's step stays, at least one."""
    dice, removed = random.Random(seed), {}
    for group in groups:
        step = group.multiple if multiple else 1
        stay = max(step, math.floor((1 - amount) * group.n) // step * step)
        if stay < group.n:
            removed[group.name] = sorted(dice.sample(range(group.n), group.n - stay))
    return removed


def same(a, b, far=1e-4):
    assert (a - b).abs().max() <= far * b.abs().max(), f"{(a - b).abs().max()} beside {b.abs().max()}"


def check(name, attention, amount, experts=None):
    """Masking, slicing and zeroing give the same output, also with padding and in generation, and change the dense model's."""
    model, groups = build(name, attention, experts)
    exact, batch = PruningGroups(tuple(a for a in groups if a.exact)), batch_of(name)
    removed = some(exact, amount, multiple=experts != "eager")
    if not removed:
        assert name in APPROXIMATE
        return
    sliced = slice_units(copy.deepcopy(model), exact, removed)
    zeroed = copy.deepcopy(model)
    zero(zeroed, exact, removed)
    dense = logits(model, batch)
    with masked(model, exact, removed):
        expected = logits(model, batch)
        written = tokens(model, batch) if FAMILIES[name][2] == "CausalLM" else None
    assert expected.isfinite().all()
    assert (expected - dense).abs().max() > 1e-3 * dense.abs().max()
    same(logits(sliced, batch), expected)
    same(logits(zeroed, batch), expected)
    assert torch.equal(logits(model, batch), dense)
    sliced.load_state_dict(sliced.state_dict(), strict=True)
    assert sum(p.numel() for p in sliced.parameters()) < sum(p.numel() for p in model.parameters())
    if written is not None:
        assert torch.equal(tokens(sliced, batch), written)


AMOUNTS = [pytest.param(0.1, marks=pytest.mark.slow), 0.5, pytest.param(0.9, marks=pytest.mark.slow)]


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_slice_is_the_mask(name, attention, amount):
    check(name, attention if build(name)[0]._supports_sdpa else "eager", amount)


@pytest.mark.parametrize("name", [name for name in MOE if name != "llama4"])
def test_experts_one_by_one_take_any_width(name):
    check(name, "eager", 0.3, experts="eager")


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_the_share_of_parameters_in_groups(name, family):
    model, groups = build(name)
    assert groups.coverage(model) == pytest.approx(family[3], abs=0.002)
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        for piece in group.slices:
            rows = piece.by_unit(model)
            assert len(rows) == group.n
            assert len(piece.index.unique()) == piece.index.numel()


@pytest.mark.parametrize(("name", "kind"), APPROXIMATE.items())
def test_a_norm_over_all_heads_makes_a_group_approximate(name, kind):
    model, groups = build(name)
    approximate = [group for group in groups if not group.exact]
    assert {group.name for group in approximate} == {group.name for group in groups if kind in ("*", group.kind)}
    removed, batch = some(approximate, 0.5), batch_of(name)
    with masked(model, groups, removed):
        expected = logits(model, batch)
    sliced = logits(slice_units(copy.deepcopy(model), groups, removed), batch)
    assert (sliced - expected).abs().max() > 1e-2 * expected.abs().max()


def test_other_families_are_exact():
    assert all(group.exact for name in FAMILIES for group in build(name)[1] if name not in APPROXIMATE)


NAMES = {
    "vit": ["vit.layers.0.attention head 6", "vit.layers.0.mlp ffn 40"],
    "bert": ["bert.encoder.layer.0 ffn 40", "bert.encoder.layer.0.attention head 6"],
    "gpt2": ["transformer.h.0.attn head 6", "transformer.h.0.mlp ffn 40"],
    "opt": ["model.decoder.layers.0 ffn 40", "model.decoder.layers.0.self_attn head 6"],
    "llama 8/4": ["model.layers.0.self_attn kv_group 4", "model.layers.0.mlp ffn 40"],
    "llama of heads": ["model.layers.0.self_attn head 8", "model.layers.0.mlp ffn 40"],
    "phi3": ["model.layers.0.self_attn kv_group 4", "model.layers.0.mlp ffn 40"],
    "neox": ["gpt_neox.layers.0.attention head 6", "gpt_neox.layers.0.mlp ffn 40"],
    "mixtral": ["model.layers.0.self_attn kv_group 4", *[f"model.layers.0.mlp.experts[{e}] moe_ffn 24" for e in range(4)]],
    "qwen2 moe": [
        "model.layers.0.self_attn kv_group 4",
        *[f"model.layers.0.mlp.experts[{e}] moe_ffn 24" for e in range(4)],
        "model.layers.0.mlp.shared_expert ffn 20",
    ],
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items(), ids=list(NAMES))
def test_groups_are_named_by_the_path_of_their_module(name, expected):
    found = [f"{group.name} {group.kind} {group.n}" for group in build(name)[1]]
    assert found[: len(expected)] == expected
    assert found[len(expected) :] == [line.replace(".0", ".1", 1) for line in expected]


def test_a_unit_of_a_group_contains_everything_that_is_removed_with_it():
    group = build("llama 8/2")[1].named("model.layers.1.self_attn")
    spans = {
        f"{piece.name.removeprefix('model.layers.1.self_attn.')} {piece.dim} {piece.role}": piece.index for piece in group.slices
    }
    own, queries = torch.arange(8, 16), torch.arange(32, 64)
    expected = {f"{part}_proj.{t} 0 producer": queries if part == "q" else own for part in "qkv" for t in ("weight", "bias")}
    expected["o_proj.weight 1 consumer"] = queries
    assert {name: index[1].tolist() for name, index in spans.items()} == {k: v.tolist() for k, v in expected.items()}
    assert (group.n, group.attention_macs, group.equal_count, group.multiple) == (2, 2 * 4 * 8, None, 1)


def test_parameters_outside_the_projections_are_tied_to_their_head():
    sinks = build("gpt oss")[1].named("model.layers.0.self_attn")
    (tied,) = sinks.by_role("tied")
    assert (tied.name, tied.index.tolist()) == ("model.layers.0.self_attn.sinks", [[0, 1], [2, 3], [4, 5], [6, 7]])
    norms = build("cohere")[1].named("model.layers.0.self_attn").by_role("tied")
    assert [(piece.name.rpartition("attn.")[2], piece.index[1].tolist()) for piece in norms] == [
        ("q_norm.weight", [2, 3]),
        ("k_norm.weight", [1]),
    ]
    assert not build("qwen3")[1].named("model.layers.0.self_attn").by_role("tied")


def test_experts_keep_the_same_number_of_units():
    groups = [group for group in build("gpt oss")[1] if group.kind == "moe_ffn"][:4]
    assert {group.equal_count for group in groups} == {"model.layers.0.mlp.experts"}
    assert [group.multiple for group in groups] == [8] * 4
    assert [len(group.counts) for group in groups] == [1, 0, 0, 0]
    assert {piece.entry for piece in groups[2].slices} == {2}
    assert not any(group.gated for group in groups)
    with pytest.raises(ValueError, match="experts of one tensor would keep different numbers of units"):
        slice_units(copy.deepcopy(build("gpt oss")[0]), groups, {groups[0].name: [1], groups[1].name: [1, 2]})


PATCHED = {
    "gpt2": ("transformer.h.1.attn", {"num_heads": 4, "embed_dim": 32, "split_size": 32, "c_attn.nf": 96, "c_proj.nx": 32}),
    "opt": ("model.decoder.layers.1.self_attn", {"num_heads": 4, "embed_dim": 32, "q_proj.out_features": 32}),
    "bert": ("bert.encoder.layer.1.attention", {"self.num_attention_heads": 4, "self.all_head_size": 32}),
    "vit": ("vit.layers.1.attention", {"num_attention_heads": 4, "o_proj.in_features": 32}),
    "phi3": ("model.layers.1.self_attn", {"num_key_value_heads": 2, "config.num_attention_heads": 4, "num_key_value_groups": 2}),
    "falcon by groups": ("transformer.h.1.self_attention", {"num_heads": 2, "num_kv_heads": 1}),
}


@pytest.mark.parametrize(("name", "expected"), PATCHED.items(), ids=list(PATCHED))
def test_stored_counts_decrease_with_the_units(name, expected):
    model, groups = build(name)
    path, numbers = expected
    sliced = slice_units(copy.deepcopy(model), groups, {path: [0, 2]})
    attention, whole = sliced.get_submodule(path), sliced.get_submodule(path.replace(".1", ".0", 1))
    found = {key: functools.reduce(getattr, key.split("."), attention) for key in numbers}
    assert found == numbers
    assert all(functools.reduce(getattr, key.split("."), whole) >= n for key, n in numbers.items())
    assert sliced.config.to_dict() == model.config.to_dict()


def test_the_experts_store_their_width():
    for name, attribute in {"mixtral": "intermediate_dim", "gpt oss": "intermediate_size", "llama4": "expert_dim"}.items():
        model, groups = build(name)
        sliced = slice_units(copy.deepcopy(model), groups, some([group for group in groups if group.kind == "moe_ffn"], 0.5))
        assert {getattr(m, attribute) for m in sliced.modules() if hasattr(m, "gate_up_proj") and hasattr(m, attribute)} == {8}


DEAD = {  # the module that computes a group's values, their rows, and the tensor's dimension; heads have dimension 8
    "llama of heads": ("model.layers.0.self_attn.v_proj", lambda u: range(8 * u, 8 * u + 8), 0),
    "llama 8/4": ("model.layers.0.self_attn.v_proj", lambda u: range(8 * u, 8 * u + 8), 0),
    "llama 6/2": ("model.layers.0.self_attn.v_proj", lambda u: range(8 * u, 8 * u + 8), 0),
    "llama 8/2": ("model.layers.0.self_attn.v_proj", lambda u: range(8 * u, 8 * u + 8), 0),
    "bert": ("bert.encoder.layer.0.attention.self.value", lambda u: range(8 * u, 8 * u + 8), 0),
    "phi3": ("model.layers.0.self_attn.qkv_proj", lambda u: range(8 * (8 + 4 + u), 8 * (8 + 4 + u + 1)), 0),
    "gpt2": ("transformer.h.0.attn.c_attn", lambda u: range(96 + 8 * u, 104 + 8 * u), 1),
    "neox": ("gpt_neox.layers.0.attention.query_key_value", lambda u: range(24 * u + 16, 24 * u + 24), 0),
    "falcon by groups": ("transformer.h.0.self_attention.query_key_value", lambda u: range(32 * u + 24, 32 * u + 32), 0),
}


@pytest.mark.parametrize(("name", "where"), DEAD.items(), ids=list(DEAD))
def test_only_removing_the_dead_group_changes_nothing(name, where):
    path, rows, dim = where
    model, groups = copy.deepcopy(build(name)[0]), build(name)[1]
    group = next(group for group in groups if path.startswith(group.name) and group.kind != "ffn")
    dead, batch = 1, batch_of(name)
    with torch.no_grad():
        values = model.get_submodule(path)
        values.weight.index_fill_(dim, torch.tensor(rows(dead)), 0)
        if values.bias is not None:
            values.bias[list(rows(dead))] = 0
    expected = logits(model, batch)
    for unit in range(group.n):
        with masked(model, groups, {group.name: [unit]}):
            found = logits(model, batch)
        sliced = logits(slice_units(copy.deepcopy(model), groups, {group.name: [unit]}), batch)
        same(sliced, found)
        far = (found - expected).abs().max() / expected.abs().max()
        assert far < 1e-6 if unit == dead else far > 1e-3


def reasons(groups):
    return {frozen.what: frozen.reason for frozen in groups.frozen}


FROZEN = {
    "deepseek v3": ("model.layers.0.self_attn", "no pattern matches q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj, o_proj"),
    "qwen3 next": ("model.layers.1.self_attn", "heads of dimension 8 do not fit: q_proj has 128 outputs, k_proj has 32 outputs"),
    "bloom": ("transformer.h.0.self_attention", "reads alibi, which another module computes for every head"),
    "falcon alibi": ("transformer.h.1.self_attention", "reads alibi"),
    "mpt": ("transformer.blocks.1.attn", "no pattern matches Wqkv, out_proj"),
    "t5": ("decoder.block.1.layer.1.EncDecAttention", "no pattern matches q, k, v, o"),
    "stablelm with a norm a head": (
        "model.layers.0.self_attn",
        "has the parameter q_layernorm.norms.0.weight (8,) outside its projections",
    ),
    "gpt bigcode": ("transformer.h.0.attn", "c_attn is a Linear"),
    "trocr": ("model.decoder.layers.0.self_attn", "assumes that its input is as wide as all heads together"),
    "diffllama": ("model.layers.0.self_attn", "has the parameter lambda_q1 (8,) outside its projections"),
    "mixtral": ("model.layers.1.mlp", "pruned only with whole experts (scope=expert): gate"),
    "llama 8/4": ("model.embed_tokens, lm_head", "embeddings and output heads are not pruned"),
    "gpt2": ("transformer.wte, transformer.wpe", "embeddings and output heads are not pruned"),
    "opt": ("the residual width", "norms reduce over it"),
}


@pytest.mark.parametrize(("name", "expected"), FROZEN.items(), ids=list(FROZEN))
def test_what_is_not_understood_is_reported(name, expected):
    groups = build(name)[1]
    assert reasons(groups)[expected[0]].startswith(expected[1])
    assert len(groups.frozen) <= 8
    assert not {f.what for f in groups.frozen} & {group.name for group in groups if group.kind != "ffn"}


class Block(nn.Module):
    """A feed-forward block of a model's own."""

    def __init__(self, first=nn.Linear, width=10):
        super().__init__()
        self.norm, self.c_fc, self.c_proj = nn.LayerNorm(6), first(6, width), nn.Linear(10, 6)


class Quantized(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight = nn.Parameter(torch.ones(self.weight.shape, dtype=torch.int8), requires_grad=False)


def test_weights_that_are_not_plain_parameters_are_frozen():
    norm = nn.utils.parametrizations.weight_norm
    wrong = {
        "0": (Block(lambda *sizes: norm(nn.Linear(*sizes))), "the weight of c_fc is quantized or computed from other tensors"),
        "1": (Block(Quantized), "the weight of c_fc is quantized or computed from other tensors"),
        "2": (Block(lambda *sizes: nn.Sequential(nn.Linear(*sizes))), "c_fc is a Sequential, not a linear layer"),
        "3": (Block(width=20), "c_fc has 20 outputs, c_proj has 10 inputs"),
    }
    groups = family_groups(nn.ModuleList([*(block for block, _ in wrong.values()), Block()]))
    assert [group.name for group in groups] == ["4"]
    found = reasons(groups)
    assert {name: found[name] for name in wrong} == {name: reason for name, (_, reason) in wrong.items()}


def test_weights_that_two_modules_share_are_frozen():
    blocks = nn.ModuleList([Block(), Block(), Block()])
    blocks[1].c_proj.weight = blocks[0].c_proj.weight
    groups = family_groups(blocks)
    assert [group.name for group in groups] == ["2"]
    assert reasons(groups)["1"] == "1.c_proj.weight is also a parameter of another module"


def test_a_norm_in_between_makes_hidden_units_approximate():
    block = Block()
    block.between = nn.LayerNorm(10)
    (group,) = family_groups(block)
    assert (group.name, group.exact, [piece.name for piece in group.by_role("tied")]) == (
        "Block",
        False,
        ["between.weight", "between.bias"],
    )
    block.between = nn.Sequential(nn.Conv2d(10, 10, 3, groups=10))
    groups = family_groups(nn.Sequential(block))
    assert (len(groups), reasons(groups)["0"]) == (0, "has the parameter between.0.weight (10, 1, 3, 3) outside its projections")


def test_two_patterns_in_one_module_have_two_names():
    block = Block()
    block.self, block.output = nn.Module(), nn.Module()
    block.self.head_dim, block.output.dense = 3, nn.Linear(6, 6)
    block.self.query, block.self.key, block.self.value = (nn.Linear(6, 6) for _ in range(3))
    assert [group.name for group in family_groups(nn.ModuleList([block]))] == ["0", "0.query"]
    assert [group.name for group in family_groups(block)] == ["Block", "Block.query"]


def test_a_model_without_a_pattern_has_no_groups():
    groups = family_groups(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2)))
    assert (len(groups), groups.frozen) == (0, ())


def test_common_names_alone_do_not_make_a_transformer():
    squeeze = nn.ModuleDict({"fc1": nn.Linear(8, 2), "fc2": nn.Linear(2, 8)})
    classifier = nn.ModuleDict({"fc1": nn.Linear(8, 5), "fc2": nn.Linear(5, 3)})
    net = nn.ModuleDict({"conv": nn.Conv2d(1, 8, 3), "squeeze": squeeze, "classifier": classifier})
    assert (len(family_groups(net)), family_groups(net).frozen) == (0, ())
    net["attention"] = nn.Identity()
    assert [group.name for group in family_groups(net)] == ["squeeze"]


def test_encoder_layers_of_torch():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    groups = family_groups(model.eval())
    assert {group.name: group.kind for group in groups} == {
        "layers.0": "ffn",
        "layers.0.self_attn": "head",
        "layers.1": "ffn",
        "layers.1.self_attn": "head",
    }
    removed = some(groups, 0.5)
    with masked(model, groups, removed), torch.no_grad():
        expected = model(x)
    sliced = slice_units(copy.deepcopy(model), groups, removed)
    with torch.no_grad():
        same(sliced(x), expected)


class Hybrid(nn.Module):
    """Convolutions before transformer blocks."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.project = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 32, 1)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        maps = self.project(self.b(self.a(x).relu()).relu())
        return self.head(self.encoder(maps.flatten(2).mT).mean(1))


def test_the_rest_of_a_network_with_known_blocks_is_found_in_its_graph():
    model, x = Hybrid().eval(), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = nl.find_groups(model, x)
    assert {group.name: group.kind for group in found}.items() >= {
        "encoder.layers.0": "ffn",
        "a": "channel",
        "b": "channel",
    }.items()
    frozen = {f.what: f.reason for f in found.frozen}
    assert frozen["the input of a"] == "3 units: reads the model's input"
    assert frozen["head"] == "4 units: the model's output"
    assert not any("searched in transformer blocks only" in reason for reason in frozen.values())
    pruned = nl.prune(model, "magnitude", 0.5, example_inputs=x)
    assert (pruned.model.b.in_channels, pruned.model.encoder.layers[0].linear2.in_features) == (8, 32)
    assert pruned.model(x).shape == (2, 4)


def test_known_blocks_stay_where_the_rest_cannot_be_traced():
    class Branching(Hybrid):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model, x = Branching().eval(), torch.ones(2, 3, 16, 16)
    found = nl.find_groups(model, x)
    assert [group.name for group in found] == ["encoder.layers.0", "encoder.layers.0.self_attn"]
    frozen = {f.what: f.reason for f in found.frozen}
    assert frozen["a, b, project"].startswith("groups are searched in transformer blocks only; convolutions outside them")
    assert frozen["the rest of the model"].startswith("torch.export cannot trace the forward pass of Branching")
