"""What a pass over a large language model costs: python benchmarks/language.py [--shape 1b|7b] [--tokens 100000] [--rounds 3]

A Llama of random weights in bfloat16 on a GPU (--shape tiny --device cpu runs anywhere): the geometry of the residual stream over
the bare forward of the blocks, and unit metrics at blocks.mlp.hidden over the bare forward with its logits, in turn; peak
memory of each, and the overhead that the plan estimates of the shape alone.
"""

import argparse
import resource
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import interleaved
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import nodelens as nl
from nodelens.app.cost_estimate import estimate_cost, estimate_geometry_cost

SHAPES = {  # those of Llama 3.2 1B and Llama 2 7B
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 512},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
}
UNITS = ["activation_mean", "activation_variance", "activation_rms", "zero_fraction"]
LAYERS = "blocks.mlp.hidden"


def llama(shape: str, device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def texts(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    generator, vocabulary = torch.Generator().manual_seed(1), SHAPES[options.shape]["vocab_size"]
    for _ in range(-(-options.tokens // (options.batch * options.length))):
        yield {"input_ids": torch.randint(vocabulary, (options.batch, options.length), generator=generator).to(device)}


def contestants(net: PreTrainedModel, data: list[dict[str, Any]], device: torch.device) -> dict[str, Callable[[], None]]:
    def bare(**more: int) -> None:
        with torch.no_grad():
            for batch in data:
                net(**batch, use_cache=False, **more)

    runs: dict[str, Callable[[], object]] = {
        "bare, blocks": lambda: bare(logits_to_keep=1),
        "geometry": lambda: nl.analyze_model(net, data, max_tokens=None),
        "bare, with logits": bare,
        "units": lambda: nl.analyze(net, data, UNITS, LAYERS),
    }

    def waited(run: Callable[[], object]) -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return {name: (lambda run=run: waited(run)) for name, run in runs.items()}  # type: ignore[misc]


def peak(run: Callable[[], None], device: torch.device) -> float:
    """Most memory in use, GB: of a GPU during the run, else of the process so far."""
    if device.type != "cuda":
        run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch sees no GPU here; --shape tiny --device cpu runs anywhere")
    if device.type != "cuda" and options.shape != "tiny":
        parser.error(f"--shape {options.shape} is for a GPU: --device cuda; --shape tiny --device cpu runs anywhere")
    net = llama(options.shape, device)
    data = list(texts(options, device))
    batch = {"samples": options.batch, "length": options.length}
    plans = {
        "geometry": estimate_geometry_cost(net.config, **batch),
        "units": estimate_cost(net.config, UNITS, LAYERS, **batch),
    }
    runs = contestants(net, data, device)
    memory = {name: peak(run, device) for name, run in runs.items()}
    seconds = interleaved(runs, options.rounds)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    count = len(data) * options.batch * options.length
    print(f"{options.shape}: {sum(p.numel() for p in net.parameters()):,} parameters, bfloat16, {count:,} tokens, {where}")
    for name, bare in (("geometry", "bare, blocks"), ("units", "bare, with logits")):
        for each in (bare, name):
            print(f"{each:18} {seconds[each]:8.3f} s {count / seconds[each]:12,.0f} tokens/s {memory[each]:8.2f} GB peak")
        estimate = 1 + plans[name].forward["overhead"]
        print(f"{'':18} {seconds[name] / seconds[bare]:8.2f} x the bare forward; {estimate:.2f} x by the plan", flush=True)


if __name__ == "__main__":
    main()
