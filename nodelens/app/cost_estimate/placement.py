"""Placement of a model's parts, and of the sums at its sites, on one device or in order on several."""

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nodelens.network.layers import Layer
from nodelens.network.roles import roles_of


@dataclass(frozen=True)
class Placement:
    """The device of each part of a model; None for a part that does not fit. A part is a block, or a module outside blocks.

    parts: {name: bytes of its parameters and buffers}, in order; devices: {name: device}
    """

    net: nn.Module
    parts: dict[str, int]
    devices: dict[str, int | None]
    homes: dict[Tensor, str]  # parameter or buffer (by identity): name of its part

    @classmethod
    def of(cls, net: nn.Module, devices: int = 1, memory: float = math.inf) -> "Placement":
        """Fills devices in order, balanced, as transformers does for ``device_map="auto"``.

        Each device but the last is filled up to an equal share of the parameters plus 1.25 times the largest part, at most its
        memory. The first keeps room for the largest remaining part. Tied weights are on the device of the first of them.
        Raises ValueError for less than one device, or no memory.
        """
        if devices < 1 or memory <= 0:
            raise ValueError(f"there are {devices} devices of {memory:,.0f} bytes: give at least one device, with memory above 0")
        blocks = {block.name for block in roles_of(net).blocks}
        parts: dict[str, int] = {}
        homes: dict[Tensor, str] = {}
        for name, tensor in itertools.chain(net.named_parameters(), net.named_buffers()):
            part = _part(name, blocks)
            parts[part] = parts.get(part, 0) + tensor.nbytes
            homes[tensor] = part
        share = sum(parts.values()) // devices + int(1.25 * max(parts.values(), default=0))
        limits = [*[min(share, memory)] * (devices - 1), memory]
        return cls(net, parts, dict(zip(parts, _filled([*parts.values()], limits), strict=True)), homes)

    def device_of(self, layer: Layer) -> int | None:
        """The device of a layer: that of its first parameter, else that of the enclosing module."""
        names = layer.name.removesuffix(".input" if layer.side == "input" else "").split(".")
        around = (self.net.get_submodule(".".join(names[:k])) for k in reversed(range(len(names))))
        for module in itertools.chain([layer.module], around):
            first = next(itertools.chain(module.parameters(), module.buffers()), None)
            if first is not None:
                return self.devices[self.homes[first]]
        return 0  # a model without parameters

    def weights(self, device: int | None) -> int:
        """Bytes of parameters and buffers on a device."""
        return sum(size for name, size in self.parts.items() if self.devices[name] == device)


def _part(name: str, blocks: Collection[str]) -> str:
    """The block that contains a tensor, else its own module."""
    *path, _ = name.split(".")
    above = (".".join(path[:k]) for k in range(1, len(path) + 1))
    return next((part for part in above if part in blocks), ".".join(path))


def _filled(sizes: Sequence[int], limits: Sequence[float]) -> list[int | None]:
    """The device of each part, in order; None if it does not fit."""
    found: list[int | None] = []
    largest = [*itertools.accumulate([0, *reversed(sizes)], max)][::-1]  # of the sizes from the k-th on
    device, used = 0, 0
    for k, size in enumerate(sizes):
        while device < len(limits):
            spare = largest[k + 1] if device == 0 else 0
            if used + size + spare <= limits[device]:
                break
            device, used = device + 1, 0
        used += size
        found.append(device if device < len(limits) else None)
    return found
