"""train.py: trains a network with Lightning and, with callbacks=measure, measures its units every epoch."""

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nodelens.app.config import build, recorded, resolved
from nodelens.results.files import checked, plain, read_json
from nodelens.statistics.processes import world

from .common import build_all, check_tokens, format_score, loggers_of, plain_worker_errors, quiet_lightning
from .media import training_figures
from .progress import ProgressLines, is_quiet, print_line, step
from .run_folder import check_same_inputs, run_folder
from .sharding import check_sharding


def train(cfg: DictConfig) -> float:
    """Trains and returns the test accuracy of the best checkpoint. Resumes from the last checkpoint in the folder."""
    from lightning.pytorch import seed_everything

    check_sharding(cfg)
    with run_folder(cfg) as folder:
        quiet_lightning()
        seed_everything(cfg.seed, workers=True, verbose=False)
        data = build(cfg.dataset, "dataset")
        data.setup()
        module = build(cfg.model, "model")
        check_same_inputs(cfg, folder, data, module.net)
        if (folder / "result.json").is_file():
            found = read_json(checked(folder / "result.json"))
            print_line(f"already finished: {folder} (test accuracy {100 * found['accuracy']:.2f} %)")
            if world()[0] == 0:  # with the options of this start
                _draw(cfg, folder)
            return float(found["accuracy"])
        return _prepared(cfg, folder, module, data)


def _prepared(cfg: DictConfig, folder: Path, module: Any, data: Any) -> float:
    from nodelens.results.loggers import close

    module.config = plain(recorded(cfg))
    check_tokens(module.net, data.classes)
    fits(module.net, data)
    start = starting_point(cfg, folder, module.net)
    data.save_splits(folder)
    loggers = loggers_of(cfg, module.config)
    try:
        return _fit(cfg, folder, module, data, loggers, start)
    finally:
        close(loggers)


def _fit(cfg: DictConfig, folder: Path, module: Any, data: Any, loggers: list[Any], start: str | None) -> float:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from nodelens.results.loggers import log_run
    from nodelens.results.training_history import HISTORY
    from nodelens.training.callbacks import Measure, Outcome
    from nodelens.training.checkpoints import write_atomically
    from nodelens.training.history import History
    from nodelens.training.last_checkpoint import LastCheckpoint
    from nodelens.training.resume import SeededSteps

    outcome = Outcome(folder / "result.json", plain(recorded(cfg)))
    lines = [] if sys.stderr.isatty() else [ProgressLines()]
    chosen = sorted(build_all(cfg.callbacks, "callbacks").values(), key=lambda callback: isinstance(callback, LastCheckpoint))
    if cfg.analysis and not any(isinstance(callback, Measure) for callback in chosen):
        raise ValueError(
            f"analysis=[{','.join(cfg.analysis)}] runs after each epoch that callbacks=measure measures: add callbacks=measure, or "
            "analyse the trained network with analyze.py"
        )
    callbacks = [
        SeededSteps(cfg.seed),
        History(folder / HISTORY),
        *lines,
        *chosen,
        outcome,
    ]  # the last checkpoint also has the state of the others
    trainer = build(
        _with_progress_bar(cfg.trainer), "trainer", logger=loggers or False, callbacks=callbacks, default_root_dir=str(folder)
    )
    write_atomically(trainer)
    try:
        with plain_worker_errors(), step("training"):
            trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except SystemExit:  # the trainer exits on Ctrl-C
        raise KeyboardInterrupt from None
    if not outcome.path.is_file():  # training had finished before its score was written
        outcome.score(trainer, module, data.loader("test"))
    found = read_json(outcome.path)
    if world()[0]:  # the first process draws and prints for all that a launcher has started
        return float(found["accuracy"])
    _draw(cfg, folder)
    opened = [logger for logger in loggers if getattr(logger, "_experiment", None) is not None]  # in this process
    score = {f"test/{name}": value for name, value in found.items() if name != "checkpoint"}
    log_run(opened, folder, cfg.ckpt_path, module.config, score, lambda: training_figures(folder))
    print_line(f"test {format_score(found)}")
    if found["checkpoint"]:
        print_line(f"checkpoint: {found['checkpoint']}")
    return float(found["accuracy"])


def _draw(cfg: DictConfig, folder: Path) -> None:
    """Writes the page, and prints what analyses say about the epochs."""
    from nodelens.analysis.registry import load_analysis
    from nodelens.report import write_training_page

    for name in cfg.analysis:
        if (folder / "epochs" / name / "metadata.json").is_file():
            for line in load_analysis(folder / "epochs" / name).summary().splitlines():
                print_line(f"{name}: {line}")
    print_line(f"page: {write_training_page(folder, **resolved(cfg)['report'])}")


def starting_point(cfg: DictConfig, folder: Path, net: Any) -> str | None:
    """The checkpoint to resume from: the last intact one in the folder, else ``ckpt_path``, else None.

    Raises ValueError if all in the folder are damaged; FileNotFoundError or ValueError if ``ckpt_path`` is not a training
    checkpoint of this network.
    """
    from nodelens.models import find_weights, load_weights, training_state
    from nodelens.training.checkpoints import to_resume_from

    last, damaged = to_resume_from(folder / "checkpoints")
    for line in damaged:
        print_line(f"warning: {line}; training continues from {last}")
    if last is not None:
        return str(last)
    if cfg.ckpt_path:
        load_weights(net, cfg.ckpt_path)
        if not training_state(cfg.ckpt_path):
            raise ValueError(f"{cfg.ckpt_path} has weights but no training state to resume: start from them with model.weights=")
        return str(find_weights(cfg.ckpt_path))
    return None


def fits(net: Any, data: Any) -> None:
    """Raises ValueError, with the shape of the input and a way out, if the network does not fit the data."""
    from nodelens.engine.dry_run import DryRun
    from nodelens.network.objective import Objective

    batch = next(iter(data.loader("train")))
    objective = Objective.of(net).settled(net, batch)
    dry_run = DryRun.of(net, [], objective.batch(batch), objective)
    if dry_run.refusal:
        raise ValueError(dry_run.refusal)
    if dry_run.classes < data.classes:
        raise ValueError(
            f"{type(net).__name__} has {dry_run.classes} outputs, the data have {data.classes} classes: set the "
            "model's classes, or dataset.classes="
        )


def _with_progress_bar(trainer: DictConfig) -> DictConfig:
    """Shows a progress bar on a terminal only; in a log file each refresh would be a line."""
    shown = trainer.get("enable_progress_bar")
    shown = (sys.stderr.isatty() if shown is None else shown) and not is_quiet()
    return OmegaConf.merge(trainer, {"enable_progress_bar": shown})  # type: ignore[return-value]
