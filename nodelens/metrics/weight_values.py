"""What several metrics compute from the same weights, each once for a table."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from nodelens.statistics.linalg import gram_of_rows, symmetric_eigenvalues

SMALL = 1e-3  # of the largest singular value, from which the second one is read off products to 1e-10 of itself


def shared(weight: Tensor, values: dict[Callable, Tensor] | None = None) -> Tensor:
    """The same weights, with which values of ``once`` are kept: a tensor that nobody writes into, and that is dropped after use.

    values: those computed before from the same weights, to which new ones are added.
    """
    alias = weight.detach()
    alias.__dict__["_values"] = {} if values is None else values
    return alias


def once(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Keeps what a function returns with weights that are ``shared``. Others may change, so nothing is kept with them."""

    @wraps(function)
    def kept(weight: Tensor) -> Tensor:
        values = weight.__dict__.get("_values")
        if values is None:
            return function(weight)
        if function not in values:
            values[function] = function(weight)
        return values[function]

    return kept


@once
def squared_norms(weight: Tensor) -> Tensor:
    """Squared norm of each unit's weights, (units, d) -> (units,) float64."""
    return weight.double().square().sum(1)


@once
def leading_singular_values(weight: Tensor) -> Tensor:
    """The two largest singular values, (units, d) -> (2,) float64; 0 for a second that is not there, NaN if a weight is not finite.

    They are roots of eigenvalues of the smaller of WW' and W'W, many times faster than singular values. Squaring costs digits of a
    small one, so a second value below 1e-3 of the first is computed from the weights themselves.
    """
    w = weight.double()
    if not bool(w.isfinite().all()):  # solvers raise errors
        return w.new_full((2,), torch.nan)
    products = gram_of_rows(w if len(w) < w.shape[1] else w.T)
    values = symmetric_eigenvalues(products)[-2:].flip(0).clamp_min(0).sqrt()
    if len(values) == 2 and bool(values[1] < SMALL * values[0]):
        values = torch.linalg.svdvals(w)[:2]
    return torch.cat([values, values.new_zeros(2 - len(values))])
