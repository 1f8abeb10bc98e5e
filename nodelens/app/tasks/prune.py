"""prune.py: scores units once, removes them in every combination of the config, and evaluates each pruned model."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig

from nodelens.app.config import build, recorded, resolved
from nodelens.engine.request import describe
from nodelens.metrics import Metric
from nodelens.metrics.base import section_of
from nodelens.network.objective import Objective
from nodelens.pruning.context import PruningContext
from nodelens.pruning.criteria.criterion import Criterion
from nodelens.pruning.criteria.scoring import columns_of
from nodelens.pruning.groups.families import family_groups
from nodelens.pruning.sweep.ranking import areas, best_cell, score_of
from nodelens.pruning.sweep.sweep import Cell, Sweep, cells
from nodelens.pruning.sweep.tables import groups_table, sweep_table
from nodelens.results.files import SUMS, checked, plain, read_json, reading, remove_sums, write, write_json
from nodelens.results.result import Result, fingerprint, load, provenance
from nodelens.statistics.processes import world

from .analyze import run_metadata
from .common import build_all, initial_of, is_dry_run, launch, loggers_of, objective_of, to_device
from .estimate_costs import LANGUAGE, from_config
from .media import sweep_figures
from .progress import console, print_line, progress_bar, step
from .run_folder import open_inputs, run_folder
from .show_pruning import show_groups, show_sweep
from .sweep_evaluator import SweepEvaluator

_BEST = ("accuracy", "val_accuracy", "perplexity", "val_loss", "macs_share", "params_share")  # of the best cell, for loggers


def prune(cfg: DictConfig) -> Any:
    """Runs the sweep, or shows a finished one again; returns its score: the area under the best curve, or what ``score`` names."""
    requested_cells(cfg)
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


def requested_cells(cfg: DictConfig) -> list[Cell]:
    """All cells of a config. Raises ValueError for invalid options before anything is measured."""
    values = resolved(cfg)
    criteria = [Criterion.of(spec, name) for name, spec in values["criterion"].items() if spec is not None]
    columns_of(criteria, dict.fromkeys(values["metrics"] or {}))
    if values["apply"] not in ("slice", "mask"):
        raise ValueError(f"apply is {values['apply']!r}; it must be slice or mask")
    return cells(
        criterion=criteria,
        allocation=list(build_all(cfg.allocation, "allocation").values()),
        compensate=_as_list(values["compensate"]),
        mode=_as_list(values["mode"]),
        amount=_amounts(values["amounts"]),
        seed=sorted(set(_as_list(values["seeds"]))),
        schedule=[build(cfg.schedule, "schedule")],
        budget=[values["budget"]["amount"]],
        protect=[values["protect"]],
        nan_policy=[values["nan_policy"]],
    )


def _work(cfg: DictConfig, folder: Path, device: torch.device) -> Any:
    from nodelens.report import write_pruning_page

    rank, _ = world()
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
    table = result.units.rename_axis(index=["group", "unit"])
    sweep = Sweep(folder, context, table, evaluator, cfg.apply, _finetuning(cfg, data), rank == 0, result.metadata["refused"])
    with step("sweep"):
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


def context_of(cfg: DictConfig, net: torch.nn.Module, data: Any, save_to: Path | None = None) -> PruningContext:
    """The pruning context: the network with its groups, the calibration data of this process, and a folder for unfinished sums."""
    rank, processes = world()
    values = resolved(cfg)
    loader = data.loader("calibration", rank=rank, world=processes)
    given = next(iter(data.loader("calibration", batch_size=2)))
    objective = Objective.of(net, **objective_of(cfg)).settled(net, given)
    budget = values["budget"]
    options = {k: values[k] for k in ("groups", "positions", "precision", "covariance", "save_minutes")}
    options |= {"budget": budget["memory"], "width": budget["width"], "max_passes": budget["max_passes"]}
    if save_to is not None:
        options["save_to"] = save_to
    if cfg.initial_path is not None:
        options["initial"] = initial_of(cfg, net)
    return PruningContext.of(
        net,
        objective.batch(given),
        loader,
        objective=objective,
        **_chosen_groups(cfg),
        seed=cfg.seed,
        reduce=values["reduce"],
        columns=build_all(cfg.metrics, "metrics"),
        all_data=data.loader("calibration"),
        progress=progress_bar("measuring", None, rank == 0),
        options=options,
    )


def context_of_shapes(cfg: DictConfig) -> PruningContext | None:
    """The pruning context of a language model, from its config alone; None for what needs weights or data.

    The groups of other models are read from their graph and tested with values.
    """
    net = resolved(cfg)["model"].get("net") or {}
    found = from_config(cfg) if net.get("_target_") == LANGUAGE else None
    if found is None or not len(family_groups(found[0])):
        return None
    model, batch, _ = found
    objective = Objective.of(model, **objective_of(cfg))
    return PruningContext.of(model, objective.batch(batch), objective=objective, **_chosen_groups(cfg))


def _chosen_groups(cfg: DictConfig) -> dict[str, Any]:
    return {name: resolved(cfg)[name] for name in ("scope", "freeze", "allow_approximate", "custom_groups")}


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
        "metrics": {name: describe_column(term) for name, term in columns.items() if name in units},
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


def describe_column(term: Any) -> dict[str, Any]:
    """The definition of a column: a metric or a published criterion."""
    if isinstance(term, Metric):
        return describe(term)
    return {
        "metric": term.names[0],
        "options": term.options,
        "needs": {"reads": term.needs},
        "source": section_of(type(term).__doc__ or "", "Source"),
        "kind": "unit",
    }


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


def _finetuning(cfg: DictConfig, data: Any) -> Callable[[int], Any] | None:
    """A function from seed to fine-tuning on the training split, selected on validation data; None without fine-tuning."""
    if not cfg.finetune:
        return None
    if not len(data.loader("val")):
        raise ValueError("fine-tuning selects the best epoch on validation data, but there are none: set dataset.val=0.1")
    objective = {name: value for name, value in objective_of(cfg).items() if value is not None}
    val = data.loader("val")
    return lambda seed: build(cfg.finetune, "finetune", train=data.train_dataloader(), val=val, seed=seed, **objective)


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


def _amounts(given: Any) -> list[float]:
    """The amounts of a config, sorted. Raises ValueError for one that is no number."""
    wrong = next((each for each in _as_list(given) if isinstance(each, bool) or not isinstance(each, (int, float))), None)
    if wrong is not None:
        raise ValueError(f"amounts has {wrong!r}; an amount is a share to remove, a number from 0 up to but not including 1")
    return sorted(set(map(float, _as_list(given))))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
