"""prune.py: units measured once, removed by every criterion, amount and seed, and the network evaluated each time."""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig

from ..config import build, resolved
from ..distributed import world
from ..files import read_json, write, write_json
from ..layers import Layer
from ..metrics import get_metric
from ..pruning.criteria import RANDOM
from ..pruning.ranking import areas
from ..pruning.removal import check_removal
from ..pruning.sweep import cells
from ..results import Result, load
from .analyze import about, measure
from .common import bar, build_all, claim, console, launch, load_module, say
from .show import show_sweep


def prune(cfg: DictConfig) -> float:
    """Runs the sweep and returns the area under the best criterion's curve of accuracy over amount."""
    _check_criteria(resolved(cfg)["criterion"], cfg)
    folder = claim(cfg)
    if (folder / "sweep.parquet").is_file() and (folder / "report.html").is_file():
        say(f"already finished: {folder}")
        table = pd.read_parquet(folder / "sweep.parquet")
        show_sweep(console(), table)
        return float(areas(table).max())
    return launch(cfg, lambda device: _work(cfg, folder, device))


def _work(cfg: DictConfig, folder: Path, device: torch.device) -> float:
    from ..evaluate import evaluate
    from ..frame import Frame
    from ..pruning import gates, masked, run_sweep, table_of
    from ..report import write_page

    criteria = resolved(cfg)["criterion"]
    todo = cells(criteria, cfg.amounts, cfg.seeds)
    rank, processes = world()
    data = build(cfg.dataset, "dataset")
    data.setup()
    module, trained_by = load_module(cfg)
    module.to(device)
    result = _measured(cfg, folder, module.net, data, criteria, trained_by)
    frame = Frame.of(next(iter(data.loader("test")))).to(device)
    units, layers = _prunable(module.net, result)
    doors = gates(module.net, layers, frame)

    def test() -> dict[str, float]:
        return evaluate(module.net, data.loader("test", rank=rank, world=processes))

    def cell(plan: Any) -> dict[str, float]:
        with masked(doors, plan):
            return test()

    dense = _once(folder / "dense.json", test)
    rows = run_sweep(folder, units, criteria, todo, cell, cfg.mode, bar("sweep", len(todo), rank == 0))
    table = table_of(rows, dense)
    if rank == 0:
        write(folder / "sweep.parquet", table.to_parquet)
        page = write_page(folder)
        _log(cfg, table, dense)
        show_sweep(console(), table)
        say(f"gates: {', '.join(f'{k} at {v.name}' for k, v in doors.items() if k != v.name) or 'at the layers themselves'}")
        say(f"page: {page}")
    return float(areas(table).max())


def _measured(cfg: DictConfig, folder: Path, net: torch.nn.Module, data: Any, criteria: dict, trained_by: dict | None) -> Result:
    """The table that every criterion reads, measured once: again only where it is not in the folder."""
    if (folder / "metadata.json").is_file():
        return load(folder)
    chosen = build_all(cfg.metrics, "metrics")
    names = {name for terms in criteria.values() if isinstance(terms, dict) for name in terms}
    metrics = {name: chosen.get(name) or get_metric(name) for name in sorted(names)} or {"magnitude": get_metric("magnitude")}
    result = measure(cfg, net, data, "calibration", metrics)
    result.metadata |= about(cfg, data, "calibration", trained_by)
    if world()[0] == 0:
        result.save(folder)
    return result


def _check_criteria(criteria: dict[str, Any], cfg: DictConfig) -> None:
    """Raises ValueError for what a sweep cannot use, before anything is measured."""
    cells(criteria, cfg.amounts, cfg.seeds)
    for amount in cfg.amounts:
        check_removal(amount, cfg.mode)
    for name, terms in criteria.items():
        if not isinstance(terms, dict) and terms != RANDOM:
            raise ValueError(f"criterion.{name} is {terms!r}; it is metrics and their weights, as {{taylor: 1.0}}, or random")
        for metric, weight in terms.items() if isinstance(terms, dict) else ():
            shape = get_metric(metric).shape
            if shape != "unit":
                raise ValueError(f"criterion.{name}: a criterion ranks units; {metric} gives a value a {shape}")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise ValueError(f"criterion.{name}.{metric} is {weight!r}; it is a weight: a number")


def _prunable(net: torch.nn.Module, result: Result) -> tuple[Any, list[Layer]]:
    """Units that may go: not the model's own outputs."""
    outputs = set(result.metadata["outputs"])
    units = result.units[~result.units.index.get_level_values("layer").isin(outputs)]
    if not len(units):
        raise ValueError(f"nothing to prune: the only layers are the model's outputs, {', '.join(outputs)}")
    names = list(dict.fromkeys(units.index.get_level_values("layer")))
    modules = {name or type(net).__name__: module for name, module in net.named_modules()}
    return units, [Layer(name, modules[name]) for name in names]


def _once(path: Path, compute: Any) -> dict[str, float]:
    if not path.is_file():
        value = compute()
        if world()[0] == 0:
            write_json(path, value)
        return value
    return read_json(path)


def _log(cfg: DictConfig, table: Any, dense: dict[str, float]) -> None:
    from ..tracking import close, log_sweep

    loggers = list(build_all(cfg.logger, "logger").values())
    try:
        log_sweep(loggers, table, dense)
    finally:
        close(loggers)
