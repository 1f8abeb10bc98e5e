"""``nl.patch``: states of one run put into another, at each layer and position, and what the model predicts then."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from nodelens.interventions.cells import CellPasses, GridCell, whole_passes
from nodelens.interventions.lenses.lens import about
from nodelens.interventions.token_model import TokenModel
from nodelens.interventions.token_positions import Positions
from nodelens.network.eval_mode import one_at_a_time
from nodelens.results.findings import Findings

from .grid import GridOptions, GridSite, grid_sites
from .pairs import METRICS, Contrast, PromptPair, read_pairs

PATCHING = "patching"  # the kind of these findings
_ROUNDING = 32  # units in the last place of the largest logit


@one_at_a_time
def patch(
    model: nn.Module,
    clean: Any,
    corrupt: Any,
    tokenizer: Any = None,
    *,
    answer: Any = None,
    wrong: Any = None,
    components: str | Sequence[str] = "residual",
    layers: str | int | Sequence[int] = "all",
    positions: Positions = "all",
    into: str = "corrupt",
) -> Findings:
    """Activation patching: puts states of a clean run into a corrupt one, one cell of a grid at a time.

    Many cells share a forward pass: the prompt stands in it once per cell, with a state of its own replaced.

    clean, corrupt: a prompt each, or as many of both: texts, or token ids, of the same number of tokens
    tokenizer:      of transformers, ``ByteTokenizer``, or the path of one; needed for texts
    answer, wrong:  the tokens whose logits are compared, as the text with which they continue the clean prompt, or as ids; by
                    default the first choices of the clean and of the corrupt run
    components, layers, positions, into: see ``GridOptions``

    Returns the tables ``cells`` (a row per pair, component, layer, head and position: logit_difference, probability and surprisal
    of the answer, kl from the run that the states are from, and ``recovered``: 0 as in the run that is changed, 1 as in the other,
    by the logit difference) and ``runs`` (the same of the clean and the corrupt run).

    Raises TypeError for what is no model; ValueError for a model in training mode, prompts of different length, positions or
    layers out of range, and components that the model does not have.
    Source: Meng et al. 2022, 2202.05262; Heimersheim & Nanda 2024, 2404.15255
    """
    known = TokenModel.checked("nl.patch", model)
    options = GridOptions(components, layers, positions, into)
    return patch_grid(known, read_pairs(clean, corrupt, tokenizer, answer, wrong), options)


def patch_grid(model: TokenModel, pairs: Iterable[PromptPair], options: GridOptions) -> Findings:
    """The grid of each pair; see ``patch``."""
    sites, missing = grid_sites(model, options)
    cells, runs, shared = list[pd.DataFrame](), list[dict[str, Any]](), list[str]()
    with model.running():
        for k, pair in enumerate(pairs):
            both = TwoRuns(model, pair, sites, options.into)
            runs += both.rows(k)
            table, grid = both.grid(options.positions)
            cells.append(pd.concat([table, both.patched(grid)], axis=1).assign(pair=k))
            shared.append(both.passes.shares)
            if both.contrast.wrong is None:
                missing.append({"layer": "", "what": f"logit_difference of pair {k}", "reason": _SAME})
    frames = {"cells": _ordered(pd.concat(cells, ignore_index=True)), "runs": pd.DataFrame(runs)}
    about_it = about(model) | {"into": options.into, "missing": missing, "shares": shared}
    return Findings(PATCHING, frames, [*_lines(frames["cells"]), *whole_passes(shared)], metadata=about_it)


_SAME = "both runs have the same first choice: give answer= and wrong="


class TwoRuns:
    """The clean and the corrupt run of a pair: states at the sites, logits of the last position, and what is compared."""

    def __init__(self, model: TokenModel, pair: PromptPair, sites: Sequence[GridSite], into: str):
        self.pair, self.sites = pair, sites
        forward = into == "corrupt"
        layers = {site.layer.name: site.layer for site in sites}.values()
        passes = [CellPasses(model, prompt.ids) for prompt in (pair.clean, pair.corrupt)]
        states, logits = zip(*(each.read(layers) for each in passes), strict=True)
        self.logits = logits[0][0], logits[1][0]
        self.contrast = Contrast.of(pair, *self.logits, into)
        self.source, self.target = states if forward else states[::-1]
        self.changed = pair.corrupt if forward else pair.clean
        self.passes = passes[forward]
        of_source, of_target = self.logits if forward else self.logits[::-1]
        self.base = {name: float(v) for name, v in self.contrast(of_target[None]).items()}
        self.goal = {name: float(v) for name, v in self.contrast(of_source[None]).items()}

    @property
    def rounding(self) -> float:
        """Changes of logits that are no larger may come from another order of sums."""
        largest = max(float(each.abs().max()) for each in self.logits)
        return _ROUNDING * torch.finfo(self.logits[0].dtype).eps * largest

    def grid(self, positions: Positions) -> tuple[pd.DataFrame, list[GridCell]]:
        """Where each cell is, as a table, and the cells."""
        chosen = self.pair.clean.positions(positions)
        found = [each for site in self.sites for each in site.cells(self.source[site.layer.name][0], chosen)]
        table = pd.DataFrame([where for where, _ in found])
        table["head"] = table["head"].astype("Int64")
        for name, prompt in (("clean", self.pair.clean), ("corrupt", self.pair.corrupt)):
            table[name] = [prompt.tokens[k] for k in table["position"]]
        return table, [cell for _, cell in found]

    def patched(self, cells: Sequence[GridCell]) -> pd.DataFrame:
        """The metrics of each cell, and the part of the logit difference that it recovers.

        Cells that write what is there already are not run: nothing changes.
        """
        found = torch.tensor([list(self.base.values())], dtype=torch.float64).repeat(len(cells), 1)
        change = [k for k, cell in enumerate(cells) if not self._has_already(cell)]
        for part, logits in self.passes([cells[k] for k in change]):
            rows = torch.tensor([change[k] for k in part])
            found[rows] = torch.stack([*self.contrast(logits).values()], 1).double().cpu()
        table = pd.DataFrame(found.numpy(), columns=list(METRICS))
        span = self.goal["logit_difference"] - self.base["logit_difference"]
        gained = table["logit_difference"] - self.base["logit_difference"]
        return table.assign(recovered=gained / span if span else float("nan"))

    def _has_already(self, cell: GridCell) -> bool:
        """Whether the changed run has the very state that the cell writes, as before the first token in which prompts differ."""
        row = self.target[cell.layer.name][0, cell.position]
        return bool((row if cell.columns is None else row[slice(*cell.columns)]).equal(cell.value))

    def rows(self, number: int) -> list[dict[str, Any]]:
        """Rows of the table of runs."""
        return [
            {"pair": number, "run": run, **self.contrast.tokens(prompt)} | {n: float(v) for n, v in self.contrast(z[None]).items()}
            for run, prompt, z in zip(("clean", "corrupt"), (self.pair.clean, self.pair.corrupt), self.logits, strict=True)
        ]


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    return table[["pair", *(name for name in table if name != "pair")]]


def _lines(cells: pd.DataFrame) -> list[str]:
    """For each component the cell that recovers most, on average over pairs."""
    means, lines = cells, []
    if cells["pair"].nunique() > 1:
        where = ["component", "layer", "head", "position"]
        means = cells.groupby(where, dropna=False, sort=False, as_index=False)["recovered"].mean()
    for component, table in means.groupby("component", sort=False):
        if table["recovered"].notna().any():
            best = table.loc[table["recovered"].idxmax()]
            head = "" if pd.isna(best["head"]) else f", head {best['head']}"
            at = f"layer {best['layer']}{head}, position {best['position']}"
            lines.append(f"{component}: {at} recovers most, {best['recovered']:.0%} of the difference")
    return lines
