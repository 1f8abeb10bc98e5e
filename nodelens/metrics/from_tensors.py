"""One metric computed from tensors: the statistics of a pass over data, built from one batch."""

from typing import Any

import torch
from torch import Tensor, nn

from nodelens.messages import nearest
from nodelens.network.layers import ASSOCIATION, Layer
from nodelens.network.missing import with_target
from nodelens.network.targets import target_of
from nodelens.statistics import Gram, Moments, Patches, Statistic
from nodelens.statistics.rows import Rows
from nodelens.statistics.weight_sums import WeightSums

from .need import Need, Other

_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size", "type", "bias")
_TENSORS = (
    "inputs",
    "outputs",
    "weights",
    "labels",
    "targets",
    "logits",
    "gradients",
    "initial_weights",
    "next_outputs",
    "norm_weights",
    "covariance",
)
_SECOND_MOMENTS = (Moments, Patches, Gram)
_PORTS = {
    "input": ["inputs"],
    "output": ["outputs"],
    "activated": ["outputs"],
    "projection": ["projections"],
    "next": ["next_outputs"],
    "grad": ["gradients"],
    "output*grad": ["outputs", "gradients"],
    "weight*grad": ["inputs", "outputs", "gradients"],
    "change": ["inputs", "weights", "initial_weights"],
}


def compute(metric: Any, tensors: dict[str, Any]) -> Tensor:
    """The value of a metric, from the tensors that ``Metric.compute`` documents."""
    unknown = sorted(set(tensors) - set(_GEOMETRY) - set(_TENSORS))
    if unknown:
        raise ValueError(
            f"{metric.names[0]}: compute() takes {', '.join(_TENSORS)} and a convolution's geometry, "
            f"not {', '.join(unknown)}.{nearest(unknown[0], [*_TENSORS, *_GEOMETRY])}"
        )
    tensors = {k: _as_tensor(metric, k, t) for k, t in tensors.items() if t is not None}
    if "covariance" in tensors:
        tensors |= {"inputs": _rows_of_covariance(metric, tensors.pop("covariance"), tensors)}
    _check_given(metric, tensors)
    _check_lengths(metric, tensors)
    _check_widths(tensors)
    if "weights" in tensors and "inputs" in tensors:
        dtype = torch.promote_types(tensors["inputs"].dtype, tensors["weights"].dtype)
        made = _layer(tensors).apply(tensors["inputs"].to(dtype), tensors["weights"].detach().to(dtype))
        tensors = {"outputs": made} | tensors | {"projections": made}
    elif "outputs" in tensors:
        tensors = tensors | {"projections": tensors["outputs"]}
    parameter = _parameter(metric, tensors)
    needs = metric.needs()
    statistics = {name: _statistic(metric, need, tensors, _known(metric, name, needs, tensors)) for name, need in needs.items()}
    return metric(parameter, **{k: [v] if metric.grouped else v for k, v in statistics.items()})


def _as_tensor(metric: Any, name: str, given: Any) -> Any:
    """A tensor from an array or a list; options of a convolution are left as they are. Raises TypeError for anything else."""
    if name in _GEOMETRY or isinstance(given, Tensor):
        return given
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{metric.names[0]}: {name} is {type(given).__name__}; give a tensor") from None


def _check_given(metric: Any, tensors: dict[str, Any]) -> None:
    """Raises ValueError that names every tensor that the metric reads, if any of them is missing."""
    needs = list(metric.needs().values())
    if metric.parameter in ("group", "units") or any(need.port.partition("/")[0] not in _PORTS for need in needs):
        return  # it has an error of its own
    of_weights = ["weights", "initial_weights"] if metric.parameter == "change" else ["weights"]
    wanted = (["norm_weights"] if metric.parameter == "norm" else of_weights) if metric.weighted else []
    for need in needs:
        port = need.port.partition("/")[0]
        wanted += (["inputs", "weights"] if metric.weighted else ["outputs"]) if port == "projection" else _PORTS[port]
        wanted += _PORTS["next"] if need.target == "next" else _targets(need.target, tensors)
    made = {"outputs"} if {"inputs", "weights"} <= tensors.keys() else set()
    missing = [name for name in dict.fromkeys(wanted) if name not in tensors.keys() | made]
    if missing:
        order = sorted(dict.fromkeys(wanted), key=_TENSORS.index)
        given = ", ".join(f"{name}=" for name in tensors if name in _TENSORS) or "nothing"
        kept = {name for need in needs for name in _targets(need.target, {"targets": True})}
        spared = [f"{name}=" for name in ("logits", "labels") if name in wanted and name not in kept]
        other = "" if "logits" not in missing else f", or targets= in place of {_and(spared)}"
        raise ValueError(f"{metric.names[0]} needs {_and([f'{name}=' for name in order])}{other}; given: {given}")


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _targets(target: Any, tensors: dict[str, Any]) -> list[str]:
    """The tensors from which a target is computed; given targets replace those of logits."""
    if not isinstance(target, str) or "." in target:
        return [] if target is None or isinstance(target, Other) else ["logits"]
    own = {"label": ["labels"], "given": ["targets"], "logits": ["logits"], "input": ["inputs"], "next": []}
    parts = [own.get(part, ["logits", "labels"]) for part in target.split("+")]
    return [name for names in parts for name in (names if names != ["logits", "labels"] or "targets" not in tensors else [])]


def _check_lengths(metric: Any, tensors: dict[str, Any]) -> None:
    """Raises ValueError for weights without two axes, rows without units, and tensors of different numbers of samples."""
    name = metric.names[0]
    for key, what in (("weights", "(units, inputs, ...)"), ("inputs", "(rows, inputs)"), ("outputs", "(rows, units)")):
        if key in tensors and tensors[key].ndim < 2:
            raise ValueError(f"{name}: {key} is {tuple(tensors[key].shape)}; it has two axes or more, {what}")
    by_sample = [key for key in ("inputs", "outputs", "labels", "targets", "logits", "gradients") if key in tensors]
    for key in by_sample[1:]:
        first, other = tensors[by_sample[0]], tensors[key]
        if not other.ndim or len(other) != len(first):
            shapes = f"{by_sample[0]} is {tuple(first.shape)} and {key} {tuple(other.shape)}"
            raise ValueError(f"{name}: {shapes}: give as many rows of both")


def _rows_of_covariance(metric: Any, covariance: Any, tensors: dict[str, Any]) -> Tensor:
    """Inputs of mean 0 whose unbiased covariance is the given one, (2 d, d) float64: each eigenvector, scaled, with both signs.

    Raises ValueError for a matrix that is no covariance, and for a metric that reads more than the covariance of the inputs.
    """
    name, c = metric.names[0], torch.as_tensor(covariance).detach().double()
    given = next((other for other in ("inputs", "outputs") if other in tensors), None)
    if given is not None:
        raise ValueError(f"{name}: covariance stands for the data: leave {given}= out, or covariance=")
    needs = metric.needs().values()
    if any(n.port not in ("input", "projection") or n.statistic not in _SECOND_MOMENTS or n.target for n in needs):
        raise ValueError(f"{name} reads more of the data than the covariance of the inputs: give inputs=")
    if getattr(metric, "bias", "none") != "none":
        raise ValueError(f"{name}: bias: {metric.bias} depends on the number of rows: give inputs=")
    if not c.isfinite().all():
        raise ValueError(f"{name}: covariance has entries that are not finite; leave those inputs out")
    if c.ndim != 2 or c.shape != c.T.shape or not torch.allclose(c, c.T, rtol=1e-6):
        raise ValueError(f"{name}: covariance is {tuple(c.shape)}; it must be a symmetric matrix (d, d)")
    values, vectors = torch.linalg.eigh(c)
    if values[0] < -1e-6 * values[-1].abs():
        raise ValueError(f"{name}: covariance has the eigenvalue {values[0]:.3g}; it must have none below 0")
    rows = (values.clamp_min(0) * (len(c) - 0.5)).sqrt()[:, None] * vectors.T
    return torch.cat([rows, -rows])


def _parameter(metric: Any, tensors: dict[str, Any]) -> Tensor | None:
    """The parameter that a metric reads in addition to statistics."""
    if metric.parameter in ("group", "units"):
        raise ValueError(_of_groups(metric))
    needed = {"norm": ["norm_weights"], "change": ["weights", "initial_weights"]}.get(metric.parameter, ["weights"])
    if metric.weighted:
        _check(metric, needed, tensors)
    found = [tensors.get(name) for name in needed]
    if any(f is None for f in found):
        return None
    if metric.parameter == "change":
        return (found[0] - found[1]).flatten(1)  # type: ignore[operator]
    return found[0].flatten(1) if metric.parameter == "weight" else found[0]  # type: ignore[union-attr]


def _of_groups(metric: Any) -> str:
    return (
        f"{metric.names[0]} reads what produces or consumes the units of a pruning group, which tensors do not contain: use "
        "nl.analyze(..., layers=nl.find_groups(model)) or nl.prune"
    )


def _known(metric: Any, name: str, needs: dict[str, Need], tensors: dict[str, Any]) -> Tensor | None:
    """The samples that have the target of a need's metric, or of its part of a composite, (n,) bool; None without a target."""
    part = name.rpartition(".")[0]
    targets = [n for k, n in needs.items() if k.rpartition(".")[0] == part and n.target not in (None, "next", "input")]
    return with_target(targets[0].target, _paired(metric, targets[0], tensors, True)) if targets else None  # type: ignore[arg-type]


def _statistic(metric: Any, need: Need, tensors: dict[str, Any], known: Tensor | None = None) -> Statistic:
    if need.port == ASSOCIATION:
        raise ValueError(
            f"{metric.names[0]} differentiates the model, which tensors do not contain: use nl.analyze(model, data, ...)"
        )
    if need.port.partition("/")[0] not in _PORTS:
        raise ValueError(_of_groups(metric))
    if issubclass(need.statistic, WeightSums):
        _check(metric, _PORTS["weight*grad"], tensors)
        layer = _layer(tensors)
        y, gradient = (layer.rows(tensors[k], len(tensors[k])).raw.transpose(1, 2).flatten(0, 1) for k in ("outputs", "gradients"))
        return need.statistic.of(layer.patches(tensors["inputs"]), y, gradient, groups=getattr(layer.module, "groups", 1))
    rows = _rows(metric, need.port, tensors)
    samples = need.view == "samples" or (need.view == "whole" and rows.grid != ())
    if samples:
        rows = rows.sample_totals() if "grad" in need.port else rows.sample_means()
    if known is not None:
        rows = rows.kept(rows.mask() & known[:, None])
    rows = rows.about(rows.mean)
    options: dict[str, Any] = {"hashes": torch.arange(len(rows))} if need.statistic.takes_hashes else {}
    if need.statistic.entries:
        options["geometry"] = _layer(tensors).geometry if tensors.get("weights") is not None else None
    paired = [] if need.target is None else [_paired(metric, need, tensors, samples)]
    return need.statistic.of(rows, *paired, **options)  # type: ignore[attr-defined]


def _paired(metric: Any, need: Need, tensors: dict[str, Any], samples: bool) -> Rows | Tensor:
    if need.target in ("next", "input"):
        rows = _rows(metric, str(need.target), tensors)
        rows = rows.sample_means() if samples else rows
        return rows.about(rows.mean)
    labels, given = tensors.get("labels"), tensors.get("targets")
    parts = need.target.split("+") if isinstance(need.target, str) else [need.target]
    if given is not None and parts[-1] != "label":  # given targets replace those that a pass would compute
        own = ["label"] if parts[0] == "label" else []
        return target_of("+".join([*own, "given"]), tensors.get("logits"), labels, given)
    assert not isinstance(need.target, Other)
    return target_of(need.target or "", tensors.get("logits"), labels, given)


def _rows(metric: Any, port: str, tensors: dict[str, Any]) -> Rows:
    port, _, by_token = port.partition("/")
    names = _PORTS[port]
    _check(metric, names, tensors)
    if port == "change":
        x = _layer(tensors).apply(tensors["inputs"], (tensors["weights"] - tensors["initial_weights"]).detach())
    else:
        x = tensors[names[0]] if len(names) == 1 else tensors[names[0]] * tensors[names[1]]
    weight = tensors.get("weights")
    maps = x.ndim >= 4 or (weight is not None and weight.ndim == x.ndim == 3)
    if not maps and x.ndim > 2:
        x = x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2)
        if by_token:  # the last token predicts no token
            x = x / max(1, x.shape[2] - 1)
    rows = Rows.of(x.flatten(2) if x.ndim > 2 else x)
    return Rows(rows.raw, rows.keep, rows.shift, tuple(x.shape[2:]) if maps else ())


def _layer(tensors: dict[str, Any]) -> Layer:
    """A layer with the shape of the given weights: a Linear, or a convolution with the given geometry."""
    weight = tensors["weights"]
    if weight.ndim == 2:
        return Layer("given", nn.Linear(weight.shape[1], len(weight), bias=False, device="meta"))
    kind: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
    options: dict[str, Any] = {k: tensors[k] for k in ("stride", "padding", "dilation", "groups", "padding_mode") if k in tensors}
    groups = options.get("groups", 1)
    conv = kind(weight.shape[1] * groups, len(weight), tuple(weight.shape[2:]), bias=False, device="meta", **options)
    return Layer("given", conv)


def _check_widths(tensors: dict[str, Any]) -> None:
    """Raises ValueError where the widths of weights, inputs and outputs do not match."""
    if "weights" not in tensors:
        return
    weight, axis = tensors["weights"], 1 if tensors["weights"].ndim > 2 else -1
    read = weight.shape[1] * (tensors.get("groups", 1) if weight.ndim > 2 else 1)
    if "inputs" in tensors and tensors["inputs"].shape[axis] != read:
        raise ValueError(f"the weight reads {read} inputs, the rows are {tensors['inputs'].shape[axis]} wide")
    if "outputs" in tensors and tensors["outputs"].shape[axis] != len(weight):
        raise ValueError(f"the weight has {len(weight)} units, the rows are {tensors['outputs'].shape[axis]} wide")


def _check(metric: Any, names: list[str], tensors: dict[str, Any]) -> None:
    missing = [name for name in names if tensors.get(name) is None]
    if missing:
        raise ValueError(f"{metric.names[0]} needs {' and '.join(f'{m}=' for m in missing)}")
