"""The forms of a batch: what is an input of the model, and what are labels, ids and targets."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_LABELS = ("labels", "label", "y")
_IDS = ("sample_ids", "ids")


class Given(NamedTuple):
    """The parts of a batch: positional and keyword arguments of the model, labels, sample ids, given targets, numbers of bytes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None = None
    ids: Tensor | None = None
    targets: Tensor | None = None
    bytes: Tensor | None = None

    @property
    def first(self) -> Tensor:
        """The first input. Raises ValueError if there is none."""
        found = next((v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor) and v.ndim), None)
        if found is None:
            raise ValueError(f"a batch has no tensor to pass to the model: its keys are {', '.join(self.kwargs) or 'none'}")
        return found


def read(batch: Any, required: Collection[str] = ()) -> Given:
    """Reads a tensor, an (x, y) pair, a tuple with ``ids``, or a dict; arrays become tensors, and so do labels in a list.

    In a pair, x may be a tuple of several inputs, or a dict of them. ``required``: entries of a dict that are inputs whatever
    their name. Raises ValueError for any other form.
    """
    batch = _as_tensors(batch)
    if isinstance(batch, Tensor):
        return Given((batch,), {})
    if isinstance(batch, Mapping):
        return _read_dict(dict(batch), required)
    ids = getattr(batch, "ids", None)
    if isinstance(batch, (tuple, list)) and batch and (len(batch) <= 2 or ids is not None):
        x, labels = batch[0], _as_labels(batch[1]) if len(batch) > 1 else None
        if isinstance(x, Tensor):
            return Given((x,), {}, labels, ids)
        if isinstance(x, (tuple, list)) and x and all(isinstance(each, Tensor) for each in x):
            return Given(tuple(x), {}, labels, ids)
        if isinstance(x, Mapping):
            return _read_dict(dict(x), required)._replace(labels=labels)
    several = isinstance(batch, (tuple, list)) and len(batch) > 2 and all(isinstance(each, Tensor) for each in batch)
    way_out = "with several inputs, give ((a, b), y) or a dict" if several else "convert the batches of your loader to one of these"
    raise ValueError(f"a batch is a tensor, an (x, y) pair or a dict of tensors, not {_shape_of(batch)}; {way_out}")


def with_samples(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches without those of 0 samples, which some loaders give for a shard that is empty."""
    return (batch for batch in batches if len(read(batch).first))


def few(batch: Any, samples: int) -> Any:
    """The first samples of a batch in any of its forms, on the CPU."""
    if isinstance(batch, Tensor):
        return batch[:samples].cpu() if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {name: few(value, samples) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(few(value, samples) for value in batch))
    return type(batch)(few(value, samples) for value in batch) if isinstance(batch, (list, tuple)) else batch


def _read_dict(rest: dict[str, Any], required: Collection[str]) -> Given:
    labels = next((rest.pop(k) for k in _LABELS if k in rest and k not in required), None)
    ids = next((rest.pop(k) for k in _IDS if k in rest and k not in required), None)
    targets, size = rest.pop("targets", None), rest.pop("bytes", None)
    x = None if "x" in required else rest.pop("x", None)
    return Given(() if x is None else (x,), rest, None if labels is None else _as_labels(labels), ids, targets, size)


def _as_tensors(value: Any) -> Any:
    """The batch with arrays as tensors, in the container it came in."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.copy() if not value.flags.writeable or any(s < 0 for s in value.strides) else value)
    if isinstance(value, Mapping):
        return {key: _as_tensors(each) for key, each in value.items()}
    if type(value) in (tuple, list) and any(isinstance(each, (np.ndarray, tuple, list, Mapping)) for each in value):
        return type(value)(map(_as_tensors, value))
    return value


def _as_labels(labels: Any) -> Tensor | None:
    """Labels as a tensor. Raises ValueError for what are no numbers."""
    if labels is None:
        return None
    try:
        found = labels if isinstance(labels, Tensor) else torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"the labels of a batch are {_shape_of(labels)}: give a tensor of numbers, such as the index of each sample's class"
        ) from None
    if found.is_complex():
        raise ValueError(
            f"the labels of a batch are complex numbers {tuple(found.shape)}: give real numbers, or the index of each class"
        )
    return found


def _shape_of(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}: ({', '.join(type(each).__name__ for each in value[:6])})"
    return f"a {type(value).__name__}"
