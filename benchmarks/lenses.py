"""Grids of patches in shared passes against one pass per cell: python benchmarks/lenses.py --model DIR

Prints the seconds of a Patchscope grid and of an activation patching grid, layers x 24 positions, in shared passes and in a loop of single
runs, their ratio, and the largest difference of the logits, relative to the largest logit. The model is a folder of transformers.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from nodelens.interventions.cells import CellPasses, GridCell, repeated_logits
from nodelens.interventions.lenses.patchscope import IDENTITY
from nodelens.interventions.prompts import read_prompts
from nodelens.interventions.token_model import TokenModel

SOURCE = "Once upon a time, there was a little girl named Lily. She loved to play with her mom and her dad in the park"
OTHER = "One day, a big dog saw a red ball in the park. He ran to the ball and said hello to the sad boy who lost it"


def least(run: Callable[[], object], repeats: int) -> float:
    """The fewest seconds of processor time of several runs: waiting for other processes does not count."""
    found = []
    for _ in range(repeats):
        begun = time.process_time()
        run()
        found.append(time.process_time() - begun)
    return min(found)


def shared(model: TokenModel, ids: Tensor, cells: list[GridCell]) -> Tensor:
    """The logits of each cell from passes that hold many."""
    found: dict[int, Tensor] = {}
    for part, logits in CellPasses(model, ids)(cells):
        found |= dict(zip(part, logits, strict=True))
    return torch.stack([found[k] for k in range(len(cells))])


def looped(model: TokenModel, ids: Tensor, cells: list[GridCell]) -> Tensor:
    """The logits of each cell from a pass of its own."""
    return torch.cat([repeated_logits(model, ids, [cell]) for cell in cells])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--positions", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = TokenModel(AutoModelForCausalLM.from_pretrained(options.model).eval())
    source, other, target = (read_prompts(text, tokenizer)[0].ids for text in (SOURCE, OTHER, IDENTITY))
    source, other = source[: options.positions], other[: options.positions]
    layers = model.stream(range(len(model.roles.blocks)))
    print(f"{'grid':<22}{'cells':>7}{'shared s':>10}{'loop s':>10}{'ratio':>8}{'difference':>12}")
    with model.running():
        states, _ = model.read(source[None], layers.values())
        for name, prompt, place in (("patchscope", target, len(target) - 1), ("activation patching", other, None)):
            cells = [
                GridCell(layer, k, "output", p if place is None else place, states[layer.name][0, p])
                for k, layer in layers.items()
                for p in range(len(source))
            ]
            together, each = shared(model, prompt, cells), looped(model, prompt, cells)
            off = float((together - each).abs().max() / each.abs().max())
            fast, slow = (least(lambda run=run: run(model, prompt, cells), options.repeats) for run in (shared, looped))
            print(f"{name:<22}{len(cells):>7}{fast:>10.4f}{slow:>10.4f}{slow / fast:>8.1f}{off:>12.1e}")


if __name__ == "__main__":
    main()
