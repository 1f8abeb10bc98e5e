"""Batch norms folded into the convolutions before them, which saves a pass over each map."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.interventions.replay import Function, RecordedCall, channels_last

from . import winograd

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(eq=False)
class Folds:
    """(weight, bias) of convolutions with the batch norm behind them, by both and whether maps lie channels last.

    loops: those of ``winograd``, by convolution and norm; None where they are not in use.
    """

    made: dict[tuple[nn.Module, nn.Module, bool], tuple[Tensor, Tensor]] = field(default_factory=dict)
    loops: dict[tuple[nn.Module, nn.Module], Callable[[Tensor], Tensor]] | None = None

    def pairs(self, calls: Iterable[RecordedCall]) -> dict[RecordedCall, RecordedCall]:
        """{call of a convolution: call of the norm that reads its output}, where both are plain and called once."""
        calls = list(calls)
        counts: dict[nn.Module, int] = {}
        for call in calls:
            counts[call.module] = counts.get(call.module, 0) + 1
        found = {call.source: call for call in calls if call.source is not None and _foldable(call.source.module, call.module)}
        return {a: b for a, b in found.items() if counts.get(a.module) == counts.get(b.module) == 1}

    def of(self, call: RecordedCall, behind: RecordedCall, last: bool = False) -> tuple[Tensor, Tensor]:
        """The weight and bias of a pair of calls; y = s (W x + b - m) + c with s = weight / sqrt(variance + eps).

        last: whether the call will read maps that lie channels last, though the recorded ones did not.
        """
        conv: Any = call.module
        norm: Any = behind.module
        key = (conv, norm, last or _is_channels_last(call.output))
        if key not in self.made:
            scale = (norm.running_var.double() + norm.eps).rsqrt()
            scale = scale if norm.weight is None else scale * norm.weight.double()
            bias = -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
            shift = bias * scale if norm.bias is None else bias * scale + norm.bias.double()
            weight = conv.weight.double() * scale.reshape([-1] + [1] * (conv.weight.ndim - 1))
            weight, shift = weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)
            self.made[key] = (channels_last(weight) if key[2] else weight, shift)  # or it is converted at each call
        return self.made[key]

    def passing(self, norm: RecordedCall | None) -> dict[RecordedCall, Function]:
        """A norm that returns what it reads."""
        return {} if norm is None else {norm: _same}

    def functions(self, pairs: dict[RecordedCall, RecordedCall], last: bool = False) -> dict[RecordedCall, Function]:
        """What the calls of the pairs compute instead."""
        found: dict[RecordedCall, Function] = {}
        for conv, norm in pairs.items():
            found[conv] = self._convolution(conv, norm, last)
            found[norm] = _same
        return found

    def _convolution(self, call: RecordedCall, norm: RecordedCall, last: bool) -> Function:
        conv: Any = call.module
        weight, bias = self.of(call, norm, last)
        run: Callable[[Tensor], Tensor] = partial(_direct, conv, weight, bias)
        if last and self.loops is not None and winograd.fits(conv):
            key = conv, norm.module
            self.loops[key] = run = self.loops.get(key) or winograd.convolution(weight, bias, run)
        return lambda args, kwargs: run(_same(args, kwargs))


def _foldable(conv: Any, norm: Any) -> bool:
    plain = type(conv) in _CONVOLUTIONS and type(norm) in _NORMS and norm.running_var is not None and not norm.training
    return plain and conv.weight.dtype == norm.running_var.dtype and conv.weight.dtype in (torch.float32, torch.float64)


def _is_channels_last(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim == 4 and not output.is_contiguous()


def _direct(conv: Any, weight: Tensor, bias: Tensor, maps: Tensor) -> Tensor:
    return conv._conv_forward(maps, weight, bias)


def _same(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["input"]
