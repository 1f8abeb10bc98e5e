"""Roles of transformers resolve, are called, and show the documented tensors."""

import functools
import itertools

import pytest
import torch
import transformers
from nets import Mixed, build
from torch import nn

import nodelens as nl
from nodelens.network.find_layers import find_layers, resolved
from nodelens.network.hooks import Capture, Site
from nodelens.network.layers import Layer
from nodelens.network.roles import PARTS, roles_of

ROTARY = {  # head width x heads exceeds the residual width
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = {k: v for k, v in ROTARY.items() if k not in ("num_key_value_heads", "head_dim")} | {"num_attention_heads": 6}
GPT = {"vocab_size": 64, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {k: v for k, v in ROTARY.items() if k != "head_dim"} | {"hidden_size": 64}
SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 6,
}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}
MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
LINEAR = {f"linear_{k}": n for k, n in {"key_head_dim": 8, "value_head_dim": 8, "num_key_heads": 2, "num_value_heads": 4}.items()}
MAMBA = {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 3, "state_size": 4}
JAMBA = {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 3, "expert_layer_offset": 2, "num_experts": 4}
JAMBA |= {"mamba_d_state": 4, "mamba_dt_rank": 4}
LLAMA = ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")
OPT = ("self_attn", "self_attn.out_proj", "fc2", "fc2")
GPT2 = ("attn", "attn.c_proj", "mlp", "mlp.c_proj")
GPTJ = ("attn", "attn.out_proj", "mlp", "mlp.fc_out")
BERT = ("attention.output.dense", "attention.output.dense", "output.dense", "output.dense")
NEOX = ("attention", "attention.dense", "mlp", "mlp.dense_4h_to_h")
FALCON = ("self_attention", "self_attention.dense", "mlp", "mlp.dense_4h_to_h")
ROUTES = tuple(f"experts[{e}].hidden" for e in range(4))
SHARED = (*LLAMA[:3], (*(f"mlp.{route}" for route in ROUTES), "mlp.shared_expert.down_proj.input"))
DEEPSEEK = (*LLAMA[:3], (*(f"mlp.{route}" for route in ROUTES), "mlp.shared_experts.down_proj.input"))
EXPERTS = (*LLAMA[:3], tuple(f"mlp.{route}" for route in ROUTES))
NONE = (None, None, None, None)

# name: (config, its options, head; what is read for attention, heads, mlp, mlp.hidden in the last block, None for nothing)
FAMILIES = {
    "vit": (
        "ViT",
        PLAIN | {"image_size": 16, "patch_size": 4, "num_labels": 5},
        "ImageClassification",
        ("attention", "attention.o_proj", "mlp", "mlp.fc2"),
    ),
    "bert": ("Bert", PLAIN, "MaskedLM", BERT),
    "modernbert": ("ModernBert", PLAIN | {"cls_token_id": 1, "sep_token_id": 2}, "MaskedLM", ("attn", "attn.Wo", "mlp", "mlp.Wo")),
    "gpt2": ("GPT2", GPT | {"n_inner": 40}, "CausalLM", GPT2),
    "gpt neo": (
        "GPTNeo",
        {
            "vocab_size": 64,
            "hidden_size": 48,
            "num_layers": 3,
            "num_heads": 6,
            "attention_types": [[["global", "local", "global"], 1]],
        },
        "CausalLM",
        ("attn", "attn.attention.out_proj", "mlp", "mlp.c_proj"),
    ),
    "gpt bigcode": ("GPTBigCode", GPT | {"n_inner": 40}, "CausalLM", GPT2),
    "openai gpt": ("OpenAIGPT", GPT, "CausalLM", GPT2),
    "gptj": ("GPTJ", GPT | {"n_inner": 40, "rotary_dim": 4}, "CausalLM", GPTJ),
    "codegen": ("CodeGen", GPT | {"n_head": 4, "n_inner": 40, "rotary_dim": 4}, "CausalLM", GPTJ),
    "ctrl": ("CTRL", GPT | {"dff": 40}, "CausalLM", ("multi_head_attention", "multi_head_attention.dense", "ffn", "ffn.2")),
    "opt": ("OPT", PLAIN | {"ffn_dim": 40, "word_embed_proj_dim": 48}, "CausalLM", OPT),
    "opt as wide as the residual": ("OPT", PLAIN | {"ffn_dim": 48, "word_embed_proj_dim": 48}, "CausalLM", OPT),
    "xglm": ("XGLM", {"vocab_size": 64, "d_model": 48, "ffn_dim": 40, "num_layers": 3, "attention_heads": 6}, "CausalLM", OPT),
    "biogpt": ("BioGpt", PLAIN, "CausalLM", OPT),
    "llama": ("Llama", ROTARY, "CausalLM", LLAMA),
    "qwen2": ("Qwen2", ROTARY, "CausalLM", LLAMA),
    "qwen3": ("Qwen3", ROTARY, "CausalLM", LLAMA),
    "mistral": ("Mistral", ROTARY, "CausalLM", LLAMA),
    "gemma": ("Gemma", ROTARY | {"num_key_value_heads": 1}, "CausalLM", LLAMA),
    "gemma2": ("Gemma2", ROTARY, "CausalLM", LLAMA),
    "gemma3": ("Gemma3Text", ROTARY, "CausalLM", LLAMA),
    "phi": ("Phi", PLAIN | {"num_key_value_heads": 3}, "CausalLM", ("self_attn", "self_attn.dense", "mlp", "mlp.fc2")),
    "phi3": ("Phi3", WIDE, "CausalLM", LLAMA),
    "persimmon": ("Persimmon", PLAIN, "CausalLM", ("self_attn", "self_attn.dense", *NEOX[2:])),
    "neox": ("GPTNeoX", PLAIN, "CausalLM", NEOX),
    "falcon": ("Falcon", PLAIN | {"multi_query": False, "num_kv_heads": 6}, "CausalLM", FALCON),
    "falcon by groups": ("Falcon", PLAIN | {"num_kv_heads": 3, "new_decoder_architecture": True, "bias": True}, "CausalLM", FALCON),
    "bloom": (
        "Bloom",
        {"vocab_size": 64, "hidden_size": 48, "n_layer": 3, "n_head": 6},
        "CausalLM",
        ("self_attention.dense", "self_attention.dense", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),
    ),
    "mpt": (
        "Mpt",
        {"vocab_size": 64, "d_model": 48, "n_layers": 3, "n_heads": 6},
        "CausalLM",
        ("attn", "attn.out_proj", "ffn.down_proj", "ffn.down_proj"),
    ),
    "olmo": ("Olmo", PLAIN, "CausalLM", LLAMA),
    "olmo2": ("Olmo2", ROTARY, "CausalLM", LLAMA),
    "cohere": ("Cohere", ROTARY | {"logit_scale": 1.0}, "CausalLM", LLAMA),
    "granite": ("Granite", ROTARY | {"residual_multiplier": 0.5, "logits_scaling": 2.0}, "CausalLM", LLAMA),
    "glm": ("Glm", ROTARY, "CausalLM", LLAMA),
    "stablelm": ("StableLm", PLAIN | {"num_key_value_heads": 3}, "CausalLM", LLAMA),
    "starcoder2": ("Starcoder2", ROTARY, "CausalLM", ("self_attn", "self_attn.o_proj", "mlp", "mlp.c_proj")),
    "nemotron": ("Nemotron", ROTARY, "CausalLM", LLAMA),
    "smollm3": ("SmolLM3", ROTARY, "CausalLM", LLAMA),
    "lfm2": (
        "Lfm2",
        WIDE | {"layer_types": ["conv", "conv", "full_attention"]},
        "CausalLM",
        ("self_attn", "self_attn.out_proj", "feed_forward", "feed_forward.w2"),
    ),
    "mixtral": ("Mixtral", ROTARY | {"num_local_experts": 4}, "CausalLM", EXPERTS),
    "qwen2 moe": ("Qwen2Moe", ROTARY | SPARSE | {"num_experts": 4, "shared_expert_intermediate_size": 20}, "CausalLM", SHARED),
    "olmoe": ("Olmoe", WIDE | {"num_experts": 4, "num_experts_per_tok": 2}, "CausalLM", EXPERTS),
    "gpt oss": ("GptOss", ROTARY | {"num_local_experts": 4, "num_experts_per_tok": 2}, "CausalLM", EXPERTS),
    "llama4": (
        "Llama4Text",
        ROTARY | {"num_local_experts": 4, "intermediate_size_mlp": 40},
        "CausalLM",
        (
            "self_attn",
            "self_attn.o_proj",
            "feed_forward",
            (*(f"feed_forward.{route}" for route in ROUTES), "feed_forward.shared_expert.down_proj.input"),
        ),
    ),
    "deepseek v3": ("DeepseekV3", PLAIN | LATENT | SPARSE | ROUTED | {"first_k_dense_replace": 1}, "CausalLM", DEEPSEEK),
    "qwen3 next": (
        "Qwen3Next",
        ROTARY | SPARSE | LINEAR | MIXED | {"num_experts": 4, "shared_expert_intermediate_size": 20},
        "CausalLM",
        ("linear_attn", "linear_attn.out_proj", "mlp", SHARED[3]),
    ),
    "jamba": ("Jamba", ROTARY | JAMBA, "CausalLM", (None, None, "feed_forward", tuple(f"feed_forward.{r}" for r in ROUTES))),
    "mamba": ("Mamba", MAMBA, "CausalLM", NONE),
    "falcon mamba": ("FalconMamba", MAMBA, "CausalLM", NONE),
    "rwkv": (
        "Rwkv",
        {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 3, "context_length": 64},
        "CausalLM",
        ("attention", None, "feed_forward", None),
    ),
}

WITHOUT_EMBEDDING = {"mamba", "falcon mamba", "rwkv"}  # their hidden states start after the first block
POST_NORM = {"bert", "openai gpt"}  # their blocks end in a norm: no final norm; the last hidden state is the last output
NOT_A_SUM = POST_NORM | {"gemma2", "gemma3", "olmo2", "granite"}  # a norm or a scale lies between a part and the residual stream
AFTER_NORM = {"gemma2": lambda z: 30 * torch.tanh(z / 30), "granite": lambda z: z / 2, "vit": lambda z: z[:, 0]}  # the head


@functools.cache
def seen(name):
    """The roles of a model, its output, and {layer: its tensor at each call}."""
    config, options, head, _ = FAMILIES[name]
    model = make(config, options, head)
    roles = roles_of(model)
    parts = [x if isinstance(x, tuple) else (x,) for b in roles.blocks for x in b.parts.values()]
    layers = [x for x in (*itertools.chain(*parts), *roles.single.values()) if isinstance(x, Layer)]
    shown = {layer.name: [] for layer in layers}
    sites = {layer.name: Site(layer, layer.side) for layer in layers}.values()
    keep = lambda site, x: shown[site.layer.name].append(x.clone() if isinstance(x, torch.Tensor) else x)  # noqa: E731
    with torch.no_grad(), Capture(sites, keep) as capture:
        capture.gate = True
        out = model(**batch_of(head), output_hidden_states=True)
    return roles, out, shown


def make(config, options, head="CausalLM"):
    """A random model with non-trivial norms."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"AutoModelFor{head}").from_config(getattr(transformers, f"{config}Config")(**options))
        for key, parameter in model.named_parameters():
            if "norm" in key.lower() or key.split(".")[-2].startswith("ln"):
                nn.init.normal_(parameter, 1.0 if key.endswith("weight") else 0.0, 0.2)
    return model.eval()


def batch_of(head, samples=2, length=7):
    g = torch.Generator().manual_seed(1)
    if head == "ImageClassification":
        return {"pixel_values": torch.randn(samples, 3, 16, 16, generator=g)}
    return {"input_ids": torch.randint(3, 64, (samples, length), generator=g)}


def at(name, part):
    """The tensor at a part of each block; None if the block has no such part."""
    roles, _, shown = seen(name)
    return [shown[layer.name][0] if isinstance(layer := block.parts[part], Layer) else None for block in roles.blocks]


def same(a, b, far=1e-4):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= far * b.abs().max()


@pytest.mark.parametrize(("name", "family"), FAMILIES.items(), ids=list(FAMILIES))
def test_parts_have_the_path_of_their_module(name, family):
    *_, block = seen(name)[0].blocks
    found = [block.parts[part] for part in PARTS]
    assert [(layer.name, layer.side) for layer in found[:2]] == [(f"{block.name}.input", "input"), (block.name, "output")]
    for layer, path, side in zip(found[2:], family[3], ("output", "input") * 2, strict=True):
        if path is None:
            assert isinstance(layer, str)
        elif isinstance(path, tuple):
            assert [each.name for each in layer] == [f"{block.name}.{each}" for each in path]
        else:
            assert (layer.name, layer.side) == (f"{block.name}.{path}{'.input' * (side == 'input')}", side)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_role_is_called_once(name):
    assert {layer: len(calls) for layer, calls in seen(name)[2].items()} == dict.fromkeys(seen(name)[2], 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stream_is_the_hidden_states(name):
    _, out, _ = seen(name)
    inputs, outputs = at(name, "input"), at(name, "output")
    states = out.hidden_states if name not in WITHOUT_EMBEDDING else (inputs[0], *out.hidden_states)
    last = name in POST_NORM or name in WITHOUT_EMBEDDING or name == "vit"
    assert len(inputs) == 3
    for k in range(3):
        assert torch.equal(inputs[k], states[k])
        assert torch.equal(outputs[k], states[k + 1]) == (k < 2 or last)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NOT_A_SUM])
def test_a_block_adds_the_outputs_of_its_parts(name):
    sites = [at(name, part) for part in ("input", "attention", "mlp", "output")]
    for before, attention, mlp, after in zip(*sites, strict=True):
        if attention is not None and mlp is not None and name != "rwkv":  # its first block normalises the input
            same(attention + mlp.reshape(before.shape), after - before)  # OPT's FFN reads rows (B T, d)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_norm_and_the_head_give_the_logits(name):
    roles, out, shown = seen(name)
    norm, head = roles.single["final_norm"], roles.single["head"]
    if name in POST_NORM:
        assert "a norm after its blocks" in norm
        return
    normed = shown[norm.name][0]
    same(normed, norm.module(at(name, "output")[-1]))
    if name == "modernbert":  # it has a layer in between
        return
    assert torch.equal(normed, out.hidden_states[-1]) or name == "vit"
    same(AFTER_NORM.get(name, lambda z: z)(head.module(normed)), out.logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_units_and_heads_are_the_inputs_of_the_output_projections(name):
    roles, _, _ = seen(name)
    for part in ("heads", "mlp.hidden"):
        for block, x in zip(roles.blocks, at(name, part), strict=True):
            if x is not None:
                weight = block.parts[part].module.weight
                assert x.shape[-1] == weight.shape[0 if hasattr(block.parts[part].module, "nf") else 1]
                assert part != "heads" or x.shape[-1] % block.heads == 0
    config = make(*FAMILIES[name][:3]).config
    attends = [block.heads for block in roles.blocks if block.heads and "linear" not in block.parts["attention"].name]
    assert set(attends) <= {config.num_attention_heads if hasattr(config, "num_attention_heads") else None}


def text_of(role):
    assert isinstance(role, str)
    return role


def lm(name):
    return make(*FAMILIES[name][:3])


def names(model, *patterns):
    return [layer.name for layer in find_layers(model, patterns)]


def test_expressions_find_layers_by_the_names_of_their_modules():
    model = lm("llama")
    assert names(model, "blocks[n//2:].mlp.hidden") == ["model.layers.1.mlp.down_proj.input", "model.layers.2.mlp.down_proj.input"]
    assert names(model, "blocks.output") == names(model, "blocks") == [f"model.layers.{k}" for k in range(3)]
    assert names(model, "blocks[-1,0].attention") == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    assert names(model, "final_norm", "head", "embedding") == ["model.embed_tokens", "model.norm", "lm_head"]
    assert names(model, "final_norm.input", "head.output") == ["model.norm.input", "lm_head"]
    (layer,) = find_layers(model, "blocks[-1].input")
    assert (layer.name, layer.module, layer.side) == ("model.layers.2.input", model.model.layers[2], "input")
    assert names(model, "blocks[0].mlp", "model.layers.0.mlp", "*.0.mlp") == ["model.layers.0.mlp"]


def test_experts_are_named_by_their_numbers():
    model = lm("deepseek v3")
    expert = "model.layers.{}.mlp.experts[{}].hidden".format
    shared = "model.layers.{}.mlp.shared_experts.down_proj.input".format
    dense = ["model.layers.0.mlp.down_proj.input"]
    every = [*dense, *(name for k in (1, 2) for name in (*(expert(k, e) for e in range(4)), shared(k)))]
    assert names(model, "blocks.mlp.hidden") == every
    assert names(model, "blocks[0].mlp.hidden") == dense
    assert names(model, "*.experts[*].hidden") == [expert(k, e) for k in (1, 2) for e in range(4)]
    assert names(model, expert(2, 3), "*.1.mlp.experts[0].hidden") == [expert(1, 0), expert(2, 3)]
    with pytest.raises(ValueError, match=r"no layer matches 'model.layers.1.mlp.experts\[4\].hidden'"):
        find_layers(model, expert(1, 4))
    (layer,) = find_layers(model, expert(2, 3))
    assert (layer.expert, layer.mixture, layer.weight) == (3, "model.layers.2.mlp.experts", None)


def test_resolved_patterns_can_be_stored():
    assert resolved(lm("gpt2"), ["blocks[1:].heads", "*.0.mlp", "final_norm"]) == {
        "blocks[1:].heads": ["transformer.h.1.attn.c_proj.input", "transformer.h.2.attn.c_proj.input"],
        "*.0.mlp": ["transformer.h.0.mlp"],
        "final_norm": ["transformer.ln_f"],
    }
    assert resolved(lm("gpt2"), "head") == {"head": ["lm_head"]}


ERRORS = {
    "blocks[3].output": r"'blocks\[3\].output': index '3' with n = 3: 3 is out of range; valid are -3 to 2",
    "blocks[9**9]": r"index '9\*\*9' with n = 3",
    "blocks[0].mlp.hiden": r"a block has no part 'mlp.hiden'; the roles of LlamaForCausalLM are blocks\[0:3\].input, .*, head$",
    "blokcs.output": r"no layer matches 'blokcs.output'.* its roles are blocks\[0:3\].input, .* embedding, final_norm, head$",
    "final_norm[0]": r"no layer matches 'final_norm\[0\]'",
    "final_norm.weight": r"'final_norm.weight': final_norm has no part 'weight'; it has input and output",
}


@pytest.mark.parametrize(("pattern", "words"), ERRORS.items(), ids=list(ERRORS))
def test_an_unknown_role_raises_with_the_roles_of_the_model(pattern, words):
    with pytest.raises(ValueError, match=words):
        find_layers(lm("llama"), pattern)


MISSING = {
    "mamba": (
        "blocks[1].attention",
        r"no .attention is found in block backbone.layers.1 \(MambaBlock\) of MambaForCausalLM: backbone.layers.1: none of norm "
        r"\(MambaRMSNorm\), mixer \(MambaMixer\) is known as an attention; give the name of a module instead$",
    ),
    "jamba": ("blocks.heads", r"block model.layers.0 \(JambaMambaDecoderLayer\).*instead, or blocks\[1\].heads$"),
    "rwkv": ("blocks[-1].heads", r"rwkv.blocks.2.attention: it may be key or value or receptance or output; give the name"),
    "bert": ("final_norm", r"no final_norm is found in BertForMaskedLM: none of .* is known as a norm after its blocks; give the"),
}


@pytest.mark.parametrize(("name", "case"), MISSING.items(), ids=list(MISSING))
def test_a_missing_role_raises(name, case):
    with pytest.raises(ValueError, match=case[1]):
        find_layers(lm(name), case[0])


HALVES = {
    f"{part}_{k}": n for part in ("encoder", "decoder") for k, n in {"layers": 3, "attention_heads": 6, "ffn_dim": 40}.items()
}
NO_BLOCKS = {
    "Bart": (HALVES | {"d_model": 48, "vocab_size": 64}, "it may be model.encoder.layers or model.decoder.layers"),
    "Albert": (
        PLAIN | {"embedding_size": 16},
        r"its config says 3 blocks, but no list of modules has that length: albert.encoder.albert",
    ),
}


@pytest.mark.parametrize(("config", "case"), NO_BLOCKS.items(), ids=list(NO_BLOCKS))
def test_ambiguous_blocks_raise(config, case):
    model = make(config, case[0], {"Bart": "Seq2SeqLM", "Albert": "MaskedLM"}[config])
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no blocks: {case[1]}.*; give the name of a module instead"):
        find_layers(model, "blocks.output")


class Mixing(nn.Module):
    """Attention with a name that no family uses, which contains its own pre-norm."""

    def __init__(self, inner=nn.Linear):
        super().__init__()
        self.norm, self.qkv, self.last = nn.LayerNorm(6), nn.Linear(6, 18), inner(6, 6)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.last((q @ k.mT).softmax(-1) @ v), None


class OwnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.look = type("OwnAttention", (Mixing,), {})()
        self.net = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6), nn.Dropout(0.0))

    def forward(self, x):
        x = self.look(x)[0]
        return x + self.net(self.norm(x))


class OwnModel(nn.Module):
    """A transformer without a config."""

    def __init__(self, blocks=None):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(9, 6), nn.Sequential(*(blocks or [OwnBlock() for _ in range(3)]))
        self.last, self.unembed = nn.LayerNorm(6), nn.Linear(6, 9)

    def forward(self, ids):
        return self.unembed(self.last(self.blocks(self.embed(ids))))


def test_unknown_names_are_resolved_by_structure():
    net = build(OwnModel)
    ids = torch.arange(8).reshape(2, 4)
    expected = {
        "blocks[1].attention": "blocks.1.look.last",
        "blocks[1].heads": "blocks.1.look.last.input",
        "blocks[1].mlp": "blocks.1.net",
        "blocks[1].mlp.hidden": "blocks.1.net.2.input",
        "embedding": "embed",
        "final_norm": "last",
        "head": "unembed",
    }
    assert {pattern: layers[0] for pattern, layers in resolved(net, list(expected)).items()} == expected
    _, shown = nl.ModelWrapper(net, [*expected, "blocks[1].input", "blocks[1]"]).forward_with_activations(ids)
    parts = shown["blocks.1.look.last"] + shown["blocks.1.net"]
    same(parts, shown["blocks.1"] - shown["blocks.1.input"])
    assert roles_of(net).blocks[0].heads is None


def test_the_model_may_be_the_list_of_blocks():
    net = build(lambda: nn.Sequential(OwnBlock(), OwnBlock()))
    assert names(net, "blocks[0].mlp.hidden", "blocks[1]") == ["0.net.2.input", "1"]
    assert "a norm after its blocks" in text_of(roles_of(net).single["final_norm"])
    assert text_of(roles_of(net).single["head"]).endswith("is known as a head")


def test_modules_come_before_roles():
    net = build(OwnModel)
    assert names(net, "blocks") == ["blocks"]
    assert names(net, "blocks.input") == ["blocks.input"]  # of the list itself, which is a called module
    assert names(net, "blocks[0].input") == ["blocks.0.input"]
    assert names(net, "blocks.output") == ["blocks.0", "blocks.1", "blocks.2"]
    net.head = nn.Linear(2, 2)
    assert names(net, "head") == ["head"]
    with pytest.raises(ValueError, match=r"no layer matches 'blocks.0.nets'; did you mean 'blocks.0.net'\?"):
        find_layers(net, "blocks.0.nets")


def module(**parts):
    """A module with these parts."""
    net = nn.Module()
    for name, part in parts.items():
        net.add_module(name, part)
    return net


def fused(experts, units, rows):
    """Experts with stacked weights, supported if ``rows`` is twice the units."""
    net = nn.Module()
    net.gate_up_proj, net.down_proj = nn.Parameter(torch.ones(experts, rows, 6)), nn.Parameter(torch.ones(experts, 6, units))
    net.act_fn = nn.SiLU()
    return net


def changed(**parts):
    """Roles of the first block of a model after its modules are replaced."""
    block = OwnBlock()
    for name, part in parts.items():
        setattr(block, name, part)
    return roles_of(OwnModel([block, OwnBlock()])).blocks[0].parts


def test_ambiguous_parts_have_no_role():
    linear = functools.partial(nn.Linear, 6, 6)
    two = module(first=nn.Linear(6, 9), o_proj=linear(), out_proj=linear())
    assert text_of(changed(self_attn=two)["heads"]) == "blocks.0.self_attn: it may be o_proj or out_proj"
    assert text_of(changed(attn=Mixing(), attention=Mixing())["attention"]) == "blocks.0: it may be attn or attention"
    both = changed(shared_mlp=nn.Sequential(linear()), block_sparse_moe=nn.Sequential(linear()))
    assert text_of(both["mlp"]) == text_of(both["mlp.hidden"]) == "blocks.0: it may be shared_mlp or block_sparse_moe"
    assert text_of(changed(other=nn.Sequential(linear()))["mlp"]) == "blocks.0: it may be net or other"
    assert text_of(changed(self_attn=nn.ModuleList([Mixing(), Mixing()]))["heads"]) == "blocks.0: it may be any of a list of 2"
    gated = module(qkv=nn.Linear(6, 18), o_proj=linear(), mlp=module(up=nn.Linear(6, 9), down_proj=linear()))
    assert "net (Sequential)" not in (found := changed(self_attn=gated, look=None, net=None)["mlp"])
    assert found.endswith("is known as an FFN")
    experts = module(gate=linear(), experts=nn.ModuleList([linear()]))
    assert text_of(changed(mlp=experts)["mlp.hidden"]) == "blocks.0.mlp: it has experts, experts"
    odd = module(gate=linear(), experts=fused(3, 2, 5), shared=module(down_proj=linear()))
    assert text_of(changed(mlp=odd)["mlp.hidden"]) == (
        "blocks.0.mlp: its experts share one tensor, experts.gate_up_proj; shared.down_proj belongs to a shared expert, which "
        "every token passes, and is not the whole FFN"
    )
    two = module(experts=fused(3, 2, 4), shared=fused(2, 2, 4))
    assert "its experts share one tensor, experts.gate_up_proj; " not in (found := text_of(changed(mlp=two)["mlp.hidden"]))
    assert found.startswith("blocks.0.mlp: its experts share one tensor, experts.gate_up_proj")
    stacked = module(experts=fused(3, 2, 4), shared=fused(2, 2, 5))
    assert text_of(changed(mlp=stacked)["mlp.hidden"]) == (
        "blocks.0.mlp: its experts share one tensor, and it has another stacked tensor, shared.gate_up_proj"
    )
    hidden = type("Hidden", (nn.Module,), {"forward": lambda self, x, residual: x})()
    hidden.inner = nn.Sequential(nn.Linear(6, 9))
    assert "the output of Hidden may include the residual, and blocks.0.mlp: none of inner" in text_of(changed(mlp=hidden)["mlp"])


def test_several_streams_and_a_name_collision_have_no_role():
    assert text_of(changed(altup=nn.Linear(6, 6))["output"]) == "blocks.0: it carries several parallel residual streams"
    taken = changed(input=nn.Linear(6, 6))
    assert text_of(taken["input"]) == "blocks.0: its inputs would have the name of its own submodule input"
    assert taken["output"].name == "blocks.0"


def test_a_module_shared_by_two_blocks_has_no_role():
    block, other = OwnBlock(), OwnBlock()
    other.look = block.look
    first, second, last = roles_of(OwnModel([block, other, OwnBlock()])).blocks
    assert text_of(second.parts["heads"]) == "blocks.0.look.last: it is shared by 2 blocks, and its calls cannot be told apart"
    assert isinstance(last.parts["heads"], Layer)
    assert isinstance(first.parts["mlp"], Layer)
    assert all("shared by 2 blocks" in text_of(roles_of(OwnModel([block, block])).blocks[k].parts["output"]) for k in range(2))


def test_the_heads_of_torch_s_encoder_cannot_be_captured():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2, nn.LayerNorm(8)).eval()
    with pytest.raises(ValueError, match="torch's MultiheadAttention uses the weight of out_proj without calling the module"):
        find_layers(net, "blocks.heads")
    patterns = ["blocks.input", "blocks", "blocks.attention", "blocks.mlp.hidden", "final_norm"]
    _, shown = nl.ModelWrapper(net, patterns).forward_with_activations(torch.ones(3, 5, 8))
    assert {name: x.shape[-1] for name, x in shown.items() if name.endswith("linear2.input")} == {
        f"layers.{k}.linear2.input": 12 for k in range(2)
    }
    assert len(shown) == 9


def test_a_model_without_blocks_has_no_roles():
    net = build(Mixed)
    assert (roles_of(net).blocks, str(roles_of(net))) == ((), "")
    with pytest.raises(ValueError, match="Mixed has no blocks: it contains no list of modules that have submodules; give the name"):
        find_layers(net, "blocks[0].output")
    with pytest.raises(ValueError, match="no layer matches 'final_norm'; the model has: stem, grouped"):
        find_layers(net, "final_norm")


def test_stages_are_the_blocks_of_a_model_without_others():
    model = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 4, 8], depths=[2, 2, 4], layer_type="basic")
    )
    assert names(model, "blocks.output") == [f"resnet.encoder.stages.{k}" for k in range(3)]
    assert names(model, "head") == ["classifier.1"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "opt"])
def test_analyze_takes_roles(name):
    model, batch = lm(name), batch_of("CausalLM", samples=3)
    batch["attention_mask"] = torch.ones(3, 7, dtype=torch.long)
    batch["attention_mask"][1, 4:] = 0
    patterns = ["blocks[1:].output", "blocks[0].input", "blocks[0].mlp.hidden", "blocks[0].heads"]
    result = nl.analyze(model, [batch], ["activation_variance", "d_pr"], patterns)
    stored, mask = resolved(model, patterns), batch["attention_mask"].bool().flatten()
    layers = [layer for found in stored.values() for layer in found]
    out, shown = nl.ModelWrapper(model, layers).forward_with_activations(batch | {"output_hidden_states": True})
    for layer in layers:
        variance = shown[layer].flatten(0, -2)[mask].double().var(0)
        same(torch.tensor(result.units.loc[layer, "activation_variance"].to_numpy()), variance)
    assert torch.equal(shown[layers[0]], out.hidden_states[2])
    assert sorted(result.layers.index) == sorted(layers)
    assert result.layers["d_pr"].notna().all()


def test_a_role_that_is_never_called_raises():
    net = build(OwnModel)
    net.last = nn.Identity()
    net.final_norm = nn.LayerNorm(6)
    with pytest.raises(ValueError, match=r"layer 'final_norm' is never called by OwnModel\.forward"):
        nl.analyze(net, [torch.arange(8).reshape(2, 4)], ["activation_variance"], ["final_norm"])


def test_an_embedding_can_be_measured_and_resolved_patterns_are_stored():
    net = lm("llama")
    ids = torch.randint(0, 40, (4, 7), generator=torch.Generator().manual_seed(0))
    result = nl.analyze(net, [{"input_ids": ids}], ["activation_variance"], ["embedding", "blocks[0].mlp.hidden"])
    wanted = {"embedding": ["model.embed_tokens"], "blocks[0].mlp.hidden": ["model.layers.0.mlp.down_proj.input"]}
    assert result.metadata["layers"] == wanted
    assert set(result.units.index.get_level_values("layer")) == {"model.embed_tokens", "model.layers.0.mlp.down_proj.input"}
