"""Sites that are too wide: reduces what metrics need there as the covariance policy says, or raises with the choices."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from nodelens.messages import option
from nodelens.metrics import Metric, Need
from nodelens.metrics.cka import DebiasedCKA, LinearCKA
from nodelens.metrics.directions import CosineDeviation, CosineMean, DebiasedParticipationRatio, RankMe
from nodelens.metrics.need import Other
from nodelens.metrics.spectrum import SpectrumMetric
from nodelens.metrics.subspace import SubspaceMetric
from nodelens.network.layers import Layer
from nodelens.statistics.costs import SQUARE

from .covariance import KINDS, base_port
from .layout import PassLayout

# metrics that do not depend on the basis, and so are defined for a random projection
_BASIS_FREE = (
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
_Plan = TypeVar("_Plan", bound=PassLayout)


class Side(NamedTuple):
    """One side of a layer: its output and gradients, or its input."""

    layer: str
    port: str  # output | input

    def __str__(self) -> str:
        return self.layer if self.port == "output" else f"{self.layer}.{self.port}"


def restricted_sides(plan: PassLayout, needs: Needs) -> set[tuple[str, Side]]:
    """Sides where a metric needs products of too many units, as (part of a composite, side)."""
    found = set()
    for name, (owner, need) in needs.items():
        if need.statistic in SQUARE:
            for side, width in _sides(plan, owner, need):
                if plan.covariance.restricts(width):
                    found.add((name.rpartition(".")[0], side))
    return found


def restrict_needs(plan: PassLayout, layer: Layer, needs: Needs) -> Needs:
    """What a metric needs at a layer, with sampled or sketched ports where sites are too wide; empty if it is left out there.

    The layer's own units are reduced for all parts of a composite, so that they stay aligned; another site only for the part that
    needs its products.
    """
    restricted, kind = restricted_sides(plan, needs), plan.covariance.kind
    if not restricted or kind == "refuse":
        return needs
    if kind == "diagonal":
        return {}
    own = Side(layer.name, "output")
    own_sampled = any(side == own for _, side in restricted)

    def port(part: str, side: Side, port: str) -> str:
        return f"{port}/{kind}" if (part, side) in restricted or (own_sampled and side == own) else port

    found: Needs = {}
    for name, (owner, need) in needs.items():
        part, target = name.rpartition(".")[0], need.target
        if isinstance(target, Other):
            target = Other(target.layer, port(part, _side(target.layer, target.port), target.port))
        found[name] = owner, need._replace(port=port(part, _side(owner.name, need.port), need.port), target=target)
    return found


class KnownUnits(NamedTuple):
    """Ids of the units and inputs for which a metric has values; None for all. ``reason`` explains the other NaN."""

    units: Tensor | None = None
    inputs: Tensor | None = None
    reason: str = ""

    def weight(self, weight: Tensor | None, read: bool) -> Tensor | None:
        """The weight (units, ...) of these units; if ``read``, a matrix also keeps only the columns of these inputs."""
        if weight is None:
            return None
        weight = weight if self.units is None else weight[self.units]
        return weight[:, self.inputs] if read and self.inputs is not None and weight.ndim == 2 else weight


def known_units(plan: PassLayout, layer: Layer, needs: Needs) -> KnownUnits:
    """The units of a layer for which a metric has values, given its needs there."""
    here = {_side(layer.name, need.port).port: need.port for owner, need in needs.values() if owner is layer}
    here |= {
        _side(t.layer, t.port).port: t.port
        for _, need in needs.values()
        if isinstance(t := need.target, Other) and t.layer == layer.name and t.port.endswith(KINDS)
    }
    widths = {side: plan.seen(layer, side).width for side, port in here.items() if port.endswith("/sample")}
    ids = {side: plan.covariance.channels(width) for side, width in widths.items()}
    return KnownUnits(
        ids.get("output"), ids.get("input"), f"not among the {plan.covariance.count:,} channels of covariance={plan.covariance}"
    )


def reason_left_out(plan: PassLayout, needs: Needs) -> str:
    """Why a metric with these needs is left out; empty if it is not."""
    sides = sorted(f"{side} is {plan.seen_at(*side).width:,} wide" for _, side in restricted_sides(plan, needs))
    if not sides:
        return ""
    wide = f"{sides[0]}, beyond {option('width')}={plan.covariance.limit:,}"
    return f"{wide}: products of its units are left out (covariance=diagonal)"


def restricted_sites(plan: PassLayout) -> dict[Side, dict[str, Metric]]:
    """The sides where products of too many units are needed, each with the metrics that need them."""
    found: dict[Side, dict[str, Metric]] = {}
    for name, metric in plan.metrics.items():
        for place in plan.places(metric):
            for _, side in restricted_sides(plan, plan.wanted(metric, place)):
                found.setdefault(side, {})[name] = metric
    return found


def omit_products(plan: _Plan, optional: bool, default: bool) -> _Plan:
    """The plan with ``covariance=diagonal`` and a note, where nobody asked for products at a site that is too wide.

    These are the ``default`` metrics at any site; and, where layers are ``optional``, any metric at the predictions, such as those
    of an ``lm_head``, if it has a value at another layer.
    """
    found = restricted_sites(plan)
    if not found or plan.covariance.kind != "refuse":
        return plan
    other = replace(plan, covariance=replace(plan.covariance, kind="diagonal"))
    heads = all(side.port == "output" and plan.seen_at(*side).width == plan.dry_run.classes for side in found)
    metrics = {name: metric for every in found.values() for name, metric in every.items()}
    elsewhere = all(any(other.resolve(metric, place) for place in plan.places(metric)) for metric in metrics.values())
    if not (default or (optional and heads and elsewhere)):
        return plan
    return replace(other, notes=(*plan.notes, _omitted_note(plan, found, [*metrics])))


def _and_more(sites: int) -> str:
    return f" (and {sites} more site{'s' if sites > 1 else ''})" if sites else ""


def _omitted_note(plan: PassLayout, found: Iterable[Side], metrics: list[str]) -> str:
    widths = {side: plan.seen_at(*side).width for side in found}
    widest = max(widths, key=lambda side: widths[side])
    more = _and_more(len(widths) - 1)
    need, are = ("need", "are") if len(metrics) > 1 else ("needs", "is")
    count = min(1024, plan.covariance.limit)
    return (
        f"{widest} is {widths[widest]:,} wide{more}, {option('width')} is {plan.covariance.limit:,}: {_listed(metrics)}, which "
        f"{need} products of all its units, {are} left out there; "
        f"covariance=sample:{count} measures {count:,} of its units"
    )


def check_width(plan: PassLayout) -> None:
    """Raises ValueError for a site that is too wide without a choice, and for a choice that a metric cannot be computed with."""
    found = restricted_sites(plan)
    if not found:
        return
    if plan.covariance.kind == "refuse":
        raise ValueError(_too_wide_message(plan, found))
    for side, metrics in found.items():
        for name, metric in metrics.items():
            if plan.covariance.kind == "sketch" and not basis_free(metric):
                raise ValueError(
                    f"metric {name!r} describes single units, but covariance={plan.covariance} mixes those of {side}, "
                    f"{plan.seen_at(*side).width:,} wide: choose "
                    f"covariance=sample:{plan.covariance.count} or covariance=diagonal, or leave it out"
                )
            if plan.covariance.kind == "sample":
                _check_sample(plan, side, name, metric)


def basis_free(metric: Metric) -> bool:
    """Whether a metric is the same in any orthonormal basis, and so can be computed from a sketch."""
    return isinstance(metric, _BASIS_FREE) and not metric.weighted and metric.options.get("rows") != "feature_standardized"


def _check_sample(plan: PassLayout, side: Side, name: str, metric: Metric) -> None:
    all_weights = any(need.port == "weight*grad" for need in metric.needs().values())
    if side.port == "output" and (all_weights or (metric.weighted and metric.parameter == "tensor")):
        raise ValueError(
            f"metric {name!r} reads all weights of {side.layer}, but covariance={plan.covariance} draws only some of its units: "
            "choose covariance=diagonal, or leave it out"
        )


def _too_wide_message(plan: PassLayout, found: dict[Side, dict[str, Metric]]) -> str:
    side, metrics = max(found.items(), key=lambda entry: plan.seen_at(*entry[0]).width)
    width, count = plan.seen_at(*side).width, min(1024, plan.covariance.limit)
    more = _and_more(len(found) - 1)
    choices = [
        "covariance=diagonal (no products; these metrics are NaN there; 0 MiB)",
        f"covariance=sample:{count} ({count:,} channels; {size_text(_bytes(plan, side, 'sample', count))})",
    ]
    if some := [name for name, metric in metrics.items() if basis_free(metric)]:
        choices.append(f"covariance=sketch:{count} (for {_listed(some)}; {size_text(_bytes(plan, side, 'sketch', count))})")
    return (
        f"site {str(side)!r} is {width:,} wide{more}, {option('width')} is {plan.covariance.limit:,}: {_listed([*metrics])} "
        f"{'need' if len(metrics) > 1 else 'needs'} products of all its units, a full covariance, "
        f"{size_text(_bytes(plan, side, 'full', 0))} there. Choose {'; '.join(choices)}; {option('max_passes')}=2 or more, if "
        f"only memory is short (full covariances, for as many layers per pass as fit into {option('budget')}); or "
        f"{option('width')}={width}"
    )


def _bytes(plan: PassLayout, side: Side, kind: str, count: int) -> int:
    """Bytes of the products at one site under a choice."""
    metrics = {name: m for name, m in plan.metrics.items() if kind != "sketch" or basis_free(m)}
    other = replace(plan, covariance=replace(plan.covariance, kind=kind, count=count), metrics=metrics)
    needs = [(layer, need) for layer in other.layers for need in other.needs(layer) if need.statistic in SQUARE]
    return sum(other.nbytes(layer, need) for layer, need in needs if side in dict(_sides(other, layer, need)))


def _sides(plan: PassLayout, owner: Layer, need: Need) -> Iterator[tuple[Side, int]]:
    yield _side(owner.name, need.port), plan.seen(owner, need.port).width
    if isinstance(need.target, Other):
        yield _side(*need.target), plan.seen_at(*need.target).width


def _side(layer: str, port: str) -> Side:
    return Side(layer, "input" if base_port(port) == "input" else "output")


def _listed(names: list[str], most: int = 6) -> str:
    rest = len(names) - most
    return ", ".join(names) if rest <= 1 else f"{', '.join(names[:most])} and {rest} more"


def size_text(count: float) -> str:
    """A number of bytes as text, in MiB, or in KiB or bytes where there are few."""
    if 0 < count < 2**10:
        return f"{count:.0f} bytes"
    return f"{count / 2**10:,.1f} KiB" if 0 < count < 2**20 / 10 else f"{count / 2**20:,.1f} MiB"


def describe(plan: PassLayout) -> list[dict[str, Any]]:
    """Entries of the metadata for sites that are too wide. ``channels``: ids of the drawn units, in the order of a pair matrix."""
    return [
        {
            "site": str(side),
            "width": (width := plan.seen_at(*side).width),
            "covariance": str(plan.covariance),
            "metrics": list(metrics),
            "channels": plan.covariance.channels(width).tolist() if plan.covariance.kind == "sample" else None,
        }
        for side, metrics in restricted_sites(plan).items()
    ]
