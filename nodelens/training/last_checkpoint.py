"""The checkpoint from which an interrupted training continues."""

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from nodelens.statistics.processes import reduce_tensor

from .checkpoints import LAST, NEW, PREVIOUS

# of Slurm and the operating system, of Lightning's requeueing, and of submitit
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


class StoppedBySignalError(Exception):
    """Ends the training of a forked process at a signal, after its state was saved."""


class LastCheckpoint(Checkpoint):
    """Saves the state of a training as ``last.ckpt``: after every epoch, every ``minutes`` within it, and when the job has to end.

    The one before it stays as ``previous.ckpt`` until training ends. At SIGTERM, SIGUSR1 and SIGUSR2 the step in progress is
    completed, the state is saved, and training stops. A job that Slurm started is put back into the queue at SIGUSR1, and submitit
    does so at SIGUSR2.

    minutes: between two checkpoints within an epoch; None: no limit. every_n_train_steps: as many optimizer steps are trained
    between two checkpoints at most; None: no limit.
    """

    def __init__(self, dirpath: str, minutes: float | None = 10, every_n_train_steps: int | None = None):
        for name, value in (("minutes", minutes), ("every_n_train_steps", every_n_train_steps)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be positive, or null")
        self.folder, self.minutes, self.steps = Path(dirpath), minutes, every_n_train_steps
        self.asked: int | None = None  # the signal that arrived
        self.handlers: dict[int, Any] = {}  # those of others, while ours are in place
        self.time, self.step = 0.0, 0  # of the last checkpoint

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.time, self.step = time.monotonic(), trainer.global_step
        self._listen()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        signum, due = self._wishes(trainer)
        if (signum or due) and _is_complete(trainer):
            self._save(trainer)
            self._stop(trainer, signum)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signum, _ = self._wishes(trainer)
        self._save(trainer)
        self._stop(trainer, signum)
        self.close()  # what follows, such as the final test, is repeated after a restart

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and (self.folder / LAST).exists():
            _remove(self.folder / PREVIOUS)

    def close(self, *_: Any, **__: Any) -> None:
        """Gives the signals back to those who handled them before."""
        for signum, handler in self.handlers.items():
            if signal.getsignal(signum) == self._note:  # otherwise they are back already, as after Lightning's own teardown
                signal.signal(signum, handler)
        self.handlers = {}

    on_exception = teardown = close

    def _listen(self) -> None:
        if not self.handlers and threading.current_thread() is threading.main_thread():
            self.handlers = {signum: signal.signal(signum, self._note) or signal.SIG_DFL for signum in SIGNALS}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.asked = signum

    def _wishes(self, trainer: Trainer) -> tuple[int, bool]:
        """The signal that a process got, or 0, and whether a checkpoint is due: the same answer in every process."""
        late = self.minutes is not None and time.monotonic() - self.time >= 60 * self.minutes
        due = late or (self.steps is not None and trainer.global_step - self.step >= self.steps)
        if trainer.world_size > 1:
            wishes = torch.tensor([self.asked or 0, due], dtype=torch.int64, device=trainer.strategy.root_device)
            asked, due = reduce_tensor(wishes, largest=True).tolist()
            return asked, bool(due)
        return self.asked or 0, due

    def _save(self, trainer: Trainer) -> None:
        new, last, previous = (self.folder / name for name in (NEW, LAST, PREVIOUS))
        if trainer.is_global_zero and last.exists():
            _remove(previous)  # first, so that there are two files at most
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            if last.exists():
                last.replace(previous)
            new.replace(last)
        trainer.strategy.barrier()
        self.time, self.step = time.monotonic(), trainer.global_step

    def _stop(self, trainer: Trainer, signum: int) -> None:
        """Ends training at a signal, after it was handed to Slurm or to the handler before ours, which is that of submitit."""
        if not signum:
            return
        name = signal.Signals(signum).name
        rank_zero_info(f"{name}: the state after step {trainer.global_step} was saved to {self.folder / LAST}")
        before, environment = self.handlers.get(signum), trainer._accelerator_connector.cluster_environment
        self.close()
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal == signum:
            if trainer.is_global_zero:
                _requeue()
        elif callable(before) and signum != signal.SIGTERM:  # at SIGTERM Lightning would stop as is done here
            before(signum, None)
        # a launcher that forked the processes waits for results of those that end without an error
        forked = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
        raise StoppedBySignalError(name) if forked else SIGTERMException


def _is_complete(trainer: Trainer) -> bool:
    """Whether the state between two batches can be saved: no gradients are accumulated, and no validation is due."""
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    ends = loop._num_ready_batches_reached() or loop._should_check_val_fx(fetcher)
    return not ends and not loop._should_accumulate()


def _requeue() -> None:
    """Puts the Slurm job of this process back into the queue."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        ended = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        said = ended.stderr.strip() if ended.returncode else ""
    except FileNotFoundError as error:
        said = str(error)
    if said:
        rank_zero_warn(f"job {job} could not be requeued: {said}; submit it again to continue")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
