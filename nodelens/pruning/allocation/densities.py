"""Removal curves: the number of units that each group loses, as a function of one share for the whole network."""

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from torch import nn

from nodelens.messages import listed, nearest
from nodelens.network.groups import PruningGroup

from .selection import EARLIER, PROTECTED, Rules

RemovalCurve = Callable[[float], np.ndarray]  # share in [0, 1] -> units that each group loses, (groups,) real, non-decreasing
Shapes = Mapping[str, tuple[int, ...]]


def ranked(
    groups: Sequence[PruningGroup],
    values: Mapping[str, np.ndarray],
    rules: Rules,
    most: np.ndarray,
    normalize: str = "mean",
    prices: np.ndarray | None = None,
    scopes: Sequence[object] | None = None,
) -> RemovalCurve:
    """The same share of every scope; within a scope the units of all groups are sorted and the first are removed.

    most (groups,): the number of units that a group can lose; only these are compared. prices (groups,): scores are divided by
    them. scopes: one label per group; None is one scope for all. Sorted by constraint class, normalized score, seeded draw.
    Raises ValueError as ``sort_keys`` does.
    """
    costs = [None] * len(groups) if prices is None else prices.tolist()
    keys = [sort_keys(group, values.get(group.name), rules, normalize, cost) for group, cost in zip(groups, costs, strict=True)]
    classes, scores, draws = (np.concatenate(part) for part in zip(*keys, strict=True))
    owner = np.repeat(np.arange(len(groups)), [group.n for group in groups])
    order = np.argsort(draws)  # three sorts, the last of small integers, take half the time of one lexsort
    order = order[np.argsort(scores[order], kind="stable")]
    order = order[np.argsort(classes[order], kind="stable")]
    owner = owner[order[classes[order] != PROTECTED]]
    owner = owner[_places(owner) < most[owner]]
    scope = numbered(scopes or [0] * len(groups))
    totals = np.bincount(scope, weights=[group.n for group in groups])
    owner = owner[np.argsort(_short(scope[owner]), kind="stable")]
    queues = np.split(owner, np.searchsorted(scope[owner], np.arange(1, len(totals))))

    def curve(share: float) -> np.ndarray:
        removed = [queue[: math.floor(share * total + 0.5)] for queue, total in zip(queues, totals, strict=True)]
        return np.bincount(np.concatenate(removed), minlength=len(groups)).astype(np.float64)

    return curve


def sort_keys(
    group: PruningGroup, values: np.ndarray | None, rules: Rules, normalize: str, price: float | None
) -> tuple[np.ndarray, ...]:
    """Class, normalized score and draw of a group's units, (n,) each; lower is removed earlier.

    Units that an earlier plan removed, or that have no score, do not affect the normalization.
    Raises ValueError if infinite scores cannot be normalized, or if a negative score would be divided by a price.
    """
    classes, scores, draws = rules.keys(group, values)
    scored = np.flatnonzero((classes != EARLIER) & ~np.isnan(scores))
    scored = scored[np.lexsort((draws[scored], scores[scored]))]
    normalized = np.full(group.n, np.nan)
    with np.errstate(invalid="ignore", over="ignore"):
        normalized[scored] = NORMALIZERS[normalize](scores[scored]) if len(scored) else 0
    if np.isnan(normalized[scored]).any():
        raise ValueError(f"group {group.name!r} has infinite scores, which {normalize!r} cannot normalize: use rank or raw")
    if price is not None:
        if (normalized[scored] < 0).any():
            raise ValueError(
                f"group {group.name!r} has negative scores after normalize={normalize!r}; dividing them by a price reverses their "
                "order: leave per_cost out, or use a score that is nowhere negative with normalize=mean, rank or minmax"
            )
        normalized /= price
    return classes, -normalized if rules.mode == "high" else normalized, draws


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
        raise ValueError("lamp squares the scores, which misorders negative ones: use a score that is nowhere negative")
    squares = _over(x, x[-1]) ** 2
    tail = squares[::-1].cumsum()[::-1]
    return np.divide(squares, tail, out=np.zeros_like(x), where=tail > 0)


# Each takes a group's scores in ascending order and keeps that order; a group whose scale is 0 becomes all 0 (minmax: 1/2).
# ``mean`` and ``sum`` divide by the mean and sum of absolute values, because a negative divisor would reverse the order.
NORMALIZERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "raw": lambda x: x,
    "mean": lambda x: _over(x, np.abs(x).mean()),
    "z": lambda x: _over(x - x.mean(), x.std()) if x[-1] != x[0] else np.zeros_like(x),
    "robust_z": _robust_z,
    "l2": lambda x: _over(x, float(np.linalg.norm(x))),
    "sum": lambda x: _over(x, np.abs(x).sum()),
    "rank": lambda x: (np.arange(len(x)) + 0.5) / len(x),  # with 0.5, counts round as in ``uniform``
    "minmax": _minmax,
    "lamp": _lamp,
}


def erk(groups: Sequence[PruningGroup], shapes: Shapes | None) -> RemovalCurve:
    """Kept share min(1, e (sum of the shape) / (product of the shape)) of each group, where e decreases until all are 0.

    shapes: {group: shape of the weight that produces it, (out, in, *kernel)}, see ``shapes_of_groups``.
    Raises ValueError for a group without a shape. Source: Evci et al. 2020, arXiv:1911.11134, section 3.
    """
    missing = [group.name for group in groups if group.name not in (shapes or {})]
    if shapes is None or missing:
        raise ValueError(f"erk reads the shape of the weight that produces each group; {listed(missing)} has none: give shapes")
    n = np.array([group.n for group in groups])
    density = np.array([sum(shapes[group.name]) / math.prod(shapes[group.name]) for group in groups])
    density = density / density.min()
    return lambda share: n * (1 - np.minimum(1, density * (1 - share)))


def shapes_of_groups(model: nn.Module, groups: Sequence[PruningGroup]) -> dict[str, tuple[int, ...]]:
    """The shape of each group's first producer weight (for an expert, its part), (out, in, *kernel); groups without are absent."""
    shapes = {}
    for group in groups:
        piece = next((c for c in group.by_role("producer") if c.of(model).ndim > 1), None)
        if piece is not None:
            shapes[group.name] = tuple(piece.of(model).movedim(piece.dim - (piece.entry is not None), 0).shape)
    return shapes


def scopes_of(groups: Sequence[PruningGroup], shapes: Shapes | None = None) -> list[object]:
    """One label per group, equal for groups of the same structure: kind, units, tensors and, where given, the weight's shape."""
    return [
        (
            group.kind,
            group.n,
            (shapes or {}).get(group.name),
            tuple((c.role, c.tensor, c.dim, c.index.shape[1]) for c in group.slices),
        )
        for group in groups
    ]


def shares_of(groups: Sequence[PruningGroup], shares: Mapping[str, float]) -> np.ndarray:
    """The share of units to remove per group, (groups,): by its name, else the first matching pattern, else its kind, else 0.

    Raises ValueError for a key that matches no group, a share outside [0, 1], or shares that are all 0.
    """
    names, kinds = {group.name for group in groups}, {group.kind for group in groups}
    for word, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"shares.{word} is {share}: a share of the units to remove, from 0 to 1")
        if word not in names | kinds and not any(fnmatchcase(name, word) for name in names):
            there = f"{listed(sorted(names))}, of the kinds {listed(sorted(kinds))}"
            raise ValueError(f"shares name {word!r}, which matches no group.{nearest(word, names | kinds)} There are {there}")
    per_group = np.array([_share(group, shares) for group in groups])
    if not per_group.any():
        raise ValueError("shares are all 0: there is nothing to remove")
    return per_group


def _share(group: PruningGroup, shares: Mapping[str, float]) -> float:
    if group.name in shares:
        return shares[group.name]
    fits = [share for word, share in shares.items() if fnmatchcase(group.name, word)]
    return fits[0] if fits else shares.get(group.kind, 0.0)


def numbered(words: Sequence[object]) -> np.ndarray:
    """Equal labels as equal integers, from 0 in order of appearance."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(word, len(numbers)) for word in words])


def _places(owner: np.ndarray) -> np.ndarray:
    """The number of earlier units with the same owner, (units,)."""
    order = np.argsort(_short(owner), kind="stable")
    counts = np.bincount(owner)
    places = np.empty_like(owner)
    places[order] = np.arange(len(owner)) - np.repeat(counts.cumsum() - counts, counts)
    return places


def _short(numbers: np.ndarray) -> np.ndarray:
    """The same integers in the smallest dtype that holds them: radix sort is used up to 16 bits."""
    return numbers.astype(np.min_scalar_type(numbers.max(initial=0)))
