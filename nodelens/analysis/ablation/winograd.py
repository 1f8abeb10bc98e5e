"""Convolutions of 3 by 3 in 4/9 of the multiplications, by the loops of ``winograd.c``."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nodelens.statistics import compiler

_FORM = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)  # G
_FEWEST = 32  # channels read and made, of fewer of which transforming the tiles costs what is saved
_SPLIT = 1 << 20  # multiplications for which one more thread is woken


@cache
def available() -> bool:
    """Whether the loops can be had; compiles them if nobody has yet."""
    try:
        _library()
    except OSError:
        return False
    return True


def fits(conv: Any) -> bool:
    """Whether the loops run a convolution: 3 by 3 in float32 on a CPU, stride 1, a border of one zero, channels enough."""
    plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and conv.groups == 1
    shape = plain and conv.kernel_size == (3, 3) and conv.stride == conv.dilation == (1, 1) and conv.padding in ("same", (1, 1))
    wide = shape and min(conv.in_channels, conv.out_channels) >= _FEWEST
    return wide and type(conv.weight) is nn.Parameter and conv.weight.device.type == "cpu" and conv.weight.dtype == torch.float32


def convolution(weight: Tensor, bias: Tensor, otherwise: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The convolution of maps (samples, channels, height, width) that lie channels last; otherwise: of all others.

    Shapes: weight (made, channels, 3, 3), bias (made,), float32 -> maps (samples, made, height, width), channels last.
    Error: that of float32 sums, as a direct convolution has it; an infinite value makes the outputs of its tiles NaN.
    """
    loops, (made, read) = _library(), weight.shape[:2]
    step = loops.panel()
    padded = -(-made // step) * step
    kernels = torch.einsum("ax,ocxy,by->abco", _FORM, weight.double(), _FORM).float().flatten(0, 1)  # (16, read, made)
    panels = pad(kernels, (0, padded - made)).view(16, read, -1, step).transpose(1, 2).contiguous()
    bias, zeros, held = bias.contiguous(), torch.zeros(read), loops.held(read, padded) + made

    def of(maps: Tensor) -> Tensor:
        if not _is_read(maps, read):
            return otherwise(maps)
        samples, _, height, width = maps.shape
        out = torch.empty((samples, made, height, width), memory_format=torch.channels_last)
        threads = max(1, min(torch.get_num_threads(), 4 * out.numel() * read // _SPLIT))
        scratch = torch.empty(threads * held)
        given = (each.data_ptr() for each in (maps, panels, bias, zeros))
        loops.convolve(*given, samples, height, width, read, made, padded, scratch.data_ptr(), out.data_ptr(), threads)
        return out

    return of


def _is_read(maps: Tensor, channels: int) -> bool:
    plain = type(maps) is Tensor and maps.dtype == torch.float32 and maps.device.type == "cpu"
    return plain and maps.ndim == 4 and maps.shape[1] == channels and maps.is_contiguous(memory_format=torch.channels_last)


@cache
def _library() -> Any:
    found = compiler.load(Path(__file__).with_name("winograd.c"), "float")
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    found.panel.argtypes, found.panel.restype = [], whole
    found.held.argtypes, found.held.restype = [whole, whole], whole
    found.convolve.argtypes, found.convolve.restype = [*[pointer] * 4, *[whole] * 6, pointer, pointer, ctypes.c_int], None
    return found
