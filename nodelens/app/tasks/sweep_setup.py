"""What a config of prune.py asks for: the cells of its sweep, the model with its groups, and the object that runs cells."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from nodelens.app.config import build, resolved
from nodelens.network.objective import Objective
from nodelens.pruning.context import PruningContext
from nodelens.pruning.criteria.criterion import Criterion
from nodelens.pruning.criteria.scoring import columns_of
from nodelens.pruning.groups.families import family_groups
from nodelens.pruning.sweep.sweep import Cell, Sweep, cells
from nodelens.results.result import Result
from nodelens.statistics.processes import world

from .common import build_all, initial_of, objective_of
from .estimate_costs import LANGUAGE, from_config
from .progress import progress_bar
from .sweep_evaluator import SweepEvaluator


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


def context_of(cfg: DictConfig, net: torch.nn.Module, data: Any, save_to: Path | None = None) -> PruningContext:
    """The pruning context: the network with its groups, the calibration data of this process, and a folder for unfinished sums."""
    rank, processes = world()
    values = resolved(cfg)
    loader = data.loader("calibration", rank=rank, world=processes)
    given = next(iter(data.loader("calibration", batch_size=2)))
    objective = Objective.of(net, **objective_of(cfg)).settled(net, given)
    budget = values["budget"]
    options = {k: values[k] for k in ("groups", "positions", "precision", "kernels", "covariance", "save_minutes")}
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


def sweep_of(cfg: DictConfig, folder: Path, context: PruningContext, data: Any, scores: Result, evaluator: SweepEvaluator) -> Sweep:
    """The sweep of a run folder, with the scores that were measured."""
    table = scores.units.rename_axis(index=["group", "unit"])
    finetune, first = _finetuning(cfg, data), world()[0] == 0
    return Sweep(folder, context, table, evaluator, cfg.apply, finetune, first, scores.metadata["refused"])


def _finetuning(cfg: DictConfig, data: Any) -> Callable[[int], Any] | None:
    """A function from seed to fine-tuning on the training split, selected on validation data; None without fine-tuning."""
    if not cfg.finetune:
        return None
    if not len(data.loader("val")):
        raise ValueError("fine-tuning selects the best epoch on validation data, but there are none: set dataset.val=0.1")
    objective = {name: value for name, value in objective_of(cfg).items() if value is not None}
    val = data.loader("val")
    return lambda seed: build(cfg.finetune, "finetune", train=data.train_dataloader(), val=val, seed=seed, **objective)


def _amounts(given: Any) -> list[float]:
    """The amounts of a config, sorted. Raises ValueError for one that is no number."""
    wrong = next((each for each in _as_list(given) if isinstance(each, bool) or not isinstance(each, (int, float))), None)
    if wrong is not None:
        raise ValueError(f"amounts has {wrong!r}; an amount is a share to remove, a number from 0 up to but not including 1")
    return sorted(set(map(float, _as_list(given))))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
