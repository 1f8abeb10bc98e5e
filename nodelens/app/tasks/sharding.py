"""``trainer=fsdp``: one model, sharded over the processes of a run."""

import os
from typing import Any

import torch
from omegaconf import DictConfig

from nodelens.network.sharded import shard
from nodelens.statistics.processes import world

from .run_lock import RANKS

_TARGET = "nodelens.training.sharded_strategy.ShardedStrategy"
_WHOLE = {
    "analysis": "run it afterwards by analyze.py in one process, trainer=cpu or trainer=gpu",
    "evaluate": "run it in one process, trainer=cpu or trainer=gpu",
    "initial_path": "run it with a copy of the model per process, trainer=ddp",
}


def is_sharding(cfg: DictConfig) -> bool:
    """Whether a run shards its model over processes."""
    strategy: Any = cfg.trainer.get("strategy")
    return isinstance(strategy, DictConfig) and strategy.get("_target_") == _TARGET


def launched_by(cfg: DictConfig) -> str:
    """The strategy that starts the processes of a sharded run which does not train."""
    return "ddp_fork" if cfg.trainer.accelerator == "cpu" and not any(name in os.environ for name in RANKS) else "ddp"


def check_sharding(cfg: DictConfig) -> None:
    """Raises ValueError, before anything is measured, for what a run with a sharded model cannot do."""
    if not is_sharding(cfg):
        return
    if cfg.task == "prune":
        raise ValueError(
            "trainer=fsdp: prune.py cuts the whole model in one process: choose trainer=cpu or trainer=gpu, or trainer=ddp, which "
            "measures scores on a copy of the model per process"
        )
    for key, way_out in _WHOLE.items():
        if cfg.get(key):
            raise ValueError(f"trainer=fsdp: {key}= needs the whole model in one process: leave it out, or {way_out}")


def sharded(net: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The network, sharded in place over all processes. Raises ValueError if it is quantised or placed by ``device_map``."""
    if getattr(net, "hf_device_map", None) or getattr(net, "is_quantized", False):
        raise ValueError(
            f"trainer=fsdp: {type(net).__name__} is quantised, or spread over GPUs already: leave out model.net.device_map= and "
            "model.net.quantization_config=, or choose trainer=cpu or trainer=gpu"
        )
    from torch.distributed.device_mesh import init_device_mesh

    shard(net, init_device_mesh(device.type, (world()[1],)))
    return net
