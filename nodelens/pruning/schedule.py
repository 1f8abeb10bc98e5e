"""How pruning is divided into steps."""

from typing import Literal

Shape = Literal["linear", "geometric", "cubic"]


def kept_shares(amount: float, steps: int, shape: Shape = "linear") -> list[float]:
    """The share of the original units (or cost) kept after each of T steps; the last is exactly 1 - amount.

    With S the amount: linear 1 - S t / T, geometric (1 - S)^(t / T), cubic 1 - S (1 - (1 - t / T)^3), which removes most at the
    start. Raises ValueError for an amount outside [0, 1), fewer than one step, or an unknown shape.
    Source: Zhu & Gupta 2017, arXiv:1710.01878, for the cubic one.
    """
    if not 0 <= amount < 1:
        raise ValueError(f"amount is {amount!r}: a share of the units to remove, from 0 up to but not including 1")
    if steps < 1:
        raise ValueError(f"steps is {steps}: a schedule has at least one")
    times = [t / steps for t in range(1, steps)]
    if shape == "linear":
        shares = [1 - amount * t for t in times]
    elif shape == "geometric":
        shares = [(1 - amount) ** t for t in times]
    elif shape == "cubic":
        shares = [1 - amount * (1 - (1 - t) ** 3) for t in times]
    else:
        raise ValueError(f"shape is {shape!r}; there are linear, geometric, cubic")
    return [*shares, 1 - amount]
