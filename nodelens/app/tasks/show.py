"""Plans and results on the terminal."""

import math
from collections.abc import Mapping

import pandas as pd
from rich.console import Console
from rich.table import Table

from nodelens.engine.plan import Plan
from nodelens.results.notices import notices
from nodelens.results.result import BESIDE, Result, values_of

from .common import format_score

_KERNELS = {"torch": "torch", "compiled": "compiled loops"}


def show_plan(console: Console, plan: Plan) -> None:
    """One line per layer: its statistics and their bytes; then the totals."""
    table = Table(title="plan of the pass", title_justify="left")
    for name, justify in (("layer", "left"), ("units", "right"), ("statistics", "left"), ("groups", "right"), ("MiB", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for layer in plan.layers:
        needs = plan.needs(layer)
        groups = sorted({plan.groups_of(layer, need) for need in needs})
        size = sum(plan.nbytes(layer, need) for need in needs) / 2**20
        table.add_row(
            layer.title,
            str(plan.seen(layer, "output").width),
            ", ".join(map(str, needs)) or "none",
            "/".join(map(str, groups)),
            f"{size:.2f}",
        )
    console.print(table)
    console.print(
        f"sums and buffers take at most {plan.total_bytes / 2**20:,.1f} MiB; estimated time {1 + plan.overhead():.3g} times "
        f"that of the bare {'forward and backward' if plan.gradients else 'forward'} pass; sums by {_KERNELS[plan.kernels]}"
    )
    for note in plan.notes:
        console.print(note, markup=False)
    if plan.never_called:
        console.print(f"not measured, never called by the model's forward: {', '.join(plan.never_called)}", markup=False)


def show_result(console: Console, result: Result) -> None:
    """One row per layer: the mean of each metric over its units, and metrics of the layer; then missing values with reasons."""
    values = layer_means(result)
    own = [c for c in values if c in result.layers and c != "units"]
    console.print("mean over the units of a layer" + (f"; one value per layer: {', '.join(own)}" if own else ""), markup=False)
    labels = _labels(list(map(str, values.index)), console.width)
    _show_table(console, values, labels, "layer")
    if len(result.edges):
        console.print("layer pairs")
        edges = result.edges[values_of(result.edges)]
        _show_table(console, edges, [f"{a} -> {b}" for a, b in edges.index], "layer pair")
    for line in _missing_lines(result.metadata.get("missing", [])):
        console.print(line, markup=False)
    for entry in result.metadata.get("left_out", []):
        of = f" of {entry['of']}" if "of" in entry else ""
        console.print(f"{entry['site']}: {entry['rows']}{of} rows that are not finite were excluded", markup=False)
    for line in notices(result.metadata):
        console.print(f"warning: {line}", markup=False, style="bold")
    found = result.metadata.get("evaluation")
    if found:
        console.print(
            f"{format_score(found)}, split {found['split']!r}; units measured on {result.metadata['samples']} samples, "
            f"split {result.metadata['data']['split']!r}"
        )


def _missing_lines(missing: list[dict], most: int = 12) -> list[str]:
    """One line per column and reason of missing values. A standard error is not listed if its value is missing too."""
    without = {(m["layer"], m["column"]) for m in missing}
    found: dict[tuple[str, str], list[dict]] = {}
    for m in missing:
        stem = next((m["column"].removesuffix(s) for s in BESIDE if m["column"].endswith(s)), None)
        if (m["layer"], stem) not in without:
            found.setdefault((m["column"], m["reason"]), []).append(m)
    lines = []
    for (column, reason), entries in found.items():
        where = entries[0]["layer"] + (f" and {len(entries) - 1} more" if len(entries) > 1 else "")
        lines.append(f"{column}: {sum(m['count'] for m in entries)} NaN at {where}: {reason}")
    rest = len(lines) - most
    return lines[:most] + ([f"and {rest} more such lines in metadata.json"] if rest > 0 else [])


def _show_table(console: Console, values: pd.DataFrame, labels: list[str], what: str) -> None:
    """Prints a frame as one table, or as several if it is too wide for the terminal."""
    widths = {str(name): max(len(str(name)), 9) for name in values}
    for names in split_columns(widths, console.width - min(console.width // 2, max(map(len, labels), default=0)) - 5):
        table = Table()
        table.add_column(what, overflow="fold")
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for label, (_, row) in zip(labels, values[names].iterrows(), strict=True):
            table.add_row(label, *(_format_number(v) for v in row))
        console.print(table)


def _labels(names: list[str], width: int) -> list[str]:
    """Layer names. Names longer than a third of the terminal lose leading parts as long as all names stay distinct."""
    while any(len(name) > width // 3 for name in names):
        shorter = ["\u2026" + name.split(".", 1)[1] if len(name) > width // 3 and "." in name else name for name in names]
        if shorter == names or len(set(shorter)) < len(names):
            break
        names = shorter
    return names


def split_columns(widths: Mapping[str, int], width: int) -> list[list[str]]:
    """Splits columns, {name: characters}, into as many tables as are needed to fit a width."""
    tables: list[list[str]] = [[]]
    used = 0
    for name in widths:
        size = widths[name] + 3
        if tables[-1] and used + size > width:
            tables, used = [*tables, []], 0
        tables[-1].append(name)
        used += size
    return tables


def layer_means(result: Result) -> pd.DataFrame:
    """One row per layer, one column per metric: means over units, and metrics of the layer."""
    means = result.units[values_of(result.units)].groupby(level="layer", sort=False).mean()
    return result.layers[["units", *values_of(result.layers)]].join(means)


def _format_number(value: float) -> str:
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return str(int(value))
    return "NaN" if math.isnan(value) else f"{value:.4g}"
