"""The complete state of an unfinished pass as plain values, from which it continues with the same sums to the bit.

Rows that wait in a buffer are part of it: adding them early would change the order of additions, and so the last bits.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nodelens.statistics.buffer import Buffer
from nodelens.statistics.patches import MapSums
from nodelens.statistics.sample_hash import mix

from .collector import Collector
from .derivative_collector import DerivativeCollector
from .other_collectors import ModelCollector

_COUNTS = ("left_out", "rows_seen", "lost", "unread")
State = dict[str, Any]  # dictionaries, lists, numbers and tensors, which torch.load(weights_only=True) accepts


class Hashed(Protocol):
    """A batch with one hash per sample, (samples,) int64."""

    @property
    def hashes(self) -> Tensor: ...


class SeenOrder(NamedTuple):
    """The batches read so far in a round: their number, a hash of all their samples in order, and one of the last batch."""

    batches: int = 0
    all: int = 0
    last: int = 0

    def then(self, batch: Hashed) -> "SeenOrder":
        """With one more batch."""
        samples = torch.arange(len(batch.hashes))
        last = int(mix(batch.hashes, samples).sum())  # wraps around
        return SeenOrder(self.batches + 1, int(mix(torch.tensor(self.all), torch.tensor(last))), last)

    def check(self, begun: "SeenOrder", folder: Path, last_only: bool = False) -> None:
        """Raises ValueError if these are not the batches of saved sums; last_only: of which only the last one was read again."""
        if self.last != begun.last or (not last_only and self != begun):
            raise ValueError(
                f"{folder} holds the sums of {begun.batches} batches, but the data do not begin with these batches: give the same "
                f"data in the same order (no shuffling), or delete {folder} to start again"
            )


def collector_state(collector: Collector) -> State:
    """The sums, the buffered rows, the shifts and the counts of one site, after a batch has ended."""
    counts = {name: getattr(collector, name) for name in _COUNTS}
    sums = [each.state_dict() for each in collector.sums.values()]
    if isinstance(collector, ModelCollector):
        return counts | {"sums": sums}
    return counts | {
        "sums": sums,
        "shift": dict(collector.shift),
        "buffers": {kind: buffer.state_dict() for kind, buffer in collector.buffers.items()},
        "grid": tuple(collector.grid),
        **({"grams": dict(collector.grams)} if isinstance(collector, DerivativeCollector) else {}),
        "maps": None if collector.maps is None else collector.maps.state_dict(),
    }


def restore_collector(collector: Collector, state: Mapping[str, Any]) -> None:
    """Gives a new collector of the same plan a saved state."""
    for name in _COUNTS:
        setattr(collector, name, state[name])
    for sums, saved in zip(collector.sums.values(), state["sums"], strict=True):
        sums.load_state_dict(saved)
    if isinstance(collector, ModelCollector):
        return
    collector.shift, collector.grid = dict(state["shift"]), state["grid"]
    collector.buffers = {kind: Buffer.of_state(saved) for kind, saved in state["buffers"].items()}
    if isinstance(collector, DerivativeCollector):
        collector.grams = dict(state["grams"])
    if state["maps"] is not None:
        geometry = collector.site.layer.geometry
        assert geometry is not None
        collector.maps = MapSums.of_state(state["maps"], geometry)
