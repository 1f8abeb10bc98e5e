"""Checks of the two arguments that every measuring call takes: a model, and batches of data."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from nodelens.messages import kind_of

from .sharded import check_data_parallel, check_whole

_BATCHES = "give batches: a DataLoader, or a list such as [(x, y)]"


def check_arguments(call: str, model: Any, data: Any = None, sharded: bool = False) -> None:
    """Raises TypeError for a model that is no module, and for data that are not batches; ValueError for data without weights.

    None is allowed as data. sharded: whether the call takes a model that is sharded over processes; ValueError otherwise.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{call} takes a model, a torch.nn.Module, and not {kind_of(model)}: {_way_to_a_model(model, data)}")
    check_data_parallel(call, model)
    if not sharded:
        check_whole(call, model)
    if data is not None:
        check_data(call, data)
        if any(p.is_meta for p in model.parameters()):
            raise ValueError(f"{call}: {type(model).__name__} has weights on the meta device, without values: load them first")


def check_data(call: str, data: Any) -> None:
    """Raises TypeError for data that are not batches: a single batch, a dataset of samples, or something that has no items."""
    way_out = ""
    if isinstance(data, Tensor) or hasattr(data, "__array__"):
        way_out = "an array is one batch: give a list of batches, [x], or [(x, y)] with labels"
    elif isinstance(data, Mapping):
        way_out = f"a dict of {', '.join(map(str, list(data)[:4])) or 'nothing'} is one batch: give a list of batches, [batch]"
    elif _is_pair(data):
        way_out = "an (x, y) pair is one batch: give a list of batches, [(x, y)]"
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        way_out = "a dataset has samples: give batches, DataLoader(dataset, batch_size=64)"
    elif isinstance(data, (str, nn.Module)) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        way_out = _BATCHES
    if way_out:
        raise TypeError(f"{call}: data is {kind_of(data)}; {way_out}")


def _way_to_a_model(model: Any, data: Any) -> str:
    if isinstance(data, nn.Module):
        return "the model comes first and the data second: swap them"
    if isinstance(model, type) and issubclass(model, nn.Module):
        return f"give an object, {model.__name__}(...)"
    if isinstance(model, str):
        return "build or load it first, for instance by from_pretrained(...)"
    if isinstance(model, Mapping):
        return "build the network, and give it the weights by load_state_dict(...)"
    return "give the network itself"


def _is_pair(data: Any) -> bool:
    """Whether data are inputs with their labels, which have fewer axes, and not two batches."""
    pair = isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    return pair and len(data[0].shape) > len(data[1].shape)
