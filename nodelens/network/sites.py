"""Sites: where rows are read, and inside a mixture of experts."""

from typing import NamedTuple

from torch import Tensor

from .experts import Call, ExpertLayer, Routed
from .group_layer import Member, UnitValues
from .layers import Layer


class Site(NamedTuple):
    """Where rows are read: a layer's port."""

    layer: Layer
    port: str

    def __str__(self) -> str:
        return f"{self.layer.name}.{self.port}"


class Awaited(NamedTuple):
    """A layer whose gradient a site awaits: the site's own, or one that reads or makes the units of its group."""

    site: Site
    layer: Layer


class InMixture(NamedTuple):
    """A site inside a module of experts: an expert's units, or, without a layer, whole experts."""

    site: Site
    layer: ExpertLayer | None
    member: Member | None = None

    @property
    def mixture(self) -> str:
        return self.site.layer.title if self.layer is None else self.layer.mixture

    @property
    def awaited(self) -> Awaited:
        if self.layer is None:
            return Awaited(self.site, self.site.layer.makers[0].layer)  # type: ignore[attr-defined]
        return Awaited(self.site, self.layer if self.member is None else self.member.layer)

    def values(self, call: Call) -> Routed | UnitValues:
        """The units, of a group times the router's weight; of whole experts which tokens they get."""
        if self.layer is None:
            return UnitValues(None, call.assigned())
        share = call.share(self.layer.expert)
        units = call.hidden(self.layer.expert, share)
        if self.member is None:
            return Routed(units, share.tokens, call.tokens)
        return UnitValues(self.member, Routed(units * share.weights, share.tokens, call.tokens))

    def slopes(self, call: Call, gradient: Tensor) -> Routed | UnitValues:
        """Gradients of the units or, where the port asks for it, their products with the units."""
        if self.layer is None:
            return UnitValues(None, call.whole(gradient))
        share = call.share(self.layer.expert)
        slope = call.hidden_gradient(self.layer.expert, share, gradient) * share.weights
        if self.site.port.startswith("made"):
            values = call.made(self.layer.expert, share, slope)
        else:
            values = call.hidden(self.layer.expert, share) * slope if self.site.port.startswith("output*grad") else slope
        routed = Routed(values, share.tokens, call.tokens)
        return routed if self.member is None else UnitValues(self.member, routed)
