"""An edit as a value: which units change, where, and how."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from nodelens.messages import as_seed

from .operations import OPERATIONS, WITHOUT_VALUE
from .selection import PHASES

_WANTED = {
    "mean": "the means (units,)",
    "project_out": "directions (k, units)",
    "module": "an nn.Module",
    "add": "a vector (units,)",
}


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of units at a site, for ``nl.edit``.

    site:      a module's name, a glob, a role such as ``blocks[n//2:].mlp`` (see ``nl.find_layers``), or a pruning group
    operation: ``zero``; ``mean``, ``set``: the value takes the units' place; ``scale``: times the value; ``add``: plus the value;
               ``project_out``: without the components along the value, one direction (units,) or several (k, units);
               ``resample``: the values of another sample of the batch, or rows drawn from the value (n, units);
               ``module``: what the value, an ``nn.Module``, makes of the whole tensor
    units:     indices or an expression of ``parse_index``; None: all. Of a pruning group its own units, such as heads
    positions: indices or an expression among the n real tokens of a prompt, whatever its padding; a phrase (``phrase:<text>``
               where it looks like an expression) or ``regex:<pattern>``, which must occur exactly once; one list per selected
               sample; None: all. In the phase ``generated`` generated tokens are counted, from 0. Of images, the positions of
               the map, row by row
    samples:   indices or an expression among the samples of each batch; None: all
    value:     a number, one per unit (of the edited or of all), or a tensor like the edited values, (positions, units) or
               (samples, positions, units)
    port:      ``output`` or ``input`` of the module
    phase:     ``prompt``, ``generated`` or ``all``: which tokens of ``generate``. With positions, ``all`` means ``prompt``
    seed:      of ``resample``

    Raises ValueError for an unknown operation, port or phase, and for a value that is missing or not needed.
    """

    site: str
    operation: str
    units: str | int | Sequence[int] | None = None
    positions: Any = None
    samples: str | int | Sequence[int] | None = None
    value: Any = None
    port: Literal["output", "input"] = "output"
    phase: Literal["all", "prompt", "generated"] = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("units", "positions", "samples"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        object.__setattr__(self, "value", _as_value(self.value))
        for name, known in (("operation", OPERATIONS), ("port", ("output", "input")), ("phase", PHASES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(known)}")
        object.__setattr__(self, "seed", as_seed(self.seed))
        self._check_value()

    def _check_value(self) -> None:
        operation, value = self.operation, self.value
        if operation == "zero" and value is not None:
            raise ValueError("zero takes no value; use set to put another value in the units' place")
        if operation not in WITHOUT_VALUE and value is None:
            more = ", such as those of the metric activation_mean" if operation == "mean" else ""
            raise ValueError(
                f"{operation} of {self.site!r} needs a value: give value={_WANTED.get(operation, 'a number or tensor')}{more}"
            )
        if (operation == "module") != isinstance(value, nn.Module):
            given = type(value).__name__
            raise ValueError(
                f"{operation} of {self.site!r} is given a {given} as value; module takes an nn.Module, the others numbers"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.site, self.operation))

    def __str__(self) -> str:
        chosen = [f"{name} {getattr(self, name)}" for name in ("units", "positions", "samples") if getattr(self, name) is not None]
        return f"{self.operation} of {self.site!r}" + (f" ({', '.join(chosen)})" if chosen else "")

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not defaults, as texts, numbers and lists; a module by its class, as ``{"module": name}``."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {f.name: given[f.name] for f in fields(self) if f.name in ("site", "operation") or given[f.name] != f.default}
        if isinstance(value := given.get("value"), Tensor):
            given["value"] = value.detach().cpu().double().tolist()
        elif isinstance(value, nn.Module):
            given["value"] = {"module": f"{type(value).__module__}.{type(value).__qualname__}"}
        return given

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "Edit":
        """The edit of ``to_dict``. Raises ValueError for an edit by a module, which is stored by name only, and unknown keys."""
        if not isinstance(given, Mapping):
            raise ValueError(f"an edit is stored as a dictionary of its fields, and not as {type(given).__name__}")
        unknown = sorted(set(given) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"an edit has no field {unknown[0]!r}; it has {', '.join(f.name for f in fields(cls))}")
        value = given.get("value")
        if isinstance(value, Mapping):
            raise ValueError(
                f"the edit of {given.get('site')!r} was made by the module {value.get('module')}: give value= the module itself"
            )
        return cls(**given)


def _plain(value: Any) -> Any:
    """Indices as texts, numbers and lists."""
    if isinstance(value, (Tensor, np.ndarray, np.integer)):
        return value.tolist()
    if isinstance(value, range) or (isinstance(value, Sequence) and not isinstance(value, str)):
        return [_plain(item) for item in value]
    return value


def _as_value(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_complex():
        raise ValueError(f"value has complex numbers, {str(value.dtype).removeprefix('torch.')}: activations are real")
    if value is None or isinstance(value, (nn.Module, Tensor, Mapping)):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    try:
        array = np.array(value, dtype=np.float64)  # a copy: a column of a table is not writable
    except (TypeError, ValueError):
        raise ValueError(f"value is {value!r}: give a number, a tensor or an nn.Module") from None
    return torch.from_numpy(array)
