"""Loss-critical channels: the loss proxy, less what the channels repeat that carry most of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from nodelens.metrics.gradient import LossReduction
from nodelens.metrics.supernode import connectivity, correlations, halo, largest, protection, redundancy_to_supernodes, share_of
from nodelens.network.groups import PruningGroup
from nodelens.statistics.processes import reduce_tensor

from .base import Baseline, Found
from .gates import GateSums, Unit
from .passes import Need
from .reads import kernels


class CoreSums(GateSums):
    """Sums of q^2 in a first round over the data; in a second those of q and of its products with the core's units.

    ``reduction: mean`` divides the gradients of a sample by its predictions.
    """

    rounds = 2

    def __init__(
        self, model: nn.Module, groups: Sequence[PruningGroup], unit: Unit, fraction: float, reduction: LossReduction = "sum"
    ):
        super().__init__(model, groups, "consumer", unit)
        self.fraction, self.reduction = fraction, reduction
        self.cores: dict[str, Tensor] = {}

    def again(self) -> None:
        for group in self.groups:
            for what in ("square", "absolute", "rows"):
                self.totals[group.name, what] = reduce_tensor(self.totals[group.name, what])
            core = largest(self.totals[group.name, "square"], share_of(group.n, self.fraction))
            self.cores[group.name] = core
            self.totals |= {(group.name, "sum"): self.zeros(group.n), (group.name, "products"): self.zeros(group.n, len(core))}

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        if self.reduction == "mean":
            samples = len(self.batch)
            tokens = [gate.shape[1] for gate in self.gates.values()] + [call.tokens // samples for _, call in self.calls]
            share = 1 / self.batch.tokens.clamp_min(1).double().to(self.device)[:, None, None]
            by_sample = [g if g is None else g.reshape(-1, samples, n, g.shape[-1]) for g, n in zip(gradients, tokens, strict=True)]
            gradients = [g if g is None else (g * share.to(g)).reshape(-1, *g.shape[-2:]) for g in by_sample]
        super().take(gradients)

    def add(self, name: str, q: Tensor) -> None:
        if not self.cores:
            super().add(name, q)
            return
        self.totals[name, "sum"] += q.sum(0)
        self.totals[name, "products"] += q.T @ q[:, self.cores[name]]

    def reduce(self) -> None:
        for key in self.totals:
            if key[1] in ("sum", "products"):
                self.totals[key] = reduce_tensor(self.totals[key])

    def correlation(self, group: PruningGroup, eps: float = 0.0) -> Tensor:
        """Correlations of each unit's q with those of the core, (units, core)."""
        n, core = self.totals[group.name, "rows"], self.cores[group.name]
        mean, square = self.totals[group.name, "sum"] / n, self.totals[group.name, "square"] / n
        shared = self.totals[group.name, "products"] / n - mean[:, None] * mean[core]
        spread = (square - mean.square()).clamp_min(0)
        return correlations(shared, spread, spread[core], eps).cpu()


@dataclass(frozen=True)
class ScarProt(Baseline):
    """Loss proxy of a channel, lowered in the halo by what the core repeats of it.

    The core are the ``core_fraction`` channels of largest loss proxy L; the halo those that write most where the core writes. The
    core is kept by the criterion's own constraint (``protect``), not by its score. Data are read twice. ``loss_reduction: mean``
    takes the mean loss of each text, ``corr_eps: 1e-8`` stands under the root of the correlations: the published code's numbers.

    Formula: L Protect, L = 0.5 E q^2, q = u dL/du a token, Protect by the rank of the redundancy to the core: f + (1 - f)(1 - r^g)
    Shapes: q over tokens of what one linear layer reads -> (units,)
    Unit:   that of the loss squared, >= 0
    NaN:    never
    Raises: ValueError where other than one linear layer reads the group (``unit: sequence`` takes any)
    Source: 2604.23475
    """

    names: ClassVar = ("scar_prot", "supernode_protection_score")
    needs: ClassVar = "gates"
    unit: Unit = "token"
    core_fraction: float = 0.01
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

    def sums(self) -> tuple[Need, ...]:
        return (Need(CoreSums, (self.unit, self.core_fraction, self.loss_reduction)),)

    def parts(self, group: PruningGroup, found: Found) -> dict[str, Tensor]:
        """Loss proxy, connectivity, redundancy to the core (NaN outside the halo), protection, (units,); ids of core and halo."""
        sums: CoreSums = found.sums[self.sums()[0]]
        core, proxy = sums.cores[group.name].cpu(), 0.5 * sums.mean(group, "square")
        weights = columns_of(found.model, group)
        connected = connectivity(weights, core, self.connectivity_topk, self.connectivity_mass_fraction)
        members = halo(connected, core, self.halo_fraction)
        redundancy = torch.full_like(proxy, torch.nan)
        rho = sums.correlation(group, self.corr_eps)
        every = redundancy_to_supernodes(rho, self.redundancy_topk, self.redundancy_reduce, self.positive_redundancy)
        redundancy[members] = every[members]
        kept = protection(redundancy, members, "rank_power", self.protection_floor, self.protection_rank_power)
        values = {"proxy": proxy, "connectivity": connected, "redundancy": redundancy, "protection": kept}
        return values | {"core": core, "halo": members}

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        parts = self.parts(group, found)
        return parts["proxy"] * parts["protection"]


@dataclass(frozen=True)
class ScarConn(ScarProt):
    """As ``scar_prot``, the protection only of the part of a channel that is connected to the core.

    Formula: L ((1 - Conn) + Conn Protect), L, Conn and Protect as there
    Shapes: q over tokens of what one linear layer reads -> (units,)
    Unit:   that of the loss squared, >= 0
    NaN:    a channel that nothing reads
    Raises: ValueError where other than one linear layer reads the group (``unit: sequence`` takes any)
    Source: 2604.23475
    """

    names: ClassVar = ("scar_conn", "supernode_connectivity_score")

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        parts = self.parts(group, found)
        return parts["proxy"] * ((1 - parts["connectivity"]) + parts["connectivity"] * parts["protection"])


def columns_of(model: nn.Module, group: PruningGroup) -> Tensor:
    """What consumers make of each unit, kernels summed, (outputs, units) float64: over a head's places the sum of sizes."""
    return torch.cat([kernels(model, piece).sum(2).cpu()[piece.places].abs().sum(1).T for piece in group.by_role("consumer")])


BASELINES: tuple[type[Baseline], ...] = (ScarProt, ScarConn)
