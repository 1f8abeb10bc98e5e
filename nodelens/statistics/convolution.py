"""How a convolution reads its input, as counts: what its statistics need in place of patches."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ConvolutionGeometry:
    """One number a spatial dimension; a transposed convolution spreads what others gather."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # before and after
    mode: str = "zeros"
    transposed: bool = False
    extra: tuple[int, ...] = ()  # output_padding

    @classmethod
    def of(cls, conv: Any) -> "ConvolutionGeometry":
        """The geometry of an ``nn.Conv`` or ``nn.ConvTranspose``, its padding as numbers."""
        kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
        if conv.padding == "valid":
            padding = tuple((0, 0) for _ in kernel)
        elif conv.padding == "same":
            spare = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            padding = tuple((s // 2, s - s // 2) for s in spare)
        else:
            padding = tuple((p, p) for p in conv.padding)
        return cls(kernel, stride, dilation, padding, conv.padding_mode, conv.transposed, conv.output_padding)

    def outputs(self, dim: int, size: int) -> int:
        """Places of the output along a dimension, for an input of this size."""
        k, s, d, (a, b) = self.kernel[dim], self.stride[dim], self.dilation[dim], self.padding[dim]
        reach = d * (k - 1)
        if self.transposed:
            return (size - 1) * s - a - b + reach + self.extra[dim] + 1
        return (size + a + b - reach - 1) // s + 1

    @lru_cache(maxsize=1024)  # noqa: B019  a value of a few numbers
    def readers(self, dim: int, size: int) -> Tensor:
        """How many outputs read each place through each kernel offset, (kernel, size) float64, along one dimension."""
        offset = self.dilation[dim] * torch.arange(self.kernel[dim])[:, None]
        if self.transposed:
            written = torch.arange(size) * self.stride[dim] - self.padding[dim][0] + offset
            return ((written >= 0) & (written < self.outputs(dim, size))).double()
        read = self._source(dim, size)[torch.arange(self.outputs(dim, size)) * self.stride[dim] + offset]
        inside = read >= 0
        counts = torch.zeros(self.kernel[dim], size, dtype=torch.float64)
        return counts.scatter_add_(1, read.where(inside, 0), inside.double())

    def _source(self, dim: int, size: int) -> Tensor:
        """The place that each place of the padded input holds, -1 for a zero."""
        before, after = self.padding[dim]
        if self.mode == "zeros":
            places = torch.arange(-before, size + after)
            return places.where((places >= 0) & (places < size), -1)
        places = torch.arange(size, dtype=torch.float64)[None, None]
        return nn.functional.pad(places, (before, after), mode=self.mode)[0, 0].long()
