"""The geometry of a language model's residual stream: one pass over tokens, a table of layers."""

import inspect
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from nodelens.engine.covariance import LIMIT, CovariancePolicy
from nodelens.engine.driver import device_of
from nodelens.engine.request import describe
from nodelens.engine.saved_work import SavedWork
from nodelens.engine.validation import in_bytes
from nodelens.engine.wide_sites import describe as describe_covariance
from nodelens.network.architecture import config_of
from nodelens.network.eval_mode import one_at_a_time
from nodelens.network.sharded import check_whole
from nodelens.results.left_out import warn_of_rows
from nodelens.results.result import provenance
from nodelens.statistics.processes import world

from .bundle import SCHEMA, GeometryResult
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


@dataclass(frozen=True)
class GeometryOptions:
    """What is measured of a residual stream, and on which tokens.

    max_tokens:   how many tokens are read, exactly: the last sample is cut. None: all. Padding does not count. Several processes
                  read the tokens that one process would, if process r of N has the samples r, r + N, ...
    layers:       blocks of residual hook points: all, indices, or an expression of n blocks, such as ``n//2:``
    hook_point:   residual_input, residual_output, module_input:<path>, module_output:<path>, or several of them
    metrics:      default, or some of spectrum, sample, novelty, router; names of the catalogue; metric objects
    diagnostics:  normalization_ablation: the spectrum of rows that are scaled in four ways
    sample_limit: how many tokens the sample family and CKA read. A hash of the tokens chooses them, so that batching, order and
                  padding change nothing. None: all tokens, from sums
    novelty_k:    leading directions that are compared
    covariance:   for sites of more than ``width`` units, whose products are not formed: diagonal, sample:<count> or
                  sketch:<count>, as in ``nodelens.engine.covariance.CovariancePolicy``. None: an error that shows these choices
    budget:       bytes that the sums may take, or a size such as 8GB; max_passes: how often the data may be read to fit
    tokenizer_name, dataset_name: notes for the metadata

    Raises ValueError for a number below 1.
    """

    max_tokens: int | None = 100_000
    layers: str | Sequence[int] = "all"
    hook_point: str | Sequence[str] = "residual_input"
    metrics: MetricSelection = "default"
    diagnostics: str | Sequence[str] | None = None
    sample_limit: int | None = 512
    novelty_k: int = 32
    covariance: str | None = None
    width: int = LIMIT
    budget: str | float | None = None
    max_passes: int = 1
    tokenizer_name: str | None = None
    dataset_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "sample_limit", "novelty_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it takes 1 or more")


@one_at_a_time
@torch.inference_mode(False)
def measure_geometry(
    model: nn.Module,
    data: Iterable[Any],
    options: GeometryOptions | None = None,
    *,
    label: str | None = None,
    run_name: str | None = None,
    run_metadata: Mapping[str, Any] | None = None,
    saved: SavedWork | None = None,
) -> GeometryResult:
    """Measures the residual stream of a language model in eval mode: one pass over the data, one row per token.

    data: batches of tokens: tensors (B, T), or dicts with input_ids, attention_mask (tokens with 0 are left out of everything),
    ids, and what else the model takes. Under a process group each process gives its own share. label: the model's name in the
    tables. run_name, run_metadata: notes for the metadata. saved: where the sums of an unfinished pass are kept.

    Each statistic that is biased at small n has a debiased counterpart: d_pr_debiased, linear_cka_debiased. ``nl.analyze`` gives
    standard errors of the same metrics. Raises ValueError, with the way out, for what does not fit; MemoryError over the budget.
    """
    check_whole("nl.analyze_model", model)
    started, options = time.perf_counter(), options or GeometryOptions()
    diagnostics = [options.diagnostics] if isinstance(options.diagnostics, str) else list(options.diagnostics or ())
    columns = columns_of(options.metrics, diagnostics, options.novelty_k, options.sample_limit is not None)
    points = hook_points(model, options.hook_point, options.layers)
    begin = partial(TokenReader, data, forward_options(model, points), options.max_tokens)
    policy = CovariancePolicy.of(options.covariance, options.width, max_passes=options.max_passes)
    budget, once = in_bytes(options.budget), isinstance(data, Iterator)
    found = read(model, begin, points, columns, options.sample_limit, policy, budget, options.max_passes, once, saved)
    warn_of_rows(found.left_out)
    label = label or str(getattr(model, "name_or_path", "") or type(model).__name__)
    result = _tables(found, columns, {"model_key": _key(label), "model_label": label}, options.novelty_k)
    result.metadata = _metadata(model, label, points, found) | {
        "max_tokens": options.max_tokens,
        "hook_point": options.hook_point,
        "sample_limit": options.sample_limit,
        "novelty_k": options.novelty_k,
        "covariance": describe_covariance(found.values.plan),
        "passes": found.passes,
        "metrics": {name: describe(m) | {"sampled": name in columns.sampled} for name, m in columns.metrics.items()},
        "diagnostics": diagnostics,
        "run_name": run_name,
        "tokenizer": options.tokenizer_name,
        "dataset": options.dataset_name,
        "run_metadata": dict(run_metadata or {}),
        "runtime_sec": time.perf_counter() - started,
    }
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


def forward_options(net: nn.Module, points: Sequence[HookPoint]) -> dict[str, Any]:
    """Forward arguments, besides the tokens, that save work: no cache, and only the last logits where no site needs the others."""
    known = inspect.signature(net.forward).parameters
    wanted: dict[str, Any] = {"input_ids": None, "use_cache": False}
    if all(point.name in RESIDUAL for point in points):
        wanted["logits_to_keep"] = 1
    return {name: value for name, value in wanted.items() if name in known}


def _key(label: str) -> str:
    """The label as it can appear in a file name."""
    return label.translate(dict.fromkeys(map(ord, "/\\ :"), "_")).lower()
