"""What takes the place of a removed unit: zero, its mean over the data, or its value in another sample."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from nodelens.engine.driver import Driver
from nodelens.network.batch import Batch
from nodelens.network.hooks import edit
from nodelens.network.layers import Layer
from nodelens.statistics.processes import gathered

from .donor_pool import Donors
from .targets import AblationTarget, Key, UnitPlace

How = Literal["zero", "mean", "resample"]
HOW = ("zero", "mean", "resample")


@dataclass
class Replacement:
    """The values in place of removed units. means: {(module, side): (width,)}."""

    how: How
    means: dict[Key, Tensor]
    donors: Donors | None = None

    @classmethod
    def of(cls, how: str, driver: Driver, data: Iterable[Any], targets: Sequence[AblationTarget], seed: int = 0) -> "Replacement":
        """For ``mean`` and ``resample`` this reads the data. Raises ValueError for another word, and as ``Donors.of`` does."""
        if how not in HOW:
            raise ValueError(f"how is {how!r}; it is {', '.join(HOW)}")
        places = [place for target in targets if target.weights is None for place in target.places]
        means = _means(driver, data, places) if how == "mean" else {}
        sites = {(place.module, place.side): f"{place.path}.{place.side}" for place in places}
        return cls(how, means, Donors.of(driver, data, sites, seed) if how == "resample" else None)  # type: ignore[arg-type]

    def begin(self, batch: Batch) -> None:
        """Finds, for ``resample``, the values that each sample gets."""
        if self.donors is not None:
            self.donors.begin(batch)

    def new(self, x: Tensor, key: Key, dim: int, places: Tensor, call: int = 0) -> Tensor:
        """The values at some places of a batch of a tensor, in the shape of x there. x: without copies; call: of the module."""
        if self.donors is not None:
            return self.donors.values(key, call, x, dim).index_select(dim, places)
        old = x.index_select(dim, places)
        if self.how == "zero":
            return torch.zeros_like(old)
        mean = self.means[key].to(x)[places]
        return mean.reshape([-1] + [1] * (x.ndim - 1 - dim % x.ndim)).expand_as(old)

    def change(self, x: Tensor, key: Key, dim: int, places: Tensor) -> Tensor:
        """The new values less those of x, in the shape of x at these places, which lie on the CPU."""
        one = len(places) == 1  # a view of it: where channels lie last, selecting reads all of them
        old = x.narrow(dim, int(places), 1) if one else x.index_select(dim, places.to(x.device))
        return -old if self.how == "zero" else self.new(x, key, dim, places.to(x.device)) - old


def _means(driver: Driver, data: Iterable[Any], places: Sequence[UnitPlace]) -> dict[Key, Tensor]:
    """{(module, side): (width,)} mean of what passes there over all rows that count, of all processes."""
    sums: dict[Key, Tensor] = {}
    current: list[Batch] = []
    reads: dict[Key, UnitPlace] = {(place.module, place.side): place for place in places}

    def see(place: UnitPlace, x: Tensor) -> Tensor:
        batch, site = current[0], f"{place.path}.{place.side}"
        rows = Layer(place.path, place.module, place.side).rows(x.detach(), len(batch), batch.mask_at(site))
        raw = rows.raw.double()
        keep = raw.new_ones(1, 1, 1) if rows.keep is None else rows.keep[:, None].to(raw)
        own = torch.cat([(raw * keep).sum((0, 2)), keep.expand(len(raw), 1, raw.shape[2]).sum().reshape(1)])
        sums[place.module, place.side] = sums.get((place.module, place.side), 0) + own
        return x

    shown = {key: partial(see, place) for key, place in reads.items()}
    outputs, inputs = ({m: f for (m, side), f in shown.items() if side == which} for which in ("output", "input"))
    with torch.no_grad(), edit(outputs, inputs):
        for batch in driver.batches(data):
            current[:] = [batch]
            batch.run(driver.model)
    named = {f"{place.path}.{place.side}": sums[key].cpu() for key, place in reads.items() if key in sums}
    every = gathered(named)  # a process without data has none of the sums
    totals = {name: sum(own[name] for own in every if name in own) for own in every for name in own}
    found = {key: totals.get(f"{place.path}.{place.side}") for key, place in reads.items()}
    return {key: total[:-1] / total[-1] for key, total in found.items() if isinstance(total, Tensor)}
