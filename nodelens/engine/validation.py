"""Validation of a request: metrics that do not fit pruning groups or labels, missing parameters, and sizes of memory."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from nodelens.messages import option
from nodelens.metrics import Metric
from nodelens.network.batch import Batch
from nodelens.network.group_layer import GroupLayer
from nodelens.network.layers import Layer
from nodelens.network.sharded import check_whole, class_name, is_sharded
from nodelens.network.tasks import BY_TOKEN
from nodelens.results.result import fingerprint_of
from nodelens.statistics.processes import gathered

from .associations import differentiates
from .dry_run import DryRun
from .layout import PassLayout
from .members import Members, of_groups_only


def check_sharded(model: nn.Module, metrics: Mapping[str, Metric]) -> None:
    """Raises ValueError for metrics that need the whole of a model in one process, if the model is sharded over processes.

    These differentiate the loss with respect to weights, or the model with respect to its units, or train a copy of it. Another
    error is a model whose buffers differ between processes. Collective for a sharded model.
    """
    if is_sharded(model) and len(set(gathered(fingerprint_of(dict(model.named_buffers()))))) > 1:
        raise ValueError(
            f"the processes have other buffers of {class_name(model)}, such as running statistics of batch norms, which "
            "fully_shard leaves to each process: copy those of the first one, torch.distributed.broadcast(buffer, 0) for each"
        )
    for name, metric in metrics.items():
        if differentiates([metric]) or any(need.port == "model" for need in metric.needs().values()):
            check_whole(f"metric {name!r}", model)


def check_groups(layers: Sequence[Layer], metrics: Mapping[str, Metric]) -> None:
    """Raises ValueError for a metric without one value per unit of a pruning group, or one that cannot read a group or a layer."""
    for name, metric in metrics.items():
        for layer in layers:
            if isinstance(layer, GroupLayer):
                _check_group(name, metric, layer)
            elif of_groups_only(metric):
                _check_layer(name, metric, layer)


def find_members(
    model: nn.Module, layers: Sequence[Layer], metrics: Mapping[str, Metric], start: Mapping[str, Tensor] | None = None
) -> Members:
    """The members of the pruning groups in ``layers``. Raises ValueError as ``check_groups`` and ``Members.find`` do."""
    check_groups(layers, metrics)
    return Members.find(model, layers, metrics, start)


def _check_group(name: str, metric: Metric, layer: GroupLayer) -> None:
    group, ports = layer.group, {need.port for need in metric.needs().values()}
    if metric.shape != "unit":
        raise ValueError(f"metric {name!r} gives one value per {metric.shape}; pruning groups are measured unit by unit")
    if group.router is not None:
        if (ports or metric.parameter == "change") and not metric.whole_experts:
            raise ValueError(
                f"{name} does not score whole experts, the units of group {group.name!r}: score them by taylor, loss_proxy, "
                "router_load, weights (magnitude, group_l2) or at random, or prune their channels instead, scope=moe_ffn"
            )
        return
    if "load" in ports:
        raise ValueError(f"{name} scores whole experts, scope=expert; group {group.name!r} has other units ({group.kind})")
    if not layer.makers or not layer.readers:
        raise ValueError(f"{name}: group {group.name!r} has no producer or no consumer: nothing to score its units by")
    metric.check_group(name, layer)


def _check_layer(name: str, metric: Metric, layer: Layer) -> None:
    """Raises ValueError if a metric of groups cannot be computed for a layer by itself, because its readers are unknown."""
    ports = {need.port for need in metric.needs().values()}
    reads = metric.parameter == "group" and bool(ports & {"consumed", "maps"} or metric.reads_consumers)
    if "load" in ports or (reads and layer.side != "input") or ("made*grad" in ports and layer.side == "input"):
        raise ValueError(
            f"metric {name!r} reads the consumers of the units, which are unknown for layer {layer.name!r} alone: measure the "
            "layer that reads them, such as 'fc2.input', or pruning groups, layers=groups"
        )


def measurable(metrics: Mapping[str, Metric], dry_run: DryRun) -> tuple[Mapping[str, Metric], tuple[str, ...]]:
    """The metrics without those of a loss where the data have no labels, and a note that says so."""
    if dry_run.labelled:
        return metrics, ()
    of_loss = [name for name, metric in metrics.items() if _reads_loss(metric)]
    note = (
        f"the data have no labels, so there is no loss: {', '.join(of_loss)} are left out; give (x, y) batches, or labels in a dict"
    )
    return {name: metric for name, metric in metrics.items() if name not in of_loss}, (note,)


def _reads_loss(metric: Metric) -> bool:
    """Whether a metric reads gradients, or a target that is computed from predictions and labels."""
    return any("grad" in need.port or need.target not in (None, "next", "input", "given") for need in metric.needs().values())


def check_parameter(plan: PassLayout, name: str, metric: Metric, optional: bool) -> None:
    """Raises ValueError if a metric reads a parameter that a layer lacks.

    ``optional``: a metric of batch norms is left out at layers without one, if other layers have one.
    """
    if not metric.weighted:
        return
    layers = list(dict.fromkeys(part for layer in plan.layers for part in plan.parts(metric, layer)))
    lacking = [layer for layer in layers if plan.lacks(layer, metric)]
    some = optional and metric.parameter == "norm" and len(lacking) < len(layers)
    if lacking and not some:
        where = f"layer {lacking[0].name!r} ({type(lacking[0].module).__name__})"
        words = {
            "norm": f"reads the scale of a batch norm, but none follows {where}",
            "change": f"reads the change of the weights, but the initial weights of {where} are unknown: give {option('initial')}=",
        }
        raise ValueError(
            f"metric {name!r} {words.get(metric.parameter, f'needs weights, but {where} has none')}; leave the metric out, or name "
            "layers with weights (layers=)"
        )


_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def in_bytes(size: str | int | float | None, key: str | None = None) -> float | None:
    """Bytes of '4GB', '512 MiB' or a number; None means no limit. Raises ValueError, naming the key, for anything else,
    and for 0 or less.
    """
    if size is None:
        return None
    text = str(size).replace(" ", "").upper()
    number = text.rstrip("BGIKM")
    try:
        found = float(number) * _SIZES[text[len(number) :]]
        if not found > 0:
            raise ValueError
        return found
    except (ValueError, KeyError):
        raise ValueError(
            f"{key or option('budget')} is {size!r}; it takes bytes, or a size such as 4GB or 512MiB, more than 0"
        ) from None


def check_classes(metrics: Mapping[str, Metric], batch: Batch, tokens: bool) -> None:
    """Raises ValueError for a metric of classes where the labels are numbers, or several per sample that are not of its tokens."""
    if batch.labels is None or not (batch.labels.is_floating_point() or (batch.labels.ndim > 1 and not tokens)):
        return
    of_classes = [
        n for n, m in metrics.items() if "target" not in m.options and any(x.target == "label" for x in m.needs().values())
    ]
    if of_classes:
        raise ValueError(
            f"{', '.join(of_classes)} needs one class per sample, but the labels are {tuple(batch.labels.shape)} numbers: give "
            "integers (labels.long(), or labels.argmax(1) of one-hot rows), or leave the metric out"
        )


def targets_by_token(batch: Batch) -> list[str]:
    """Which of the targets label and given have one value per token."""
    y, given = batch.labels, batch.targets
    positions = y is not None and y.ndim > 1 and batch.task in ("classification", *BY_TOKEN)
    tokens = [t for t in (*batch.args, *batch.kwargs.values()) if isinstance(t, Tensor) and t.ndim > 1 and batch.task in BY_TOKEN]
    by_token = given is not None and given.ndim > 1 and any(given.shape[1] == t.shape[1] for t in tokens)
    return ["label"] * positions + ["given"] * by_token
