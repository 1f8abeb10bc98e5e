"""Which back end adds up the rows of a pass: torch, or loops that numba compiles at their first use."""

import importlib
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, get_args

import torch
from torch import nn

from nodelens.statistics import jit
from nodelens.statistics.reductions import Kernels, using

CHOICES = ("auto", *get_args(Kernels))
LONG = 4 << 30  # bytes of rows from which compiling for some seconds pays


class Backend(NamedTuple):
    """The back end of a pass, how long compiling or reading its loops took, and why it is not another."""

    name: Kernels = "torch"
    seconds: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        return self.name + (f" ({self.reason})" if self.reason else "")

    def timed(self) -> str:
        """The same with the time that the loops took, if that was more than a second."""
        return f"{self}, loops compiled in {self.seconds:.1f} s, kept in {jit.folder()}" if self.seconds > 1 else str(self)


def check_kernels(asked: Any) -> None:
    """Raises ValueError for another back end, and where numba is asked for and not installed."""
    if asked not in CHOICES:
        raise ValueError(f"kernels is {asked!r}; it is {', '.join(CHOICES)}")
    if asked == "numba" and not jit.INSTALLED:
        raise ValueError("kernels is 'numba', which is not installed: pip install 'nodelens[fast]', or take kernels='torch'")


def choose(asked: str, dtype: torch.dtype, device: torch.device, nbytes: float) -> Backend:
    """The back end for rows of a dtype on a device. nbytes: of all rows that will be read, 0 if that is not known.

    ``auto`` takes the loops on a CPU, if numba is installed and works, where the rows are known to be many. It does not ask whether
    the loops have been compiled before, so that a run and its repetition have the same back end.
    """
    if asked == "torch":
        return Backend()
    if device.type != "cpu":
        return Backend(reason=f"on {device.type}")
    if not jit.INSTALLED:
        return Backend(reason="numba is not installed: pip install 'nodelens[fast]'")
    if asked == "auto" and nbytes < LONG:
        return Backend(reason=f"rows are not known to take {LONG >> 30} GiB")
    started = time.perf_counter()
    try:
        importlib.import_module("nodelens.statistics.compiled").compile_loops(dtype)
    except Exception as error:  # an installation that does not work, or machine code that cannot be read
        if asked == "numba":
            raise
        return Backend(reason="numba does not work here: " + f"{type(error).__name__}: {error}".splitlines()[0])
    return Backend("numba", time.perf_counter() - started)


def with_kernels(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a model and a plan, run with the back end of the plan."""

    @wraps(function)
    def run(model: Any, plan: Any, *arguments: Any, **named: Any) -> Any:
        with using(plan.kernels.name):
            return function(model, plan, *arguments, **named)

    return run


def backend_of(model: nn.Module, plan: Any, samples: float, asked: str = "auto") -> Backend:
    """The back end for a plan. samples: how many will be read, 0 if that is not known."""
    parameters = list(model.parameters())
    wide = plan.precision == "float64" or any(parameter.dtype == torch.float64 for parameter in parameters)
    device = parameters[0].device if parameters else torch.device("cpu")
    sites = [site for site in plan.sites() if str(site) in plan.dry_run.seen]
    nbytes = samples * sum(plan.seen(*site).nbytes for site in sites) if sites else 0.0
    return choose(asked, torch.float64 if wide else torch.float32, device, nbytes)


def samples_of(data: Any, plan: Any) -> float:
    """How many samples data hold; 0 if they do not say."""
    return len(data) * plan.dry_run.samples if hasattr(data, "__len__") else 0
