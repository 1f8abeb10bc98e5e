"""The dry run: one recorded forward pass of a few samples, before the real one."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nodelens.network.batch import Batch, logits_of
from nodelens.network.eval_mode import eval_mode
from nodelens.network.experts import Routed
from nodelens.network.hooks import Capture, Site
from nodelens.network.layers import Layer

from .members import Members

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Identity = tuple[Any, torch.Size]


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
    """Operations of queries with keys, and of what that gives with values; nothing is left out for a causal mask."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _grouped(a: torch.Size, b: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    """Operations of one product a group, the weight of each row's own group."""
    return 2 * a[-1] * out_shape.numel()


# what torch's counter does not know: attention on the CPU, and the experts of a mixture
_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention, torch.ops.aten._grouped_mm: _grouped}


@dataclass(frozen=True)
class Seen:
    """What a recorded forward saw at a site, a sample of the batch."""

    width: int
    positions: int
    flat: bool  # (B, width): one row a sample whatever the input's size
    calls: int
    nbytes: int
    overwritten: bool = False  # by a later operation, in place
    final: bool = False  # it is the model's output
    grid: tuple[int, ...] = ()
    packed: bool = False  # positions are of its own: some of the tokens


@dataclass(frozen=True)
class DryRun:
    """What fired, with which shapes, at what cost."""

    seen: dict[str, Seen]  # by str(site)
    flops: int  # of the forward pass, a sample
    classes: int  # width of the logits
    tokens: bool = False  # whether each token has logits of its own
    samples: int = 2  # in the batch it was taken from
    norms: dict[str, Layer] = field(default_factory=dict)  # the batch norm that reads a layer's output

    @classmethod
    def of_weights(cls, layers: Iterable[Layer]) -> "DryRun":
        """What the weights of layers alone tell; nothing is run."""
        wide = ((layer.name, len(layer.weight)) for layer in layers if layer.weight is not None)
        return cls({f"{name}.output": Seen(n, 1, True, 1, 4 * n) for name, n in wide}, 0, 0)

    @classmethod
    def of(cls, model: nn.Module, layers: Iterable[Layer], batch: Batch) -> "DryRun":
        """Runs the first samples of a batch. Raises ValueError, with the input's shape, where the model cannot take them."""
        shown: dict[Site, list[tuple[Any, int]]] = {}
        layers, samples = list(layers), len(batch)
        norms = [Layer(name, module) for name, module in model.named_modules() if isinstance(module, _NORMS)]
        sites = [Site(layer, port) for layer in layers for port in ("input", "output") if port == "output" or not _reads_ids(layer)]
        readers = [Site(norm, "input") for norm in norms]
        batch = batch.head(2).map(torch.clone)  # tensors made in inference mode would have no version to compare
        capture = Capture(sites + readers, lambda site, seen: shown.setdefault(site, []).append((seen, version_of(seen))))
        capture.gate = True
        with eval_mode(model), torch.inference_mode(False), torch.no_grad(), capture, _counter() as counter:
            try:
                logits = logits_of(batch.run(model))
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(_unfit(model, batch, error)) from error
        seen = {str(site): _seen(site, shown[site], len(batch), logits) for site in sites if site in shown}
        read = {identity(shown[site][0][0]): site.layer for site in readers if site in shown}
        behind = {
            site.layer.name: read.get(identity(shown[site][0][0])) for site in sites if site in shown and site.port == "output"
        }
        return cls(
            seen,
            counter.get_total_flops() // len(batch),
            logits.shape[-1],
            logits.ndim == 3,
            samples,
            {name: norm for name, norm in behind.items() if norm is not None},
        )


def with_groups(dry_run: DryRun, members: Members) -> DryRun:
    """The dry run with what pruning groups show, which follows from the layers that read or make their units."""
    seen = dict(dry_run.seen)
    for group in members.groups:
        shows = members.readers.get(group.name) or members.makers.get(group.name) or []
        mixture = members.mixtures.get(group.name)
        names = [layer.name for layer, _ in shows] + ([mixture.name] if mixture is not None else [])
        found = [seen[f"{name}.output"] for name in names if f"{name}.output" in seen]
        first = found[0] if found else Seen(group.group.n, 1, True, 1, 4 * group.group.n)
        flat = first.flat and mixture is None
        size = 4 * group.group.n * first.positions
        seen[f"{group.name}.output"] = Seen(group.group.n, first.positions, flat, max(1, len(found)) * first.calls, size)
    return replace(dry_run, seen=seen)


def _seen(site: Site, shows: list[tuple[Any, int]], samples: int, logits: Tensor) -> Seen:
    tensor, version = shows[0]
    rows = site.layer.rows(tensor, samples)
    _, width, positions = rows.raw.shape
    if isinstance(tensor, Routed):
        return Seen(width, positions, False, len(shows), tensor.values.nbytes // samples, packed=True)
    return Seen(
        width,
        positions,
        tensor.ndim == 2 and len(tensor) == samples,
        len(shows),
        tensor.nbytes // samples,
        tensor._version != version,
        identity(tensor) == identity(logits),
        rows.grid,
    )


def _reads_ids(layer: Layer) -> bool:
    """Whether what a module reads are numbers of entries, no rows."""
    return isinstance(layer.module, nn.Embedding)


def version_of(shown: Any) -> int:
    """How often a tensor was written into in place."""
    return shown._version if isinstance(shown, Tensor) else 0


def identity(shown: Any) -> Identity:
    """What names of one tensor have in common while it is held; a tensor on the meta device has no address, but a storage."""
    tensor: Tensor = shown.values if isinstance(shown, Routed) else shown
    place = (tensor.untyped_storage()._cdata, int(tensor.storage_offset())) if tensor.is_meta else tensor.data_ptr()
    return place, tensor.shape


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)


def _unfit(model: nn.Module, batch: Batch, error: Exception) -> str:
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"{type(model).__name__} cannot take the data, {batch.describe()}: {cause}; change the data's channels and size "
        "(dataset.channels=, dataset.size=), or the model"
    )
