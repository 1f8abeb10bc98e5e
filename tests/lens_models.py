"""Language models that the tests of lenses and patches share."""

import functools

import torch
from families import FAMILIES, build
from real import folder
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
)

CAUSAL = [name for name, (_, _, head, _) in FAMILIES.items() if head == "CausalLM"]
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ODD_TAILS = {  # tails with more than a norm and a head
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.25),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=3.0, residual_multiplier=0.5),
    "gemma2": lambda: Gemma2Config(**SIZES, final_logit_softcapping=2.0),
    "opt": lambda: OPTConfig(**{k: v for k, v in SIZES.items() if "heads" not in k}, num_attention_heads=4, ffn_dim=40,
                             word_embed_proj_dim=24),
}  # fmt: skip


@functools.cache
def odd(name):
    """A random model whose tail has a scale, a cap or a projection."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(ODD_TAILS[name]()).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model


@functools.cache
def llama():
    """A random Llama of three blocks; nobody changes it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def family(name):
    """A random model of a family; nobody changes it."""
    return build(name)[0]


@functools.cache
def stories():
    """The trained network of 260,000 parameters and its tokenizer; skipped without real data."""
    home = str(folder("NODELENS_DATA") / "models/stories260K")
    return AutoModelForCausalLM.from_pretrained(home).eval(), AutoTokenizer.from_pretrained(home)


def ids(samples, length, seed=0, vocabulary=64):
    """Token ids (samples, length) above the special ones."""
    return torch.randint(3, vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))


def padded(rows, side):
    """A batch of rows of different lengths, padded with 0 on one side."""
    width = max(map(len, rows))
    batch, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for k, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(len(row))
        batch[k, where], mask[k, where] = row, 1
    return {"input_ids": batch, "attention_mask": mask}


def hooks(model):
    """How many hooks a model has; transformers leave some of their own."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
