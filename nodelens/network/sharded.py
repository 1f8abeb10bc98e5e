"""Models that torch's FSDP2 (``torch.distributed.fsdp.fully_shard``) has distributed over processes.

Each process stores a part of every parameter, a ``DTensor``. A sharded module gathers its parameters before its forward pass and
drops them afterwards, so running the model is collective: every process has to run it equally often. What passes through it are
plain tensors, of the samples of each process.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from nodelens.messages import either

_FSDP, _TENSOR = "torch.distributed.fsdp", "torch.distributed.tensor"  # imported by whoever shards a model
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_PREFIX = "FSDP"  # of the classes that ``fully_shard`` makes


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of a model are distributed over processes."""
    return bool(_sharded_modules(model)) or any(is_part(p) for p in model.parameters())


def shard(model: nn.Module, mesh: Any) -> None:
    """Shards a model in place over the processes of a mesh: each of its blocks by itself, and what is left together.

    Blocks are modules with parts in a list, a dictionary or a sequence, such as those of a transformer or a residual network.
    """
    from torch.distributed.fsdp import fully_shard

    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies the tensors of a whole model into a model; of a sharded one, each process gets its part. Collective then."""
    if not is_sharded(model):
        model.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole, without a graph; any other tensor as it is. Collective for a sharded one."""
    whole: Any = tensor
    return whole.detach().full_tensor() if is_part(tensor) else tensor


def reshard(model: nn.Module) -> None:
    """Drops the parameters that a forward pass has gathered, so that modules hold the sharded ones.

    The outermost sharded module would otherwise keep those that it has gathered, with the ``requires_grad`` of that time.
    """
    for module in _sharded_modules(model):
        module.reshard()


def class_name(module: nn.Module) -> str:
    """The name of a module's class, which ``fully_shard`` replaces by one of its own."""
    kind = type(module)
    return kind.__mro__[2].__name__ if _is_fsdp_module(module) and kind.__name__.startswith(_PREFIX) else kind.__name__


def check_whole(call: str, model: nn.Module) -> None:
    """Raises ValueError for a sharded model, in a call that needs the whole of it in one process."""
    if is_sharded(model):
        way_out = either(
            "gather its weights by get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), and load them into "
            "the model in one process; nl.analyze and nl.evaluate take it as it is",
            "run it in one process, trainer=cpu or trainer=gpu, or with a copy of the model per process, trainer=ddp",
        )
        raise ValueError(f"{call}: {class_name(model)} is sharded over processes (fully_shard): {way_out}")


def check_data_parallel(call: str, model: nn.Module) -> None:
    """Raises ValueError for a model that is sharded in another way than by ``fully_shard`` along its samples."""
    name, way_out = class_name(model), "shard it by torch.distributed.fsdp.fully_shard, or do not shard it"
    if any(kind.__name__ == "FullyShardedDataParallel" for module in model.modules() for kind in type(module).__mro__):
        raise ValueError(
            f"{call}: {name} is wrapped in FullyShardedDataParallel, whose parameters have lost their shapes: {way_out}"
        )
    shards = bool(_sharded_modules(model))
    kept = next((n for n, p in model.named_parameters() if is_part(p) and not (shards and _by_samples(p))), None)
    if kept is not None:
        raise ValueError(f"{call}: {kept} of {name} is sharded by tensor parallelism, within which samples are shared: {way_out}")


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with parts that are in a list, a dictionary or a sequence."""
    for child in model.children():
        if isinstance(model, _LISTS) and not isinstance(child, _LISTS) and next(child.children(), None) is not None:
            yield child
        else:
            yield from _blocks(child)


def _by_samples(parameter: Any) -> bool:
    """Whether the placement of a parameter is one of ``fully_shard``: sharded, and possibly replicated over groups of processes."""
    *replicas, last = parameter.placements
    return last.is_shard() and len(replicas) < 2 and all(placement.is_replicate() for placement in replicas)


def _sharded_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _is_fsdp_module(module)] if _FSDP in sys.modules else []


def _is_fsdp_module(module: nn.Module) -> bool:
    return _FSDP in sys.modules and isinstance(module, sys.modules[_FSDP].FSDPModule)


def is_part(tensor: Tensor) -> bool:
    """Whether this process has only a part of a tensor."""
    return _TENSOR in sys.modules and isinstance(tensor, sys.modules[_TENSOR].DTensor)
