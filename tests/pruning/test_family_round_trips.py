"""Small random transformers of many families are analysed, pruned, saved and loaded again."""

import json

import pytest
import torch
import transformers
from torch import nn

import nodelens as nl
from nodelens.pruning.surgery.mask import masked

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = BASE | {"num_key_value_heads": 2, "head_dim": 8}
SPACE = {"mamba_d_state": 4, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_expand": 2}
BART = {f"{part}_{k}": n for part in ("encoder", "decoder") for k, n in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
IMAGE = {"image_size": 32, "patch_size": 4, "num_labels": 5}

# name: (config, its options, head)
FAST = {
    "bamba": ("Bamba", GROUPED | SPACE | {"attn_layer_indices": [1]}, "CausalLM"),  # its config holds an infinite number
    "m2m 100": ("M2M100", BART | {"d_model": 32, "vocab_size": 64, "max_position_embeddings": 64}, "Seq2SeqLM"),
    "mamba": ("Mamba", BASE | {"state_size": 4}, "CausalLM"),
    "longformer": ("Longformer", BASE | {"attention_window": 4}, "MaskedLM"),  # its queries have the positions first
}
SLOW = {
    "falcon mamba": ("FalconMamba", BASE | {"state_size": 4}, "CausalLM"),
    "falcon h1": ("FalconH1", GROUPED | SPACE | {"mamba_d_ssm": 64}, "CausalLM"),
    "granite hybrid": (
        "GraniteMoeHybrid",
        BASE | SPACE | {"num_key_value_heads": 2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
        "CausalLM",
    ),
    "jamba": (
        "Jamba",
        BASE | {"num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4},
        "CausalLM",
    ),
    "nemotron h": (
        "NemotronH",
        GROUPED
        | {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1, "chunk_size": 8}
        | {"layers_block_type": ["mamba", "mlp", "attention"]},
        "CausalLM",
    ),
    "recurrent gemma": ("RecurrentGemma", GROUPED | {"num_hidden_layers": 3, "lru_width": 32}, "CausalLM"),
    "rwkv": ("Rwkv", BASE | {"attention_hidden_size": 32, "context_length": 64}, "CausalLM"),  # its cache is written in place
    "ctrl": ("CTRL", {"vocab_size": 64, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}, "CausalLM"),
    "lfm2": ("Lfm2", BASE | {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}, "CausalLM"),
    "qwen3 next": ("Qwen3Next", GROUPED | SPARSE | LINEAR | {"layer_types": ["linear_attention", "full_attention"]}, "CausalLM"),
    "big bird": ("BigBird", BASE | {"attention_type": "original_full"}, "MaskedLM"),  # a pooler that the loss does not read
    "blenderbot": ("Blenderbot", BART | {"d_model": 32, "vocab_size": 64, "max_position_embeddings": 64}, "Seq2SeqLM"),
    "swin v2": (
        "Swinv2",
        IMAGE | {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        "ImageClassification",
    ),
    "vit": ("ViT", BASE | IMAGE, "ImageClassification"),
    "resnet": ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}, "ImageClassification"),
    "wav2vec2": (
        "Wav2Vec2",
        BASE
        | {"conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2], "num_labels": 5}
        | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
        "AudioClassification",
    ),
}
EVERY = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def build(name):
    config, options, head = (FAST | SLOW)[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, f"{config}Config")(**options)
        model = getattr(transformers, f"AutoModelFor{head}").from_config(made).eval()
        for key, weight in model.named_parameters():
            if weight.ndim > 1 and "A_log" not in key:
                nn.init.normal_(weight, 0.0, 0.2)
    return model


def batches(name):
    head, generator = (FAST | SLOW)[name][2], torch.Generator().manual_seed(1)
    found = []
    for k in range(2):
        ids = torch.randint(3, 64, (4, 16), generator=generator)
        classes = torch.randint(5, (4,), generator=generator)
        batch = {
            "Seq2SeqLM": {"input_ids": ids, "labels": ids[:, :9].contiguous()},
            "ImageClassification": {"pixel_values": torch.randn(4, 3, 32, 32, generator=generator), "labels": classes},
            "AudioClassification": {"input_values": torch.randn(4, 200, generator=generator), "labels": classes},
        }.get(head, {"input_ids": ids, "labels": ids})
        found.append(batch | {"ids": torch.arange(4) + 4 * k})
    return found


def logits(model, batch):
    with torch.no_grad():
        return model(**{name: value for name, value in batch.items() if name != "ids"}).logits


@pytest.mark.parametrize("name", EVERY)
def test_a_family_is_analysed_pruned_saved_and_loaded(name, tmp_path):
    model, data = build(name), batches(name)
    found = nl.analyze(model, data)
    assert found.units["magnitude"].notna().all()
    assert found.units["activation_mean"].notna().any()

    pruned = nl.prune(model, "taylor", 0.5, data=data)
    sliced = logits(pruned.model, data[0])
    assert sum(p.numel() for p in pruned.model.parameters()) < 0.95 * sum(p.numel() for p in model.parameters())
    with masked(model, pruned.groups, pruned.plan.removed):
        expected = logits(model, data[0])
    assert (sliced - expected).abs().max() < 1e-5 * expected.abs().max()

    loaded = nl.load_pruned(pruned.save(tmp_path))
    assert torch.equal(logits(loaded, data[0]), sliced)


def test_a_config_that_its_class_refuses_is_one_line_with_the_way_out(tmp_path):
    model = build("bamba")
    folder = nl.prune(model, "magnitude", 0.5).save(tmp_path)
    origin = json.loads((folder / "origin.json").read_text())
    origin["config"]["time_step_limit"] = [0.0, None]
    (folder / "origin.json").write_text(json.dumps(origin))
    plan = json.loads((folder / "plan.json").read_text())
    del plan["config"], plan["digests"]  # as in a folder of an earlier version
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(
        ValueError, match=r"refuses the config of BambaForCausalLM: .*'time_step_limit'.*; give a dense model"
    ) as error:
        nl.load_pruned(folder)
    assert "\n" not in str(error.value)
    nl.load_pruned(folder, model)


def test_a_pruned_state_space_generates_with_its_cache_what_it_generates_without():
    model, data = build("mamba"), batches("mamba")
    pruned = nl.prune(model, "taylor", 0.5, data=data)
    assert {(group.kind, group.n) for group in pruned.groups} == {("channel", 48)}
    assert pruned.model.backbone.layers[0].mixer.intermediate_size == 24
    prompt = {"inputs": data[0]["input_ids"][:, :6], "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(pruned.model.generate(**prompt), pruned.model.generate(**prompt, use_cache=False))


def test_a_state_space_whose_widths_differ_is_frozen_with_the_reason():
    model = build("mamba")
    mixer = model.backbone.layers[0].mixer
    mixer.D = nn.Parameter(torch.ones(47))
    groups = nl.find_groups(model)
    assert [group.name for group in groups] == ["backbone.layers.1.mixer"]
    reasons = {frozen.what: frozen.reason for frozen in groups.frozen}
    assert reasons["backbone.layers.0.mixer"] == "D has 47 channels, out_proj reads 48"
