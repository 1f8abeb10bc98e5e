"""Lightning callbacks that measure units during training and record the test score."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from nodelens.analysis.registry import Analyses, with_metrics
from nodelens.engine.analyze import analyze, finish
from nodelens.engine.associations import differentiates
from nodelens.engine.collect import Pass
from nodelens.engine.covariance import LIMIT, CovariancePolicy
from nodelens.engine.dry_run import DryRun
from nodelens.engine.members import of_groups_only
from nodelens.engine.plan import Plan
from nodelens.engine.several_passes import check_bytes
from nodelens.engine.validation import in_bytes
from nodelens.evaluation.evaluate import evaluate
from nodelens.messages import as_seed
from nodelens.metrics import Metric
from nodelens.models import load_weights
from nodelens.network.batch import Batch
from nodelens.network.find_layers import find_layers
from nodelens.network.hooks import Capture, Site
from nodelens.network.layers import Layer
from nodelens.network.objective import Objective
from nodelens.network.sharded import full
from nodelens.results.files import SUMS, write, write_json
from nodelens.results.left_out import warn_of_rows
from nodelens.results.loggers import close, histograms, log_result, scalars
from nodelens.results.result import Result
from nodelens.statistics.processes import world

from .epoch_analyses import EpochAnalyses


class Measure(Callback):
    """Measures the units every epoch and writes ``units_<epoch>.parquet`` and ``layers_<epoch>.parquet`` to a folder.

    on: ``probe`` measures the calibration samples in eval mode after each epoch, the same rows every time. Its sums are saved every
    ``save_minutes`` and before a signal: a pass that was stopped continues, if the training comes to the same weights again.
    ``train`` measures the training batches while the weights change. A checkpoint within an epoch has the sums so far, except for
    several processes: an epoch within which their training was resumed is left out, with a warning. The measured module is
    ``module.net``.

    analysis: further analyses of each epoch, such as modularity, in ``<folder>/<name>/<epoch>``, and of all in ``<folder>/<name>``.
    """

    def __init__(
        self,
        metrics: dict[str, Metric],
        folder: str,
        layers: str | list[str] = "*",
        on: Literal["probe", "train"] = "probe",
        every: int = 1,
        groups: int = 8,
        positions: int | None = None,
        precision: str = "float32",
        kernels: str = "auto",
        budget: str | float | None = None,
        pairs: str | list[list[str]] = "consecutive",
        bias: bool = False,
        seed: int = 0,
        covariance: str | None = None,
        width: int = LIMIT,
        max_passes: int = 1,
        analysis: Analyses = (),
        save_minutes: float = 10.0,
    ):
        self.analyses, self.save_minutes = EpochAnalyses.of(analysis), save_minutes
        metrics = with_metrics(metrics, self.analyses.analyses)
        self.metrics, self.folder, self.layers, self.on, self.every = metrics, Path(folder), layers, on, every
        self.groups, self.positions, self.precision, self.budget, self.seed = groups, positions, precision, budget, as_seed(seed)
        self.kernels = kernels
        self.pairs, self.bias, self.covariance, self.width, self.passes = pairs, bias, covariance, width, max_passes
        self.start: dict[str, Tensor] | None = None  # the weights before training, for metrics of their change
        self.sums: dict[str, Tensor] | None = None  # of the epoch in which training continues
        self.capture: Capture | None = None
        self.plan: Plan | None = None
        self.taken: Pass | None = None
        self.result: Result | None = None
        self.logits: Tensor | None = None
        self.objective: Objective | None = None
        self.partial = False  # whether earlier batches of the epoch were not seen

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        find_layers(pl_module.net, self.layers)  # type: ignore[arg-type]  # a pattern without a match stops before the first epoch
        if self.start is None and any(metric.parameter == "change" for metric in self.metrics.values()):
            self.start = {k: full(v.detach()).clone() for k, v in pl_module.net.state_dict().items()}  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        """The weights before training, and the sums of an epoch in progress."""
        alone = self.taken is not None and world()[1] == 1
        return {"start": self.start, "sums": self.taken.state_dict() if alone else None}  # type: ignore[union-attr]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.start, self.sums = state_dict.get("start"), state_dict.get("sums")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        self.partial = self.on == "train" and progress.processed > 0 and self.sums is None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.partial = False  # this hook is not called where an epoch continues

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.on == "train" and self._due(trainer) and not self.partial:
            if self.objective is None:
                self.objective = Objective.of(pl_module.net).settled(pl_module.net, batch)  # type: ignore[arg-type]
            batch = self.objective.batch(batch, self.groups, self.seed)
            if self.capture is None:
                self._open(pl_module, batch, self.objective)
            assert self.taken is not None
            assert self.capture is not None
            self.capture.scale = _undo_scaling(trainer, int(batch.predicted.sum()))
            self.taken.begin(batch)
            self.capture.gate = True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.capture:
            self.capture.gate = False  # a recomputation under checkpointing would count its rows twice

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.taken is not None and self.taken.batch is not None:
            self.taken.end(self.logits)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        started = time.perf_counter()
        if not self._due(trainer):
            return
        if self.partial:
            epoch = trainer.current_epoch
            rank_zero_warn(
                f"no units are written for epoch {epoch}: training was resumed within it, so not all batches were measured"
            )
            return
        if self.on == "probe":
            self.result = analyze(
                pl_module.net,  # type: ignore[arg-type]
                _Batches(trainer, pl_module),
                self.metrics,
                self.layers,
                seed=self.seed,
                groups=self.groups,
                positions=self.positions,
                precision=self.precision,
                kernels=self.kernels,
                pairs=self.pairs,
                initial=self.start,
                bias=self.bias,
                budget=in_bytes(self.budget),
                covariance=self.covariance,
                width=self.width,
                max_passes=self.passes,
                save_to=self._unfinished,
                save_minutes=self.save_minutes,
            )
        elif self.taken is not None and self.plan is not None:
            self.taken.flush()
            self.result = finish(self.plan, self.taken, pl_module.device, self.bias, self.seed)
            warn_of_rows(self.result.metadata["left_out"])
        self.close()
        if self.result is not None:
            batches = _Batches(trainer, pl_module)
            self.analyses.run(pl_module.net, batches, self.result, self.seed, self._unfinished, self.save_minutes)  # type: ignore[arg-type]
            if trainer.is_global_zero:
                self._write(trainer, self.result, time.perf_counter() - started)
            shutil.rmtree(self._unfinished, ignore_errors=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.result is not None:
            self.analyses.finish(self.folder)
            log_result(trainer.loggers, self.result)

    def close(self, *_: Any, **__: Any) -> None:
        """Removes the hooks, also if training raises."""
        if self.capture:
            self.capture.close()
        self.capture = self.taken = None

    on_exception = close
    teardown = close

    @property
    def _unfinished(self) -> Path:
        """Where this process keeps the sums of an epoch's passes, in case it is stopped within one."""
        return self.folder / SUMS / f"process{world()[0]}"

    def _due(self, trainer: Trainer) -> bool:
        return not trainer.sanity_checking and trainer.current_epoch % self.every == 0

    def _open(self, module: LightningModule, batch: Batch, objective: Objective) -> None:
        net: Any = module.net
        if alone := [name for name, metric in self.metrics.items() if of_groups_only(metric) or differentiates([metric])]:
            raise ValueError(f"metric {alone[0]!r} is measured in a pass of its own: take on=probe, or leave it out")
        layers = find_layers(net, self.layers, self.start)
        self.plan = Plan.of(
            net,
            layers,
            self.metrics,
            DryRun.of(net, layers, batch, objective),
            self.groups,
            self.positions,
            self.layers == "*",
            self.precision,
            self.pairs,
            covariance=CovariancePolicy.of(self.covariance, self.width, self.seed),
        ).with_kernels(self.kernels, module.device)
        check_bytes(self.plan, in_bytes(self.budget))
        self.taken = Pass(self.plan, objective, self.seed)
        if self.sums is not None:
            self.taken.load_state_dict({name: t.to(module.device) if "/" in name else t for name, t in self.sums.items()})
            self.sums = None
        root = Site(Layer("", net), "output")
        self.capture = Capture([*self.plan.sites(), root], self._see, self.plan.overwritten).open()

    def _see(self, site: Site, tensor: Tensor) -> None:
        if site.layer.name == "":
            self.logits = tensor
        elif self.taken is not None:
            self.taken.see(site, tensor)

    def _write(self, trainer: Trainer, result: Result, seconds: float) -> None:
        name = f"{trainer.current_epoch:03d}.parquet"
        write(self.folder / f"units_{name}", result.units.to_parquet)
        write(self.folder / f"layers_{name}", result.layers.to_parquet)
        self.analyses.write(self.folder, trainer.current_epoch)
        keep = ("samples", "groups", "positions", "metrics", "missing", "counts", "left_out", "never_called", "warnings")
        write_json(self.folder / "metadata.json", {"on": self.on, "seconds": seconds} | {k: result.metadata[k] for k in keep})
        for logger in trainer.loggers:
            logger.log_metrics(scalars(result) | {"epoch": trainer.current_epoch}, step=trainer.global_step)
            if hasattr(logger, "log_histograms"):
                logger.log_histograms(histograms(result), {"epoch": trainer.current_epoch})


class Outcome(Callback):
    """Logs the settings when training starts, and the test score of the best weights when it ends; writes the score to a file.

    It is a callback because training may run in another process than the one that started it.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams(self.settings)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule.loader("test", rank=trainer.global_rank, world=trainer.world_size)  # type: ignore[attr-defined]
        self.score(trainer, pl_module, data)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.strategy.launcher is not None:
            close(trainer.loggers)  # a forked process ends without its exit handlers

    def score(self, trainer: Trainer, module: LightningModule, data: Any) -> dict[str, float]:
        net: Any = module.net
        best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
        if best:
            last = {k: v.detach().clone() for k, v in net.state_dict().items()}
            load_weights(net, best)
        score = evaluate(net, data)
        if best:
            net.load_state_dict(last)
        if trainer.is_global_zero:
            write_json(self.path, score | {"checkpoint": best, "epochs": trainer.current_epoch})
            for logger in trainer.loggers:
                logger.log_metrics({f"test/{k}": v for k, v in score.items()})
                if best and hasattr(logger, "log_files"):
                    logger.log_files("checkpoint", [Path(best)], ["best", "latest"], **score)
        trainer.strategy.barrier()  # other processes read the file
        return score


@dataclass(frozen=True)
class _Batches:
    """The calibration samples of this process, on its device; they can be read several times."""

    trainer: Any
    module: LightningModule

    def __iter__(self) -> Iterator[Any]:
        data = self.trainer.datamodule.loader("calibration", rank=self.trainer.global_rank, world=self.trainer.world_size)
        return (self.module.transfer_batch_to_device(batch, self.module.device, 0) for batch in data)


def _undo_scaling(trainer: Trainer, terms: int) -> float:
    """The factor from the gradient of Lightning's mean loss (with accumulation and loss scale) to that of the summed loss."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return terms * trainer.accumulate_grad_batches / (scaler.get_scale() if scaler is not None else 1.0)
