"""Grids of patches in shared passes against one pass per cell: python benchmarks/lenses.py --model DIR

Prints the seconds of processor time of a Patchscope grid and of activation patching grids, layers x 24 positions, in shared passes
and in a loop of single runs, their ratio, and the largest difference of the logits, relative to the largest logit. ``nl.patch`` is
the whole call with its tables, against the loop of the residual stream alone. Seconds are medians of interleaved rounds with one
thread. The model is a folder of transformers.
"""

import argparse
from dataclasses import replace
from functools import partial

import torch
from timing import interleaved
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import nodelens as nl
from nodelens.interventions.cells import CellPasses, GridCell, repeated_logits
from nodelens.interventions.lenses.patchscope import IDENTITY
from nodelens.interventions.patching.grid import GridOptions, grid_sites
from nodelens.interventions.prompts import read_prompts
from nodelens.interventions.token_model import TokenModel

SOURCE = "Once upon a time, there was a little girl named Lily. She loved to play with her mom and her dad in the park"
OTHER = "One day, a big dog saw a red ball in the park. He ran to the ball and said hello to the sad boy who lost it"


def shared(model: TokenModel, ids: Tensor, cells: list[GridCell]) -> Tensor:
    """The logits of each cell from passes that hold many."""
    found: dict[int, Tensor] = {}
    for part, logits in CellPasses(model, ids)(cells):
        found |= dict(zip(part, logits, strict=True))
    return torch.stack([found[k] for k in range(len(cells))])


def looped(model: TokenModel, ids: Tensor, cells: list[GridCell]) -> Tensor:
    """The logits of each cell from a pass of its own."""
    return torch.cat([repeated_logits(model, ids, [cell]) for cell in cells])


def states_of(model: TokenModel, ids: Tensor, component: str) -> list[GridCell]:
    """Cells that write the states of a prompt at their own positions."""
    sites, _ = grid_sites(model, GridOptions(component))
    states, _ = model.read(ids[None], [site.layer for site in sites])
    return [cell for site in sites for _, cell in site.cells(states[site.layer.name][0], range(len(ids)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--positions", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = TokenModel(AutoModelForCausalLM.from_pretrained(options.model).eval())
    source, other, target = (read_prompts(text, tokenizer)[0].ids for text in (SOURCE, OTHER, IDENTITY))
    source, other = source[: options.positions], other[: options.positions]
    print(f"{'grid':<30}{'cells':>7}{'shared s':>10}{'loop s':>10}{'ratio':>8}{'difference':>12}")
    with model.running():
        grids = {f"patching, {name}": (other, states_of(model, source, name)) for name in ("residual", "attention", "mlp", "heads")}
        into = [replace(cell, position=len(target) - 1) for cell in grids["patching, residual"][1]]
        for name, (prompt, cells) in ({"patchscope": (target, into)} | grids).items():
            together, each = shared(model, prompt, cells), looped(model, prompt, cells)
            off = float((together - each).abs().max() / each.abs().max())
            runs = {run: partial(function, model, prompt, cells) for run, function in (("shared", shared), ("loop", looped))}
            if name == "patching, residual":
                runs["nl.patch"] = partial(nl.patch, model.model, source, other, tokenizer, answer=1, wrong=2)
            took = interleaved(runs, options.rounds, processor=True)
            for run in [run for run in took if run != "loop"]:
                shown = name if run == "shared" else f"  {run}, residual"
                print(
                    f"{shown:<30}{len(cells):>7}{took[run]:>10.4f}{took['loop']:>10.4f}{took['loop'] / took[run]:>8.1f}{off:>12.1e}"
                )


if __name__ == "__main__":
    main()
