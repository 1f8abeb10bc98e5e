"""What the geometry of a residual stream costs: python benchmarks/geometry.py [--tokens 20000] [--rounds 5] [--flat]

A random Llama of 6 layers, 384 wide; every column of nl.analyze_model at every block, tables included, over the bare forward of the
blocks (no cache, the head for one token only) and over the whole forward; representation-geometry beside it where it is installed.
--flat: peak memory of 10,000, 100,000 and 1,000,000 tokens instead, each in a process of its own.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator

import torch
from memory import largest
from timing import interleaved
from transformers import LlamaConfig, LlamaForCausalLM

import nodelens as nl

BATCH, LENGTH, VOCABULARY = 16, 256, 8192


def llama(width: int = 384) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=6,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config).eval()


def texts(tokens: int) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(-(-tokens // (BATCH * LENGTH))):
        yield {"input_ids": torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)}


def seconds_of(tokens: int, rounds: int, width: int = 384, processor: bool = False) -> dict[str, float]:
    """Median seconds of the bare forward passes and of each way to measure."""
    net, data = llama(width), list(texts(tokens))

    def bare(**options: int) -> None:
        with torch.no_grad():
            for batch in data:
                net(**batch, use_cache=False, **options)

    contestants = {
        "bare, blocks": lambda: bare(logits_to_keep=1),
        "bare, whole": bare,
        "nodelens": lambda: nl.analyze_model(net, data, max_tokens=None),
        "nodelens, spectrum": lambda: nl.analyze_model(net, data, max_tokens=None, metrics="spectrum"),
    }
    try:
        from representation_geometry import analyze_model
    except ImportError:
        pass
    else:
        contestants["representation-geometry"] = lambda: analyze_model(net, data, max_tokens=None)
    return interleaved(contestants, rounds, processor)


def overhead(tokens: int, rounds: int) -> None:
    seconds = seconds_of(tokens, rounds)
    if "representation-geometry" not in seconds:
        print("representation-geometry is not installed: pip install representation-geometry==0.1.0")
    for name, value in seconds.items():
        ratios = [value / seconds[base] for base in ("bare, blocks", "bare, whole")]
        print(f"{name:25} {value:7.3f} s   {ratios[0]:5.2f} x the blocks   {ratios[1]:5.2f} x the whole forward")


def peak(tokens: int) -> float:
    """Largest resident set, MiB."""
    nl.analyze_model(llama(), texts(tokens), max_tokens=tokens)
    return largest()


def flat() -> None:
    first = 0.0
    for tokens in (10_000, 100_000, 1_000_000):
        environment = os.environ | {"MALLOC_ARENA_MAX": "1"}  # one heap: what other threads keep is the allocator's
        command = [sys.executable, __file__, "--one", str(tokens)]
        found = float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
        first = first or found
        print(f"{tokens:>9,} tokens: {found:8.1f} MiB peak ({100 * (found / first - 1):+.1f} %)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flat", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(peak(options.one))
    elif options.flat:
        flat()
    else:
        overhead(options.tokens, options.rounds)


if __name__ == "__main__":
    main()
