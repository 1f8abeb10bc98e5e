"""The dry run: one forward pass of two samples, which finds shapes and costs before the real pass."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nodelens.network.batch import Batch
from nodelens.network.eval_mode import eval_mode
from nodelens.network.experts import Routed
from nodelens.network.hooks import Capture, Site
from nodelens.network.layers import Layer
from nodelens.network.objective import BY_VALUE, Objective

from .members import Members

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Identity = tuple[Any, torch.Size]


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
    """FLOPs of attention: queries times keys, then weights times values. A causal mask saves none."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _grouped_mm(a: torch.Size, b: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    """FLOPs of a grouped matrix product, in which each row uses the weight of its own group."""
    return 2 * a[-1] * out_shape.numel()


# what torch's counter does not know: attention on the CPU, and the experts of a mixture
_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention, torch.ops.aten._grouped_mm: _grouped_mm}


@dataclass(frozen=True)
class Seen:
    """What the dry run saw at a site; sizes are per sample."""

    width: int
    positions: int
    flat: bool  # (B, width): one row per sample, whatever the size of the input
    calls: int
    nbytes: int
    overwritten: bool = False  # a later operation writes into it in place
    final: bool = False  # is the model's output
    grid: tuple[int, ...] = ()
    packed: bool = False  # its positions are only some of the tokens (an expert's)


@dataclass(frozen=True)
class DryRun:
    """Which sites were reached, with their shapes, and the cost of the forward pass."""

    seen: dict[str, Seen]  # by str(site)
    flops: int  # of the forward pass, per sample
    classes: int  # width of the logits
    tokens: bool = False  # whether each token has its own prediction
    samples: int = 2  # in the batch that the two were taken from
    norms: dict[str, Layer] = field(default_factory=dict)  # by layer: the batch norm that reads its output
    task: str = ""
    refusal: str = ""  # why the predictions cannot be read from the output

    @classmethod
    def of_weights(cls, layers: Iterable[Layer]) -> "DryRun":
        """A dry run that is derived from the shapes of weights; no model is run."""
        widths = ((layer.name, len(layer.weight)) for layer in layers if layer.weight is not None)
        return cls({f"{name}.output": Seen(n, 1, True, 1, 4 * n) for name, n in widths}, 0, 0)

    @classmethod
    def of(cls, model: nn.Module, layers: Iterable[Layer], batch: Batch, objective: Objective | None = None) -> "DryRun":
        """Runs the first two samples of a batch. Raises ValueError, with the input's shape, if the model cannot take them."""
        objective = objective or Objective.of(model)
        captured: dict[Site, list[tuple[Any, int]]] = {}
        layers, samples = list(layers), len(batch)
        batch_norms = [Layer(name, module) for name, module in model.named_modules() if isinstance(module, _NORMS)]
        sites = [Site(layer, port) for layer in layers for port in ("input", "output") if port == "output" or not _reads_ids(layer)]
        readers = [Site(norm, "input") for norm in batch_norms]
        batch = batch.head(2).map(torch.clone)  # tensors made in inference mode have no version to compare
        capture = Capture(sites + readers, lambda site, seen: captured.setdefault(site, []).append((seen, version_of(seen))))
        capture.gate = True
        with eval_mode(model), torch.inference_mode(False), torch.no_grad(), capture, _counter() as counter:
            try:
                output = batch.run(model)
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(_cannot_run_message(model, batch, error)) from error
        _check_samples(model, batch, {site: each[0][0] for site, each in captured.items() if site.port == "output"})
        answer, aligned, refusal = _predictions(objective, output, batch)
        seen = {str(site): _seen(site, captured[site], len(batch), answer) for site in sites if site in captured}
        read = {identity(captured[site][0][0]): site.layer for site in readers if site in captured}
        outputs = [site for site in sites if site in captured and site.port == "output"]
        norms = {site.layer.name: norm for site in outputs if (norm := read.get(identity(captured[site][0][0]))) is not None}
        classes, tokens = (
            (0, False) if aligned is None else (aligned.shape[-1], aligned.ndim == 3 and objective.task not in BY_VALUE)
        )
        return cls(seen, counter.get_total_flops() // len(batch), classes, tokens, samples, norms, objective.task, refusal)


def _check_samples(model: nn.Module, batch: Batch, captured: Mapping[Site, Any]) -> None:
    """Raises ValueError where the first axis of a layer is not the samples: one sample less has to show half of it.

    The model runs again only where this is in doubt: samples share their axis with windows or frames, or a module takes time on
    the first axis and samples on the second. If such a module shows samples first, the data have them on the axis of time.
    """
    time_first = [Layer(name, m) for name, m in model.named_modules() if getattr(m, "batch_first", True) is False]
    shown = {site: tensor.shape for site, tensor in captured.items() if isinstance(tensor, Tensor) and tensor.ndim}
    if len(batch) < 2 or not (time_first or any(shape[0] != 2 for shape in shown.values())):
        return
    again = _shapes_of_one(model, batch, [*shown, *(Site(layer, "output") for layer in time_first)])
    way_out = "give data and modules with samples first (batch_first=True)"
    for site, shape in shown.items():
        if site in again and shape[0] != 2 * again[site][0]:
            one, two = tuple(again[site]), tuple(shape)
            raise ValueError(
                f"layer {site.layer.name!r} puts out {one} for one sample and {two} for two: its first axis is not the samples; "
                f"{way_out}, or leave it out (layers=)"
            )
    for site in again.keys() - shown.keys():
        if len(again[site]) == 3 and again[site][0] == 1:
            raise ValueError(
                f"{site.layer.name!r} takes time first and samples second (batch_first=False), "
                f"but the first axis of the data is its time: {way_out}"
            )


def _shapes_of_one(model: nn.Module, batch: Batch, sites: Iterable[Site]) -> dict[Site, torch.Size]:
    """The shapes at sites for the first sample alone."""
    found: dict[Site, torch.Size] = {}

    def see(site: Site, tensor: Any) -> None:
        found.setdefault(site, tensor.shape)

    capture = Capture(sites, see)
    capture.gate = True
    with eval_mode(model), torch.inference_mode(False), torch.no_grad(), capture:
        batch.head(1).map(torch.clone).run(model)
    return found


def _predictions(objective: Objective, output: Any, batch: Batch) -> tuple[Tensor | None, Tensor | None, str]:
    """The predictions as the model returns them, with classes last, and why they cannot be read."""
    try:
        answer = objective.answer(output)
    except ValueError as error:
        return None, None, str(error)
    try:
        return answer, objective.aligned(answer, batch.labels), ""
    except ValueError as error:
        return answer, None, str(error)


def with_groups(dry_run: DryRun, members: Members) -> DryRun:
    """The dry run extended by pruning groups, whose shapes follow from the layers that read or make their units."""
    seen = dict(dry_run.seen)
    for group in members.groups:
        captures = members.readers.get(group.name) or members.makers.get(group.name) or []
        mixture = members.mixtures.get(group.name)
        names = [layer.name for layer, _ in captures] + ([mixture.name] if mixture is not None else [])
        found = [seen[f"{name}.output"] for name in names if f"{name}.output" in seen]
        first = found[0] if found else Seen(group.group.n, 1, True, 1, 4 * group.group.n)
        flat = first.flat and mixture is None
        size = 4 * group.group.n * first.positions
        seen[f"{group.name}.output"] = Seen(group.group.n, first.positions, flat, max(1, len(found)) * first.calls, size)
    return replace(dry_run, seen=seen)


def _seen(site: Site, captures: list[tuple[Any, int]], samples: int, answer: Tensor | None) -> Seen:
    tensor, version = captures[0]
    rows = site.layer.rows(tensor, samples)
    _, width, positions = rows.raw.shape
    if isinstance(tensor, Routed):
        return Seen(width, positions, False, len(captures), tensor.values.nbytes // samples, packed=True)
    return Seen(
        width,
        positions,
        tensor.ndim == 2 and len(tensor) == samples,
        len(captures),
        tensor.nbytes // samples,
        tensor._version != version,
        answer is not None and identity(tensor) == identity(answer),
        rows.grid,
    )


def _reads_ids(layer: Layer) -> bool:
    """Whether a module reads ids, not rows of numbers."""
    return isinstance(layer.module, nn.Embedding)


def version_of(captured: Any) -> int:
    """How often a tensor was written in place; 0 for the tokens of an expert."""
    return captured._version if isinstance(captured, Tensor) else 0


def identity(captured: Any) -> Identity:
    """Equal for views of one tensor while it is alive. A tensor on the meta device has no address, so its storage is used."""
    tensor: Tensor = captured.values if isinstance(captured, Routed) else captured
    place = (tensor.untyped_storage()._cdata, int(tensor.storage_offset())) if tensor.is_meta else tensor.data_ptr()
    return place, tensor.shape


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)


def _cannot_run_message(model: nn.Module, batch: Batch, error: Exception) -> str:
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"{type(model).__name__} cannot take the data, {batch.describe()}: {cause}; change the data's channels and size "
        "(dataset.channels=, dataset.size=), or the model"
    )
