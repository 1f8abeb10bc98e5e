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

from .grid import WHERE, GridOptions, GridSite, grid_sites
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
            cells.append(pd.concat([table, both.patched(grid)], axis=1))
            cells[-1].insert(0, "pair", k)
            shared.append(both.passes.shares)
            if both.contrast.wrong is None:
                missing.append({"layer": "", "what": f"logit_difference of pair {k}", "reason": _SAME})
    frames = {"cells": pd.concat(cells, ignore_index=True), "runs": pd.DataFrame(runs)}
    about_it = about(model) | {"into": options.into, "missing": missing, "shares": shared}
    return Findings(PATCHING, frames, [*_lines(frames["cells"]), *whole_passes(shared)], metadata=about_it)


_SAME = "both runs have the same first choice: give answer= and wrong="


class TwoRuns:
    """The clean and the corrupt run of a pair: states at the sites, logits of the last position, and what is compared."""

    def __init__(self, model: TokenModel, pair: PromptPair, sites: Sequence[GridSite], into: str):
        self.pair, self.sites = pair, sites
        self._same: dict[tuple[str, Any], list[bool]] = {}  # whether both runs have the same state, by position
        forward = into == "corrupt"
        layers = {site.layer.name: site.layer for site in sites}.values()
        prompts = torch.stack([pair.clean.ids, pair.corrupt.ids])
        states, logits, self.passes = CellPasses.read(model, prompts, layers, int(forward))
        self.logits = logits[0], logits[1]
        self.contrast = Contrast.of(pair, *self.logits, into)
        both = [{name: state[k : k + 1] for name, state in states.items()} for k in range(2)]
        self.source, self.target = both if forward else both[::-1]
        self.changed = pair.corrupt if forward else pair.clean
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
        columns: dict[str, Any] = {name: [where[name] for where, _ in found] for name in WHERE}
        columns["head"] = pd.array(columns["head"], dtype="Int64")
        for name, prompt in (("clean", self.pair.clean), ("corrupt", self.pair.corrupt)):
            columns[name] = [prompt.tokens[k] for k in columns["position"]]
        table = pd.DataFrame(columns)
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
        table = dict(zip(METRICS, found.T.numpy(), strict=True))
        span = self.goal["logit_difference"] - self.base["logit_difference"]
        gained = table["logit_difference"] - self.base["logit_difference"]
        return pd.DataFrame(table | {"recovered": gained / (span or float("nan"))})

    def _has_already(self, cell: GridCell) -> bool:
        """Whether the changed run has the very state that the cell writes, as before the first token in which prompts differ."""
        name, columns = cell.layer.name, slice(None) if cell.columns is None else slice(*cell.columns)
        if (name, cell.columns) not in self._same:
            same = self.target[name][0, :, columns] == self.source[name][0, :, columns]
            self._same[name, cell.columns] = same.all(1).tolist()
        return self._same[name, cell.columns][cell.position]

    def rows(self, number: int) -> list[dict[str, Any]]:
        """Rows of the table of runs."""
        return [
            {"pair": number, "run": run, **self.contrast.tokens(prompt)} | {n: float(v) for n, v in self.contrast(z[None]).items()}
            for run, prompt, z in zip(("clean", "corrupt"), (self.pair.clean, self.pair.corrupt), self.logits, strict=True)
        ]


def _lines(cells: pd.DataFrame) -> list[str]:
    """For each component the cell that recovers most, on average over pairs."""
    means, lines = cells, []
    if cells["pair"].nunique() > 1:
        by = ["component", "layer", "head", "position"]
        means = cells.groupby(by, dropna=False, sort=False, as_index=False)["recovered"].mean()
    names = means["component"].to_numpy()
    for component in dict.fromkeys(names):
        gained = means["recovered"].where(names == component)
        if gained.notna().any():
            best = {name: means[name].iat[gained.argmax()] for name in ("layer", "head", "position", "recovered")}
            head = "" if pd.isna(best["head"]) else f", head {best['head']}"
            at = f"layer {best['layer']}{head}, position {best['position']}"
            lines.append(f"{component}: {at} recovers most, {best['recovered']:.0%} of the difference")
    return lines
