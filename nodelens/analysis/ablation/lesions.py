"""A lesion: units of one or several targets that are removed together, and the passes in which several are removed at once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nodelens.interventions.replay import Function
from nodelens.network.batch import read_of, tensor_of
from nodelens.network.hooks import edit
from nodelens.pruning.surgery.mask import masked

from .replacement import Replacement
from .targets import AblationTarget, Key, Units

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Lesion:
    """Removed units as places in tensors. places: {(module, side): (count,)}; dims: {(module, side): dimension of units}."""

    places: Mapping[Key, Tensor]
    dims: Mapping[Key, int]
    weights: tuple[tuple[AblationTarget, tuple[int, ...]], ...] = ()  # masked in the weights

    @classmethod
    def of(cls, targets: Mapping[str, AblationTarget], removed: Units) -> "Lesion":
        places: dict[Key, set[int]] = {}
        dims: dict[Key, int] = {}
        weights = []
        for name, ids in removed.items():
            target = targets[name]
            if target.weights is not None and len(ids):
                weights.append((target, tuple(ids)))
            for place in target.places if len(ids) else ():
                key: Key = (place.module, place.side)
                places.setdefault(key, set()).update(place.index[list(ids)].flatten().tolist())
                dims[key] = place.dim
        return cls({key: torch.tensor(sorted(own), dtype=torch.long) for key, own in places.items()}, dims, tuple(weights))

    def without(self, module: nn.Module) -> "Lesion":
        """The lesion without what the module reads."""
        return replace(self, places={key: own for key, own in self.places.items() if key != (module, "input")})


@contextmanager
def removed(model: nn.Module, lesions: Sequence[Lesion], values: Replacement) -> Iterator[None]:
    """Inside, each copy of the batch lacks the units of one lesion; all lesions have the same places."""
    edits: dict[str, dict[nn.Module, Any]] = {"input": {}, "output": {}}
    for key in lesions[0].places:
        if len(lesions[0].places[key]):
            edits[key[1]][key[0]] = partial(_replaced, lesions, key, values, count())
    with ExitStack() as stack:
        for target, ids in lesions[0].weights:
            assert target.weights is not None
            stack.enter_context(masked(model, [target.weights], {target.name: list(ids)}))
        stack.enter_context(edit(edits["output"], edits["input"]))
        yield


def without_columns(
    lesions: Sequence[Lesion], module: nn.Module, output: Any, values: Replacement, weight: Tensor | None = None
) -> Function | None:
    """A function of a call's arguments that returns its output without the units it reads; None where the module has to run.

    A linear map of x + d is that of x, which is recorded, plus that of d, which takes only the columns of the removed units.
    output: the recorded one, once for each copy. weight: the module's, or another one with which the output was made.
    """
    key: Key = (module, "input")
    if lesions[0].weights or key not in lesions[0].places or not _is_linear(module, output):
        return None
    dim, columns = lesions[0].dims[key], module.weight if weight is None else weight

    def without(args: tuple, kwargs: dict) -> Tensor:
        x = tensor_of(read_of(args, kwargs))
        assert x is not None
        found = torch.empty_like(output)
        shares, clean, new = (t.unflatten(0, (len(lesions), -1)) for t in (x, output, found))
        for share, whole, out, lesion in zip(shares, clean, new, lesions, strict=True):
            places = lesion.places[key]
            d = values.change(share, key, dim, places)
            torch.add(whole, _columns(module, columns, d, places.to(x.device)), out=out)
        return found

    return without


def _is_linear(module: nn.Module, output: Any) -> bool:
    """Whether a module is a plain linear map whose columns can be taken, in a precision that allows a sum of two parts."""
    plain = type(module) in _LINEAR or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))
    exact = isinstance(output, Tensor) and output.dtype in (torch.float32, torch.float64)
    return plain and exact and getattr(module, "groups", 1) == 1 and "forward" not in module.__dict__


def _columns(module: Any, weight: Any, d: Tensor, places: Tensor) -> Tensor:
    """What a linear module adds to its output for a difference at some of its inputs."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module._conv_forward(d, weight[:, places], None)
    return functional.linear(d, weight[:, places] if isinstance(module, nn.Linear) else weight[places].T)


def _replaced(lesions: Sequence[Lesion], key: Key, values: Replacement, calls: Iterator[int], x: Tensor) -> Tensor:
    """A tensor of several copies of a batch, each without the units of its lesion. calls: numbers of the calls in the pass."""
    changed, call = x.clone(), next(calls)
    dim = lesions[0].dims[key]
    for share, lesion in zip(changed.unflatten(0, (len(lesions), -1)), lesions, strict=True):
        places = lesion.places[key].to(x.device)
        share.index_copy_(dim % share.ndim, places, values.new(share, key, dim, places, call))
    return changed
