"""Plans passes over large language models from shapes alone: memory per GPU, traffic, hours per billion tokens. Prints Markdown.

python benchmarks/plan_large.py          8B, 70B and 671B on 8 to 64 GPUs of 80 GB; no weights and no data are read
"""

import math

from transformers import DeepseekV3Config, LlamaConfig, PretrainedConfig

from nodelens.app.cost_estimate import CostEstimate, estimate_cost, model_from_config

GPU_BYTES, FLOPS, SHARE = 80e9, 989e12, 0.35  # an H100 in bfloat16; the share of its peak that a forward pass is assumed to reach
TOKENS, GPUS = 1_000_000_000, (8, 16, 32, 64)
LLAMA = {"vocab_size": 128_256, "num_key_value_heads": 8, "dtype": "bfloat16"}
SHAPES: dict[str, PretrainedConfig] = {
    "8B (Llama 3.1)": LlamaConfig(**LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "70B (Llama 3.1)": LlamaConfig(
        **LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
    "671B (DeepSeek-V3)": DeepseekV3Config(dtype="bfloat16"),
}
PLANS = {  # name: metrics, layers, options
    "means and variances of every layer": (["activation_mean", "activation_variance"], "*", {}),
    "effective rank of the residual stream": (["effective_rank"], "blocks[*].output", {"covariance": "sketch:1024"}),
}


def active_flops(config: PretrainedConfig, found: CostEstimate) -> float:
    """Operations per token; of a mixture, two per active parameter, since on shapes alone every expert would count."""
    if not hasattr(config, "n_routed_experts"):
        return found.forward["flops_per_row"]
    sparse = config.num_hidden_layers - config.first_k_dense_replace
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = sparse * (config.n_routed_experts - config.num_experts_per_tok) * expert
    return 2.0 * (found.model["parameters"] - idle)


def table() -> list[str]:
    """The lines of the table."""
    heads = ("model", "what", "GPUs", "copies", "GB per GPU: weights", "sums, buffers", "GB sent per rank", "hours per 10⁹ tokens")
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * 6]
    for name, config in SHAPES.items():
        net = model_from_config(config)
        for what, (metrics, layers, options) in PLANS.items():
            found = estimate_cost(net, metrics, layers, length=2048, samples=2, rows=TOKENS, budget=None, **options)
            lines += [_row(name, what, gpus, config, found) for gpus in GPUS if _devices(found) <= gpus]
    return lines


def _devices(found: CostEstimate) -> int:
    """GPUs that share a copy: the next power of two that holds weights and sums, with a fifth left for activations."""
    return 2 ** max(0, math.ceil(math.log2((found.model["bytes"] + found.bytes["total"]) / (0.8 * GPU_BYTES))))


def _row(name: str, what: str, gpus: int, config: PretrainedConfig, found: CostEstimate) -> str:
    devices = _devices(found)
    copies = gpus // devices
    sent = 2 * (copies - 1) / copies * found.bytes["statistics"] / devices
    busy = copies  # device_map runs the GPUs of a copy one after the other
    flops = active_flops(config, found) + found.forward["flops_per_row"] * found.forward["overhead"]
    hours = TOKENS * flops / (busy * FLOPS * SHARE) / 3600
    sizes = [found.model["bytes"] / devices, found.bytes["total"] / devices, sent]
    return f"| {name} | {what} | {gpus} | {copies} | " + " | ".join(f"{size / 1e9:.2f}" for size in sizes) + f" | {hours:,.1f} |"


if __name__ == "__main__":
    print(*table(), sep="\n")
