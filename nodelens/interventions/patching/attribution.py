"""Attribution patching: every cell of a grid of patches to first order, from one backward pass."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from nodelens.interventions.cells import GridCell
from nodelens.interventions.lenses.lens import about
from nodelens.interventions.token_model import TokenModel
from nodelens.messages import option
from nodelens.network.changed import Change
from nodelens.network.hooks import edit
from nodelens.results.findings import Findings

from .grid import GridOptions, GridSite, grid_sites
from .pairs import METRICS, PromptPair
from .patch import PATCHING, TwoRuns


@dataclass(frozen=True)
class AttributionOptions(GridOptions):
    """``GridOptions``, the metric that is differentiated, and how many of the largest cells are also patched exactly, or all."""

    metric: str = "logit_difference"
    exact: int | str = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in METRICS:
            raise ValueError(f"{option('metric')} is {self.metric!r}; it is {', '.join(METRICS)}")
        if self.exact != "all" and not (isinstance(self.exact, int) and self.exact >= 0):
            raise ValueError(f"{option('exact')} is {self.exact!r}; it is a number of cells, or all")


def attribution_grid(model: TokenModel, pairs: Iterable[PromptPair], options: AttributionOptions) -> Findings:
    """The change of a metric by each patch to first order, (source - target) . gradient in the target run, and exactly for some.

    One backward pass gives all cells of a pair. The exact change comes from patching the cells of largest absolute attribution.
    The table ``cells`` has the columns attribution and exact (NaN where it was not patched, 0 where the change is below rounding);
    ``runs`` is as in ``nl.patch``.

    Source: Nanda 2023, Attribution patching; Syed et al. 2023, 2310.10348
    """
    sites, missing = grid_sites(model, options)
    tables, runs = list[pd.DataFrame](), list[dict[str, Any]]()
    with model.running():
        for k, pair in enumerate(pairs):
            both = TwoRuns(model, pair, sites, options.into)
            if options.metric == "logit_difference" and both.contrast.wrong is None:
                token = both.contrast.tokens(pair.clean)["answer"]
                raise ValueError(
                    f"pair {k}: {token!r} is the first choice of both the clean and the corrupt run: give answer= and wrong=, or "
                    "metric=kl"
                )
            runs += both.rows(k)
            table, cells = both.grid(options.positions)
            table["attribution"] = _attributions(model, both, options.metric, cells)
            table["exact"] = _exact(both, options, cells, table["attribution"])
            tables.append(table.assign(pair=k))
    every = pd.concat(tables, ignore_index=True)
    every = every[["pair", *(name for name in every if name != "pair")]]
    known = every.dropna(subset="exact")
    rank = float(known["attribution"].rank().corr(known["exact"].rank())) if len(known) > 2 else float("nan")
    meta = about(model) | {
        "into": options.into,
        "metric": options.metric,
        "spearman": rank,
        "exact": len(known),
        "missing": missing,
    }
    return Findings(PATCHING, {"cells": every, "runs": pd.DataFrame(runs)}, _lines(every, known, rank), metadata=meta)


def _attributions(model: TokenModel, both: TwoRuns, metric: str, cells: Sequence[GridCell]) -> list[float]:
    """(source - target) . gradient of each cell."""
    layers = {site.layer.name: site for site in both.sites}
    gradients = _gradients(model, both, metric, list(layers.values()))
    products = {name: ((both.source[name] - both.target[name]).double() * g.double())[0].cpu() for name, g in gradients.items()}
    found = []
    for cell in cells:
        row = products[cell.layer.name][cell.position]
        found.append(float((row if cell.columns is None else row[slice(*cell.columns)]).sum()))
    return found


def _gradients(model: TokenModel, both: TwoRuns, metric: str, sites: Sequence[GridSite]) -> dict[str, Tensor]:
    """{layer: the gradient of the metric with respect to its state, (1, T, width)}, zero where the metric does not depend on it."""
    zeros = {site.layer.name: torch.zeros_like(both.target[site.layer.name], requires_grad=True) for site in sites}
    sides: dict[str, dict[nn.Module, Change]] = {"output": {}, "input": {}}
    for site in sites:
        sides[site.layer.side][site.layer.module] = _adding(zeros[site.layer.name])
    with torch.enable_grad(), edit(sides["output"], sides["input"]):
        value = both.contrast(model.logits(both.changed.ids[None], last=True))[metric].sum()
        found = torch.autograd.grad(value, list(zeros.values()), allow_unused=True)
    return {name: torch.zeros_like(zero) if g is None else g for (name, zero), g in zip(zeros.items(), found, strict=True)}


def _adding(zero: Tensor) -> Change:
    """A function that adds zeros, whose gradient is that of the state."""
    return lambda state: state + zero.reshape(state.shape)


def _exact(both: TwoRuns, options: AttributionOptions, cells: Sequence[GridCell], scores: pd.Series) -> pd.Series:
    """The change of the metric when the cells of largest attribution are patched, 0 below rounding; NaN for the others."""
    count = len(cells) if options.exact == "all" else int(options.exact)
    best = scores.abs().nlargest(count).index
    found = pd.Series(float("nan"), index=scores.index)
    if len(best):
        change = both.patched([cells[k] for k in best])[options.metric].to_numpy() - both.base[options.metric]
        found[best] = np.where(abs(change) > both.rounding, change, 0)  # in ranks, rounding would order what changes nothing
    return found


def _lines(cells: pd.DataFrame, known: pd.DataFrame, rank: float) -> list[str]:
    if not len(known):
        return [f"{len(cells)} cells from one backward pass per pair; none patched exactly"]
    top = known.loc[known["exact"].abs().idxmax()]
    which = "" if pd.isna(top["head"]) else f", head {top['head']}"
    return [
        f"{len(cells)} cells from one backward pass per pair; {len(known)} patched exactly, Spearman {rank:.2f} to the attribution",
        f"largest exact change: {top['component']}, layer {top['layer']}{which}, position {top['position']}: {top['exact']:.3g} "
        f"(attribution {top['attribution']:.3g})",
    ]
