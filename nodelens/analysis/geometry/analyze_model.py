"""The geometry of a language model's residual stream: one pass over tokens, a table of layers."""

import inspect
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nodelens.engine.analyze import device_of
from nodelens.engine.covariance import LIMIT, CovariancePolicy
from nodelens.engine.narrow import describe as describe_covariance
from nodelens.engine.request import describe
from nodelens.network.architecture import config_of
from nodelens.results.result import provenance
from nodelens.statistics.processes import world

from .bundle import SCHEMA, GeometryResult, folder_of
from .columns import DIAGNOSTICS, Columns, MetricSelection, columns_of
from .reading import Reading, read
from .router import experts_of, router_tables
from .sites import RESIDUAL, HookPoint, hook_points
from .tables import ablation_table, eigenvalues, metrics_table, novelty_table
from .tokens import TokenReader

_CONFIG = (
    "model_type",
    "architectures",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "num_experts_per_tok",
    "vocab_size",
)


@torch.inference_mode(False)
def analyze_model(
    model_name: str | Path | nn.Module | None = None,
    dataloader: Iterable[Any] | None = None,
    *,
    model: nn.Module | None = None,
    max_tokens: int | None = 100_000,
    layers: str | Sequence[int] = "all",
    hook_point: str | Sequence[str] = "residual_input",
    metrics: MetricSelection = "default",
    diagnostics: str | Sequence[str] | None = None,
    sample_limit: int | None = 512,
    novelty_k: int = 32,
    covariance: str | None = None,
    width: int = LIMIT,
    budget: float | None = None,
    max_passes: int = 1,
    save_mode: str | None = None,
    save_dir: str | Path | None = None,
    tokenizer_name: str | None = None,
    dataset_name: str | None = None,
    run_metadata: Mapping[str, Any] | None = None,
    run_name: str | None = None,
    device: str | torch.device | None = None,
) -> GeometryResult:
    """Measures the residual stream of a language model in one pass, in eval mode, each token that counts a row.

    model_name:   a hub id or folder of transformers, or with ``model``, which may stand here too, its name in the tables
    dataloader:   batches of tokens: tensors (B, T), or dicts with input_ids, attention_mask (0: left out of everything),
                  ids, and what else the model takes; under a process group each process's own share
    max_tokens:   how many that count are read, exactly: the last sample is cut; None: all. Over processes it is shared out
    layers:       of residual hook points: all, indices, or an expression of n blocks, such as ``n//2:``
    hook_point:   residual_input, residual_output, module_input:<path>, module_output:<path>, or several of them
    metrics:      default, or some of spectrum, sample, novelty, router; names of the catalogue; metric objects
    diagnostics:  normalization_ablation: the spectrum of rows scaled in four ways
    sample_limit: how many tokens the sample family and CKA read, chosen by a hash of what they are: any batching, order or
                  padding gives the same; None: all of them, from sums
    novelty_k:    leading directions that are compared
    wide:         at sites of more than ``width`` units, whose products are not formed: diagonal, sample:<count>, sketch:<count>,
                  each as ``nodelens.engine.covariance.CovariancePolicy`` has it; None: an error with these choices
    budget:       bytes that the sums may take; passes: over how many readings of the data the layers may be divided to fit
    save_mode:    json, csv or bundle, into ``save_dir``, which alone means bundle
    device:       where the model is moved to; None: it stays. The other words go into the metadata.

    Beside each number that few rows bend stands one that they do not: d_pr_debiased, linear_cka_debiased. Standard errors of the
    same metrics are nl.analyze's. Raises ValueError, with the way out, for what does not fit; MemoryError over the budget;
    OSError for a model not to be had.
    """
    started = time.perf_counter()
    if dataloader is None:
        raise ValueError("dataloader is missing: give batches of tokens, such as [{'input_ids': tokens}]")
    for name, value in {"max_tokens": max_tokens, "sample_limit": sample_limit, "novelty_k": novelty_k}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it takes 1 or more")
    mode = save_mode or (None if save_dir is None else "bundle")
    if mode is not None:
        folder_of(save_dir, mode)  # before the work, not behind it
    diagnostics = [diagnostics] if isinstance(diagnostics, str) else list(diagnostics or ())
    columns = columns_of(metrics, diagnostics, novelty_k, sample_limit is not None)
    net, label = _opened(model_name, model, device)
    points = hook_points(net, hook_point, layers)
    begin = partial(TokenReader, dataloader, forward_options(net, points), _share(max_tokens))
    how, once = CovariancePolicy.of(covariance, width, max_passes=max_passes), isinstance(dataloader, Iterator)
    found = read(net, begin, points, columns, sample_limit, how, budget, max_passes, once)
    result = _tables(found, columns, {"model_key": _key(label), "model_label": label}, novelty_k)
    result.metadata = _metadata(net, label, points, found) | {
        "max_tokens": max_tokens,
        "hook_point": hook_point,
        "sample_limit": sample_limit,
        "novelty_k": novelty_k,
        "covariance": describe_covariance(found.values.plan),
        "passes": found.passes,
        "metrics": {name: describe(m) | {"sampled": name in columns.sampled} for name, m in columns.metrics.items()},
        "diagnostics": diagnostics,
        "run_name": run_name,
        "tokenizer": tokenizer_name,
        "dataset": dataset_name,
        "run_metadata": dict(run_metadata or {}),
        "runtime_sec": time.perf_counter() - started,
    }
    if mode is not None and world()[0] == 0:
        result.save(save_dir, mode)
    return result


def _tables(found: Reading, columns: Columns, names: Mapping[str, str], novelty_k: int) -> GeometryResult:
    points, values = found.points, found.values
    routers, experts = router_tables(found.loads, found.blocks)
    ablation = {DIAGNOSTICS[0]: ablation_table(points, columns, values, names)} if columns.ablation else {}
    return GeometryResult(
        metrics=metrics_table(points, columns, values, names, found.tokens),
        novelty=novelty_table(points, columns, values, names, novelty_k),
        router=routers,
        experts=experts,
        diagnostics=ablation,
        eigenvalues=eigenvalues(points, values),
    )


def _metadata(net: nn.Module, label: str, points: Sequence[HookPoint], found: Reading) -> dict[str, Any]:
    """What was measured, on which model, with which versions."""
    versions, config = provenance(), config_of(net)
    return {
        "artifact_schema_version": SCHEMA,
        "software": versions["versions"] | {"python": platform.python_version()},
        "commit": versions["commit"],
        "model_id": label,
        "model_class": type(net).__name__,
        "model_config": {name: value for name in _CONFIG if (value := getattr(config, name, None)) is not None},
        "num_blocks": len(found.blocks),
        "layers": {point.name: list(point.sites) for point in points},
        "hook_targets": {point.name: [layer.name for layer in point.sites.values()] for point in points},
        "routers": list(found.loads),
        "experts_in_config": experts_of(config),
        "tokens_observed": found.tokens,
        "batches_observed": found.batches,
        "left_out": found.left_out,
        "processes": world()[1],
        "input_device": str(device_of(net)),
    }


def _opened(model_name: str | Path | nn.Module | None, model: nn.Module | None, device: Any) -> tuple[nn.Module, str]:
    """The model, and its name."""
    net = model_name if model is None and isinstance(model_name, nn.Module) else model
    if net is None:
        if not isinstance(model_name, (str, Path)):
            raise ValueError("there is no model: give model_name=, a hub id or a folder, or model=")
        from nodelens.models import causal_lm

        net = causal_lm(str(model_name))
    if device is not None and not getattr(net, "hf_device_map", None):  # whose parts lie where they were put
        net.to(device)
    if isinstance(model_name, (str, Path)):
        return net, str(model_name)
    return net, str(getattr(net, "name_or_path", "") or type(net).__name__)


def forward_options(net: nn.Module, points: Sequence[HookPoint]) -> dict[str, Any]:
    """Forward arguments, besides the tokens, that save work: no cache, and only the last logits where no site needs the others."""
    known = inspect.signature(net.forward).parameters
    wanted: dict[str, Any] = {"input_ids": None, "use_cache": False}
    if all(point.name in RESIDUAL for point in points):
        wanted["logits_to_keep"] = 1
    return {name: value for name, value in wanted.items() if name in known}


def _share(max_tokens: int | None) -> int | None:
    """The number of tokens that this process reads."""
    rank, processes = world()
    return None if max_tokens is None else max_tokens // processes + (rank < max_tokens % processes)


def _key(label: str) -> str:
    """The label as it can appear in a file name."""
    return label.translate(dict.fromkeys(map(ord, "/\\ :"), "_")).lower()
