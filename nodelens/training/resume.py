"""Training that can be interrupted anywhere: each batch is drawn and trained from a random state of its own."""

from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nodelens.statistics.seeding import seed_all, seed_of

from .loader_order import set_epoch

_KEY = "nodelens_epoch_end"


class SeededSteps(Callback):
    """Makes each step of a training a function of (seed, process, epoch, batch), so that a resumed training is the undisturbed one.

    The global generators are seeded before each batch is read and again before it is trained on, which covers dropout, random
    transforms, and the order of a loader that shuffles with the global generator. A training that is resumed within an epoch reads
    the batches that were already trained on once more, without training, and continues behind them. Lightning steps schedulers
    that watch a metric, and stops early, after the checkpoint at the end of an epoch: after a restart that is made up for.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.left: dict[str, Any] = {}  # what is left to do of the epoch before

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEY] = {"stop": bool(trainer.should_stop), "watched": _watched(trainer)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.left = checkpoint.get(_KEY, {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._catch_up(trainer, pl_module)
        parallel = trainer.strategy.model
        if isinstance(parallel, DistributedDataParallel) and trainer.strategy.root_device.type == "cpu":
            parallel.register_comm_hook(None, _mean_in_order)
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        done = progress.processed
        if not 0 < done < trainer.num_training_batches:
            return
        batches = self._opened(trainer)
        for k in range(done):
            next(batches)
            self._seed(trainer, k + 1)
        batches.fetched = 0  # the trainer adds the number of batches that were done

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._catch_up(trainer, pl_module)
        loop = trainer.fit_loop
        if trainer.current_epoch > 0 and not loop.is_resuming and not loop.restarting:
            self._seed(trainer, 0)  # the trainer opens the loader after this hook
        else:
            self._opened(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._seed(trainer, batch_idx, "step")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._seed(trainer, batch_idx + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.restarting:  # Lightning leaves out the schedulers of an epoch within which training was resumed
            self.left = {"watched": _watched(trainer)}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seed(trainer, trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def _catch_up(self, trainer: Trainer, module: LightningModule) -> None:
        for config, value in zip(trainer.lr_scheduler_configs, self.left.get("watched", ()), strict=False):
            if value is not None:
                module.lr_scheduler_step(config.scheduler, value)
        same_run = Path(trainer.default_root_dir) in Path(trainer.ckpt_path or "").parents  # another one may go on for longer
        trainer.should_stop = trainer.should_stop or (same_run and self.left.get("stop", False))
        self.left = {}

    def _opened(self, trainer: Trainer) -> Any:
        """The batches of an epoch from its start. The trainer opens the first epoch's before it knows which epoch it is."""
        for loader in trainer.fit_loop._combined_loader.flattened:  # type: ignore[union-attr]
            set_epoch(loader, trainer.current_epoch)
        self._seed(trainer, 0)
        return iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]

    def _seed(self, trainer: Trainer, batch: int, what: str = "read") -> None:
        seed_all(seed_of(self.seed, trainer.global_rank, trainer.current_epoch, batch, what))


def _watched(trainer: Trainer) -> list[float | None]:
    """The metric with which each scheduler is stepped at the end of an epoch; None for one that is not stepped then."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    found: list[float | None] = []
    for config in trainer.lr_scheduler_configs:
        steps = config.reduce_on_plateau and config.interval == "epoch" and (trainer.current_epoch + 1) % config.frequency == 0
        value = trainer.callback_metrics.get(str(config.monitor)) if steps and epoch.processed > epoch.completed else None
        found.append(None if value is None else float(value))
    return found


def _mean_in_order(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean gradient, added in the order of the processes.

    The order in which an all-reduce adds depends on how gradients are laid out in buckets, and that differs in the first step after
    a restart: with three or more processes the sums would differ in the last bit.
    """
    own = bucket.buffer()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    sent = dist.all_gather(parts, own, async_op=True)
    assert sent is not None
    return sent.get_future().then(lambda _: reduce(torch.add, parts) / len(parts))
