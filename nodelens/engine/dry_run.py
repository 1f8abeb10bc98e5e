"""The dry run: one forward pass of two samples, which finds shapes and costs before the real pass."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nodelens.network.batch import Batch
from nodelens.network.eval_mode import eval_mode
from nodelens.network.experts import Routed
from nodelens.network.failed_forward import check_finite, check_forward
from nodelens.network.hooks import Capture, Site
from nodelens.network.layers import Layer
from nodelens.network.objective import Objective
from nodelens.network.tasks import BY_VALUE

from .association_methods import Facts
from .firing import BEHIND, Firing, FiringTracer, Place, place_of, stored_tensors
from .members import Members
from .sample_axis import warn_of_shared, without_samples

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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
    unread: str = ""  # why no rows can be made of what it shows


@dataclass(frozen=True)
class DryRun:
    """Which sites were reached, with their shapes, and the cost of the forward pass."""

    seen: dict[str, Seen]  # by str(site)
    flops: int  # of the forward pass, per sample
    classes: int  # width of the logits
    tokens: bool = False  # whether each token has its own prediction
    predictions: int = 1  # of each sample
    decoder: frozenset[str] = frozenset()  # sites with one row per token of the decoder
    samples: int = 2  # in the batch that the two were taken from
    norms: dict[str, str] = field(default_factory=dict)  # by layer: the path of the batch norm that reads its output
    norm_modules: dict[str, nn.Module] = field(default_factory=dict)  # by layer: that norm, once bound to a model
    firing: dict[str, Firing] = field(default_factory=dict)  # by layer: the activation that follows
    task: str = ""
    refusal: str = ""  # why the predictions cannot be read from the output
    labelled: bool = True  # whether the data have what the loss needs
    own_loss: bool = False  # whether the loss is one of the user's
    facts: Facts | None = None  # of derivatives, where associations need them

    @classmethod
    def of_weights(cls, layers: Iterable[Layer]) -> "DryRun":
        """A dry run that is derived from the shapes of weights; no model is run."""
        widths = ((layer.name, layer.shape[0]) for layer in layers if layer.shape is not None)
        return cls({f"{name}.output": Seen(n, 1, True, 1, 4 * n) for name, n in widths}, 0, 0)

    @classmethod
    def of(
        cls, model: nn.Module, layers: Iterable[Layer], batch: Batch, objective: Objective | None = None, optional: bool = False
    ) -> "DryRun":
        """Runs the first two samples of a batch.

        optional: some layers with weights may show no rows of samples; the reason is then in their ``Seen``. Raises ValueError,
        with the input's shape, if the model cannot take the samples, and for layers that cannot be read.
        """
        check_finite(batch)
        objective = objective or Objective.of(model)
        captured: dict[Site, list[tuple[Any, int]]] = {}
        layers, samples = list(layers), len(batch)
        batch_norms = [Layer(name, module) for name, module in model.named_modules() if isinstance(module, _NORMS)]
        sites = [Site(layer, port) for layer in layers for port in ("input", "output") if port == "output" or not _reads_ids(layer)]
        readers = [Site(norm, "input") for norm in batch_norms]
        whole, batch = batch, batch.head(2).map(torch.clone)  # tensors made in inference mode have no version to compare
        tracer = FiringTracer(model)

        def see(site: Site, tensor: Any) -> None:
            captured.setdefault(site, []).append((tensor, version_of(tensor)))
            if site.port == "output" and site.layer.side == "output" and isinstance(tensor, Tensor):
                tracer.start(site.layer.name, tensor)

        capture = Capture(sites + readers, see)
        capture.gate = True
        try:
            with eval_mode(model), torch.inference_mode(False), torch.no_grad(), capture, _counter() as counter, tracer:
                output = batch.run(model)
        except Exception:  # a forward pass may raise anything; an error of a hook is raised as it is
            check_forward(model, whole)
            raise
        warn_of_shared(model, whole, objective)
        shown = {site: captured[site][0][0] for site in sites if site in captured}
        unread = without_samples(model, batch, shown, optional)
        answer, aligned, refusal = _predictions(objective, output, batch)
        made = partial(_seen, samples=len(batch), answer=answer, unread=unread, optional=optional)
        seen = {str(site): made(site, captured[site]) for site in sites if site in captured}
        seen |= {str(site): _unread(site, unread[site.layer.name]) for site in sites if site.layer.name in unread}
        if seen and all(each.unread for each in seen.values()):
            raise ValueError(next(iter(unread.values())))
        read = {identity(captured[site][0][0]): site.layer.name for site in readers if site in captured}
        outputs = [site for site in sites if site in captured and site.port == "output"]
        norms = {site.layer.name: norm for site in outputs if (norm := read.get(identity(captured[site][0][0]))) is not None}
        firing = {}
        for site in outputs:
            if site.layer.name not in unread and (found := tracer.found(site.layer.name)):
                firing[site.layer.name], behind = found
                seen[f"{site.layer.name}.{BEHIND}"] = made(site, [(behind, behind._version)])
        flops, classes = counter.get_total_flops() // len(batch), 0 if aligned is None else aligned.shape[-1]
        tokens = aligned is not None and aligned.ndim == 3 and objective.task not in BY_VALUE
        positions = aligned.shape[1] if tokens and aligned is not None else 1
        known: dict[str, Any] = {"norms": norms, "firing": firing, "task": objective.task, "refusal": refusal}
        known |= {"labelled": batch.labels is not None or objective.loss is not None, "own_loss": objective.loss is not None}
        return cls(seen, flops, classes, tokens, positions, objective.decoder, samples, **known)

    def bound(self, model: nn.Module) -> "DryRun":
        """The same with the norms of this process's model, and with the parameters that its activations' norms read.

        Until then no part of a model is in it, so that processes can share it. Collective for a sharded model.
        """
        tensors = stored_tensors(model)
        firing = {name: firing.bound(tensors) for name, firing in self.firing.items()}
        return replace(self, firing=firing, norm_modules={name: model.get_submodule(norm) for name, norm in self.norms.items()})


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
        calls = max(1, len(found)) * first.calls
        seen[f"{group.name}.output"] = Seen(group.group.n, first.positions, flat, calls, size, unread=first.unread)
    return replace(dry_run, seen=seen)


def _seen(
    site: Site, captures: list[tuple[Any, int]], samples: int, answer: Tensor | None, unread: dict[str, str], optional: bool
) -> Seen:
    """What a site shows. Where no rows can be made of it, ``unread`` gets the reason, unless the layer has to be read."""
    tensor, version = captures[0]
    try:
        rows = site.layer.rows(tensor, samples)
    except ValueError as error:
        if not optional:
            raise
        return _unread(site, unread.setdefault(site.layer.name, str(error)))
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


def _unread(site: Site, reason: str) -> Seen:
    """A site without rows, as wide as the layer's weight is there."""
    shape = site.layer.shape
    return Seen(0 if shape is None else shape[site.port == "input"], 1, True, 1, 0, unread=reason)


def _reads_ids(layer: Layer) -> bool:
    """Whether a module reads ids, not rows of numbers."""
    return isinstance(layer.module, nn.Embedding)


def version_of(captured: Any) -> int:
    """How often a tensor was written in place; 0 for the tokens of an expert."""
    return captured._version if isinstance(captured, Tensor) else 0


def identity(captured: Any) -> Place:
    """Equal for views of one tensor while it is alive."""
    return place_of(captured.values if isinstance(captured, Routed) else captured)


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
