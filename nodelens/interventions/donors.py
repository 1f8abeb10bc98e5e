"""Values of other samples, or rows drawn from given ones, in place of a sample's own."""

import torch
from torch import Tensor

from nodelens.statistics.sample_hash import generator, mix

from .tokens_seen import TokensSeen


def donated(x: Tensor, seen: TokensSeen, bank: Tensor | None, seed: int) -> Tensor:
    """What each row (samples, positions) gets, (samples, positions, units).

    Without a bank, each sample gets the values of one other sample of the batch: its k-th real token those of the k-th, counted
    again from the first where the other one is shorter. Otherwise each position gets one row of the bank (n, units). The draw
    depends on the seed, the number of the prompt, the sample and the position only. Raises ValueError for a single sample, or a
    bank of another width.
    """
    assert seen.prompt is not None
    columns = torch.arange(seen.now) + seen.before
    if bank is not None:
        if bank.ndim != 2 or bank.shape[1] != x.shape[2]:
            raise ValueError(f"value is {tuple(bank.shape)}, the site is {x.shape[2]} units wide: give rows (n, {x.shape[2]})")
        own = torch.arange(seen.samples) // seen.repeats
        drawn = mix(seed, seen.started, own[:, None], columns[None]) % len(bank)
        return bank.to(x.device, x.dtype)[drawn.to(x.device)]
    n = len(seen.prompt)
    if n < 2:
        raise ValueError("resample takes the values of another sample, and the batch has one: give larger batches, or value=rows")
    order = torch.randperm(n, generator=generator(seed, str(seen.started)))
    donor = torch.empty_like(order).index_copy(0, order, order.roll(1))
    source = torch.stack([_columns(seen, k, int(donor[k])) for k in range(n)]).repeat_interleave(seen.repeats, 0)
    rows = donor.repeat_interleave(seen.repeats) * seen.repeats + torch.arange(n * seen.repeats) % seen.repeats
    return x[rows.to(x.device)[:, None], source.to(x.device)]


def _columns(seen: TokensSeen, sample: int, donor: int) -> Tensor:
    """For each column of this call, the one from which the donor's value is taken."""
    assert seen.prompt is not None
    taken = torch.arange(seen.now)
    own, theirs = seen.prompt.places(sample), seen.prompt.places(donor)
    for k, column in enumerate(own if theirs else ()):
        here, there = column - seen.before, theirs[k % len(theirs)] - seen.before
        if 0 <= here < seen.now and 0 <= there < seen.now:
            taken[here] = there
    return taken
