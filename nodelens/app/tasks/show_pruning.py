"""Pruning groups and sweeps on the terminal."""

import pandas as pd
from rich.console import Console
from rich.table import Table

from nodelens.pruning.context import PruningContext
from nodelens.pruning.sweep.ranking import KEY, areas, curves, measure_of
from nodelens.pruning.sweep.tables import groups_table

from .show import split_columns

MOST = 60  # maximum number of lines of a table


def show_groups(console: Console, context: PruningContext) -> None:
    """One line per group: units, cost per unit, coupled layers; then what is frozen, and why."""
    groups, cost = context.groups, context.cost
    table = Table(title="groups", title_justify="left")
    for name, justify in (
        ("group", "left"),
        ("kind", "left"),
        ("units", "right"),
        ("params/unit", "right"),
        ("MACs/unit", "right"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("producers > consumers", overflow="fold")
    for name, row in list(groups_table(context.model, groups, cost).iterrows())[:MOST]:
        coupled = row["coupled"] + ("" if row["exact"] else " (allow_approximate: a norm reduces over the units)")
        coupled += f" (kept in multiples of {row['multiple']})" if row["multiple"] > 1 else ""
        table.add_row(
            str(name), row["kind"], str(row["units"]), f"{row['params_per_unit']:,}", f"{row['macs_per_unit']:,}", coupled
        )
    console.print(table)
    if len(groups) > MOST:
        console.print(f"and {len(groups) - MOST} more groups")
    share = 100 * groups.coverage(context.model)
    console.print(
        f"{len(groups)} groups, {sum(a.n for a in groups):,} units; prunable tensors have {share:.1f} % of the "
        f"{cost.params():,} parameters; {cost.macs():,} MACs per sample",
        markup=False,
    )
    for frozen in groups.frozen[:MOST]:
        console.print(f"frozen: {frozen.what}: {frozen.reason}", markup=False)
    if len(groups.frozen) > MOST:
        console.print(f"and {len(groups.frozen) - MOST} more frozen")


def show_sweep(console: Console, table: pd.DataFrame) -> None:
    """Accuracy or perplexity by amount, as mean over seeds (standard deviation), sorted by area under the curve, best first."""
    means, area = curves(table), areas(table)
    amounts = sorted(table["amount"].unique())
    varied = [k for k in KEY if table[k].nunique() > 1 or k == "criterion"]
    upto = f"{100 * area['upto'].iloc[0]:.0f} %" if len(area) else "0 %"
    measure = measure_of(table)
    dense = f"dense {table[f'dense_{measure}'].iloc[0]:.4f}"
    title = f"test {measure} by amount, {dense}; area: mean of the curve up to {upto} of the MACs removed"
    console.print(title)
    rows = []
    for key, row in list(area.iterrows())[:MOST]:
        labels = [str(dict(zip(KEY, key, strict=True))[k]) for k in varied]
        here = [means.loc[(*key, a)] if (*key, a) in means.index else None for a in amounts]
        values = {f"{a:g}": "infeasible" if c is None else _with_spread(c) for a, c in zip(amounts, here, strict=True)}
        rows.append((labels, {"area": f"{row['area']:.4f}"} | values))
    _show_rows(console, varied, rows)
    if len(area) > MOST:
        console.print(f"and {len(area) - MOST} more rows in sweep.parquet")
    infeasible = table[table["status"] != "done"]
    for reason, rows in list(infeasible.groupby("error"))[:6]:
        console.print(f"{len(rows)} cells infeasible, such as {rows['name'].iloc[0]}: {reason}", markup=False)


def _show_rows(console: Console, names: list[str], rows: list[tuple[list[str], dict[str, str]]]) -> None:
    """Prints rows of labels and values as one table, or as several, each with the labels, if it is too wide for the terminal."""
    used = sum(min(24, max(len(label) for label in each)) + 3 for each in zip(names, *(labels for labels, _ in rows), strict=True))
    widths = {name: max(len(name), *(len(values[name]) for _, values in rows)) for _, values in rows[:1] for name in values}
    for part in split_columns(widths, console.width - used - 1):
        shown = Table()
        for name in names:
            shown.add_column(name, overflow="fold")
        for name in part:
            shown.add_column(name, justify="right", no_wrap=True)
        for labels, values in rows:
            shown.add_row(*labels, *(values[name] for name in part))
        console.print(shown)


def _with_spread(cell: pd.Series) -> str:
    return f"{cell['mean']:.4f}" + (f" ({cell['std']:.4f})" if cell["seeds"] > 1 and cell["std"] > 0 else "")
