"""Plots of lenses: predicted tokens by layer and position, and scores by layer."""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from nodelens.results.findings import Findings

from .charts import grid, line, panels
from .plot import Plot

_PROMPTS, _POSITIONS = 4, 64  # that are drawn
_SCORES = ("precision_at_", "agreement_at_")


def figures_of(found: Findings) -> Iterator[Plot]:
    """The plots of a lens."""
    if "predictions" in found.frames:
        table = found["predictions"]
        for sample in list(dict.fromkeys(table["sample"]))[:_PROMPTS]:
            own = table[table["sample"] == sample]
            yield Plot(f"tokens-{sample}", f"What the layers predict, prompt {sample}", _TOKENS, token_grid(own), own)
    if "layers" in found.frames:
        yield Plot("lens", "From which layer on the prediction is known", _LAYERS, curves(found["layers"]), found["layers"])


def token_grid(table: pd.DataFrame) -> Any:
    """A heatmap of layers by positions with the likeliest token in each cell; the pointer shows all that are listed.

    table: layer, position, token, rank, predicted, probability
    """
    table = table[table["position"].isin(list(dict.fromkeys(table["position"]))[:_POSITIONS])]
    every = table.assign(words=[f"{shown(t, 24)} {p:.3f}" for t, p in zip(table["predicted"], table["probability"], strict=True)])
    listed = every.groupby(["layer", "position"], sort=False)["words"].agg("\n".join).unstack("position")
    first = table[table["rank"] == 1]
    p = first.pivot(index="layer", columns="position", values="probability").sort_index(ascending=False)
    words = first.pivot(index="layer", columns="position", values="predicted").reindex_like(p).map(shown)
    read = first.drop_duplicates("position").set_index("position")["token"]
    hover = listed.reindex_like(p).radd("token " + read.map(lambda token: shown(token, 24)) + "\n")
    return over_tokens(p, "probability", [shown(read[k]) for k in p], hover, words=words, limits=(0, 1))


def over_tokens(values: pd.DataFrame, label: str, tokens: Sequence[str], hover: pd.DataFrame, **more: Any) -> Any:
    """A heatmap of layers by positions. Each column has its token and its position, which tells repeated tokens apart.

    tokens: one per column, as ``shown`` writes them; hover: what the pointer shows beside layer, position and value, one line each
    """
    ticks = [f"{token} {position}" for token, position in zip(tokens, values.columns, strict=True)]
    figure = grid(values, label, "position", ticks=ticks, hover=hover, **more)
    cells = [[cell.replace("\n", "<br>") for cell in row] for row in figure.data[0].customdata]
    figure.data[0].update(customdata=cells, textfont={"size": 10})
    return figure.update_layout(xaxis_tickangle=-45, height=figure.layout.height + 40)


def curves(table: pd.DataFrame) -> Any:
    """Precision and agreement, and KL and surprisal, by layer. Several lenses, in the column ``lens``, are drawn in one figure."""
    lenses = dict(list(table.groupby("lens", sort=False))) if "lens" in table else {"": table}
    shares = [name for name in table if str(name).startswith(_SCORES) and not str(name).endswith("_se")]
    sides = {"share of the tokens": shares, "nats": [name for name in ("kl", "surprisal") if name in table]}

    def draw(side: Any) -> list[dict[str, Any]]:
        found = []
        for style, (lens, rows) in zip(("solid", "dash", "dot", "dashdot"), lenses.items(), strict=False):
            for k, name in enumerate(sides[side]):
                label = f"{str(name).replace('_', ' ')} {lens}".strip()
                k = k + (len(shares) if side == "nats" else 0)
                found.append(line(rows["layer"], rows[name], label, k, rows.get(f"{name}_se")))
                found[-1]["line"] = found[-1]["line"] | {"dash": style}
        return found

    return panels([side for side, names in sides.items() if names], draw, "layer", height=300, shared=False)


def shown(token: object, most: int = 9) -> str:
    """A token as a figure shows it: spaces and line breaks visible, at most nine characters."""
    text = str(token).replace("\n", "\\n").replace("\t", "\\t")
    text = f"_{text[1:]}" if text.startswith(" ") else text
    return text if len(text) <= most else f"{text[: most - 1]}…"


_TOKENS = (
    "The likeliest token after each layer, at each position of the prompt; the colour is its probability. The pointer shows the "
    "other listed tokens, and the data below the figure have all of them."
)
_LAYERS = "Scores of the lens after each layer, with one standard error over samples."
