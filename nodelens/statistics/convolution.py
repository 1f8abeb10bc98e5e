"""The geometry of a convolution as counts of reads per input position, so that patch statistics need no patches."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ConvolutionGeometry:
    """Kernel, stride, dilation and padding, one number per spatial dimension, of a plain or transposed convolution."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # before and after
    mode: str = "zeros"
    transposed: bool = False
    extra: tuple[int, ...] = ()  # output_padding

    @classmethod
    def of(cls, conv: Any) -> "ConvolutionGeometry":
        """The geometry of an ``nn.Conv*d`` or ``nn.ConvTranspose*d``; string padding is converted to numbers."""
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
        """Output size along a dimension, for an input of this size."""
        k, s, d, (a, b) = self.kernel[dim], self.stride[dim], self.dilation[dim], self.padding[dim]
        reach = d * (k - 1)
        if self.transposed:
            return (size - 1) * s - a - b + reach + self.extra[dim] + 1
        return (size + a + b - reach - 1) // s + 1

    @lru_cache(maxsize=1024)  # noqa: B019  the key is a few numbers
    def readers(self, dim: int, size: int) -> Tensor:
        """How many outputs read each input position through each kernel offset, (kernel, size) float64, in one dimension."""
        offset = self.dilation[dim] * torch.arange(self.kernel[dim])[:, None]
        if self.transposed:
            written = torch.arange(size) * self.stride[dim] - self.padding[dim][0] + offset
            return ((written >= 0) & (written < self.outputs(dim, size))).double()
        read = self._source(dim, size)[torch.arange(self.outputs(dim, size)) * self.stride[dim] + offset]
        inside = read >= 0
        counts = torch.zeros(self.kernel[dim], size, dtype=torch.float64)
        return counts.scatter_add_(1, read.where(inside, 0), inside.double())

    def _source(self, dim: int, size: int) -> Tensor:
        """The input position behind each position of the padded input, -1 for a padding zero."""
        before, after = self.padding[dim]
        if self.mode == "zeros":
            places = torch.arange(-before, size + after)
            return places.where((places >= 0) & (places < size), -1)
        places = torch.arange(size, dtype=torch.float64)[None, None]
        return nn.functional.pad(places, (before, after), mode=self.mode)[0, 0].long()
