"""Axes of figures for papers: labels, ticks and limits of a plotly layout for matplotlib."""

import html
from typing import Any

import numpy as np
from matplotlib.axes import Axes


def draw_axis(axis: Axes, letter: str, about: dict[str, Any]) -> None:
    """Label, ticks, limits and scale of one axis."""
    both: dict[str, Any] = {
        "x": (axis.set_xlabel, axis.set_xticks, axis.set_xlim, axis.set_xscale),
        "y": (axis.set_ylabel, axis.set_yticks, axis.set_ylim, axis.set_yscale),
    }
    label, ticks, limits, scale = both[letter]
    label(plain_text((about.get("title") or {}).get("text") or ""))
    if about.get("type") == "log":
        scale("log")
    if about.get("range") is not None and about.get("type") != "log":
        limits(*about["range"])
    if about.get("tickvals") is not None:
        names = [plain_text(word) for word in about.get("ticktext", about["tickvals"])]
        ticks(list(about["tickvals"]), names, **_turned(names, letter, about))
        if about.get("type") == "log":
            axis.minorticks_off()
    own = axis.xaxis if letter == "x" else axis.yaxis
    if about.get("showticklabels") is False:
        own.set_ticks([])
    if about.get("visible") is False:
        own.set_visible(False)
        axis.spines["bottom" if letter == "x" else "left"].set_visible(False)
    if about.get("rangemode") == "tozero" and letter == "y" and axis.get_ylim()[0] > 0:
        axis.set_ylim(bottom=0)
    if about.get("autorange") == "reversed" and not (axis.yaxis_inverted() if letter == "y" else axis.xaxis_inverted()):
        axis.invert_yaxis() if letter == "y" else axis.invert_xaxis()


def _turned(names: list[str], letter: str, about: dict[str, Any]) -> dict[str, Any]:
    """Size and angle of names below a figure: many of them stand upright, so that none covers another."""
    if letter == "y" or not (about.get("tickangle") or len(names) > 8) or max(map(len, names)) < 4:
        return {"fontsize": 6}
    if len(names) > 24:
        return {"fontsize": max(3.0, min(6.0, 280 / len(names))), "rotation": 90}
    return {"fontsize": 6, "rotation": 45, "ha": "right"}


def share_axes(axes: np.ndarray, layout: dict[str, Any]) -> None:
    """Panels that share a vertical axis on the page share their limits."""
    tails = [str(k + 1) if k else "" for k in range(axes.size)]
    alike = [axis for axis, tail in zip(axes.flat, tails, strict=True) if (layout.get(f"yaxis{tail}") or {}).get("matches") == "y"]
    ends = [axis.get_ylim() for axis in (axes.flat[0], *alike)]
    if alike and ends[0][0] < ends[0][1]:
        for axis in (axes.flat[0], *alike):
            axis.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))


def plain_text(words: object) -> str:
    """The text of a label: entities as characters; a dollar would begin a formula."""
    return html.unescape(str(words).replace("<br>", "\n")).replace("$", r"\$")
