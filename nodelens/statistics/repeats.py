"""Samples with the same content under different ids, found among a bounded number of hashes."""

import torch
from torch import Tensor

from .processes import gathered

LIMIT = 1 << 16  # pairs of content and id that are kept


class Repeats:
    """The pairs (content hash, id hash) with the smallest content hashes, at most LIMIT of them.

    They are the same for any order, batches or number of processes. With more samples than LIMIT they are a random sample of the
    contents, each with all its ids.
    """

    def __init__(self, pairs: Tensor | None = None):
        self.pairs = torch.empty(0, 2, dtype=torch.int64) if pairs is None else pairs  # (m, 2), sorted
        self.waiting: list[Tensor] = []

    def add(self, contents: Tensor, ids: Tensor) -> None:
        """Takes the hashes of one batch, (B,) int64 each."""
        self.waiting.append(torch.stack([contents, ids], 1))
        if sum(map(len, self.waiting)) >= LIMIT:
            self.kept()

    def kept(self) -> Tensor:
        """The pairs kept so far, (m, 2), each once."""
        if self.waiting:
            self.pairs, self.waiting = torch.cat([self.pairs, *self.waiting]).unique(dim=0)[:LIMIT], []
        return self.pairs

    def share(self) -> tuple[int, int]:
        """How many of the samples kept have the content of another one with another id, and how many are kept."""
        pairs = self.kept()
        each = pairs[:, 0].unique_consecutive(return_counts=True)[1] if len(pairs) else pairs[:, 0]
        return int((each - 1).sum()), len(pairs)


def repeats_warning(own: Repeats) -> list[str]:
    """A warning about samples with the same content under different ids, in any process; empty if there are none. Collective."""
    whole = Repeats()
    for pairs in gathered(own.kept()):
        whole.add(*pairs.unbind(1))
    copies, among = whole.share()
    text = (
        f"{copies:,} of {among:,} samples ({copies / max(1, among):.1%}) have the content of another one under another id: they "
        "count as independent, so standard errors are too small; leave them out, or give copies the same id"
    )
    return [text] if copies else []
