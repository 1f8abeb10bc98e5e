"""prune.py: scores units once, removes them in every combination of the config, and evaluates each pruned model."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig

from nodelens.app.config import recorded, resolved
from nodelens.engine.request import describe
from nodelens.pruning.context import PruningContext
from nodelens.pruning.criteria.scoring import columns_of
from nodelens.pruning.sweep.ranking import areas, best_cell, score_of
from nodelens.pruning.sweep.sweep import Cell, Sweep
from nodelens.pruning.sweep.tables import groups_table, sweep_table
from nodelens.results.files import SUMS, checked, plain, read_json, reading, remove_sums, write, write_json
from nodelens.results.result import Result, fingerprint, load, provenance
from nodelens.statistics.processes import world

from .analyze import run_metadata
from .common import is_dry_run, launch, loggers_of, to_device
from .media import sweep_figures
from .progress import console, print_line, progress_bar, step
from .run_folder import open_inputs, run_folder
from .sharding import check_sharding
from .show_pruning import show_groups, show_sweep
from .sweep_evaluator import SweepEvaluator
from .sweep_setup import context_of, context_of_shapes, requested_cells, sweep_of
from .sweep_workers import add_latency, check_workers, run_in_workers

_BEST = ("accuracy", "val_accuracy", "perplexity", "val_loss", "macs_share", "params_share")  # of the best cell, for loggers


def prune(cfg: DictConfig) -> Any:
    """Runs the sweep, or shows a finished one again; returns its score: the area under the best curve, or what ``score`` names."""
    requested_cells(cfg)
    check_workers(cfg)
    check_sharding(cfg)
    with run_folder(cfg) as folder:
        if not ((folder / "sweep.parquet").is_file() and (folder / "report.html").is_file()):
            return launch(cfg, lambda device: _work(cfg, folder, device))
        return _show_again(cfg, folder)


def _show_again(cfg: DictConfig, folder: Path) -> Any:
    from nodelens.report import write_pruning_page

    open_inputs(cfg, folder)
    load(folder)  # damaged scores are refused by each process
    print_line(f"already finished: {folder}")
    with reading(folder / "sweep.parquet") as path:
        table = pd.read_parquet(path)
    show_sweep(console(), table)
    if world()[0] == 0:  # with the options of this start
        print_line(f"page: {write_pruning_page(folder, **resolved(cfg)['report'])}")
    return score_of(table, resolved(cfg)["score"])


def _work(cfg: DictConfig, folder: Path, device: torch.device) -> Any:
    from nodelens.report import write_pruning_page

    rank, processes = world()
    check_workers(cfg, processes)
    if is_dry_run(cfg) and (shapes := context_of_shapes(cfg)) is not None:
        show_groups(console(), shapes)
        return math.nan
    with step("opening data and model"):
        data, module, trained_by = open_inputs(cfg, folder)
    context = context_of(cfg, to_device(module.net, device).eval(), data, folder / SUMS)
    if rank == 0:
        show_groups(console(), context)
    if is_dry_run(cfg):
        return math.nan
    requested = requested_cells(cfg)
    with step("measuring scores"):
        result = _load_or_measure(cfg, folder, context, data, requested, trained_by)
    evaluator = SweepEvaluator(cfg, context, data)
    dense = _cached_json(folder / "dense.json", lambda: evaluator.of(context.model, "dense_", "evaluating the dense model"))
    sweep = sweep_of(cfg, folder, context, data, result, evaluator)
    with step("sweep"):
        if cfg.sweep.workers > 1:
            run_in_workers(cfg, sweep, requested, device)
        if processes == 1:
            add_latency(sweep, requested, evaluator)
        rows = sweep.run(requested, progress_bar("sweep", len(requested), rank == 0))
    found = sweep_table(rows, dense)
    if not (found["status"] == "done").any():
        raise ValueError(f"no cell of the sweep can be carried out; {found['name'].iloc[0]}: {found['error'].iloc[0]}")
    if rank == 0:
        _finish(folder, found)
    _save_models(cfg, folder, sweep, requested, found, getattr(data, "stored_tokenizer", None))
    if rank == 0:
        print_line(f"page: {write_pruning_page(folder, **resolved(cfg)['report'])}")
        _log(cfg, folder, found, dense, result)
    return score_of(found, resolved(cfg)["score"])


def _load_or_measure(
    cfg: DictConfig, folder: Path, context: PruningContext, data: Any, requested: list[Cell], trained_by: Any
) -> Result:
    """The scores that the criteria read, from the folder if they are there, else measured and saved."""
    if (folder / "metadata.json").is_file():
        return load(folder)
    criteria = list({cell.options.criterion.name: cell.options.criterion for cell in requested}.values())
    columns = columns_of(criteria, context.columns)
    table, refused = context.tables(criteria)
    units = table.rename_axis(index=["layer", "unit"])
    samples = len(data.indices["calibration"]) if hasattr(data, "indices") else None
    result = Result(units, groups_table(context.model, context.groups, context.cost))
    result.metadata |= provenance() | run_metadata(cfg, data, "calibration", trained_by)
    result.metadata |= {
        "metrics": {name: describe(metric) for name, metric in columns.items() if name in units},
        "refused": refused,
        "seed": cfg.seed,
        "samples": samples,
        "model": {"class": type(context.model).__name__, "fingerprint": fingerprint(context.model)},
        "frozen": [{"what": f.what, "reason": f.reason} for f in context.groups.frozen],
        "coverage": context.groups.coverage(context.model),
    }
    if world()[0] == 0:
        result.save(folder)
        remove_sums(folder)
        data.save_splits(folder)
    return result


def _finish(folder: Path, table: pd.DataFrame) -> None:
    write(folder / "ranking.parquet", areas(table).reset_index().to_parquet)
    write(folder / "sweep.parquet", table.to_parquet)
    remove_sums(folder)  # of the scorings within an iterative schedule
    show_sweep(console(), table)


def _log(cfg: DictConfig, folder: Path, table: pd.DataFrame, dense: dict[str, float], scores: Result) -> None:
    from nodelens.results.loggers import close, log_result, log_run, log_sweep

    loggers = loggers_of(cfg, scores.metadata["config"])
    best = areas(table).reset_index().iloc[0]
    summary: dict[str, Any] = {f"final/{name}": value for name, value in dense.items()}
    row = best_cell(table)
    summary |= {f"best/{name}": float(row[name]) for name in _BEST if row is not None and name in row and pd.notna(row[name])}
    summary |= {"final/area": float(best["area"]), "final/best_criterion": str(best["criterion"]), "cells": len(table)}
    try:
        log_sweep(loggers, table, dense)
        log_result(loggers, scores)
        log_run(loggers, folder, cfg.ckpt_path, scores.metadata["config"], summary, lambda: sweep_figures(table, scores))
    finally:
        close(loggers)


def _save_models(cfg: DictConfig, folder: Path, sweep: Sweep, requested: list[Cell], table: pd.DataFrame, tokenizer: Any) -> None:
    """Saves the pruned models of ``cfg.save``: the best cell on validation data at the largest amount, one cell, or all."""
    names = [cell.name for cell in requested]
    if cfg.save == "best":
        best = best_cell(table)
        chosen = [] if best is None else [best["name"]]
    else:
        chosen = names if cfg.save == "all" else [] if cfg.save in (None, "none") else [cfg.save]
    for name in chosen:
        if name not in names:
            raise ValueError(f"save is {name!r}; it must be best, all, none, or a cell such as {names[0]}")
        place = folder / "pruned" / name if cfg.save == "all" else folder / "pruned"
        if (place / "plan.json").is_file():
            continue
        pruned = sweep.pruned(requested[names.index(name)])
        if "transformers" not in pruned.origin:
            pruned = replace(pruned, origin={"net": plain(recorded(cfg)["model"].get("net") or {}), **pruned.origin})
        if world()[0] == 0:
            pruned.save(place, tokenizer, table)
            print_line(f"saved {name} to {place}: {sum(p.numel() for p in pruned.model.parameters()):,} parameters")


def _cached_json(path: Path, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    if not path.is_file():
        value = compute()
        if world()[0] == 0:
            write_json(path, value)
        return value
    found = read_json(checked(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no scores of the dense model: delete it, and the run measures them again")
    return found
