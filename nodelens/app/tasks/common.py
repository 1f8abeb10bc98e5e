"""Shared by the tasks: the run folder, the model and its weights, processes, terminal output."""

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch.multiprocessing import ProcessRaisedException

from nodelens.app.checks import check
from nodelens.app.config import build, resolved, unset
from nodelens.engine.signals import passing_on, stopping
from nodelens.engine.validation import in_bytes
from nodelens.messages import LIGHTNING_HINTS, as_seed
from nodelens.models import find_weights, load_weights
from nodelens.results.files import plain

from .progress import print_line
from .sharding import is_sharding, launched_by


def verify(cfg: DictConfig) -> None:
    """Raises ValueError for mistakes that can be found before anything is read or written.

    These are a missing value, a key or type that a class does not accept, and a number out of range.
    """
    if str(cfg.model.get("_target_", "")).endswith(".LanguageModel") and "channels" in cfg.dataset:
        raise ValueError(
            f"the model reads texts ({cfg.model._target_}) and the data are images ({cfg.dataset.get('_target_')}): choose texts, "
            "dataset=text, or a model of images, such as model=resnet18"
        )
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
    as_seed(values["seed"])
    for k, seed in enumerate(values.get("seeds", [])):
        as_seed(seed, f"seeds[{k}]")
    in_bytes(cfg.budget.memory)
    from nodelens.report.document import check_options

    check_options(**values["report"])


def is_dry_run(cfg: DictConfig) -> bool:
    """Whether the config asks for cost estimates only. ``plan_only`` is the deprecated name of ``dry_run``."""
    return bool(cfg.get("dry_run") or cfg.get("plan_only"))


def build_all(node: Any, path: str) -> dict[str, Any]:
    """The objects of a config group by name, without those set to null."""
    return {name: built for name, built in (build(node, path) if node else {}).items() if built is not None}


def loggers_of(cfg: DictConfig, config: Mapping[str, Any]) -> list[Any]:
    """The loggers of a config. config: the settings of the run as plain values, which are shown by W&B."""
    # a function, because of a dict Hydra would build the objects that it names, and resolve ${oc.env:...}
    chosen = {name: node for name, node in (cfg.logger or {}).items() if node is not None}
    settings = plain(config)
    more = {
        name: {"settings": lambda: settings} for name, node in chosen.items() if str(node.get("_target_")).endswith("wandb_logger")
    }
    return [build(node, f"logger.{name}", **more.get(name, {})) for name, node in chosen.items()]


def launch(cfg: DictConfig, work: Callable[[torch.device], float]) -> float:
    """Runs work(device) on the trainer's accelerator, in its number of processes; returns the value of the first process."""
    quiet_lightning()
    wanted = {k: cfg.trainer[k] for k in ("accelerator", "devices", "strategy", "num_nodes") if cfg.trainer.get(k) is not None}
    if is_sharding(cfg):
        wanted["strategy"] = launched_by(cfg)
    try:
        fabric = build({"_target_": "lightning.fabric.Fabric", **wanted}, "trainer")
    except ValueError as error:
        raise ValueError(
            f"{error}; trainer=cpu works everywhere, trainer=gpu needs a GPU, trainer=ddp runs several processes"
        ) from error

    def stoppable(fabric: Any) -> float:
        with stopping():
            return work(fabric.device)

    with plain_worker_errors(), passing_on():
        return fabric.launch(stoppable)


@contextmanager
def plain_worker_errors() -> Iterator[None]:
    """Re-raises the error of a forked process with its own message, without its traceback; a signal is an interruption."""
    try:
        yield
    except ProcessRaisedException as error:
        last = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
        kind, _, message = last.partition(": ")
        if kind.endswith("StoppedBySignalError"):
            raise KeyboardInterrupt from None
        if kind in ("ValueError", "FileNotFoundError", "MemoryError"):
            raise ValueError(message) from None
        raise


def quiet_lightning() -> None:
    """Sends Lightning's notices to the log of the run instead of the terminal, and hides warnings that users cannot act on."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors.checkpoint_connector"):
        logging.getLogger(name).addFilter(_no_advice)
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # expected when a run resumes
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")  # to the bit
    for hint in LIGHTNING_HINTS:
        warnings.filterwarnings("ignore", message=hint)


def _no_advice(record: logging.LogRecord) -> bool:
    """Whether a notice is more than a product's name, or an option of Lightning that is not ours to set."""
    text = record.getMessage()
    return "Tip:" not in text and "`weights_only` was not set" not in text


def load_module(cfg: DictConfig, classes: int | None = None) -> tuple[Any, dict[str, Any] | None]:
    """The Lightning module with its weights, and the config of the run that trained them, if known.

    classes: number of classes (or tokens) of the data. Raises ValueError if a language model has fewer tokens.
    """
    with torch.random.fork_rng(devices=[]):  # weights that are not loaded are random, but the same in every process and run
        torch.manual_seed(cfg.seed)
        module = build(cfg.model, "model")
    trained_by = None
    if classes is not None:
        check_tokens(module.net, classes)
    if cfg.ckpt_path:
        file = find_weights(cfg.ckpt_path)
        if Path(cfg.ckpt_path).is_dir():
            print_line(f"weights: {file}")
        trained_by = load_weights(module.net, file)
    elif not cfg.model.get("weights") and not any((cfg.model.get("net") or {}).get(key) for key in ("path", "pretrained")):
        name = type(module.net).__name__
        print_line(f"warning: the weights of {name} are random; pass ckpt_path=... to measure a trained model")
    return module, trained_by


def objective_of(cfg: DictConfig) -> dict[str, Any]:
    """The options task, output and loss of a config, functions imported. Raises ValueError for a name that is no function."""
    given = resolved(cfg)["objective"]
    output = given["output"]
    dotted = isinstance(output, str) and "." in output
    return {
        "task": given["task"],
        "output": _function("objective.output", output) if dotted else output,
        "loss": None if given["loss"] is None else _function("objective.loss", given["loss"]),
    }


def _function(key: str, name: str) -> Callable[..., Any]:
    home, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(home), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{key}={name} cannot be imported: {error}; give a function by its dotted name, as package.module.function"
        ) from error
    if not callable(found):
        raise ValueError(f"{key}={name} is {type(found).__name__}, not a function")
    return found


def initial_of(cfg: DictConfig, net: torch.nn.Module) -> torch.nn.Module | None:
    """The network before training, from ``initial_path``; None if it is not given."""
    if cfg.initial_path is None:
        return None
    start = copy.deepcopy(net)
    load_weights(start, cfg.initial_path)
    return start


def to_device(net: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Moves the network to a device, unless it is quantised or already placed by ``device_map``."""
    fixed = getattr(net, "hf_device_map", None) or getattr(net, "is_quantized", False)
    return net if fixed else net.to(device)


def check_tokens(net: torch.nn.Module, classes: int) -> None:
    """Raises ValueError if the data have more tokens than the vocabulary of a language model."""
    if hasattr(net, "get_input_embeddings"):
        from nodelens.models import check_vocabulary  # a slow import that other networks do not need

        check_vocabulary(net, classes)


def format_score(score: dict[str, Any]) -> str:
    """A score as text: accuracy, loss and, for texts, perplexity, with the number of samples or tokens. In files NaN is None."""
    score = {name: math.nan if value is None else value for name, value in score.items()}
    if "accuracy" not in score:
        return f"loss {score['loss']:.4f} on {score['samples']} samples"
    if "perplexity" not in score:
        return f"accuracy {100 * score['accuracy']:.2f} % (loss {score['loss']:.4f}) on {score['samples']} samples"
    size = f", {score['bits_per_byte']:.3f} bits per byte" if score.get("bits_per_byte") else ""
    nats = f"perplexity {score['perplexity']:.3f} ({score['loss']:.4f} nats per token{size})"
    return f"{nats}, next-token accuracy {100 * score['accuracy']:.2f} % on {score['tokens']} tokens"


def main_score(score: dict[str, Any]) -> float:
    """The accuracy, or of a task without classes the loss with the opposite sign: higher is better."""
    value = score["accuracy"] if "accuracy" in score else score["loss"]
    sign = 1 if "accuracy" in score else -1
    return math.nan if value is None else sign * float(value)


def layers_of(cfg: DictConfig, net: torch.nn.Module, batches: Iterable[Any]) -> Any:
    """The layers of the config: names, or with ``groups`` the model's pruning groups, found from the first batch."""
    if cfg.layers != "groups":
        return cfg.layers if isinstance(cfg.layers, str) else list(cfg.layers)
    from nodelens.network.batch import Batch
    from nodelens.pruning.groups.find import find_groups

    return list(find_groups(net, Batch.of(next(iter(batches)))))
