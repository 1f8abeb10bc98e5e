"""What takes the place of a removed unit: zero, its mean over the data, or its value in another sample."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nodelens.engine.driver import Driver
from nodelens.network.batch import Batch
from nodelens.network.hooks import edit
from nodelens.network.layers import Layer
from nodelens.statistics.processes import gathered
from nodelens.statistics.sample_hash import generator

from .targets import AblationTarget, UnitPlace

How = Literal["zero", "mean", "resample"]
HOW = ("zero", "mean", "resample")
Key = tuple[nn.Module, str]  # a module, and input or output


@dataclass
class Replacement:
    """The values in place of removed units. means: {(module, side): (width,)}; donors and rows: of the current batch."""

    how: How
    means: dict[Key, Tensor]
    donors: Tensor | None = None
    rows: Tensor | None = None
    tokens: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, how: str, driver: Driver, data: Iterable[Any], targets: Sequence[AblationTarget]) -> "Replacement":
        """For ``mean`` this reads the data. Raises ValueError for another word."""
        if how not in HOW:
            raise ValueError(f"how is {how!r}; it is {', '.join(HOW)}")
        places = [place for target in targets if target.weights is None for place in target.places]
        return cls(how, _means(driver, data, places) if how == "mean" else {})  # type: ignore[arg-type]

    def begin(self, batch: Batch, seed: int, number: int) -> None:
        """Draws, for ``resample``, whose values each sample gets. Raises ValueError for a batch of one sample."""
        if self.how != "resample":
            return
        n = len(batch)
        if n < 2:
            raise ValueError(
                "how=resample takes values from other samples of the batch, but a batch has 1 sample: give batches of several"
            )
        order = torch.randperm(n, generator=generator(seed, "resample", str(number)))
        self.donors = torch.empty(n, dtype=torch.long).index_put_((order,), order.roll(1))
        mask = batch.mask
        self.rows = None if mask is None else _token_donors(mask.cpu(), self.donors)
        self.tokens = (0, 0) if mask is None else (mask.shape[0], mask.shape[1])

    def new(self, x: Tensor, key: Key, dim: int, places: Tensor) -> Tensor:
        """The values at some places of a batch of a tensor, in the shape of x there. x: without copies."""
        old = x.index_select(dim, places)
        if self.how == "zero":
            return torch.zeros_like(old)
        if self.how == "mean":
            mean = self.means[key].to(x)[places]
            return mean.reshape([-1] + [1] * (x.ndim - 1 - dim % x.ndim)).expand_as(old)
        assert self.donors is not None
        samples, positions = self.tokens
        if self.rows is not None and dim == -1 and x.shape[:-1].numel() == samples * positions:
            flat = old.reshape(samples * positions, -1)
            return flat[self.rows.to(x.device)].reshape(old.shape)
        grouped = old.unflatten(0, (len(self.donors), -1))
        return grouped[self.donors.to(x.device)].reshape(old.shape)


def _token_donors(mask: Tensor, donors: Tensor) -> Tensor:
    """For each token (B T,) the flat place of the donor's token with the same number among its real ones, in turn if it has fewer.

    Padding keeps its own value.
    """
    samples, width = mask.shape
    rows = torch.arange(samples * width).reshape(samples, width)
    for sample, donor in enumerate(donors.tolist()):
        own, other = mask[sample].nonzero()[:, 0], mask[donor].nonzero()[:, 0]
        if len(own) and len(other):
            rows[sample, own] = donor * width + other[torch.arange(len(own)) % len(other)]
    return rows.flatten()


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
