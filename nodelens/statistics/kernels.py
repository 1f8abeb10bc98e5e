"""Which back end forms sums over positions and histograms: plain torch, or loops that are compiled for the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from . import compiled, compiler

KERNELS = ("auto", "torch", "compiled")
WORTH = 1 << 28  # bytes of rows from which on compiled loops save more than compiling them once takes

_in_use: ContextVar[str] = ContextVar("kernels", default="torch")


@contextmanager
def using(kernels: str) -> Iterator[None]:
    """Forms sums by a back end, torch or compiled, within the context."""
    before = _in_use.set(kernels)
    try:
        yield
    finally:
        _in_use.reset(before)


def chosen(kernels: str, device: torch.device, nbytes: float) -> str:
    """The back end that an option names: ``auto`` is compiled for rows of many bytes on a CPU with a C compiler, otherwise torch.

    nbytes: of all rows that are read. Raises ValueError for another name, and where compiled loops cannot be had.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels is {kernels!r}; it is {', '.join(KERNELS)}")
    if kernels == "torch" or (kernels == "auto" and (device.type != "cpu" or nbytes < WORTH)):
        return "torch"
    if device.type != "cpu":
        raise ValueError(f"kernels is compiled, which are loops for a CPU, but the model is on {device}: use kernels=torch")
    try:
        compiled.library("float32")
    except OSError as error:
        if kernels == "auto":
            return "torch"
        raise ValueError(f"kernels is compiled, but {error}: install a C compiler (CC names it), or use kernels=torch") from None
    return "compiled"


def are_compiled() -> bool:
    """Whether compiled loops are in use."""
    return _in_use.get() == "compiled"


def compiled_for(raw: Tensor) -> ModuleType | None:
    """The module of compiled loops if they are in use and read such rows, otherwise None."""
    if not are_compiled() or raw.device.type != "cpu" or raw.dtype not in (torch.float32, torch.float64):
        return None
    return compiled


def seconds() -> float:
    """How long compiling, or loading what was compiled before, took in this process so far."""
    return sum(compiler.seconds.values())
