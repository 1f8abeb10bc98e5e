"""Patchscopes: a hidden state put into another prompt, which makes the model say what the state holds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from nodelens.interventions.cells import TOKENS, CellPasses, GridCell, whole_passes, written
from nodelens.interventions.prompts import TokenizedPrompt, token_text
from nodelens.interventions.token_model import TokenModel
from nodelens.interventions.token_positions import Positions
from nodelens.messages import option
from nodelens.results.findings import Findings

from .lens import LENS, about, top_tokens
from .scores import row_scores

IDENTITY = "cat->cat; 1135->1135; hello->hello; ?"  # the target prompt of the authors for what token a state stands for


@dataclass(frozen=True)
class PatchscopeOptions:
    """Which states are put where.

    layers, positions: of the source prompts: blocks whose output is read, and tokens
    target:            the prompt that receives a state; the default asks for the token that a state stands for
    target_layers:     where it is put: same (the layer it comes from), or one block, by index
    target_position:   which token of the target it replaces, an index, expression or ``phrase:<text>`` that selects one
    k:                 how many tokens are listed
    generate:          how many tokens the model goes on with after the target, each the likeliest; 0: none
    """

    layers: str | int | Sequence[int] = "all"
    positions: Positions = "all"
    target: Any = IDENTITY
    target_layers: str | int = "same"
    target_position: Positions = -1
    k: int = 5
    generate: int = 0

    def __post_init__(self) -> None:
        if self.k < 1 or self.generate < 0:
            raise ValueError(f"patchscope: k is {self.k} and generate is {self.generate}; k is 1 or more, generate 0 or more")


def patchscope_grid(
    model: TokenModel, sources: Iterable[TokenizedPrompt], target: TokenizedPrompt, options: PatchscopeOptions
) -> Findings:
    """Every state of a grid of layers and positions put into the target prompt: what the model predicts at its end.

    The target stands in a pass once per state. Tables: ``predictions``, as in ``nl.lens``, and ``positions`` with agreement_at_1,
    surprisal and kl of the model's own prediction at the source position, in nats, and with ``generate`` the continuation.

    Source: Ghandeharioun et al. 2024, 2401.06102, section 3 (the framework) and 4.1 (precision and surprisal)
    """
    place = target.positions(options.target_position)
    if len(place) != 1:
        raise ValueError(
            f"{option('target_position')}={options.target_position!r} selects {len(place)} tokens of the target: give one"
        )
    blocks = model.blocks(options.layers)
    into = {k: _target_block(model, options.target_layers, k) for k in blocks}
    predictions, positions, shared = list[dict[str, Any]](), list[dict[str, Any]](), list[str]()
    with model.running():
        for sample, source in enumerate(sources):
            layers = model.stream(blocks)
            states, final = model.read(source.ids[None], layers.values())
            chosen = source.positions(options.positions)
            where = [(block, position) for block in blocks for position in chosen]
            cells = [
                GridCell(
                    model.part(into[block], "output"), into[block], "output", place[0], states[layers[block].name][0, position]
                )
                for block, position in where
            ]
            passes = CellPasses(model, target.ids)
            for part, logits in passes(cells):
                own = final[0, torch.tensor([where[k][1] for k in part])].float()
                found = grid_rows(logits, own, [where[k] for k in part], source, layers, sample, options.k)
                predictions += found[0]
                positions += found[1]
            shared.append(passes.shares)
            if options.generate:
                texts = dict(zip(where, _continuations(model, target, cells, options.generate), strict=True))
                for at in positions[-len(cells) :]:
                    at["continuation"] = texts[at["layer"], at["position"]]
    order = ["sample", "layer", "position"]
    frames = {
        "predictions": pd.DataFrame(predictions).sort_values([*order, "rank"], ignore_index=True),
        "positions": pd.DataFrame(positions).sort_values(order, ignore_index=True),
    }
    meta = about(model) | {"target": target.text or target.ids.tolist(), "target_layers": options.target_layers, "k": options.k}
    meta |= {"lens": "patchscope", "shares": shared}
    return Findings(LENS, frames, [*_lines(frames["positions"]), *whole_passes(shared)], metadata=meta)


def _continuations(model: TokenModel, target: TokenizedPrompt, cells: Sequence[GridCell], count: int) -> list[str]:
    """What the model goes on with after the target, with each cell written."""
    found, size = list[str](), max(1, TOKENS // (len(target) + count))
    for start in range(0, len(cells), size):
        part = cells[start : start + size]
        rows = target.ids.expand(len(part), -1)
        for _ in range(count):
            with written(list(enumerate(part)), len(part)):
                following = model.logits(rows, last=True).argmax(1)
            rows = torch.cat([rows, following[:, None].to(rows)], 1)
        for row in rows[:, len(target) :].tolist():
            found.append("".join(token_text(i, target.tokenizer) for i in row))
    return found


def _target_block(model: TokenModel, chosen: str | int, source: int) -> int:
    if chosen == "same":
        return source
    found = model.blocks(chosen)
    if len(found) != 1:
        raise ValueError(f"{option('target_layers')}={chosen!r} selects {len(found)} blocks: give same, or one block")
    return found[0]


def grid_rows(
    logits: Tensor, final: Tensor, where: Sequence[tuple[int, int]], source: TokenizedPrompt, layers: Any, sample: int, k: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the two tables for cells with logits (n, V); final (n, V): the model's own at the source positions."""
    scores = row_scores(logits, final, final.argmax(1), (1,))
    columns = {name: scores[name].tolist() for name in ("agreement_at_1", "surprisal", "kl")}
    predictions, positions = list[dict[str, Any]](), list[dict[str, Any]]()
    for row, (block, position) in enumerate(where):
        at = {
            "sample": sample,
            "layer": block,
            "module": layers[block].name,
            "position": position,
            "token": source.tokens[position],
        }
        predictions += [at | each for each in top_tokens(logits[row], k, source)]
        positions.append(at | {name: values[row] for name, values in columns.items()})
    return predictions, positions


def _lines(positions: pd.DataFrame) -> list[str]:
    means = positions.groupby("layer")[["agreement_at_1", "surprisal"]].mean()
    best = means["agreement_at_1"].idxmax()
    share, surprisal = means.loc[best]
    return [f"layer {best} tells best what the model predicts: its first choice at {share:.0%}, surprisal {surprisal:.3g}"]
