"""Colours of plotly as matplotlib takes them."""

import re
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from plotly.colors import sample_colorscale

EMPTY = "#eceff2"  # a cell without a value


def shade_of(given: Any) -> Any:
    """A colour of plotly as matplotlib takes it."""
    found = re.fullmatch(r"rgba?\(([^)]*)\)", str(given))
    if not found:
        return given
    numbers = [float(number) for number in found[1].split(",")]
    return (*(number / 255 for number in numbers[:3]), *numbers[3:])


def shades_of(given: Any, count: int) -> list[Any]:
    """The colours of so many dots or bars: a list of them, or one for all."""
    return [shade_of(each) for each in ([given] * count if isinstance(given, str) else given)]


def map_of(scale: Any) -> Any:
    """A colour map of a plotly colour scale."""
    if scale is None or isinstance(scale, str):
        shades = [shade_of(shade) for shade in sample_colorscale(scale or "Cividis", np.linspace(0, 1, 256))]
        return ListedColormap(shades).with_extremes(bad=EMPTY)
    return LinearSegmentedColormap.from_list("", [(float(at), shade_of(shade)) for at, shade in scale]).with_extremes(bad=EMPTY)
