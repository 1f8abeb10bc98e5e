"""Cost estimates on the terminal."""

import re
from typing import Any

from rich.console import Console
from rich.table import Table

from nodelens.app.cost_estimate import CostEstimate

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_NUMBER = re.compile(r"(?<=[.\[])\d+(?=[.\]]|$)")  # the index of a block or an expert in a name


def show_cost(console: Console, name: str, found: CostEstimate) -> None:
    """Prints the sites (one line for equal blocks), the model, the time, the passes, the devices and the ranks."""
    _sites(console, f"cost estimate: {name}", found)
    model, forward, rate, ranks = found.model, found.forward, found.rate, found.ranks
    row, both = forward["row"], "forward and backward" if forward["gradients"] else "forward"
    lines = [
        f"sums take {size(found.bytes['statistics'])}, buffered rows at most {size(found.bytes['buffers'])}; estimated overhead "
        f"over the bare {both} pass {100 * forward['overhead']:+.0f} %",
        f"{model['class']}: {model['parameters']:,} parameters, {size(model['bytes'])} in {model['dtype']}; "
        f"{number(forward['flops_per_row'])}FLOP per {row} (forward)",
        f"to measure {rate['rows']:,} {row}s within {rate['hours']:g} h (cost.hours), {rate['rows_per_second']:,.1f} {row}s per "
        f"second are needed, {number(rate['flops_per_second'])}FLOP/s with the overhead",
    ]
    if found.passes:
        most, budget = max(each["bytes"] for each in found.passes), size(found.budget) if found.budget else "no limit"
        lines.append(f"passes over the data: {len(found.passes)}, at most {size(most)} each (budget.memory: {budget})")
    if ranks["ranks"] > 1:
        lines.append(
            f"{ranks['ranks']} ranks: {size(ranks['bytes'])} each, with all statistics; {ranks['rows']:,} {row}s each; "
            f"the all-reduce moves {size(ranks['all_reduce_bytes'])}"
        )
    for line in lines:
        console.print(line, markup=False)
    _devices(console, found.devices)
    for reason in found.refused:
        console.print(f"the pass would be refused: {reason}", markup=False)


def size(count: float) -> str:
    """A number of bytes with a decimal unit: 1.5 GB is 1,500,000,000 bytes."""
    power = next((k for k in range(len(_UNITS)) if abs(count) < 1000 ** (k + 1)), len(_UNITS) - 1)
    return f"{count / 1000**power:.{0 if power == 0 else 1}f} {_UNITS[power]}"


def number(count: float) -> str:
    """A large number with an SI prefix: 1.5 T."""
    power = next((k for k in range(6) if abs(count) < 1000 ** (k + 1)), 5)
    return f"{count / 1000**power:.1f} {('', 'k', 'M', 'G', 'T', 'P')[power]}"


def _sites(console: Console, title: str, found: CostEstimate) -> None:
    table = Table(title=title, title_justify="left")
    for name, justify in (("layer", "left"), ("layers", "right"), ("units", "right"), ("statistics", "left"), ("bytes", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    alike: dict[tuple, list[dict[str, Any]]] = {}
    for site in found.sites:
        key = _NUMBER.sub("*", site["layer"]), site["width"], tuple(site["statistics"]), site["bytes"]
        alike.setdefault(key, []).append(site)
    for (pattern, width, statistics, sums), sites in alike.items():
        name = pattern if len(sites) > 1 else sites[0]["layer"]
        table.add_row(name, str(len(sites)), f"{width:,}", ", ".join(statistics) or "none", size(sums * len(sites)))
    console.print(table)


def _devices(console: Console, devices: list[dict[str, Any]]) -> None:
    if len(devices) == 1 and devices[0]["fits"]:
        return
    table = Table(title="placement, in the order of device_map=auto", title_justify="left")
    for name in ("device", "from", "to", "weights", "statistics", "buffered rows", "total", "fits"):
        table.add_column(name, justify="left" if name in ("from", "to") else "right", overflow="fold")
    for row in devices:
        place = "no room" if row["device"] is None else str(row["device"])
        sizes = [size(row[name]) for name in ("weights", "statistics", "buffers", "total")]
        table.add_row(place, row["first"], row["last"], *sizes, "yes" if row["fits"] else "no")
    console.print(table)
