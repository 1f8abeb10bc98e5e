"""Small mixtures of experts of many families, with random weights, and tokens for them."""

import functools

import torch
import transformers
from torch import nn

from nodelens.pruning.groups.families import family_groups

E, K = 8, 2
BASE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32}
BASE |= {"intermediate_size": 12, "max_position_embeddings": 32, "num_experts_per_tok": K}
BASE |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROTARY = BASE | {"head_dim": 4}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
DEEPSEEK = {"num_key_value_heads": 4, "n_routed_experts": E, "moe_intermediate_size": 12, "first_k_dense_replace": 1}
GROUPS = {"n_group": 1, "topk_group": 1}

# name: (config, its options, how the router makes weights of logits)
FAMILIES = {
    "mixtral": ("Mixtral", ROTARY | {"num_local_experts": E}, "softmax"),
    "qwen3 moe": ("Qwen3Moe", ROTARY | {"num_experts": E, "moe_intermediate_size": 12, "norm_topk_prob": True}, "softmax"),
    "olmoe": ("Olmoe", BASE | {"num_experts": E}, "softmax"),
    "gpt oss": ("GptOss", ROTARY | {"num_local_experts": E}, "softmax"),
    "granite": ("GraniteMoe", BASE | {"num_local_experts": E}, "softmax"),
    "aria": ("AriaText", {k: v for k, v in ROTARY.items() if k != "num_experts_per_tok"} | {"moe_num_experts": E}, "softmax"),
    "hunyuan": ("HunYuanMoEV1", ROTARY | {"num_experts": E, "moe_topk": K}, "softmax"),  # a layer inside the router
    "deepseek v3": ("DeepseekV3", BASE | LATENT | DEEPSEEK | GROUPS, "corrected"),
    "minimax m2": ("MiniMaxM2", ROTARY | {"num_local_experts": E}, "sigmoid"),  # the block holds a tensor of the router's
    "ernie": ("Ernie4_5_Moe", ROTARY | {"moe_num_experts": E, "moe_k": K, "moe_intermediate_size": 12}, "sigmoid"),
}
TOKENS = torch.randint(3, 32, (3, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(3, 9, dtype=torch.long).index_put((torch.tensor(1), torch.arange(6, 9)), torch.tensor(0))
BATCH = {"input_ids": TOKENS, "attention_mask": MASK}


@functools.cache
def build(name, **more):
    """A random model without trivial tensors, and its groups; tests must not change it."""
    config, options, _ = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, f"{config}Config")(**(options | more))
        chosen = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = transformers.AutoModelForCausalLM.from_config(made, **chosen).eval()
        for key, tensor in model.named_parameters():
            nn.init.normal_(tensor, 1.0 if "norm" in key else 0.0, 0.3)
        for key, tensor in model.named_buffers():
            if "correction" in key:
                nn.init.normal_(tensor, 0.0, 0.3)
    return model, family_groups(model)
