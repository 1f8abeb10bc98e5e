"""Moments of what each unit of a layer reads: features of a Linear, patch entries of a convolution."""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..geometry import Geometry
from ..rows import Rows
from .moments import Moments


@dataclass(frozen=True, eq=False)
class Patches(Moments):
    """Moments of the entries a layer's units read: (channels x kernel,) in the order of the flattened weight.

    Of a convolution no patch is formed: the maps are added over samples first, then read through each kernel offset.
    Zeros that padding adds are entries like others.
    A sample with a place that is masked or not finite is left out as a whole.
    """

    @classmethod
    def of(cls, x: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None,
           geometry: Geometry | None = None) -> Self:
        rows = Rows.of(x, weights, shift)
        if geometry is None:
            return super().of(rows)
        if rows.keep is not None:  # a place that does not count spoils every patch it is in: leave out its whole sample
            rows = Rows(rows.raw, None, rows.shift, rows.grid).index(rows.keep.all(1))
        samples, channels, _ = rows.x.shape
        grid = (channels, *rows.grid)
        maps = torch.stack([rows.x.sum(0), rows.x.square().sum(0)]).double().reshape(2, *grid)
        padded = samples * math.prod(geometry.outputs(dim, size) for dim, size in enumerate(rows.grid))
        valid = torch.ones((), dtype=torch.float64, device=maps.device)
        for dim, size in reversed(list(enumerate(rows.grid))):
            readers = geometry.readers(dim, size).to(maps.device)
            maps = (maps.movedim(dim + 2, -1) @ readers.T).movedim(-1, dim + 2)
            valid = readers.sum(1).reshape(-1, *[1] * valid.ndim) * valid
        outside = padded - samples * valid.flatten()  # entries that are padding, (kernel,)
        shift = rows.shift[:, None]
        total = maps[0].flatten(1) - outside * shift
        square = maps[1].flatten(1) + outside * shift.square()
        n = torch.full((1,), padded, device=maps.device)
        return cls(n, rows.shift.repeat_interleave(len(outside)), total.flatten(), square.flatten())
