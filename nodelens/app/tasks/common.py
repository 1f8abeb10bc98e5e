"""What the tasks share: the run's folder, the model and its weights, processes, words for a person."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.multiprocessing import ProcessRaisedException

from nodelens.app.checks import check
from nodelens.app.config import build, resolved, unset
from nodelens.engine.validation import in_bytes
from nodelens.models import load_weights
from nodelens.results.files import has_results, plain, read_json, write_json
from nodelens.results.result import flatten


def console() -> Console:
    """A terminal's own width; 140 columns where the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False, soft_wrap=False)


def verify(cfg: DictConfig) -> None:
    """Raises ValueError for what can be seen to be wrong before anything is opened or written.

    A value that is missing, a key or type that its class does not take, a number out of range.
    """
    if missing := unset(cfg):
        raise ValueError(f"{missing[0]} has no value: give {missing[0]}=...")
    values = resolved(cfg)
    for group in ("dataset", "model", "trainer", "metrics", "analysis", "logger", "callbacks"):
        if group in values and not isinstance(values[group], dict):
            raise ValueError(f"{group} is {values[group]!r}; it is a group: choose one of its files, as --help shows")
        check(values.get(group) or {}, group)
    for key, least in (("groups", 1), ("positions", 1)):
        if values[key] is not None and values[key] < least:
            raise ValueError(f"{key} is {values[key]}; it is {least} or more{', or null for all' if key == 'positions' else ''}")
    in_bytes(cfg.budget.memory)


def check_settings(cfg: DictConfig) -> None:
    """Raises ValueError where the run's folder holds results of other settings: nothing there is overwritten."""
    folder = Path(cfg.paths.output_dir)
    if not (folder / "settings.json").is_file() or not has_results(folder):
        return
    old, new = flatten(read_json(folder / "settings.json")), flatten(_settings(cfg))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"{folder} holds a run with {key}={_shown(old.get(key))}, this one has {key}={_shown(new.get(key))}: "
                "choose another folder (hydra.run.dir=), or the same settings to go on"
            )


def claim(cfg: DictConfig) -> Path:
    """The run's folder, made if need be and marked with its settings; raises ValueError as verify and check_settings do."""
    verify(cfg)
    check_settings(cfg)
    folder = Path(cfg.paths.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not has_results(folder):
        write_json(folder / "settings.json", _settings(cfg))
    return folder


def build_all(node: Any, path: str) -> dict[str, Any]:
    """The objects of a group, by name; one that is set to null is left out."""
    return {name: built for name, built in (build(node, path) if node else {}).items() if built is not None}


def launch(cfg: DictConfig, work: Callable[[torch.device], float]) -> float:
    """Runs work(device) on the trainer's accelerator, in as many processes as it names; returns the first one's number."""
    wanted = {k: cfg.trainer[k] for k in ("accelerator", "devices", "strategy", "num_nodes") if cfg.trainer.get(k) is not None}
    try:
        fabric = build({"_target_": "lightning.fabric.Fabric", **wanted}, "trainer")
    except ValueError as error:
        raise ValueError(
            f"{error}; trainer=cpu works everywhere, trainer=gpu and trainer=ddp take one GPU and several processes"
        ) from error
    quiet()
    with in_one_line():
        return fabric.launch(lambda fabric: work(fabric.device))


@contextmanager
def in_one_line() -> Iterator[None]:
    """What a forked process refused is raised again here in its own words, without the process's traceback."""
    try:
        yield
    except ProcessRaisedException as error:
        last = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
        kind, _, words = last.partition(": ")
        if kind in ("ValueError", "FileNotFoundError", "MemoryError"):
            raise ValueError(words) from None
        raise


def quiet() -> None:
    """Lightning's notices go to the run's log, not to the terminal; a deprecated name it uses is its own affair."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # so it is when a run goes on
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message="The number of training batches")


def load_module(cfg: DictConfig, classes: int | None = None) -> tuple[Any, dict[str, Any] | None]:
    """The Lightning module with its weights, and the config of the run that trained them, where that is known.

    classes: of the data. Raises ValueError where a language model knows fewer tokens.
    """
    with torch.random.fork_rng(devices=[]):  # weights that are not loaded are drawn: the same in every process and run
        torch.manual_seed(cfg.seed)
        module = build(cfg.model, "model")
    trained_by = None
    if classes is not None:
        check_tokens(module.net, classes)
    if cfg.ckpt_path:
        trained_by = load_weights(module.net, cfg.ckpt_path)
    elif not cfg.model.get("weights") and not (cfg.model.get("net") or {}).get("path"):
        say(f"the weights of {type(module.net).__name__} were never trained: what is measured is their start (give ckpt_path=)")
    return module, trained_by


def placed(net: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The network on a device, but for one whose parts lie where they were put (``device_map``) or that is quantised."""
    stays = getattr(net, "hf_device_map", None) or getattr(net, "is_quantized", False)
    return net if stays else net.to(device)


def check_tokens(net: torch.nn.Module, classes: int) -> None:
    """Raises ValueError where the data have more tokens than a language model knows."""
    if hasattr(net, "get_input_embeddings"):
        from nodelens.models import check_vocabulary  # costs a second that no other network needs

        check_vocabulary(net, classes)


def in_words(score: dict[str, Any]) -> str:
    """Accuracy and, of texts, perplexity, of how many."""
    if "perplexity" not in score:
        return f"accuracy {100 * score['accuracy']:.2f} % (loss {score['loss']:.4f}) on {score['samples']} samples"
    size = f", {score['bits_per_byte']:.3f} bits a byte" if score.get("bits_per_byte") else ""
    nats = f"perplexity {score['perplexity']:.3f} ({score['loss']:.4f} nats a token{size})"
    return f"{nats}, next-token accuracy {100 * score['accuracy']:.2f} % on {score['tokens']} tokens"


def bar(what: str, total: int | None, show: bool) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """A progress bar around an iterable, on a terminal; silent elsewhere."""

    def around(items: Iterable[Any]) -> Iterable[Any]:
        if not (show and sys.stderr.isatty()):
            yield from items
            return
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            yield from progress.track(items, total=len(items) if isinstance(items, Sized) else total)

    return around


def say(line: str) -> None:
    """One line for the person at the terminal."""
    console().print(line, markup=False)


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """What makes a run this run; paths below its own folder stand without it, so that the folder may move."""
    found = plain({k: v for k, v in resolved(cfg).items() if k not in ("paths", "logger")})
    return _relative(found, str(cfg.paths.output_dir))


def _relative(value: Any, home: str) -> Any:
    if isinstance(value, dict):
        return {k: _relative(v, home) for k, v in value.items()}
    if isinstance(value, list):
        return [_relative(v, home) for v in value]
    return "." + value.removeprefix(home) if isinstance(value, str) and value.startswith(home) else value


def _shown(value: Any) -> Any:
    return "null" if value is None else value
