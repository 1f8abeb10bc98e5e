"""The units of a run as data of a page: in pieces that are loaded when a layer is chosen, with a sample of all layers."""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from nodelens.results.result import Result, values_of

from .definitions import label
from .document import Document, block

VALUES = 750_000  # of one piece
SAMPLE = 10_000  # units that stand for all, where there are twice as many
_LEAST = 5  # units of each layer in the sample


def explorer(document: Document, result: Result, definitions: Mapping[str, str]) -> str:
    """The part of a page in which units are chosen, plotted against each other and listed.

    definitions: {column: what it is}, shown beside the choice of a column
    """
    table = _shown(result)
    names = list(dict.fromkeys(table.index.get_level_values("layer")))
    pieces = list(_pieces(table))
    sampled = len(table) > 2 * SAMPLE
    about = {
        "layers": [str(name) for name in names],
        "rows": len(table),
        "pieces": [[str(name) for name in dict.fromkeys(piece.index.get_level_values("layer"))] for piece in pieces],
        "sampled": sampled,
        "metrics": (metrics := values_of(result.units)),
        "axes": {name: label(result, name) for name in metrics},
        "labels": [str(name) for name in table if not pd.api.types.is_float_dtype(table[name])],
        "definitions": dict(definitions),
    }
    document.embed("units", about)
    for k, piece in enumerate(pieces):
        document.embed(f"units-{k}", block(piece), on_demand=sampled)
    if sampled:
        document.embed("units-sample", block(sample(table, SAMPLE)))
    return (
        "<div data-widget='units' class='units'><h3>Any metric against any other</h3>"
        "<div class='menus'></div><div class='definitions'></div>"
        "<div class='canvas' style='min-height:520px' role='img' tabindex='0' aria-label='Scatter of two metrics'></div>"
        "<p class='soft'>Select points with the box or the lasso to list them below. A double click lists all again.</p>"
        "<h3>Table of units</h3><div class='rows'></div></div>"
    )


def sample(table: pd.DataFrame, most: int, seed: int = 0) -> pd.DataFrame:
    """Rows of every layer, in proportion to its size but at least five, in their order."""
    generator = np.random.default_rng(seed)
    chosen = []
    for rows in _rows_of_layers(table):
        count = min(len(rows), max(_LEAST, round(most * len(rows) / len(table))))
        chosen.append(np.sort(generator.choice(rows, count, replace=False)))
    return table.iloc[np.concatenate(chosen)]


def _shown(result: Result) -> pd.DataFrame:
    """Metrics, their standard errors and labels."""
    metrics = values_of(result.units)
    errors = [f"{name}_se" for name in metrics if f"{name}_se" in result.units]
    labels = [name for name in result.units if not pd.api.types.is_float_dtype(result.units[name])]
    return result.units[[*metrics, *labels, *errors]]


def _pieces(table: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Parts of at most so many values: of several whole layers, or of one that is larger."""
    most = max(1, VALUES // max(1, table.shape[1]))
    waiting: list[np.ndarray] = []
    for rows in _rows_of_layers(table):
        if waiting and sum(map(len, waiting)) + len(rows) > most:
            yield table.iloc[np.concatenate(waiting)]
            waiting = []
        if len(rows) > most:
            yield from (table.iloc[rows[k : k + most]] for k in range(0, len(rows), most))
        else:
            waiting.append(rows)
    if waiting:
        yield table.iloc[np.concatenate(waiting)]


def _rows_of_layers(table: pd.DataFrame) -> Iterator[np.ndarray]:
    """The numbers of the rows of each layer."""
    codes, _ = pd.factorize(table.index.get_level_values("layer"))
    order = np.argsort(codes, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else ()
