"""The config schema; composition by Hydra; construction of the objects that a config names."""

import datetime
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, BooleanNode, DictConfig, FloatNode, IntegerNode, Node, OmegaConf
from omegaconf.errors import InterpolationKeyError
from omegaconf.resolvers import oc

from nodelens.messages import kind_of

from .checks import check
from .entries import share_nodes, store_entries
from .explain import ERRORS, explain, parsed_overrides
from .renamed import rename_in_files, taken_warnings, with_new_keys
from .search_path import CONF, SEARCHPATH, config_folders

TASKS = ("train", "analyze", "prune")
_KEY = re.compile(r"^full_key: (.+)$", re.MULTILINE)  # in Hydra's errors: where in the config an object is
_OPTION = re.compile(r"(?:\w+: )?(\w+)( is .*)", re.DOTALL)  # how objects name an option that they refuse


@dataclass
class Budget:
    """Limits of a pass: memory in bytes or as '4GB', null for none.

    width: for wider layers the full covariance is not formed, ``covariance`` says what is kept instead. max_passes: how often the
    data may be read if the sums of all layers do not fit into the memory at once; from 2 on, the width does not limit.
    """

    memory: str | None = "8GB"
    width: int = 4096
    max_passes: int = 1


@dataclass
class PruneBudget(Budget):
    """Limits of a pass, and what a pruning amount is a fraction of: units, params or macs."""

    amount: str = "units"


@dataclass
class Latency:
    """Batch sizes at which models are timed ([]: no timing), and the number of repeats."""

    batches: list[int] = field(default_factory=lambda: [1])
    repeats: int = 30


@dataclass
class SweepOptions:
    """In how many processes the cells of a sweep run."""

    workers: int = 1


@dataclass
class Report:
    """The page: where plotly's script is (shared: a file beside the page; inline; cdn), and the formats of figure files."""

    plotly: str = "shared"
    figures: list[str] = field(default_factory=list)


@dataclass
class Common:
    """Keys of every task. The values of a config group come from its file."""

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
    kernels: str = "auto"  # torch, compiled
    initial_path: str | None = None
    covariance: str | None = None  # diagonal, sample:1024, sketch:1024
    budget: Budget = field(default_factory=Budget)
    report: Report = field(default_factory=Report)


@dataclass
class MeasuringTask(Common):
    """Keys of the tasks that measure layers: names, globs, roles, or ``groups`` for the model's pruning groups."""

    layers: Any = "*"
    pairs: Any = "consecutive"
    bias: bool = False


@dataclass
class Train(MeasuringTask):
    """train.py"""

    task: str = "train"
    callbacks: dict[str, Any] = field(default_factory=dict)
    analysis: dict[str, Any] = field(default_factory=dict)


@dataclass
class CostOptions:
    """What a cost estimate (``dry_run=true``) assumes: devices per model copy, bytes of each, processes, hours, rows to read."""

    devices: int = 1
    memory: str | None = None
    ranks: int = 1
    hours: float = 1.0
    rows: int | None = None


@dataclass
class ObjectiveOptions:
    """What the network predicts, as in ``AnalyzeOptions``; loss is a dotted function, output may be one."""

    task: str | None = None
    output: Any = None
    loss: str | None = None


@dataclass
class Analyze(MeasuringTask):
    """analyze.py"""

    task: str = "analyze"
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    analysis: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    split: str | None = None
    results: str | None = None
    save_minutes: float = 10.0  # how often the sums of an unfinished pass are saved
    dry_run: bool = False
    cost: CostOptions = field(default_factory=CostOptions)


@dataclass
class Prune(Common):
    """prune.py"""

    task: str = "prune"
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    criterion: dict[str, Any] = field(default_factory=dict)
    allocation: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] | None = None
    amounts: Any = field(default_factory=list)
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
    nan_policy: str = "drop"
    budget: PruneBudget = field(default_factory=PruneBudget)
    latency: Latency = field(default_factory=Latency)
    sweep: SweepOptions = field(default_factory=SweepOptions)
    save: str | None = "best"
    score: Any = "area"
    save_minutes: float = 10.0  # how often the sums of an unfinished scoring are saved
    dry_run: bool = False


def register(folders: Sequence[Path] = (CONF,), imports: bool = True) -> None:
    """Makes the schema and the entries of metrics and criteria known to Hydra; ``folders`` and ``imports`` as ``store_entries``."""
    _store_schemas()
    store_entries(folders, imports)
    rename_in_files()
    share_nodes()


@cache
def _store_schemas() -> None:
    for node in (Train, Analyze, Prune):
        ConfigStore.instance().store(name=f"{node.task}_schema", node=node)


def load_config(task: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The config that a script would compose, for a notebook: ``load_config("analyze", ["model=resnet18"])``.

    Results go to ``outputs/<task>/<time>`` below the working folder unless ``paths.output_dir=`` says otherwise.
    Raises ValueError, in one line, for an unknown task, key or option, and for a missing folder of ``hydra.searchpath``.
    """
    if task not in TASKS:
        raise ValueError(f"no task is called {task!r}; there are {', '.join(TASKS)}")
    if isinstance(overrides, str):
        raise TypeError(f"overrides is the text {overrides!r}; give a list, as [{overrides!r}]")
    if wrong := [each for each in overrides if not isinstance(each, str)]:
        raise TypeError(f"overrides has {kind_of(wrong[0])} in it; it is a list of texts, such as ['metrics=[rq]']")
    taken_warnings()  # those of an earlier composition
    overrides = with_custom_model(with_new_keys(overrides))
    parsed = parsed_overrides(overrides)
    register(config_folders([override for override in parsed if override.key_or_group == SEARCHPATH]))
    if not any(o.startswith("paths.output_dir=") for o in overrides):
        now = datetime.datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f")
        overrides.append(f"paths.output_dir=outputs/{task}/{now}")
    with initialize_config_dir(str(CONF), version_base="1.3", job_name=task):
        try:
            cfg = compose(task, overrides=overrides)
        except ERRORS as error:
            search = [str(o.input_line) for o in parsed if o.key_or_group == SEARCHPATH]
            explain(task, parsed, [str(o.input_line) for o in parsed if (CONF / o.key_or_group).is_dir()], search, error)
    for line in taken_warnings():
        warnings.warn(line, FutureWarning, stacklevel=2)
    return cfg


def with_custom_model(overrides: Sequence[str]) -> list[str]:
    """Overrides for a user's own model (``model.net._target_=``): its group is ``custom``, and its options need no ``+``."""
    names = [o.split("=", 1)[0].lstrip("+") for o in overrides]
    if "model.net._target_" not in names:
        return list(overrides)
    own = [f"++{o.lstrip('+')}" if n.startswith("model.net.") else o for o, n in zip(overrides, names, strict=True)]
    return own if "model" in names else ["model=custom", *own]


def build(node: Any, path: str, **more: Any) -> Any:
    """Checks a config and builds the objects that it names: the only call of ``hydra.utils.instantiate``.

    Raises ValueError with the config's path, for an unknown key, a wrong type, or a value that the object refuses.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    container = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    check({**container, **more} if more and isinstance(container, dict) else container, path)
    try:
        return instantiate(container, _convert_="all", **more)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise _with_key(cause, container, path, _KEY.search(str(error))) from None
        if isinstance(cause, (OSError, MemoryError)):
            raise cause from None
        if isinstance(cause, (RuntimeError, ImportError)) or type(cause).__name__ == "MisconfigurationException":
            raise ValueError(f"{path}: {cause}") from cause
        raise


def _with_key(error: ValueError, node: Any, path: str, key: re.Match[str] | None) -> ValueError:
    """An object's error with the full key of the option that it begins with, as ``rq: regularization is -1``, if there is one."""
    for part in key[1].split(".") if key else ():
        node, path = node.get(part) if isinstance(node, dict) else None, f"{path}.{part}"
    named = _OPTION.fullmatch(str(error))
    return ValueError(f"{path}.{named[1]}{named[2]}") if named and isinstance(node, dict) and named[1] in node else error


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The whole config as plain values. Raises ValueError if a value refers to a key that another group does not have."""
    with _in_words():
        found = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


def recorded(cfg: DictConfig) -> dict[str, Any]:
    """The config as a run stores it: as ``resolved``, but values of environment variables stay ``${oc.env:NAME}``.

    Passwords and tokens come from there. Numbers of the schema, such as the seed, are resolved.
    """
    OmegaConf.register_new_resolver("oc.env", _unresolved, replace=True)
    try:
        return resolved(cfg)
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _unresolved(name: str, *default: Any, _node_: Node) -> Any:
    if isinstance(_node_, (IntegerNode, FloatNode, BooleanNode)):
        return oc.env(name, *default)
    return f"${{oc.env:{','.join([name, *('null' if d is None else str(d) for d in default)])}}}"


def unset(cfg: DictConfig) -> list[str]:
    """The keys without a value, sorted. Raises the errors of ``resolved``."""
    with _in_words():
        return sorted(OmegaConf.missing_keys(cfg))


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except InterpolationKeyError as error:
        line, key = str(error).splitlines()[0], str(error.full_key)
        if key.startswith("model.") and "'dataset." in line:
            line = f"{key} refers to a value that this dataset does not have ({line})"
            line += ": image models need images; for texts use model=tiny_lm or model=causal_lm"
        raise ValueError(line) from None
