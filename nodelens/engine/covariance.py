"""Sites too wide for products of all their units: what is measured there instead."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nodelens.metrics import Metric, Need
from nodelens.metrics.cka import DebiasedCKA, LinearCKA
from nodelens.metrics.directions import CosineDeviation, CosineMean, DebiasedParticipationRatio, RankMe
from nodelens.metrics.need import Other
from nodelens.metrics.spectrum import SpectrumMetric
from nodelens.metrics.subspace import SubspaceMetric
from nodelens.network.layers import Layer
from nodelens.statistics.costs import SQUARE
from nodelens.statistics.linalg import exact_products
from nodelens.statistics.rows import Rows
from nodelens.statistics.sample_hash import generator

if TYPE_CHECKING:
    from .plan import Plan

LIMIT = 4096  # a full covariance of this width takes 134 MB in float64, one of 14,336 1.6 GB
KINDS = ("sample", "sketch")  # what makes narrower rows, at a port of that suffix
# what depends on no basis, and so has a meaning in a random one
_TURNED = (
    SpectrumMetric,
    CosineMean,
    CosineDeviation,
    DebiasedParticipationRatio,
    RankMe,
    LinearCKA,
    DebiasedCKA,
    SubspaceMetric,
)
Needs = dict[str, tuple[Layer, Need]]


class Side(NamedTuple):
    """One side of a layer: what it puts out and its gradients, or what it reads."""

    layer: str
    port: str  # output | input

    def __str__(self) -> str:
        return self.layer if self.port == "output" else f"{self.layer}.{self.port}"


@dataclass(frozen=True)
class CovariancePolicy:
    """What becomes of products of units with units (a covariance) at a site wider than ``limit``.

    kind: ``refuse``: an error before the pass, with the choices and their bytes; ``full``: formed all the same; ``diagonal``: no
    metric that wants them is taken there, its values are NaN; all others are as ever.

    ``sample``: ``count`` channels drawn without replacement, the same at every site of that width, in every process, batch and
    pass. A metric that wants products there reads these channels alone, with their weights: values of units are known for them
    and NaN for the others, exact but that their partners are the drawn ones (a mean over partners is unbiased for that over
    all); a layer's or an edge's value is the subset's (a count of directions is at most ``count``), no estimate of the whole; a
    matrix of pairs has a row a drawn channel. A row counts where the drawn channels are finite.

    ``sketch``: rows times S (width, k), k = ``count``, of independent Gaussians of variance 1/k, one S for all sites of a width.
    For metrics that depend on no basis: spectra, cosines of rows, CKA, subspaces. With C the covariance of the rows, and B that
    of two sites, one S at both:

        E tr S'CS = tr C        E ||S'CS||_F^2 = (1 + 1/k) ||C||_F^2 + (tr C)^2 / k
        E ||S'BS||_F^2 = ||B||_F^2 + ((tr B)^2 + tr B^2) / k;    two independent S: ||B||_F^2

    for rows i, j of S: (s_i'B s_j)^2 has the mean ||B||_F^2/k^2, and where i = j (the k on the diagonal) (tr B)^2 + tr B^2 more.
    So 1/PR of the sketch is about (1 + 1/k)/PR + 1/k: a participation ratio reads low, at most k, by less than 10 % only
    where k > 10 PR; nothing is corrected. CKA and what reads single eigenvalues or directions have a bias of that order,
    PR/k, without a closed form. Values divided by the width are divided by k.
    """

    kind: str = "refuse"
    count: int = 0
    limit: int = LIMIT
    seed: int = 0

    @classmethod
    def of(cls, words: str | None, width: int = LIMIT, seed: int = 0, max_passes: int = 1) -> "CovariancePolicy":
        """From the words of a call: diagonal, sample:<count>, sketch:<count>; None is an error at such a site.

        But not where several passes are allowed: then all is formed, as far as the memory goes.
        Raises ValueError for other words and for a width below 1.
        """
        if width < 1:
            raise ValueError(f"budget.width is {width}; it is a number of units, 1 or more")
        if words is None:
            return cls("full" if max_passes > 1 else "refuse", 0, width, seed)
        kind, colon, count = str(words).partition(":")
        if (kind == "diagonal" and not colon) or (kind in KINDS and count.isdecimal() and int(count) > 1):
            return cls(kind, int(count or 0), width, seed)
        raise ValueError(
            f"covariance is {words!r}; it takes diagonal, sample:1024 or sketch:1024 (any count of 2 or more), or null"
        )

    def __str__(self) -> str:
        return f"{self.kind}:{self.count}" if self.kind in KINDS else self.kind

    def beyond(self, width: int) -> bool:
        """Whether products are not formed of all units of a site."""
        return width > max(self.limit, self.count) and self.kind != "full"

    def channels(self, width: int) -> Tensor:
        """The drawn units of a site, (count,) int64, ascending; a larger count holds those of a smaller one."""
        drawn = torch.randperm(width, generator=generator(self.seed, "wide", str(width)))
        return drawn[: self.count].sort().values

    def projection(self, width: int) -> Tensor:
        """The sketch's S, (width, count) float32."""
        return _projection(self.seed, width, self.count)

    def rows(self, rows: Rows, port: str) -> Rows:
        """The rows of a port: narrower ones where its suffix says so."""
        if not port.endswith(KINDS):
            return rows
        raw, last = rows.raw, rows.raw.stride(1) == 1  # the layout that products will read
        if port.endswith("sample"):
            ids = self.channels(raw.shape[1]).to(raw.device)
            raw = raw.mT.index_select(2, ids).mT if last else raw.index_select(1, ids)
        else:
            s = self.projection(raw.shape[1]).to(raw.device, raw.dtype)
            with exact_products():
                raw = (raw.mT @ s).mT if last else s.T @ raw
        return Rows(raw, rows.keep, rows.shift, rows.grid, rows.shifted)


@lru_cache(maxsize=4)  # one for all sites of a width
def _projection(seed: int, width: int, count: int) -> Tensor:
    return torch.randn(width, count, generator=generator(seed, "sketch", str(width))) / math.sqrt(count)


def whole(port: str) -> str:
    """A port without the suffix of narrower rows."""
    return port.removesuffix("/sample").removesuffix("/sketch")


def wide_sides(plan: "Plan", needs: Needs) -> set[tuple[str, Side]]:
    """Where a metric wants products of more units than are taken: (part of a composite, side)."""
    found = set()
    for name, (owner, need) in needs.items():
        if need.statistic in SQUARE:
            for side, width in _sides(plan, owner, need):
                if plan.covariance.beyond(width):
                    found.add((name.rpartition(".")[0], side))
    return found


def narrowed(plan: "Plan", layer: Layer, needs: Needs) -> Needs:
    """What a metric needs at a layer, of narrower rows where products of all would be too many; empty: it is left out there.

    The layer's own units are drawn for all parts of a composite, anything else for the part that wants its products.
    """
    wide, kind = wide_sides(plan, needs), plan.covariance.kind
    if not wide or kind == "refuse":
        return needs
    if kind == "diagonal":
        return {}
    own = Side(layer.name, "output")
    drawn_own = any(side == own for _, side in wide)

    def port(part: str, side: Side, port: str) -> str:
        return f"{port}/{kind}" if (part, side) in wide or (drawn_own and side == own) else port

    found: Needs = {}
    for name, (owner, need) in needs.items():
        part, target = name.rpartition(".")[0], need.target
        if isinstance(target, Other):
            target = Other(target.layer, port(part, _side(target.layer, target.port), target.port))
        found[name] = owner, need._replace(port=port(part, _side(owner.name, need.port), need.port), target=target)
    return found


class Kept(NamedTuple):
    """Which of a layer's units, and of what they read, a metric knows; None for all. ``reason``: why not the others."""

    units: Tensor | None = None
    inputs: Tensor | None = None
    reason: str = ""

    def weight(self, weight: Tensor | None, read: bool) -> Tensor | None:
        """The weight (units, ...) of the drawn units; with ``read`` the columns of the drawn inputs, where it has one an input."""
        if weight is None:
            return None
        weight = weight if self.units is None else weight[self.units]
        return weight[:, self.inputs] if read and self.inputs is not None and weight.ndim == 2 else weight


def kept(plan: "Plan", layer: Layer, needs: Needs) -> Kept:
    """What a metric knows of a layer, by its needs there."""
    here = {_side(layer.name, need.port).port: need.port for owner, need in needs.values() if owner is layer}
    here |= {
        _side(t.layer, t.port).port: t.port
        for _, need in needs.values()
        if isinstance(t := need.target, Other) and t.layer == layer.name and t.port.endswith(KINDS)
    }
    widths = {side: plan.seen(layer, side).width for side, port in here.items() if port.endswith("/sample")}
    ids = {side: plan.covariance.channels(width) for side, width in widths.items()}
    return Kept(
        ids.get("output"), ids.get("input"), f"not among the {plan.covariance.count:,} channels of covariance={plan.covariance}"
    )


def absent(plan: "Plan", needs: Needs) -> str:
    """Why a metric is left out where it needs something; empty where it is not."""
    wide = sorted(f"{side} is {plan.seen_at(*side).width:,} wide" for _, side in wide_sides(plan, needs))
    return (
        f"{wide[0]}, beyond budget.width={plan.covariance.limit:,}: covariance=diagonal leaves products of units out"
        if wide
        else ""
    )


def wanted(plan: "Plan") -> dict[Side, dict[str, Metric]]:
    """The sites where products of more units are wanted than are taken, and the metrics that want them."""
    found: dict[Side, dict[str, Metric]] = {}
    for name, metric in plan.metrics.items():
        for place in plan.places(metric):
            for _, side in wide_sides(plan, plan.wanted(metric, place)):
                found.setdefault(side, {})[name] = metric
    return found


def check_width(plan: "Plan") -> None:
    """Raises ValueError, with the choices, for a site that is too wide, and for a choice that a metric cannot be taken with."""
    found = wanted(plan)
    if not found:
        return
    if plan.covariance.kind == "refuse":
        raise ValueError(_refusal(plan, found))
    for side, metrics in found.items():
        for name, metric in metrics.items():
            if plan.covariance.kind == "sketch" and not turned(metric):
                raise ValueError(
                    f"metric {name!r} is of units, and covariance={plan.covariance} mixes those of {side}, "
                    f"{plan.seen_at(*side).width:,} wide: choose "
                    f"covariance=sample:{plan.covariance.count} or covariance=diagonal, or leave it out"
                )
            if plan.covariance.kind == "sample":
                _check_drawn(plan, side, name, metric)


def turned(metric: Metric) -> bool:
    """Whether a metric is the same in any basis, and so has a meaning in a sketch."""
    return isinstance(metric, _TURNED) and not metric.weighted and metric.options.get("rows") != "feature_standardized"


def _check_drawn(plan: "Plan", side: Side, name: str, metric: Metric) -> None:
    whole_only = any(need.port == "weight*grad" for need in metric.needs().values())
    if side.port == "output" and (whole_only or (metric.weighted and metric.parameter == "tensor")):
        raise ValueError(
            f"metric {name!r} reads the weights of {side.layer} as a whole, and covariance={plan.covariance} draws some of its "
            "units: choose covariance=diagonal, or leave it out"
        )


def _refusal(plan: "Plan", found: dict[Side, dict[str, Metric]]) -> str:
    side, metrics = max(found.items(), key=lambda entry: plan.seen_at(*entry[0]).width)
    width, count = plan.seen_at(*side).width, min(1024, plan.covariance.limit)
    more = f" (and {len(found) - 1} more sites)" if len(found) > 1 else ""
    ways = [
        "covariance=diagonal (they are left out there, NaN; 0 MiB)",
        f"covariance=sample:{count} ({count:,} channels; {_size(_bytes(plan, side, 'sample', count))})",
    ]
    if some := [name for name, metric in metrics.items() if turned(metric)]:
        ways.append(f"covariance=sketch:{count} (for {_listed(some)}; {_size(_bytes(plan, side, 'sketch', count))})")
    return (
        f"site {str(side)!r} is {width:,} wide{more}, budget.width is {plan.covariance.limit:,}: {_listed([*metrics])} "
        f"{'want' if len(metrics) > 1 else 'wants'} products of all its units, a full covariance, "
        f"{_size(_bytes(plan, side, 'full', 0))} there. Choose {'; '.join(ways)}; budget.max_passes=2 or more, where memory alone "
        f"is the matter: all is formed, as many layers at a time as budget.memory takes; or budget.width={width}"
    )


def _bytes(plan: "Plan", side: Side, kind: str, count: int) -> int:
    """What products at one site take under a choice."""
    metrics = {name: m for name, m in plan.metrics.items() if kind != "sketch" or turned(m)}
    other = replace(plan, covariance=replace(plan.covariance, kind=kind, count=count), metrics=metrics)
    needs = [(layer, need) for layer in other.layers for need in other.needs(layer) if need.statistic in SQUARE]
    return sum(other.nbytes(layer, need) for layer, need in needs if side in dict(_sides(other, layer, need)))


def _sides(plan: "Plan", owner: Layer, need: Need) -> Iterator[tuple[Side, int]]:
    yield _side(owner.name, need.port), plan.seen(owner, need.port).width
    if isinstance(need.target, Other):
        yield _side(*need.target), plan.seen_at(*need.target).width


def _side(layer: str, port: str) -> Side:
    return Side(layer, "input" if whole(port) == "input" else "output")


def _listed(names: list[str], most: int = 6) -> str:
    rest = len(names) - most
    return ", ".join(names) if rest <= 1 else f"{', '.join(names[:most])} and {rest} more"


def _size(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"


def describe(plan: "Plan") -> list[dict[str, Any]]:
    """What was done at sites that are too wide: for the metadata. ``channels``: ids of the drawn, a row of a pair matrix each."""
    return [
        {
            "site": str(side),
            "width": (width := plan.seen_at(*side).width),
            "covariance": str(plan.covariance),
            "metrics": list(metrics),
            "channels": plan.covariance.channels(width).tolist() if plan.covariance.kind == "sample" else None,
        }
        for side, metrics in wanted(plan).items()
    ]
