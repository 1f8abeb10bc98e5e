"""``analyze_model`` of representation-geometry: a model by name or as an object, measured and saved in one call."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from nodelens.analysis.geometry.analyze_model import GeometryOptions, measure_geometry
from nodelens.analysis.geometry.bundle import GeometryResult, folder_of
from nodelens.analysis.geometry.columns import FAMILIES, MetricSelection
from nodelens.engine.covariance import LIMIT
from nodelens.messages import nearest
from nodelens.metrics import Metric
from nodelens.statistics.processes import world

_LOADER = {  # what transformers' from_pretrained calls it: what nodelens.models.causal_lm calls it
    "attn_implementation": "attention",
    "config": "config",
    "device_map": "device_map",
    "dtype": "dtype",
    "quantization": "quantization",
    "revision": "revision",
    "torch_dtype": "dtype",
}


def analyze_model(
    model_name: str | Path | nn.Module | None = None,
    dataloader: Iterable[Any] | None = None,
    *,
    model: nn.Module | None = None,
    max_tokens: int | None = 100_000,
    metrics: MetricSelection = "default",
    diagnostics: str | Sequence[str] | None = None,
    layers: str | Sequence[int] = "all",
    hook_point: str | Sequence[str] = "residual_input",
    save_mode: str | None = None,
    save_dir: str | Path | None = None,
    sample_limit: int | None = 512,
    novelty_k: int = 32,
    device: str | torch.device | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    output_router_logits: bool | Literal["auto"] = "auto",
    run_name: str | None = None,
    tokenizer_name: str | None = None,
    dataset_name: str | None = None,
    run_metadata: Mapping[str, Any] | None = None,
    covariance: str | None = None,
    width: int = LIMIT,
    budget: str | float | None = None,
    max_passes: int = 1,
) -> GeometryResult:
    """Measures the residual stream of a language model in eval mode, in one pass with one row per token, and saves the result.

    model_name:   a hub id or folder of transformers, or the model itself; with ``model``, the model's name in the tables
    dataloader:   batches of tokens, as ``measure_geometry`` takes them
    save_mode:    json, csv or bundle, into ``save_dir``; a ``save_dir`` alone means bundle
    device:       where the model is moved to. None: it stays
    model_kwargs: how a model is loaded by name: dtype, attn_implementation, device_map, revision, config
    output_router_logits: False leaves the routers of experts out, otherwise ``metrics`` decides. The model's own option is not
                  needed, because hooks read what the routers decide
    run_name, run_metadata: notes for the metadata; all other options are those of ``GeometryOptions``

    With one hook point, metadata["layers"] and metadata["hook_targets"] are lists; with several, they are lists by hook point.
    Raises ValueError, with the way out, for what does not fit; MemoryError over the budget; OSError for a model that cannot be had.
    """
    if dataloader is None:
        raise ValueError("dataloader is missing: give batches of tokens, such as [{'input_ids': tokens}]")
    if trust_remote_code:
        raise ValueError(
            "trust_remote_code=True: code that lies beside weights is not run; load the model yourself and give model="
        )
    options = GeometryOptions(
        max_tokens,
        layers,
        hook_point,
        without_routers(metrics) if output_router_logits is False else metrics,
        diagnostics,
        sample_limit,
        novelty_k,
        covariance,
        width,
        budget,
        max_passes,
        tokenizer_name,
        dataset_name,
    )
    mode = save_mode or (None if save_dir is None else "bundle")
    if mode is not None:
        folder_of(save_dir, mode)  # before the work, not after it
    net = _load_model(model_name, model, model_kwargs or {})
    if device is not None and not getattr(net, "hf_device_map", None):  # whose parts lie where they were put
        net.to(device)
    label = str(model_name) if isinstance(model_name, (str, Path)) else None
    result = measure_geometry(net, dataloader, options, label=label, run_name=run_name, run_metadata=run_metadata)
    for key in ("layers", "hook_targets"):
        if len(result.metadata[key]) == 1:
            (result.metadata[key],) = result.metadata[key].values()
    if mode is not None and world()[0] == 0:
        result.save(save_dir, mode)
    return result


def without_routers(metrics: MetricSelection) -> MetricSelection:
    """What is asked for, less the routers of experts. Raises ValueError where they are asked for by name."""
    if isinstance(metrics, (Mapping, Metric)):
        return metrics
    asked = [metrics] if isinstance(metrics, str) else list(metrics or ["default"])
    if "router" in asked:
        raise ValueError("metrics names router and output_router_logits is False: leave one of them out")
    families = [family for family in FAMILIES if family != "router"]
    return [name for each in asked for name in (families if each == "default" else [each])]


def _load_model(model_name: str | Path | nn.Module | None, model: nn.Module | None, kwargs: Mapping[str, Any]) -> nn.Module:
    """The model that is given, else the one of that name."""
    given = model_name if model is None and isinstance(model_name, nn.Module) else model
    if given is not None:
        if kwargs:
            raise ValueError(f"model_kwargs={dict(kwargs)} says how a model is loaded, and the model is here already: leave it out")
        return given
    if not isinstance(model_name, (str, Path)):
        raise ValueError("there is no model: give model_name=, a hub id or a folder, or model=")
    unknown = next((name for name in kwargs if name not in _LOADER), None)
    if unknown is not None:
        known = ", ".join(sorted(_LOADER))
        raise ValueError(
            f"model_kwargs has no {unknown!r}.{nearest(unknown, _LOADER)} It takes {known}; or load the model yourself"
        )
    from nodelens.models import causal_lm

    return causal_lm(str(model_name), **{_LOADER[name]: _plain(value) for name, value in kwargs.items()})


def _plain(value: Any) -> Any:
    """A dtype by its name, anything else as it is."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
