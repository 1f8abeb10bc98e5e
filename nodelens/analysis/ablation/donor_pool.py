"""Donors: samples whose values take the place of removed units, the same for any batches, order and number of processes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.engine.driver import Driver, device_of
from nodelens.network.batch import Batch
from nodelens.network.hooks import edit
from nodelens.statistics.processes import gathered
from nodelens.statistics.sample_hash import mix

from .targets import Key

_MOST = 64  # samples that are kept as donors


@dataclass(eq=False)
class Donors:
    """Up to 64 samples of all data, and what passes some places of a model when it runs on them.

    The donors are the samples with the smallest hashes of seed and content, and the hash of a sample decides which of them is its
    own. So a sample has the same donor in any batch, order or process, and never itself.

    samples: batches of one sample. sites: names of the places, ``<module>.input`` or ``<module>.output``.
    """

    model: nn.Module
    samples: Sequence[Batch]
    sites: Mapping[Key, str]
    seed: int
    batch: Batch | None = None
    chosen: list[int] = field(default_factory=list)  # the donor of each sample of the batch
    shown: dict[tuple[int, Key], list[Tensor]] = field(default_factory=dict)  # what each donor shows at each call
    made: dict[tuple[Key, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, driver: Driver, data: Iterable[Any], sites: Mapping[Key, str], seed: int) -> "Donors":
        """Reads the data without running the model. Collective. Raises ValueError if all samples are equal."""
        kept: dict[int, tuple[int, Batch]] = {}  # {hash of the sample: (hash of seed and sample, sample)}
        for batch in driver.batches(data):
            last = max(rank for rank, _ in kept.values()) if len(kept) == _MOST else None
            for k, rank in enumerate(mix(batch.hashes, seed).tolist()):
                if last is None or rank < last:
                    kept.setdefault(int(batch.hashes[k]), (rank, _sample(batch, k)))
            kept = _smallest(kept.items())
        kept = _smallest(item for own in gathered(list(kept.items())) for item in own)
        if len(kept) < 2:
            raise ValueError(
                "how=resample takes values from another sample, but all samples of the data are equal: give others, or use how=mean"
            )
        return cls(driver.model, [sample for _, sample in kept.values()], sites, seed)

    def begin(self, batch: Batch) -> None:
        """Chooses the donors of a batch, and runs the model on them."""
        at, hashes = mix(batch.hashes, self.seed, 1) % len(self.samples), torch.cat([sample.hashes for sample in self.samples])
        self.chosen = ((at + (hashes[at] == batch.hashes)) % len(self.samples)).tolist()
        self.batch, self.shown, self.made = batch, {}, {}
        for number in sorted(set(self.chosen)):
            self._run(number)

    def values(self, key: Key, call: int, x: Tensor, dim: int) -> Tensor:
        """What the donors of the batch show at a call of a place, in the shape of x, which is what the batch shows there.

        Positions correspond by number: of texts, real tokens, in turn where the donor has fewer; padding keeps its own values.
        Raises ValueError where rows do not belong to samples, and where the donor shows no such positions.
        """
        if (key, call) not in self.made:
            self.made[key, call] = self._made(key, call, x, dim)
        return self.made[key, call]

    def _run(self, number: int) -> None:
        """Keeps what a donor shows at the places."""

        def see(key: Key, x: Tensor) -> Tensor:
            self.shown.setdefault((number, key), []).append(x.clone())  # later operations may write into it
            return x

        looks = {key: partial(see, key) for key in self.sites}
        outputs, inputs = ({m: look for (m, side), look in looks.items() if side == which} for which in ("output", "input"))
        with torch.no_grad(), edit(outputs, inputs):
            self.samples[number].to(device_of(self.model)).run(self.model)

    def _made(self, key: Key, call: int, x: Tensor, dim: int) -> Tensor:
        assert self.batch is not None
        site, laid = self.sites[key], x.movedim(dim, -1)
        own, mask = _by_sample(laid, self.batch, site), self.batch.mask_at(site)
        parts = []
        for k, number in enumerate(self.chosen):
            sample, calls = self.samples[number], self.shown.get((number, key), [])
            other = _by_sample(calls[call].movedim(dim, -1), sample, site)[0] if call < len(calls) else None
            theirs = sample.mask_at(site)
            found = _exchanged(own[k], other, None if mask is None else mask[k], None if theirs is None else theirs[0])
            if found is None:
                shapes = [f"{tuple(own[k].shape)}", "no such call" if other is None else f"{tuple(other.shape)}"]
                raise ValueError(
                    f"how=resample: {site} shows {shapes[0]} for a sample and {shapes[1]} for the one whose values it gets: give "
                    "samples of one size, or use how=mean"
                )
            parts.append(found)
        return torch.stack(parts).reshape(laid.shape).movedim(-1, dim)


def _sample(batch: Batch, k: int) -> Batch:
    """One sample, without what only its loss needs, on the CPU."""
    alone = batch.map(lambda t: t[k : k + 1].detach().cpu().clone())
    return replace(alone, labels=None, targets=None, bytes=None)


def _smallest(items: Iterable[tuple[int, tuple[int, Batch]]]) -> dict[int, tuple[int, Batch]]:
    return dict(sorted(dict(items).items(), key=lambda item: item[1][0])[:_MOST])


def _by_sample(laid: Tensor, batch: Batch, site: str) -> Tensor:
    """Rows by sample, (B, ..., units). Raises ValueError where they do not belong to samples, as of tokens that a router chose."""
    samples, mask = len(batch), batch.mask_at(site)
    chosen = laid.ndim == 2 and mask is not None and len(laid) not in (samples, mask.numel())
    if len(laid) % samples or chosen:
        raise ValueError(
            f"how=resample: {site} shows {len(laid)} rows for a batch of {samples} samples: rows must belong to samples; use "
            "how=mean"
        )
    return laid if len(laid) == samples else laid.unflatten(0, (samples, -1))


def _exchanged(own: Tensor, other: Tensor | None, mask: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    """The values of a donor at the positions of a sample, (..., units); None where the positions do not correspond."""
    if other is None or own.ndim != other.ndim:
        return None
    if own.ndim != 2:
        return other if own.shape == other.shape else None
    at, those = (_real(x, known) for x, known in ((own, mask), (other, theirs)))
    if not len(at) or not len(those):
        return own
    return own.index_copy(0, at, other[those[torch.arange(len(at), device=at.device) % len(those)]])


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """Numbers of the positions that are no padding; x (positions, units)."""
    return torch.arange(len(x), device=x.device) if mask is None or len(mask) != len(x) else mask.to(x.device).nonzero()[:, 0]
