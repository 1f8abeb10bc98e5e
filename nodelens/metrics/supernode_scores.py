"""Pruning criteria with supernodes: the loss proxy, lowered for units that are redundant with the few that have most of it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nodelens.network.group_layer import GroupLayer

from .base import Metric
from .model_sums import LossReduction, Unit
from .need import Need
from .supernode import connectivity, halo, protection, redundancy_to_supernodes
from .supernode_products import SupernodeProducts
from .taylor import check_tokens


@dataclass(frozen=True)
class ScarProt(Metric):
    """Loss proxy of a channel, lowered for channels in the halo that are redundant with the supernodes.

    The supernodes are the share ``supernode_fraction`` of the channels with the largest loss proxy L. The halo consists of the
    channels that write most to the same outputs. The score does not protect the supernodes: the constraint ``protect`` of the
    criterion does. The data are read twice. ``loss_reduction: mean`` uses the mean loss of each text. ``corr_eps: 1e-8`` is added
    under the root of the correlations, as in the published code.

    Formula: L Protect, L = 0.5 E q^2, q = u dL/du per token, Protect = f + (1 - f)(1 - r^g), r in [0, 1] the rank of the redundancy
    Shapes: q over tokens, for the input of one linear layer -> (units,)
    Unit:   that of the loss squared, >= 0
    NaN:    never
    Raises: ValueError where the units are not read by exactly one linear layer (``unit: sequence`` allows any consumers)
    Source: 2604.23475
    """

    names: ClassVar = ("scar_prot", "supernode_protection_score")
    weighted: ClassVar = True
    parameter: ClassVar = "group"
    reads_consumers: ClassVar = True
    unit: Unit = "token"
    supernode_fraction: float = 0.01
    halo_fraction: float = 0.1
    connectivity_topk: int = 256
    connectivity_mass_fraction: float | None = None
    redundancy_topk: int = 5
    redundancy_reduce: Literal["topk_mean", "max"] = "topk_mean"
    positive_redundancy: bool = True
    protection_floor: float = 0.2
    protection_rank_power: float = 8.0
    corr_eps: float = 0.0
    loss_reduction: LossReduction = "sum"

    def needs(self) -> dict[str, Need]:
        options = (self.unit, self.supernode_fraction, self.loss_reduction)
        return {"q": Need(SupernodeProducts, "model", options=options)}  # type: ignore[arg-type]

    def check_group(self, name: str, group: GroupLayer) -> None:
        check_tokens(group, self.unit)

    def parts(self, group: GroupLayer, q: SupernodeProducts) -> dict[str, Tensor]:
        """Loss proxy, connectivity, redundancy (NaN outside the halo), protection, (units,); ids of supernodes and halo."""
        core, proxy = q.cores[group.name].cpu(), 0.5 * q.mean_square(group.name)
        connected = connectivity(group.columns, core, self.connectivity_topk, self.connectivity_mass_fraction)
        members = halo(connected, core, self.halo_fraction)
        redundancy = torch.full_like(proxy, torch.nan)
        rho = q.correlation(group.name, self.corr_eps)
        every = redundancy_to_supernodes(rho, self.redundancy_topk, self.redundancy_reduce, self.positive_redundancy)
        redundancy[members] = every[members]
        kept = protection(redundancy, members, "rank_power", self.protection_floor, self.protection_rank_power)
        values = {"proxy": proxy, "connectivity": connected, "redundancy": redundancy, "protection": kept}
        return values | {"core": core, "halo": members}

    def __call__(self, weight: GroupLayer, q: SupernodeProducts) -> Tensor:
        parts = self.parts(weight, q)
        return parts["proxy"] * parts["protection"]


@dataclass(frozen=True)
class ScarConn(ScarProt):
    """Like ``scar_prot``, but the protection applies only to the share of a channel that is connected to the supernodes.

    Formula: L ((1 - Conn) + Conn Protect), L and Protect as in scar_prot, Conn the share of outgoing weight that goes to the
             outputs to which the supernodes write most
    Shapes: q over tokens, for the input of one linear layer -> (units,)
    Unit:   that of the loss squared, >= 0
    NaN:    a channel that nothing reads
    Raises: ValueError where the units are not read by exactly one linear layer (``unit: sequence`` allows any consumers)
    Source: 2604.23475
    """

    names: ClassVar = ("scar_conn", "supernode_connectivity_score")

    def __call__(self, weight: GroupLayer, q: SupernodeProducts) -> Tensor:
        parts = self.parts(weight, q)
        return parts["proxy"] * ((1 - parts["connectivity"]) + parts["connectivity"] * parts["protection"])
