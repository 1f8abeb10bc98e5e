"""What a plan refuses, in words: a metric without the parameter it reads, sums without the memory they take."""

from typing import TYPE_CHECKING

from nodelens.metrics import Metric

if TYPE_CHECKING:
    from .plan import Plan


def check_parameter(plan: "Plan", name: str, metric: Metric, optional: bool) -> None:
    """Raises ValueError where a metric reads a parameter that a layer has not.

    ``optional``: layers without a norm behind them are left out, where some have one.
    """
    if not metric.weighted:
        return
    bare = [layer for layer in plan.layers if plan.stored(layer, metric) is None]
    some = optional and metric.parameter == "norm" and len(bare) < len(plan.layers)
    if bare and not some:
        where = f"layer {bare[0].name!r} ({type(bare[0].module).__name__})"
        words = {
            "norm": f"reads the scale of a batch norm, and none is behind {where}",
            "change": f"reads the change of the weights, and those of {where} at the start are not known: give "
            "initial_path= (initial= in Python)",
        }
        raise ValueError(
            f"metric {name!r} {words.get(metric.parameter, f'needs weights, {where} has none')}; or leave the metric out, or "
            "the layer (layers=)"
        )


def check_bytes(plan: "Plan", budget: float | None, more: str = "") -> None:
    """Raises MemoryError, with the ways out and ``more``, where a plan takes more bytes than the budget."""
    if budget is None or plan.total_bytes <= budget:
        return
    layer, need = max(((a, b) for a in plan.layers for b in plan.needs(a)), key=lambda pair: plan.nbytes(*pair))
    raise MemoryError(
        f"the plan takes {plan.total_bytes / 2**20:,.0f} MiB, budget.memory is {budget / 2**20:,.0f} MiB; the "
        f"largest is {need} at {layer.name} with {plan.nbytes(layer, need) / 2**20:,.0f} MiB: choose fewer layers "
        f"(layers=), fewer groups (groups=1), other metrics, or a larger budget{more}"
    )


_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def in_bytes(size: str | int | float | None) -> float | None:
    """Bytes of '4GB', '512 MiB' or a number; None for no limit. Raises ValueError for anything else."""
    if size is None:
        return None
    text = str(size).replace(" ", "").upper()
    number = text.rstrip("BGIKM")
    try:
        return float(number) * _SIZES[text[len(number) :]]
    except (ValueError, KeyError):
        raise ValueError(f"budget.memory is {size!r}; it takes bytes, or a size such as 4GB or 512MiB") from None
