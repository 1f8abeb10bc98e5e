"""The config: composed by Hydra, checked against the code it names, built in one place."""

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from .checks import check

_PACKAGE = Path(__file__).parents[1]
CONF = next(p for p in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if (p / "analyze.yaml").is_file())  # of a wheel, of a checkout
TASKS = ("train", "analyze", "prune")


@dataclass
class Budget:
    """Limits of a pass: memory in bytes or as '4GB', null for none.

    width: units beyond which products of all of them are not formed but as ``wide`` says. passes: how often the data may be read
    where the sums of all layers do not fit into the memory at once; from 2 on products are formed whatever the width.
    """

    memory: str | None = "8GB"
    width: int = 4096
    max_passes: int = 1


@dataclass
class PruneBudget(Budget):
    """Limits of a pass, and what an amount is a share of: units, params or macs."""

    amount: str = "units"


@dataclass
class Latency:
    """Batch sizes at which models are timed ([]: not at all), and how often."""

    batches: list[int] = field(default_factory=lambda: [1])
    repeats: int = 30


@dataclass
class Common:
    """Keys that every task has; a group's values come from its file."""

    task: str = MISSING
    seed: int = 0
    ckpt_path: str | None = None
    dataset: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    groups: int = 8
    positions: int | None = None
    precision: str = "float32"
    initial_path: str | None = None
    covariance: str | None = None  # diagonal, sample:1024, sketch:1024
    budget: Budget = field(default_factory=Budget)


@dataclass
class MeasuringTask(Common):
    """Keys of the tasks that measure layers."""

    layers: Any = "*"
    pairs: Any = "consecutive"
    bias: bool = False


@dataclass
class Train(MeasuringTask):
    """train.py"""

    task: str = "train"
    callbacks: dict[str, Any] = field(default_factory=dict)


@dataclass
class CostOptions:
    """What plan_only plans for: devices that share a copy of the model, bytes of each, ranks, hours, rows to read."""

    devices: int = 1
    memory: str | None = None
    ranks: int = 1
    hours: float = 1.0
    rows: int | None = None


@dataclass
class Analyze(MeasuringTask):
    """analyze.py"""

    task: str = "analyze"
    analysis: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    split: str | None = None
    plan_only: bool = False
    forecast: CostOptions = field(default_factory=CostOptions)


@dataclass
class Prune(Common):
    """prune.py"""

    task: str = "prune"
    criterion: dict[str, Any] = field(default_factory=dict)
    allocation: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] | None = None
    amounts: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    mode: Any = "low"
    compensate: Any = "none"
    apply: str = "slice"
    scope: Any = "*"
    freeze: Any = field(default_factory=list)
    protect: dict[str, Any] = field(default_factory=dict)
    custom_groups: list[Any] = field(default_factory=list)
    allow_approximate: bool = False
    reduce: str = "sum"
    nan: str = "remove"
    budget: PruneBudget = field(default_factory=PruneBudget)
    latency: Latency = field(default_factory=Latency)
    save: str | None = "best"
    plan_only: bool = False


def register() -> None:
    """Makes the schema known to Hydra."""
    store = ConfigStore.instance()
    for node in (Train, Analyze, Prune):
        store.store(name=f"{node.task}_schema", node=node)


def load_config(task: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The config that a script would compose, for a notebook: ``load_config("analyze", ["model=resnet18"])``.

    Results go to ``outputs/<task>/<time>`` below the working folder unless ``paths.output_dir=`` says otherwise.
    Raises ValueError for an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"no task is called {task!r}; there are {', '.join(TASKS)}")
    register()
    overrides = with_custom_model(overrides)
    if not any(o.startswith("paths.output_dir=") for o in overrides):
        now = datetime.datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f")
        overrides.append(f"paths.output_dir=outputs/{task}/{now}")
    with initialize_config_dir(str(CONF), version_base="1.3", job_name=task):
        return compose(task, overrides=overrides)


def with_custom_model(overrides: Sequence[str]) -> list[str]:
    """A model of the user's own (``model.net._target_=``) starts from an empty group; its options need no ``+``."""
    names = [o.split("=", 1)[0].lstrip("+") for o in overrides]
    if "model.net._target_" not in names:
        return list(overrides)
    own = [f"++{o.lstrip('+')}" if n.startswith("model.net.") else o for o, n in zip(overrides, names, strict=True)]
    return own if "model" in names else ["model=custom", *own]


def build(node: Any, path: str, **more: Any) -> Any:
    """The objects that a config names, after ``check``: the one call of ``hydra.utils.instantiate``.

    Raises ValueError with the config's path: for a key or type that does not fit, or what the object itself refuses.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    container = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    check({**container, **more} if more and isinstance(container, dict) else container, path)
    try:
        return instantiate(container, _convert_="all", **more)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, (ValueError, OSError, MemoryError)):
            raise cause from None
        if isinstance(cause, RuntimeError) or type(cause).__name__ == "MisconfigurationException":
            raise ValueError(f"{path}: {cause}") from cause
        raise


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The whole config as plain values. Raises ValueError for one that asks another group for what it does not have."""
    with _in_words():
        found = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


def unset(cfg: DictConfig) -> list[str]:
    """The keys without a value, sorted. Raises as ``resolved`` does."""
    with _in_words():
        return sorted(OmegaConf.missing_keys(cfg))


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except InterpolationKeyError as error:
        line, key = str(error).splitlines()[0], str(error.full_key)
        if key.startswith("model.") and "'dataset." in line:
            line = f"{key} asks for what this dataset does not have ({line})"
            line += ": an image model takes images, texts want model=tiny_lm or model=causal_lm"
        raise ValueError(line) from None
