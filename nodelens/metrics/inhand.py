"""One metric from tensors in hand: the statistics of a pass, made of one batch."""

from typing import Any

from torch import Tensor, nn

from ..geometry import Geometry
from ..rows import Rows
from ..statistics import ByClass, Cross, Patches, Statistic
from ..targets import target_of
from .base import Metric, Need

_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size", "type", "bias")
_TENSORS = ("inputs", "outputs", "weights", "labels", "targets", "logits", "gradients")


def compute(metric: Metric, tensors: dict[str, Any]) -> Tensor:
    """The value of a metric from the tensors that ``Metric.compute`` documents."""
    unknown = set(tensors) - set(_GEOMETRY) - set(_TENSORS)
    if unknown:
        raise ValueError(
            f"{metric.names[0]}: compute() takes {', '.join(_TENSORS)} and a convolution's geometry, "
            f"not {', '.join(sorted(unknown))}"
        )
    weight = tensors.get("weights")
    if metric.weighted and weight is None:
        raise ValueError(f"{metric.names[0]} needs weights=")
    if tensors.get("outputs") is None and weight is not None and tensors.get("inputs") is not None:
        tensors = tensors | {"outputs": _apply(tensors)}
    statistics = {name: _statistic(metric, need, tensors) for name, need in metric.needs().items()}
    return metric(None if weight is None else weight.flatten(1), **statistics)


def _statistic(metric: Metric, need: Need, tensors: dict[str, Any]) -> Statistic:
    rows = _rows(metric, need, tensors)
    if need.view == "samples":
        rows = rows.sample_totals() if need.port == "output*grad" else rows.sample_means()
    rows = rows.about(rows.mean)
    if issubclass(need.statistic, (Cross, ByClass)):
        labels, given = tensors.get("labels"), tensors.get("targets")
        name = "given" if given is not None and need.target != "label" else need.target or ""
        return need.statistic.of(rows, target_of(name, tensors.get("logits"), labels, given))
    if issubclass(need.statistic, Patches):
        return need.statistic.of(rows, geometry=_geometry(tensors))
    return need.statistic.of(rows)  # type: ignore[attr-defined]


def _rows(metric: Metric, need: Need, tensors: dict[str, Any]) -> Rows:
    names = {"input": ["inputs"], "output": ["outputs"], "output*grad": ["outputs", "gradients"]}[need.port]
    missing = [name for name in names if tensors.get(name) is None]
    if missing:
        raise ValueError(f"{metric.names[0]} needs {' and '.join(f'{m}=' for m in missing)}")
    x = tensors[names[0]]
    x = x if len(names) == 1 else x * tensors["gradients"]
    weight = tensors.get("weights")
    maps = x.ndim >= 4 or (weight is not None and weight.ndim == x.ndim == 3)
    if not maps and x.ndim > 2:
        x = x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2)
    rows = Rows.of(x.flatten(2) if x.ndim > 2 else x)
    return Rows(rows.raw, rows.keep, rows.shift, tuple(x.shape[2:]))


def _convolution(tensors: dict[str, Any]) -> nn.Module | None:
    weight = tensors.get("weights")
    if weight is None or weight.ndim == 2:
        return None
    kind: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
    options: dict[str, Any] = {k: tensors[k] for k in ("stride", "padding", "dilation", "groups", "padding_mode") if k in tensors}
    groups = options.get("groups", 1)
    conv = kind(weight.shape[1] * groups, len(weight), tuple(weight.shape[2:]), bias=False, **options).to(weight)
    conv.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return conv


def _geometry(tensors: dict[str, Any]) -> Geometry | None:
    conv = _convolution(tensors)
    return None if conv is None else Geometry.of(conv)


def _apply(tensors: dict[str, Any]) -> Tensor:
    """The outputs that inputs and weights give; a bias does not matter to any metric that may do without them."""
    conv, x = _convolution(tensors), tensors["inputs"]
    return x @ tensors["weights"].T if conv is None else conv(x).detach()
