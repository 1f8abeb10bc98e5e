"""What the tasks share: the run's folder, the model and its weights, processes, words for a person."""

import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import build, resolved
from ..files import plain, read_json, write_json
from ..models import load_weights
from ..results import flatten

log = logging.getLogger("nodelens")


def console() -> Console:
    """A terminal's own width; 140 columns where the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False, soft_wrap=False)


def claim(cfg: DictConfig) -> Path:
    """The run's folder, made if need be and marked with its settings.

    Raises ValueError where it holds a run with other settings: nothing there is overwritten.
    """
    folder = Path(cfg.paths.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = plain({k: v for k, v in resolved(cfg).items() if k not in ("paths", "logger")})
    path = folder / "settings.json"
    if path.is_file():
        old, new = flatten(read_json(path)), flatten(settings)
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and not _about_folder(old.get(key)):
                raise ValueError(f"{folder} holds a run with {key}={old.get(key)}, this one has {key}={new.get(key)}: "
                                 "choose another folder (hydra.run.dir=), or the same settings to go on")
    else:
        write_json(path, settings)
    return folder


def launch(cfg: DictConfig, work: Callable[[torch.device], float]) -> float:
    """Runs work(device) on the trainer's accelerator, in as many processes as it names; returns the first one's number."""
    wanted = {k: cfg.trainer[k] for k in ("accelerator", "devices", "strategy", "num_nodes") if cfg.trainer.get(k) is not None}
    fabric = build({"_target_": "lightning.fabric.Fabric", **wanted}, "trainer")
    return fabric.launch(lambda fabric: work(fabric.device))


def load_module(cfg: DictConfig) -> tuple[Any, dict[str, Any] | None]:
    """The Lightning module with its weights, and the config of the run that trained them, where that is known."""
    module = build(cfg.model, "model")
    trained_by = None
    if cfg.ckpt_path:
        trained_by = load_weights(module.net, cfg.ckpt_path)
    elif not cfg.model.get("weights") and not (cfg.model.get("net") or {}).get("path"):
        say(f"the weights of {type(module.net).__name__} were never trained: what is measured is their start (give ckpt_path=)")
    return module, trained_by


def bar(what: str, total: int | None, show: bool) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """A progress bar around an iterable, on a terminal; silent elsewhere."""
    def around(items: Iterable[Any]) -> Iterable[Any]:
        if not (show and sys.stderr.isatty()):
            yield from items
            return
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            yield from progress.track(items, total=total)

    return around


def say(line: str) -> None:
    """One line for the person at the terminal."""
    console().print(line, markup=False)


def _about_folder(value: Any) -> bool:
    return isinstance(value, str) and "/" in value  # a folder's own name may differ between machines
