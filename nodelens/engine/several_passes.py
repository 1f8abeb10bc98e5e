"""Several passes over the data, for a model whose sums do not fit into memory at once."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from nodelens.messages import option
from nodelens.network.layers import Layer
from nodelens.results.result import Result
from nodelens.statistics.processes import reduce_tensor

from .plan import Plan
from .table import of_model
from .wide_sites import describe, size_text


def divided(plan: Plan, budget: float | None, max_passes: int = 1) -> list[Plan]:
    """Divides a plan into the fewest passes that each fit into a budget of bytes, with consecutive layers and about equal bytes.

    A metric's sums are all in one pass, so those of a layer's successor may be computed in two. The result depends on the plan
    alone, so it is the same in every process. Raises ValueError for ``max_passes`` below 1, and MemoryError if more passes are
    needed or if one layer alone is too large.
    """
    if max_passes < 1:
        raise ValueError(f"{option('max_passes')} is {max_passes}; it is how often the data may be read, 1 or more")
    if budget is None or plan.total_bytes <= budget:
        return [plan]
    parts = _fewest(plan, budget)
    if not parts:
        alone = max((_part(plan, [layer]) for layer in plan.layers), key=lambda part: part.total_bytes)
        name, size = alone.measured[0].title, size_text(alone.total_bytes)
        check_bytes(plan, budget, f"; more passes do not help: layer {name} alone takes {size}")
    elif len(parts) > max_passes:
        largest = size_text(max(part.total_bytes for part in parts))
        more = f"{option('max_passes')}={len(parts)} (it is {max_passes})"
        check_bytes(plan, budget, f"; or {more}: the largest pass takes {largest}")
    return _even(plan, parts, budget)


def check_bytes(plan: Plan, budget: float | None, more: str = "") -> None:
    """Raises MemoryError, with remedies and the text ``more``, if a plan takes more bytes than the budget."""
    if budget is None or plan.total_bytes <= budget:
        return
    layer, need = max(((a, b) for a in plan.every_layer for b in plan.needs(a)), key=lambda pair: plan.nbytes(*pair))
    largest = f"largest is {need} at {layer.name} with {size_text(plan.nbytes(layer, need))}: choose fewer layers"
    way_out = "(layers=), fewer groups (groups=1), other metrics, or a larger budget"
    if plan.buffer_bytes > plan.total_bytes / 2:
        largest = f"largest are buffered rows with {size_text(plan.buffer_bytes)}: choose fewer layers"
        way_out = "(layers=), other metrics, or a larger budget"
    if plan.vector_bytes > max(plan.nbytes(layer, need), plan.buffer_bytes):
        largest = f"largest are vectors of derivatives with {size_text(plan.vector_bytes)}: choose smaller batches, fewer layers"
        way_out = "(layers=), other metrics, or a larger budget"
    raise MemoryError(
        f"the plan takes {size_text(plan.total_bytes)}, {option('budget')} is {size_text(budget)}; the {largest} {way_out}{more}"
    )


def check_again(is_iterator: bool, reads: int, device: torch.device) -> None:
    """Raises ValueError in all processes if data must be read again but one process has an iterator. Every process must call it."""
    if reads > 1 and int(reduce_tensor(torch.tensor([int(is_iterator)], device=device))):
        raise ValueError(
            f"the data are read {reads} times, by a metric or to fit into {option('budget')}, and are an iterator: give a loader "
            "or a list of batches, or a larger budget"
        )


def joined(plan: Plan, results: Sequence[Result]) -> Result:
    """Merges the results of the passes of a divided plan. Raises ValueError if they did not see the same samples."""
    first = results[0]
    if len(results) == 1:
        return first
    for k, result in enumerate(results):
        seen, expected = result.metadata["samples_by_group"], first.metadata["samples_by_group"]
        if seen != expected:
            raise ValueError(
                f"pass {k + 1} saw {sum(seen)} samples, {seen} per group, pass 1 {sum(expected)}, {expected}: the data must be the "
                f"same every time (no sampling, no random crops), or fit into one pass ({option('budget')})"
            )
    layers = pd.concat([result.layers for result in results])
    metadata = first.metadata | {
        "rows": _rows(plan, results),
        "missing": _ordered(plan, results, "missing"),
        "counts": _ordered(plan, results, "counts"),
        "left_out": _left_out(plan, results),
        "model_values": of_model(plan, layers),
        "covariance": describe(plan),
        "plan": {"statistics": plan.rows(), "bytes": plan.total_bytes, "estimated_overhead": plan.overhead()},
        "traffic": {key: sum(result.metadata["traffic"][key] for result in results) for key in first.metadata["traffic"]},
        "passes": [entry for result in results for entry in result.metadata["passes"]],
    }
    matrices = {key: value for result in results for key, value in result.matrices.items()}
    return Result(pd.concat([result.units for result in results]), layers, matrices, metadata, _edges(plan, results))


def _fewest(plan: Plan, budget: float) -> list[Plan]:
    """Greedy: each pass takes as many of the next layers as fit. Empty if a single layer does not fit."""
    parts, first = [], 0
    while first < len(plan.layers):
        last = _furthest(plan, first, budget)
        if last == first:
            return []
        parts.append(_part(plan, plan.layers[first:last]))
        first = last
    return parts


def _furthest(plan: Plan, first: int, budget: float) -> int:
    """The end of the longest slice of layers from ``first`` that fits, found by doubling and bisection."""

    def fits(last: int) -> bool:
        return _part(plan, plan.layers[first:last]).total_bytes <= budget

    step, low = 1, first
    while low + step <= len(plan.layers) and fits(low + step):
        low, step = low + step, 2 * step
    while step > 1:
        step //= 2
        if low + step <= len(plan.layers) and fits(low + step):
            low += step
    return low


def _even(plan: Plan, parts: list[Plan], budget: float) -> list[Plan]:
    """The same number of passes with about equal bytes; ``parts`` if some of those would not fit."""
    sizes = [sum(plan.nbytes(layer, need) for need in plan.needs(layer)) for layer in plan.layers]
    ends = np.searchsorted(np.cumsum(sizes), np.arange(1, len(parts)) * sum(sizes) / len(parts) - np.median(sizes) / 2) + 1
    slices = [plan.layers[a:b] for a, b in itertools.pairwise([0, *map(int, ends), len(plan.layers)])]
    even = [_part(plan, run) for run in slices if run]
    largest = max(part.total_bytes for part in even)
    better = len(even) == len(parts) and largest <= min(budget, max(part.total_bytes for part in parts))
    return even if better else parts


def _part(plan: Plan, layers: Sequence[Layer]) -> Plan:
    return replace(plan, part=frozenset(layer.name for layer in layers))


def _rows(plan: Plan, results: Sequence[Result]) -> list[dict[str, Any]]:
    """The rows that each statistic saw; a statistic computed in two passes is listed once."""
    found = {(e["layer"], e["statistic"]): e for result in results for e in result.metadata["rows"]}
    order = [(site.layer.name, str(n)) for site in plan.sites() for n in plan.needs(site.layer) if n.port == site.port]
    return [found[key] for key in order if key in found]


def _ordered(plan: Plan, results: Sequence[Result], key: str) -> list[dict[str, Any]]:
    """Notes of all passes, in the order of layers, then layer pairs."""
    names = [layer.title for layer in plan.layers] + [f"{a.name} -> {b.name}" for a, b in plan.pairs]
    place = {name: k for k, name in reversed(list(enumerate(names)))}
    return sorted((note for result in results for note in result.metadata[key]), key=lambda note: place[note["layer"]])


def _left_out(plan: Plan, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Rows that were not finite; several passes over one site find the same ones."""
    found: dict[str, dict[str, Any]] = {}
    for entry in (e for result in results for e in result.metadata["left_out"]):
        found[entry["site"]] = max(entry, found.get(entry["site"], entry), key=lambda e: e["rows"])
    return [found[str(site)] for site in plan.sites() if str(site) in found]


def _edges(plan: Plan, results: Sequence[Result]) -> pd.DataFrame:
    """One row per pair of layers, in the plan's order; a pass has the pairs that start at one of its layers."""
    tables = [result.edges for result in results if len(result.edges)]
    if not tables:
        return results[0].edges
    names = [{str(name) for name in result.layers.index} for result in results]
    order = [k for part in names for k, (first, _) in enumerate(plan.pairs) if first.name in part]
    return pd.concat(tables).iloc[np.argsort(order)]
