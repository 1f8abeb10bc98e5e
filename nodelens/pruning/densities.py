"""How many units each axis would lose, as one number for the whole network grows from nothing to everything."""

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from torch import nn

from ..checks import nearest
from .axis import Axis, shown
from .selection import EARLIER, PROTECTED, Rules

Wish = Callable[[float], np.ndarray]  # from 0 to 1 -> units that each axis would lose, (axes,), real numbers that never fall
Shapes = Mapping[str, tuple[int, ...]]


def ranked(
    axes: Sequence[Axis],
    values: Mapping[str, np.ndarray],
    rules: Rules,
    most: np.ndarray,
    normalise: str = "mean",
    prices: np.ndarray | None = None,
    scopes: Sequence[object] | None = None,
) -> Wish:
    """The same share of every scope, its units compared across axes: those that sort first go, never all below a threshold.

    most (axes,): how many an axis can lose; what it cannot lose is out of the contest. prices (axes,): scores are divided by
    them. scopes: a word an axis; None is one scope for all. Order: constraint class, normalised score, seeded draw.
    Raises ValueError as ``contest`` does.
    """
    costs = [None] * len(axes) if prices is None else prices.tolist()
    keys = [contest(axis, values.get(axis.name), rules, normalise, cost) for axis, cost in zip(axes, costs, strict=True)]
    classes, scores, draws = (np.concatenate(part) for part in zip(*keys, strict=True))
    owner = np.repeat(np.arange(len(axes)), [axis.n for axis in axes])
    order = np.argsort(draws)  # three sorts, the last of small integers: half the time of one lexsort
    order = order[np.argsort(scores[order], kind="stable")]
    order = order[np.argsort(classes[order], kind="stable")]
    owner = owner[order[classes[order] != PROTECTED]]
    owner = owner[_places(owner) < most[owner]]
    scope = numbered(scopes or [0] * len(axes))
    totals = np.bincount(scope, weights=[axis.n for axis in axes])
    owner = owner[np.argsort(_short(scope[owner]), kind="stable")]
    queues = np.split(owner, np.searchsorted(scope[owner], np.arange(1, len(totals))))

    def wish(share: float) -> np.ndarray:
        gone = [queue[: math.floor(share * total + 0.5)] for queue, total in zip(queues, totals, strict=True)]
        return np.bincount(np.concatenate(gone), minlength=len(axes)).astype(np.float64)

    return wish


def contest(axis: Axis, values: np.ndarray | None, rules: Rules, normalise: str, price: float | None) -> tuple[np.ndarray, ...]:
    """Class, normalised score and draw of an axis's units, (n,) each; what comes lower goes earlier.

    Units that an earlier plan removed, or that have no score, take no part in the normalising.
    Raises ValueError where infinite scores cannot be normalised, or a negative one would be divided by a price.
    """
    classes, scores, draws = rules.keys(axis, values)
    there = np.flatnonzero((classes != EARLIER) & ~np.isnan(scores))
    there = there[np.lexsort((draws[there], scores[there]))]
    normal = np.full(axis.n, np.nan)
    with np.errstate(invalid="ignore", over="ignore"):
        normal[there] = NORMALISERS[normalise](scores[there]) if len(there) else 0
    if np.isnan(normal[there]).any():
        raise ValueError(f"axis {axis.name!r} has infinite scores, which {normalise!r} cannot normalise: take rank or raw")
    if price is not None:
        if (normal[there] < 0).any():
            raise ValueError(
                f"axis {axis.name!r} has scores below zero after {normalise!r}, and a negative score divided by a price turns "
                "round: leave per_cost out, or normalise by mean, rank or minmax a score that is nowhere negative"
            )
        normal /= price
    return classes, -normal if rules.mode == "high" else normal, draws


def _over(x: np.ndarray, scale: float) -> np.ndarray:
    return x / scale if scale else np.zeros_like(x)


def _robust_z(x: np.ndarray) -> np.ndarray:
    away = x - np.median(x)
    scale = 1.4826 * np.median(np.abs(away))
    return _over(away, scale or 1.2533 * np.abs(away).mean())  # more than half are equal: Iglewicz & Hoaglin 1993


def _minmax(x: np.ndarray) -> np.ndarray:
    return (x - x[0]) / (x[-1] - x[0]) if x[-1] != x[0] else np.full_like(x, 0.5)


def _lamp(x: np.ndarray) -> np.ndarray:
    if x[0] < 0:
        raise ValueError("lamp squares the scores, which misorders negative ones: give it a score that is nowhere negative")
    squares = _over(x, x[-1]) ** 2
    tail = squares[::-1].cumsum()[::-1]
    return np.divide(squares, tail, out=np.zeros_like(x), where=tail > 0)


# Each of an axis's scores in ascending order, to the same order; an axis whose scale is 0 is all 0 (minmax: 1/2). ``mean``
# and ``sum`` divide by absolute values: by the mean and sum themselves where no score is negative, and never by a negative
# number, which would turn the order round.
NORMALISERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "raw": lambda x: x,
    "mean": lambda x: _over(x, np.abs(x).mean()),
    "z": lambda x: _over(x - x.mean(), x.std()) if x[-1] != x[0] else np.zeros_like(x),
    "robust_z": _robust_z,
    "l2": lambda x: _over(x, float(np.linalg.norm(x))),
    "sum": lambda x: _over(x, np.abs(x).sum()),
    "rank": lambda x: (np.arange(len(x)) + 0.5) / len(x),  # the half makes it round as uniform does
    "minmax": _minmax,
    "lamp": _lamp,
}


def erk(axes: Sequence[Axis], shapes: Shapes | None) -> Wish:
    """Kept share min(1, e (sum of the shape) / (product of the shape)) of each axis, e falling from where all are 1 to 0.

    shapes: {axis: the shape of the weight that makes it, (out, in, *kernel)}, see ``shapes_of_axes``.
    Raises ValueError for an axis without a shape. Source: Evci et al. 2020, arXiv:1911.11134, section 3.
    """
    missing = [axis.name for axis in axes if axis.name not in (shapes or {})]
    if shapes is None or missing:
        raise ValueError(f"erk reads the shape of the weight behind each axis; there is none for {shown(missing)}: give shapes")
    n = np.array([axis.n for axis in axes])
    density = np.array([sum(shapes[axis.name]) / math.prod(shapes[axis.name]) for axis in axes])
    density = density / density.min()
    return lambda share: n * (1 - np.minimum(1, density * (1 - share)))


def shapes_of_axes(model: nn.Module, axes: Sequence[Axis]) -> dict[str, tuple[int, ...]]:
    """The shape of each axis's first producing weight, (out, in, *kernel); of an expert its own. Axes without one are absent."""
    found = {}
    for axis in axes:
        cut = next((c for c in axis.by_role("producer") if c.of(model).ndim > 1), None)
        if cut is not None:
            found[axis.name] = tuple(cut.of(model).movedim(cut.dim - (cut.entry is not None), 0).shape)
    return found


def scopes_of(axes: Sequence[Axis], shapes: Shapes | None = None) -> list[object]:
    """What axes share that are built alike: kind, units, the tensors cut, and the producing weight's shape where it is given."""
    return [
        (axis.kind, axis.n, (shapes or {}).get(axis.name), tuple((c.role, c.tensor, c.dim, c.index.shape[1]) for c in axis.cuts))
        for axis in axes
    ]


def shares_of(axes: Sequence[Axis], shares: Mapping[str, float]) -> np.ndarray:
    """The share that each axis is to lose, (axes,): by its name, else the first pattern that fits, else its kind, else 0.

    Raises ValueError for a word that fits no axis, a share outside [0, 1], or shares that are all 0.
    """
    names, kinds = {axis.name for axis in axes}, {axis.kind for axis in axes}
    for word, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"shares.{word} is {share}: a share of the units to remove, from 0 to 1")
        if word not in names | kinds and not any(fnmatchcase(name, word) for name in names):
            there = f"{shown(sorted(names))}, of the kinds {shown(sorted(kinds))}"
            raise ValueError(f"shares name {word!r}, which fits no axis.{nearest(word, names | kinds)} There are {there}")
    found = np.array([_share(axis, shares) for axis in axes])
    if not found.any():
        raise ValueError("shares are all 0: there is nothing to remove")
    return found


def _share(axis: Axis, shares: Mapping[str, float]) -> float:
    if axis.name in shares:
        return shares[axis.name]
    fits = [share for word, share in shares.items() if fnmatchcase(axis.name, word)]
    return fits[0] if fits else shares.get(axis.kind, 0.0)


def numbered(words: Sequence[object]) -> np.ndarray:
    """Equal words, equal numbers, from 0 in order of appearance."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(word, len(numbers)) for word in words])


def _places(owner: np.ndarray) -> np.ndarray:
    """How many of the same owner stand before each, (units,)."""
    order = np.argsort(_short(owner), kind="stable")
    counts = np.bincount(owner)
    places = np.empty_like(owner)
    places[order] = np.arange(len(owner)) - np.repeat(counts.cumsum() - counts, counts)
    return places


def _short(numbers: np.ndarray) -> np.ndarray:
    """The same numbers in as few bits as hold them: 16 are sorted by radix."""
    return numbers.astype(np.min_scalar_type(numbers.max(initial=0)))
