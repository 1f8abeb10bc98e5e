"""Figures of lenses: predicted tokens by layer and position, and scores by layer."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from nodelens.results.findings import Findings

from .figures import COLOURS, plt, png

_PROMPTS, _POSITIONS = 4, 48  # that are drawn
_SCORES = ("precision_at_", "agreement_at_")


def figures_of(found: Findings) -> Iterator[tuple[str, bytes, str]]:
    """Name, picture and caption of each figure of a lens."""
    if "predictions" in found.frames:
        table = found["predictions"]
        for sample in list(dict.fromkeys(table["sample"]))[:_PROMPTS]:
            own = table[(table["sample"] == sample) & (table["rank"] == 1)]
            yield (
                f"tokens-{sample}",
                token_grid(own),
                f"The likeliest token after each layer, at each position of prompt {sample}; colour: its probability. The "
                "table predictions has all listed tokens.",
            )
    if "layers" in found.frames:
        yield "layers", curves(found["layers"]), "Scores of the lens after each layer, with one standard error over samples."


def token_grid(table: pd.DataFrame) -> bytes:
    """A heatmap of layers by positions with one token in each cell. table: layer, position, token, predicted, probability."""
    table = table[table["position"].isin(list(dict.fromkeys(table["position"]))[:_POSITIONS])]
    p = table.pivot(index="layer", columns="position", values="probability").sort_index(ascending=False)
    words = table.pivot(index="layer", columns="position", values="predicted").reindex_like(p)
    read = table.drop_duplicates("position").set_index("position")["token"]
    return grid(p, words, [shown(read[k]) for k in p.columns], "position", "probability", limits=(0, 1))


def grid(
    values: pd.DataFrame,
    words: pd.DataFrame | None,
    ticks: list[str],
    axis_name: str,
    label: str,
    limits: tuple[float, float] | None = None,
    diverging: bool = False,
) -> bytes:
    """A heatmap of layers (rows) by positions or heads (columns). words: what is written into the cells."""
    down, across = values.shape
    wide = 0.62 if words is not None else 0.34
    figure, axis = plt.subplots(figsize=(1.9 + wide * across, 1.2 + 0.26 * down), layout="constrained")
    most = np.nanmax(np.abs(values.to_numpy(float)), initial=1e-12)
    low, high = limits or ((-most, most) if diverging else (np.nanmin(values.to_numpy(float)), most))
    image = axis.imshow(values.to_numpy(float), cmap="RdBu_r" if diverging else "Blues", vmin=low, vmax=high, aspect="auto")
    axis.set_xticks(range(across), ticks, rotation=45, ha="right", fontsize=7)
    axis.set_yticks(range(down), [str(k) for k in values.index], fontsize=7)
    axis.set(xlabel=axis_name, ylabel="layer")
    if words is not None:
        for row, column in np.ndindex(values.shape):
            colour = "white" if values.iat[row, column] > (low + high) / 2 else "#20242a"
            text = shown(words.iat[row, column])
            axis.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(image, ax=axis, label=label, fraction=0.03)
    return png(figure)


def curves(table: pd.DataFrame) -> bytes:
    """Precision and agreement, and KL and surprisal, by layer. Several lenses, in the column ``lens``, are drawn in one figure."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    lenses = dict(list(table.groupby("lens", sort=False))) if "lens" in table else {"": table}
    shares = [name for name in table if name.startswith(_SCORES) and not name.endswith("_se")]
    for (lens, rows), style in zip(lenses.items(), ("-", "--", ":", "-."), strict=False):
        for axis, names in zip(axes, (shares, [name for name in ("kl", "surprisal") if name in table]), strict=True):
            for k, name in enumerate(names):
                label = f"{name.replace('_', ' ')} {lens}".strip()
                colour = COLOURS[k % len(COLOURS)]
                axis.errorbar(
                    rows["layer"], rows[name], rows[f"{name}_se"], color=colour, linestyle=style, label=label, linewidth=1
                )
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set(xlabel="layer", ylabel="share of the tokens", ylim=(0, 1.02))
    axes[1].set(xlabel="layer", ylabel="nats")
    for axis in axes:
        axis.legend(frameon=False, fontsize=7)
    return png(figure)


def shown(token: object, most: int = 9) -> str:
    """A token as a figure shows it: spaces and line breaks visible, ``$`` harmless, at most nine characters."""
    text = str(token).replace("\n", "\\n").replace("\t", "\\t").replace("$", r"\$")
    text = f"_{text[1:]}" if text.startswith(" ") else text
    return text if len(text) <= most else f"{text[: most - 1]}…"
