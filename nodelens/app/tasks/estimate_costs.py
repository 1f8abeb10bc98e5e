"""dry_run=true: the cost estimates of the passes of a config, from the config alone if shapes suffice."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from nodelens.analysis.composed import GeometryAnalysis
from nodelens.analysis.registry import with_metrics
from nodelens.app.config import build, resolved
from nodelens.app.cost_estimate import (
    CostEstimate,
    Machine,
    estimate_cost,
    estimate_geometry_cost,
    image_batch,
    meta_lm,
    meta_model,
    token_batch,
)
from nodelens.engine.validation import in_bytes
from nodelens.network.batch import Batch
from nodelens.results.files import write_json

from .common import build_all, layers_of, load_module
from .progress import console, print_line
from .show_cost import show_cost
from .splits import splits

LANGUAGE = "nodelens.models.causal_lm"


def estimate_costs(cfg: DictConfig, folder: Path) -> dict[str, CostEstimate]:
    """The estimate of each pass, {"units": of the metrics, name: of an analysis}. They are printed and written to plan.json.

    If the model runs on shapes alone, no weights, tokenizer or data are read; otherwise the model and the first batch are, as for
    the pass itself. Raises ValueError if there is no pass, and for what the pass itself would refuse, except for its size.
    """
    found = from_config(cfg) or _from_data(cfg)
    try:
        estimates = _estimates(cfg, *found)
    except (ValueError, RuntimeError) as error:
        if not isinstance(error.__cause__ or error, RuntimeError) or not _on_meta(found[0]):
            raise
        print_line(f"the forward of {type(found[0]).__name__} reads values, so the model and the data are loaded")
        estimates = _estimates(cfg, *_from_data(cfg))
    for name, estimate in estimates.items():
        show_cost(console(), name, estimate)
    write_json(folder / "plan.json", {name: each.plain() for name, each in estimates.items()})
    return estimates


def machine_of(cfg: DictConfig) -> Machine:
    """The machine in ``cost.*``. Raises ValueError for a memory that is not a size, and for numbers out of range."""
    given = dict(_cost_options(resolved(cfg)))
    given.pop("rows", None)
    return Machine(memory=in_bytes(given.pop("memory", None), "cost.memory"), **given)


def _estimates(cfg: DictConfig, net: nn.Module, batch: Any, rows: int) -> dict[str, CostEstimate]:
    values, machine, budget = resolved(cfg), machine_of(cfg), in_bytes(cfg.budget.memory)
    analyses = build_all(cfg.analysis, "analysis")
    metrics, found = with_metrics(build_all(cfg.metrics, "metrics"), analyses), {}
    if metrics:
        found["units"] = estimate_cost(
            net,
            metrics,
            layers_of(cfg, net, [batch]),
            batch=batch,
            rows=rows,
            machine=machine,
            budget=budget,
            initial=cfg.initial_path is not None,
            **{name: values[name] for name in ("groups", "positions", "precision", "pairs")},
            **_options(values),
        )
    for name, analysis in analyses.items():
        if isinstance(analysis, GeometryAnalysis):
            found[name] = _geometry(analysis, net, batch, rows, machine)
        elif not analysis.required_metrics():
            print_line(f"{name}: there is no cost estimate for {type(analysis).__name__}")
    if not found:
        raise ValueError("there is no pass to estimate: choose metrics, as in 'metrics=[rq,synergy]', or analysis=geometry")
    return found


def _options(values: dict[str, Any]) -> dict[str, Any]:
    """The options of wide sites and of several passes that a config has."""
    known = {"covariance": values.get("covariance"), **{name: values["budget"].get(name) for name in ("width", "max_passes")}}
    return {name: value for name, value in known.items() if value is not None}


def _geometry(analysis: GeometryAnalysis, net: nn.Module, batch: Any, rows: int, machine: Machine) -> CostEstimate:
    samples, length = batch["input_ids"].shape
    options = {name: value for name, value in vars(analysis).items() if not name.endswith("_name")}
    options |= {"max_tokens": analysis.max_tokens or rows, "budget": in_bytes(analysis.budget)}
    return estimate_geometry_cost(net, samples=samples, length=length, machine=machine, **options)


def from_config(cfg: DictConfig) -> tuple[nn.Module, Any, int] | None:
    """The model and a batch on the meta device, and the number of rows to read; None if the config does not determine them."""
    values = resolved(cfg)
    data, net = values["dataset"], values["model"].get("net") or {}
    sizes = [data.get(key) for key in (("batch_size", "length") if "length" in data else ("batch_size", "channels", "size"))]
    if None in sizes or "_target_" not in net:
        return None
    batch = token_batch(*sizes) if "length" in data else image_batch(*sizes)
    rows = _requested_rows(cfg) or _default_rows(cfg, data)
    if net["_target_"] == LANGUAGE:
        return meta_lm(**{name: value for name, value in net.items() if name != "_target_"}), batch, rows
    try:
        return meta_model(lambda: build(net, "model.net")), batch, rows
    except (RuntimeError, ValueError, OSError):  # it may read weights; real mistakes show when it is built for real
        return None


def _from_data(cfg: DictConfig) -> tuple[nn.Module, Any, int]:
    """The model, the first batch of the pass, and the number of rows to read."""
    data = build(cfg.dataset, "dataset")
    data.setup()
    module, trained_by = load_module(cfg, data.classes)
    loader = data.loader(splits(cfg, data, trained_by)[0])
    batch = next(iter(loader), None)
    if batch is None:
        raise ValueError("the data are empty: there is no batch to estimate from")
    tokens = Batch.of(batch).kwargs.get("input_ids")
    per_sample = 1 if tokens is None else tokens.shape[1]
    return module.net, batch, _requested_rows(cfg) or len(loader.dataset) * per_sample


def _requested_rows(cfg: DictConfig) -> int | None:
    return _cost_options(cfg).get("rows")


def _cost_options(cfg: Any) -> Any:
    return cfg.get("cost") or cfg.get("forecast") or {}  # forecast: the deprecated name of cost


def _default_rows(cfg: DictConfig, data: dict[str, Any]) -> int:
    """Number of tokens (images: samples) that a pass reads: the calibration split; for other splits ``max_tokens``."""
    most, some = data.get("max_tokens"), (data.get("calibration") or 1) * data.get("length", 1)
    if cfg.get("split") in (None, "calibration") and not data.get("streaming"):
        return some if most is None else min(some, most)
    return some if most is None else most


def _on_meta(net: nn.Module) -> bool:
    return any(parameter.device == torch.device("meta") for parameter in net.parameters())
