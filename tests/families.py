"""Small random transformers of every model family, with their pruning groups."""

import functools

import torch
import transformers
from torch import nn

from nodelens.pruning.groups.families import family_groups

ROTARY = {  # all heads together are wider than the residual stream; two query heads per key head
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
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
GPT = {"vocab_size": 64, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {k: v for k, v in ROTARY.items() if k != "head_dim"} | {"hidden_size": 64}
EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 24}
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
LINEAR = {f"linear_{k}": n for k, n in {"key_head_dim": 8, "value_head_dim": 8, "num_key_heads": 2, "num_value_heads": 4}.items()}
BART = {f"{part}_{k}": n for part in ("encoder", "decoder") for k, n in {"layers": 2, "attention_heads": 6, "ffn_dim": 40}.items()}

# name: (config, its options, head, share of the parameters that lie in groups)
FAMILIES = {
    "vit": ("ViT", PLAIN | {"image_size": 16, "patch_size": 4, "num_labels": 5}, "ImageClassification", 0.865),
    "bert": ("Bert", PLAIN, "MaskedLM", 0.738),
    "distilbert": ("DistilBert", {"vocab_size": 64, "dim": 48, "n_layers": 2, "n_heads": 6, "hidden_dim": 40}, "MaskedLM", 0.462),
    "modernbert": ("ModernBert", PLAIN | {"cls_token_id": 1, "sep_token_id": 2}, "MaskedLM", 0.839),
    "albert": ("Albert", PLAIN | {"embedding_size": 16}, "MaskedLM", 0.224),
    "gpt2": ("GPT2", GPT | {"n_inner": 40}, "CausalLM", 0.795),
    "gptj": ("GPTJ", GPT | {"n_inner": 40, "rotary_dim": 4}, "CausalLM", 0.799),
    "opt": ("OPT", PLAIN | {"ffn_dim": 40, "word_embed_proj_dim": 48}, "CausalLM", 0.793),
    "opt as wide as the residual": ("OPT", PLAIN | {"ffn_dim": 48, "word_embed_proj_dim": 48}, "CausalLM", 0.802),
    "llama of heads": ("Llama", ROTARY | {"num_key_value_heads": 8}, "CausalLM", 0.850),
    "llama 8/2": ("Llama", ROTARY | {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}, "CausalLM", 0.805),
    "llama 8/4": ("Llama", ROTARY, "CausalLM", 0.824),
    "llama 6/2": ("Llama", ROTARY | {"num_attention_heads": 6, "num_key_value_heads": 2}, "CausalLM", 0.789),
    "qwen2": ("Qwen2", ROTARY, "CausalLM", 0.826),
    "qwen3": ("Qwen3", ROTARY, "CausalLM", 0.824),
    "mistral": ("Mistral", ROTARY, "CausalLM", 0.824),
    "gemma": ("Gemma", ROTARY | {"num_key_value_heads": 1}, "CausalLM", 0.884),
    "gemma2": ("Gemma2", ROTARY, "CausalLM", 0.895),
    "gemma3": ("Gemma3Text", ROTARY, "CausalLM", 0.894),
    "phi": ("Phi", PLAIN | {"num_key_value_heads": 3, "qk_layernorm": True}, "CausalLM", 0.763),
    "phi3": ("Phi3", WIDE, "CausalLM", 0.824),
    "neox": ("GPTNeoX", PLAIN, "CausalLM", 0.795),
    "falcon": ("Falcon", PLAIN | {"ffn_hidden_size": 40, "multi_query": False, "num_kv_heads": 6}, "CausalLM", 0.886),
    "falcon by groups": ("Falcon", PLAIN | {"num_kv_heads": 3, "new_decoder_architecture": True, "bias": True}, "CausalLM", 0.932),
    "falcon alibi": ("Falcon", PLAIN | {"multi_query": False, "num_kv_heads": 6, "alibi": True}, "CausalLM", 0.628),
    "bloom": ("Bloom", {"vocab_size": 64, "hidden_size": 48, "n_layer": 2, "n_head": 6}, "CausalLM", 0.623),
    "mpt": ("Mpt", {"vocab_size": 64, "d_model": 48, "n_layers": 2, "n_heads": 6}, "CausalLM", 0.629),
    "gpt bigcode": ("GPTBigCode", GPT | {"n_inner": 40, "multi_query": False}, "CausalLM", 0.233),
    "trocr": ("TrOCR", BART | {"vocab_size": 64, "d_model": 48, "max_position_embeddings": 64}, "CausalLM", 0.148),
    "diffllama": ("DiffLlama", WIDE, "CausalLM", 0.317),
    "olmo2": ("Olmo2", ROTARY, "CausalLM", 0.825),
    "cohere": ("Cohere", ROTARY | {"use_qk_norm": True, "logit_scale": 1.0}, "CausalLM", 0.904),
    "granite": ("Granite", ROTARY, "CausalLM", 0.824),
    "stablelm": ("StableLm", PLAIN | {"num_key_value_heads": 3}, "CausalLM", 0.793),
    "stablelm with a norm a head": ("StableLm", PLAIN | {"num_key_value_heads": 3, "qk_layernorm": True}, "CausalLM", 0.359),
    "starcoder2": ("Starcoder2", ROTARY | {"use_bias": True}, "CausalLM", 0.876),
    "nemotron": ("Nemotron", ROTARY, "CausalLM", 0.798),
    "smollm3": ("SmolLM3", ROTARY, "CausalLM", 0.900),
    "bitnet": ("BitNet", WIDE, "CausalLM", 0.825),
    "mixtral": ("Mixtral", ROTARY | EXPERTS | {"num_local_experts": 4}, "CausalLM", 0.872),
    "qwen2 moe": ("Qwen2Moe", ROTARY | SPARSE | {"num_experts": 4, "shared_expert_intermediate_size": 20}, "CausalLM", 0.884),
    "qwen3 moe": ("Qwen3Moe", ROTARY | SPARSE | {"num_experts": 4}, "CausalLM", 0.871),
    "olmoe": ("Olmoe", WIDE | EXPERTS | {"num_experts": 4}, "CausalLM", 0.872),
    "gpt oss": ("GptOss", ROTARY | EXPERTS | {"num_local_experts": 4}, "CausalLM", 0.866),
    "aria": ("AriaText", ROTARY | EXPERTS | {"moe_num_experts": 4}, "CausalLM", 0.898),
    "llama4": ("Llama4Text", ROTARY | EXPERTS | {"num_local_experts": 4, "intermediate_size_mlp": 40}, "CausalLM", 0.887),
    "deepseek v3": ("DeepseekV3", PLAIN | LATENT | SPARSE | ROUTED | {"first_k_dense_replace": 1}, "CausalLM", 0.487),
    "mimo": ("MiMoV2Flash", ROTARY | SPARSE | ROUTED | {"v_head_dim": 12}, "CausalLM", 0.876),
    "qwen3 next": (
        "Qwen3Next",
        ROTARY
        | SPARSE
        | LINEAR
        | {"num_experts": 4, "shared_expert_intermediate_size": 20, "layer_types": ["linear_attention", "full_attention"]},
        "CausalLM",
        0.563,
    ),
    "bart": ("Bart", BART | {"vocab_size": 64, "d_model": 48, "max_position_embeddings": 64}, "Seq2SeqLM", 0.867),
    "t5": ("T5", {"vocab_size": 64, "d_model": 48, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 6}, "Seq2SeqLM", 0.206),
}
MOE = [name for name, (_, options, _, _) in FAMILIES.items() if "num_experts_per_tok" in options]
APPROXIMATE = {"olmo2": "kv_group", "olmoe": "kv_group", "bitnet": "*"}


@functools.cache
def build(name, attention="eager", experts=None):
    """A random model of sharp attention in which no bias and no norm's weight is trivial, and its groups; nobody changes it."""
    config, options, head, _ = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chosen = {"attn_implementation": attention} | ({"experts_implementation": experts} if experts else {})
        made = getattr(transformers, f"{config}Config")(**options)
        model = getattr(transformers, f"AutoModelFor{head}").from_config(made, **chosen).eval()
        for key, parameter in model.named_parameters():
            scales = key.endswith("weight") and ("norm" in key.lower() or parameter.ndim == 1)
            nn.init.normal_(parameter, 1.0 if scales else 0.0, 0.2)
    return model, family_groups(model)
