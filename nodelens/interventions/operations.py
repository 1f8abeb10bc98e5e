"""What an edit does to the values of units: functions of the old values that return new ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

OPERATIONS = ("zero", "mean", "resample", "scale", "add", "set", "project_out", "module")
WITHOUT_VALUE = ("zero", "resample")


def scale(old: Tensor, value: Tensor) -> Tensor:
    """Times the value."""
    return old * value


def add(old: Tensor, value: Tensor) -> Tensor:
    """Adding zero changes no bit, not even the sign of zero."""
    return torch.where(value == 0, old, old + value)


def set_to(old: Tensor, value: Tensor) -> Tensor:
    """The value itself."""
    return value.expand_as(old)


def project_out(old: Tensor, value: Tensor) -> Tensor:
    """Removes the components along the directions (k, units): x - Q Q'x, Q an orthonormal basis of their span.

    Raises ValueError for directions that are zero or linearly dependent.
    """
    wide = torch.promote_types(old.dtype, torch.float32)
    directions = torch.atleast_2d(value).to(old.device, torch.float64)
    basis, triangle = torch.linalg.qr(directions.T)
    sizes = triangle.diagonal().abs()
    if not bool((sizes > 1e-10 * directions.norm(dim=1).max()).all()) or directions.shape[0] > directions.shape[1]:
        raise ValueError(f"the {len(directions)} directions of project_out are zero or linearly dependent: give independent ones")
    basis = basis.to(wide)
    return (old.to(wide) - (old.to(wide) @ basis) @ basis.T).to(old.dtype)


def through(old: Tensor, value: nn.Module) -> Tensor:
    """What a module makes of the values. Raises ValueError where it changes their shape."""
    new = value(old)
    if not isinstance(new, Tensor) or new.shape != old.shape:
        shape = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise ValueError(
            f"{type(value).__name__} returns {shape} for values of shape {tuple(old.shape)}: it must return a tensor of that shape"
        )
    return new.to(old.dtype)


_BY_NAME: dict[str, Callable[..., Tensor]] = {
    **{"scale": scale, "add": add, "set": set_to, "mean": set_to},
    **{"project_out": project_out, "module": through},
}


def changed(operation: str, old: Tensor, value: Any) -> Tensor:
    """The new values (..., units) of an operation other than ``resample``."""
    if operation == "zero":
        return torch.zeros_like(old)
    if not isinstance(value, Tensor):
        return _BY_NAME[operation](old, value)
    value = value.to(old.device) if operation == "project_out" else value.to(old.device, old.dtype)
    if not _fits(value, old, operation):
        raise ValueError(
            f"value is {tuple(value.shape)}, the edited values are {tuple(old.shape)}: give a number, one value per unit "
            f"({old.shape[-1]},), or a tensor of the shape of the edited values"
        )
    return _BY_NAME[operation](old, value)


def _fits(value: Tensor, old: Tensor, operation: str) -> bool:
    """Whether a value is one number or broadcasts to the old values; directions are (units,) or (k, units)."""
    if operation == "project_out":
        return value.ndim in (1, 2) and value.shape[-1] == old.shape[-1]
    try:
        return torch.broadcast_shapes(value.shape, old.shape) == old.shape and (value.ndim == 0 or value.shape[-1] == old.shape[-1])
    except RuntimeError:
        return False
