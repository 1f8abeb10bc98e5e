"""dry_run=true: what the passes of a config will take, of the config alone where shapes tell it."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from nodelens.analysis.composed import GeometryAnalysis
from nodelens.app.config import build, resolved
from nodelens.app.cost_estimate import Forecast, Machine, forecast, forecast_geometry, hollow, hollow_lm, image_batch, token_batch
from nodelens.engine.validation import in_bytes
from nodelens.network.batch import Batch
from nodelens.results.files import write_json

from .common import build_all, console, load_module, say
from .show_forecast import show_forecast
from .splits import splits

_LANGUAGE = "nodelens.models.causal_lm"


def plan(cfg: DictConfig, folder: Path) -> dict[str, Forecast]:
    """The forecast of each pass, {units: of the metrics, name: of an analysis}; shown, and written whole into plan.json.

    Neither weights, tokenizer nor data are read where the model runs on shapes alone; else the first batch and the model are, as
    for the pass itself. Raises ValueError where no pass is asked for, or what it would itself refuse but for bytes.
    """
    found = _hollow(cfg) or _loaded(cfg)
    try:
        forecasts = _forecasts(cfg, *found)
    except ValueError as error:
        if not isinstance(error.__cause__, RuntimeError) or not _is_hollow(found[0]):
            raise
        say(f"{type(found[0]).__name__} asks for values on the way, so shapes are not enough: the model and the data are opened")
        forecasts = _forecasts(cfg, *_loaded(cfg))
    for name, found_there in forecasts.items():
        show_forecast(console(), name, found_there)
    write_json(folder / "plan.json", {name: each.plain() for name, each in forecasts.items()})
    return forecasts


def machine_of(cfg: DictConfig) -> Machine:
    """What ``cost.*`` says. Raises ValueError for a memory that is no size, and numbers that are none."""
    given = dict(resolved(cfg).get("cost") or {})
    given.pop("rows", None)
    try:
        memory = in_bytes(given.pop("memory", None))
    except ValueError as error:
        raise ValueError(str(error).replace("budget.memory", "cost.memory")) from None
    return Machine(memory=memory, **given)


def _forecasts(cfg: DictConfig, net: nn.Module, batch: Any, rows: int) -> dict[str, Forecast]:
    values, machine, budget = resolved(cfg), machine_of(cfg), in_bytes(cfg.budget.memory)
    metrics, found = build_all(cfg.metrics, "metrics"), {}
    if metrics:
        found["units"] = forecast(
            net,
            metrics,
            values["layers"],
            batch=batch,
            rows=rows,
            machine=machine,
            budget=budget,
            initial=cfg.initial_path is not None,
            **{name: values[name] for name in ("groups", "positions", "precision", "pairs")},
            **_options(values),
        )
    for name, analysis in build_all(values.get("analysis"), "analysis").items():
        if isinstance(analysis, GeometryAnalysis):
            found[name] = _geometry(analysis, net, batch, rows, machine)
        else:
            say(f"{name}: {type(analysis).__name__} has no plan before it runs")
    if not found:
        raise ValueError("no pass to plan: choose metrics, as in 'metrics=[rq,synergy]', or analysis=geometry")
    return found


def _options(values: dict[str, Any]) -> dict[str, Any]:
    """What a config says of wide sites and of several passes, where it can."""
    budget = values["budget"]
    known = {"covariance": values.get("covariance"), "width": budget.get("width"), "passes": budget.get("passes")}
    return {name: value for name, value in known.items() if value is not None}


def _geometry(analysis: GeometryAnalysis, net: nn.Module, batch: Any, rows: int, machine: Machine) -> Forecast:
    samples, length = batch["input_ids"].shape
    options = {name: value for name, value in vars(analysis).items() if not name.endswith("_name")}
    options |= {"max_tokens": analysis.max_tokens or rows, "budget": in_bytes(analysis.budget)}
    return forecast_geometry(net, samples=samples, length=length, machine=machine, **options)


def _hollow(cfg: DictConfig) -> tuple[nn.Module, Any, int] | None:
    """The model without weights, a batch without data and the rows to read; None where the config does not tell them."""
    values = resolved(cfg)
    data, net = values["dataset"], values["model"].get("net") or {}
    sizes = [data.get(key) for key in (("batch_size", "length") if "length" in data else ("batch_size", "channels", "size"))]
    if None in sizes or "_target_" not in net:
        return None
    batch = token_batch(*sizes) if "length" in data else image_batch(*sizes)
    rows = _wanted(cfg) or _rows(cfg, data)
    if net["_target_"] == _LANGUAGE:
        return hollow_lm(**{name: value for name, value in net.items() if name != "_target_"}), batch, rows
    try:
        return hollow(lambda: build(net, "model.net")), batch, rows
    except (RuntimeError, ValueError, OSError):  # weights that are read on the way; what is wrong shows when it is built for real
        return None


def _loaded(cfg: DictConfig) -> tuple[nn.Module, Any, int]:
    """The model, the first batch of the pass, and how many rows it will read."""
    data = build(cfg.dataset, "dataset")
    data.setup()
    module, trained_by = load_module(cfg, data.classes)
    loader = data.loader(splits(cfg, data, trained_by)[0])
    batch = next(iter(loader), None)
    if batch is None:
        raise ValueError("the data are empty: not one batch to plan with")
    tokens = Batch.of(batch).kwargs.get("input_ids")
    per_sample = 1 if tokens is None else tokens.shape[1]
    return module.net, batch, _wanted(cfg) or len(loader.dataset) * per_sample


def _wanted(cfg: DictConfig) -> int | None:
    return (cfg.get("cost") or {}).get("rows")


def _rows(cfg: DictConfig, data: dict[str, Any]) -> int:
    """Tokens, of images samples, that a pass reads: those of the calibration split, of any other as many as ``max_tokens``."""
    most, some = data.get("max_tokens"), (data.get("calibration") or 1) * data.get("length", 1)
    if cfg.get("split") in (None, "calibration") and not data.get("streaming"):
        return some if most is None else min(some, most)
    return some if most is None else most


def _is_hollow(net: nn.Module) -> bool:
    return any(parameter.device == torch.device("meta") for parameter in net.parameters())
