"""Plots of modules: graphs sorted by module, modularity beside its null, and alignment between associations."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nodelens.results.findings import Findings

from .charts import dots, grid, heat
from .plot import GREY, Plot, figure_of, one_of, rows_axis, rows_height

_GRAPHS = 24  # graphs in a page
_WIDE = 400  # rows of a picture of a graph


def figures_of(found: Findings) -> Iterator[Plot]:
    """The plots of a modularity analysis."""
    modules = found["modules"]
    if not len(modules):
        return
    yield Plot("q", "Are units organised in modules?", _Q, q_bars(modules), modules)
    graphs = {
        f"{row.layer}, {row.association}: {row.modules} modules, Q {row.q:.2f}": found.matrices[
            row.layer, f"sorted_{row.association}"
        ]
        for row in list(modules.itertuples())[:_GRAPHS]
    }
    yield Plot("graphs", "The modules as blocks", _GRAPHS_CAPTION, pictures(graphs), modules)
    compared = found["comparison"]
    compared = compared[compared.groupby("layer")["layer"].transform("size") > 1]  # one pair is no picture
    if len(compared):
        of = "" if compared["layer"].nunique() > 1 else f" {compared['layer'].iloc[0]}"  # where no menu names it
        yield Plot("alignment", f"Do associations find the same modules?{of}", _ALIGNED, alignment(compared), compared)


def q_bars(modules: pd.DataFrame) -> Any:
    """Q of every layer, one row of dots per association, beside the null."""
    layers, names = (list(dict.fromkeys(modules[column])) for column in ("layer", "association"))
    traces = []
    for k, name in enumerate(names):
        rows = modules[modules["association"] == name]
        place = rows["layer"].map(layers.index) + 0.7 / len(names) * (k - (len(names) - 1) / 2)
        null: dict[str, Any] = {"color": GREY, "symbol": "line-ns", "size": 8, "line": {"width": 2, "color": GREY}}
        traces.append(
            dots(rows["q_null"], place, "null", error=2 * rows["q_null_std"], marker=null, showlegend=k == 0, legendgroup="null")
        )
        traces.append(dots(rows["q"], place, name, k, marker={"size": 9}))
    height = rows_height(len(layers), 14 * len(names) + 12)
    return figure_of(traces, height, xaxis={"title": {"text": "modularity Q"}}, yaxis=rows_axis(layers))


def pictures(graphs: dict[str, np.ndarray]) -> Any:
    """Absolute weights of graphs, one at a time, chosen in a menu."""
    traces = []
    for matrix in graphs.values():
        picture = _blocks(np.abs(matrix))
        trace = heat(picture, "weight", 0, float(np.nanquantile(picture, 0.99)) or 1.0, "Magma")
        traces.append(trace | {"hovertemplate": "%{z:.3g}<extra></extra>"})
    hidden: dict[str, Any] = {"visible": False}
    square = hidden | {"scaleanchor": "x", "autorange": "reversed"}
    menus = one_of("graph", traces, list(graphs))
    return figure_of(traces, 480, xaxis=hidden | {"constrain": "domain"}, yaxis=square, updatemenus=menus)


def alignment(table: pd.DataFrame) -> Any:
    """Alignment between the associations of a layer, one layer at a time, chosen in a menu."""
    by_layer = list(table.groupby("layer", sort=False))
    names = names_of(table)
    figures = [squares(square(rows, "alignment", names), square(rows, "alignment_null", names), _SCORE) for _, rows in by_layer]
    traces = [figure.data[0].to_plotly_json() for figure in figures]
    menus = one_of("layer", traces, [str(layer) for layer, _ in by_layer])
    first = figures[0].layout
    axes = {name: first[name].to_plotly_json() for name in ("xaxis", "yaxis")}
    return figure_of(traces, first.height, **axes, updatemenus=menus)


def names_of(pairs: pd.DataFrame) -> list[str]:
    """The associations of a table of pairs, those of the first column first."""
    return list(dict.fromkeys(pairs[["association_a", "association_b"]].to_numpy().T.ravel()))


def square(pairs: pd.DataFrame, value: str, names: Sequence[str]) -> pd.DataFrame:
    """The mean of a value of pairs of associations as a symmetric table."""
    found = pd.DataFrame(np.nan, index=names, columns=names)
    for (a, b), number in pairs.groupby(["association_a", "association_b"])[value].mean().items():
        found.loc[a, b] = found.loc[b, a] = number
    return found


def squares(mean: pd.DataFrame, chance: pd.DataFrame | None, label: str) -> Any:
    """A symmetric table as coloured squares, with the value by chance behind each value."""
    words = mean.map(lambda v: "" if np.isnan(v) else f"{v:.2f}")
    if chance is not None:
        words += chance.map(lambda v: "" if np.isnan(v) else f" ({v:.2f})")
    figure = grid(mean, label, y="", words=words, limits=(0, 1))
    return figure.update_layout(height=rows_height(len(mean), 42, 150), xaxis_tickangle=-30)


def sorted_by(matrix: np.ndarray, modules: Sequence[float]) -> np.ndarray:
    """A matrix of units in order of their modules, those in no module last, without its diagonal."""
    order = np.argsort(np.nan_to_num(np.asarray(modules, dtype=float), nan=np.inf), kind="stable")
    found = np.abs(matrix[np.ix_(order, order)])
    np.fill_diagonal(found, 0)
    return found


def _blocks(matrix: np.ndarray) -> np.ndarray:
    """A large picture as means over blocks, as single precision."""
    if len(matrix) > _WIDE:
        edges = np.linspace(0, len(matrix), _WIDE + 1).astype(int)[:-1]
        sizes = np.diff(np.append(edges, len(matrix)))
        summed = np.add.reduceat(np.add.reduceat(matrix, edges, 0), edges, 1)
        matrix = summed / np.outer(sizes, sizes)
    return matrix.astype(np.float32)


_Q = "Modularity Q of the modules found. Grey: mean of random graphs, with two standard deviations."
_GRAPHS_CAPTION = (
    "Weights between units, in order of modules, largest first. Bright: strong. Wide layers are averaged over blocks of units."
)
_SCORE = "alignment score"
_ALIGNED = "Alignment: share of units in matched modules; in parentheses that of shuffled units."
