"""prune.py: units scored once, removed in every way that is asked for, and what is left evaluated."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig

from nodelens.app.config import build, resolved
from nodelens.engine.request import describe
from nodelens.evaluation.evaluate import evaluate
from nodelens.metrics import Metric
from nodelens.metrics.base import section_of
from nodelens.network.batch import Batch
from nodelens.pruning.context import PruningContext
from nodelens.pruning.criteria.criterion import Criterion
from nodelens.pruning.criteria.scoring import columns_of
from nodelens.pruning.prune import Pruned
from nodelens.pruning.sweep.latency import latency
from nodelens.pruning.sweep.ranking import areas, measure_of
from nodelens.pruning.sweep.sweep import Cell, Sweep, cells
from nodelens.pruning.sweep.tables import groups_table, sweep_table
from nodelens.results.files import plain, read_json, write, write_json
from nodelens.results.result import Result, fingerprint, load, provenance
from nodelens.statistics.processes import world

from .analyze import about
from .common import bar, build_all, claim, console, launch, load_module, placed, say
from .show_pruning import show_axes, show_sweep


def prune(cfg: DictConfig) -> float:
    """Runs the sweep and returns the area under the best curve of accuracy over the MACs that went."""
    asked_of(cfg)
    folder = claim(cfg)
    if (folder / "sweep.parquet").is_file() and (folder / "report.html").is_file():
        say(f"already finished: {folder}")
        table = pd.read_parquet(folder / "sweep.parquet")
        show_sweep(console(), table)
        return _number(table)
    return launch(cfg, lambda device: _work(cfg, folder, device))


def _number(table: pd.DataFrame) -> float:
    """The best curve's area."""
    return float(areas(table)["area"].iloc[0]) if table["accuracy"].notna().any() else math.nan


def asked_of(cfg: DictConfig) -> list[Cell]:
    """Every cell that a config asks for. Raises ValueError for what a sweep cannot use, before anything is measured."""
    values = resolved(cfg)
    criteria = [Criterion.of(spec, name) for name, spec in values["criterion"].items() if spec is not None]
    columns_of(criteria, dict.fromkeys(values["metrics"] or {}))
    if values["apply"] not in ("slice", "mask"):
        raise ValueError(f"apply is {values['apply']!r}; it is slice or mask")
    return cells(
        criterion=criteria,
        allocation=list(build_all(cfg.allocation, "allocation").values()),
        compensate=_listed(values["compensate"]),
        mode=_listed(values["mode"]),
        amount=sorted(set(map(float, _listed(values["amounts"])))),
        seed=sorted(set(_listed(values["seeds"]))),
        schedule=[build(cfg.schedule, "schedule")],
        budget=[values["budget"]["amount"]],
        protect=[values["protect"]],
        nan_policy=[values["nan_policy"]],
    )


def _work(cfg: DictConfig, folder: Path, device: torch.device) -> float:
    from nodelens.report import write_pruning_page

    rank, _ = world()
    data = build(cfg.dataset, "dataset")
    data.setup()
    module, trained_by = load_module(cfg, data.classes)
    context = context_of(cfg, placed(module.net, device).eval(), data)
    if rank == 0:
        show_axes(console(), context)
    if cfg.dry_run:
        return math.nan
    todo = asked_of(cfg)
    result = _measured(cfg, folder, context, data, todo, trained_by)
    judge = Judge(cfg, context, data)
    dense = _once(folder / "dense.json", lambda: judge.of(context.model, "dense_"))
    table = result.units.rename_axis(index=["group", "unit"])
    sweep = Sweep(folder, context, table, judge, cfg.apply, _recover(cfg, data), rank == 0, result.metadata["refused"])
    rows = sweep.run(todo, bar("sweep", len(todo), rank == 0))
    found = sweep_table(rows, dense)
    if rank == 0:
        _finish(cfg, folder, found, dense)
    _keep(cfg, folder, sweep, todo, found, module)
    if rank == 0:
        say(f"page: {write_pruning_page(folder)}")
    return _number(found)


def context_of(cfg: DictConfig, net: torch.nn.Module, data: Any) -> PruningContext:
    """The network with its groups, and the calibration data of this process."""
    rank, processes = world()
    values = resolved(cfg)
    loader = data.loader("calibration", rank=rank, world=processes)
    batch = Batch.of(next(iter(data.loader("calibration", batch_size=2))))
    options = {k: values[k] for k in ("groups", "positions", "precision")}
    if cfg.initial_path is not None:
        from .analyze import initial_of

        options["initial"] = initial_of(cfg, net)
    return PruningContext.of(
        net,
        batch,
        loader,
        scope=values["scope"],
        freeze=values["freeze"],
        allow_approximate=values["allow_approximate"],
        custom_groups=values["custom_groups"],
        seed=cfg.seed,
        reduce=values["reduce"],
        columns=build_all(cfg.metrics, "metrics"),
        all_data=data.loader("calibration"),
        progress=bar("measuring", None, rank == 0),
        options=options,
    )


class Judge:
    """What a finished model is worth: accuracy and loss on validation and test data, and its latency."""

    def __init__(self, cfg: DictConfig, context: PruningContext, data: Any):
        rank, processes = world()
        self.rank, self.context = rank, context
        self.batches, self.repeats = list(cfg.latency.batches or []), cfg.latency.repeats
        self.loaders = {split: data.loader(split, rank=rank, world=processes) for split in ("test", "val")}
        self.has_val = len(data.loader("val")) > 0
        self.batch = Batch.of(next(iter(data.loader("calibration"))))
        self.timed: dict[tuple, Mapping[str, float]] = {}

    def __call__(self, pruned: Pruned) -> dict[str, Any]:
        found = self.of(pruned.model)
        before = pruned.finetuned.get("before")
        for key in ("accuracy", "loss"):
            found[f"val_pruned_{key}"] = before[key] if before else found[f"val_{key}"]
        return {**found, **self._latency(pruned)}

    def of(self, model: torch.nn.Module, prefix: str = "") -> dict[str, Any]:
        """Accuracy, its standard error, loss, ece (of texts perplexity) of the test set; accuracy and loss of validation data."""
        test = evaluate(model, self.loaders["test"])
        val = evaluate(model, self.loaders["val"]) if self.has_val else {"accuracy": math.nan, "loss": math.nan}
        test.setdefault("accuracy_se", math.sqrt(test["accuracy"] * (1 - test["accuracy"]) / test["samples"]))
        found = {f"{prefix}{k}": v for k, v in test.items() if k not in ("samples", "tokens")}
        found |= {f"val_{prefix}{k}": val[k] for k in ("accuracy", "loss")}
        return found if prefix else found | {"samples": test["samples"]}

    def _latency(self, pruned: Pruned) -> Mapping[str, float]:
        """Milliseconds, beside the dense model's in the same minute; once for models of the same widths."""
        if not self.batches or self.rank:
            return {}
        widths = tuple(sorted((k, len(v)) for k, v in pruned.plan.removed.items()))
        if widths not in self.timed:
            models = {"": pruned.model, "dense_": self.context.model}
            found = latency(models, self.batch, self.batches, self.repeats)
            self.timed[widths] = {
                f"{which}{name.replace('median', 'ms')}": ms
                for which, times in (("latency_", found[""]), ("dense_latency_", found["dense_"]))
                for name, ms in times.items()
            }
        return self.timed[widths]


def _measured(cfg: DictConfig, folder: Path, context: PruningContext, data: Any, todo: list[Cell], trained_by: Any) -> Result:
    """The scores that every criterion reads, measured once: again only where they are not in the folder."""
    if (folder / "metadata.json").is_file():
        return load(folder)
    criteria = list({cell.options.criterion.name: cell.options.criterion for cell in todo}.values())
    columns = columns_of(criteria, context.columns)
    table, refused = context.tables(criteria)
    units = table.rename_axis(index=["layer", "unit"])
    samples = len(data.indices["calibration"]) if hasattr(data, "indices") else None
    result = Result(units, groups_table(context.model, context.groups, context.cost))
    result.metadata |= provenance() | about(cfg, data, "calibration", trained_by)
    result.metadata |= {
        "metrics": {name: described(term) for name, term in columns.items() if name in units},
        "refused": refused,
        "seed": cfg.seed,
        "samples": samples,
        "model": {"class": type(context.model).__name__, "fingerprint": fingerprint(context.model)},
        "frozen": [{"what": f.what, "reason": f.reason} for f in context.groups.frozen],
        "coverage": context.groups.coverage(context.model),
    }
    if world()[0] == 0:
        result.save(folder)
        data.save_splits(folder)
    return result


def described(term: Any) -> dict[str, Any]:
    """What a column is, of a metric or a published criterion."""
    if isinstance(term, Metric):
        return describe(term)
    return {
        "metric": term.names[0],
        "options": term.options,
        "needs": {"reads": term.needs},
        "source": section_of(type(term).__doc__ or "", "Source"),
        "kind": "unit",
    }


def _finish(cfg: DictConfig, folder: Path, table: pd.DataFrame, dense: dict[str, float]) -> None:
    from nodelens.results.loggers import close, log_sweep

    write(folder / "ranking.parquet", areas(table).reset_index().to_parquet)
    write(folder / "sweep.parquet", table.to_parquet)
    loggers = list(build_all(cfg.logger, "logger").values())
    try:
        log_sweep(loggers, table, dense)
    finally:
        close(loggers)
    show_sweep(console(), table)


def _keep(cfg: DictConfig, folder: Path, sweep: Sweep, todo: list[Cell], table: pd.DataFrame, module: Any) -> None:
    """Writes the pruned model of a cell, and loads it again: the best on validation data at the largest amount, or those named."""
    names = [cell.name for cell in todo]
    if cfg.save == "best":
        finished = table[(table["status"] == "done") & (table["amount"] == table["amount"].max())]
        lower = "val_loss" if measure_of(table) == "perplexity" else "params_share"
        measure = "val_accuracy" if lower == "params_share" and finished["val_accuracy"].notna().any() else lower
        best = finished.sort_values(measure, ascending=measure != "val_accuracy", kind="stable")["name"].head(1)
        chosen = list(best)
    else:
        chosen = names if cfg.save == "all" else [] if cfg.save in (None, "none") else [cfg.save]
    for name in chosen:
        if name not in names:
            raise ValueError(f"save is {name!r}; it is best, all, none, or a cell, such as {names[0]}")
        place = folder / "pruned" / name if cfg.save == "all" else folder / "pruned"
        if (place / "plan.json").is_file():
            continue
        pruned = sweep.pruned(todo[names.index(name)])
        if "transformers" not in pruned.origin:
            pruned = replace(pruned, origin={"net": plain(resolved(cfg)["model"].get("net") or {}), **pruned.origin})
        if world()[0] == 0:
            pruned.save(place)
            say(f"{place} holds {name}: {sum(p.numel() for p in pruned.model.parameters()):,} parameters")


def _recover(cfg: DictConfig, data: Any) -> Callable[[int], Any] | None:
    """Seed to fine-tuning on the training split, selected on validation; None where nothing is asked."""
    if not cfg.finetune:
        return None
    if not len(data.loader("val")):
        raise ValueError("recovery keeps the best epoch on validation data, and there are none: give dataset.val=0.1")
    return lambda seed: build(cfg.finetune, "finetune", train=data.train_dataloader(), val=data.loader("val"), seed=seed)


def _once(path: Path, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    if not path.is_file():
        value = compute()
        if world()[0] == 0:
            write_json(path, value)
        return value
    return read_json(path)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
