"""The plan of a pass: which statistic is kept at which site, what it will take, and whether that is allowed."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .frame import Frame, logits_of
from .hooks import Capture, Site
from .layers import Layer
from .metrics import Metric, Need
from .modes import frozen
from .statistics import ByClass, Cross, Gram, Moments, Patches, Sizes, Zeros

GROUPED_WIDTH = 1024  # wider pair statistics are kept once, not once a group: they have no standard error
BALANCE = 32.0  # float32 operations in the time of one byte of rows, found with ResNet-18 at 32, 64 and 224 pixels
CAPACITY = {"rows": 4096, "sums": 1024, "samples": 1024}  # what waits for company, so that no small product is formed
PAIRS = (Gram,)


@dataclass(frozen=True)
class Seen:
    """What one recorded forward saw at a site, a sample of the batch."""

    width: int
    positions: int
    flat: bool  # (B, width): one row a sample whatever the input's size
    calls: int
    nbytes: int
    overwritten: bool = False  # by a later operation, in place
    final: bool = False  # it is the model's output


@dataclass(frozen=True)
class Recording:
    """One small forward pass, looked at: what fired, with which shapes, at what cost."""

    seen: dict[str, Seen]  # by str(site)
    flops: int  # of the forward pass, a sample
    classes: int  # width of the logits

    @classmethod
    def of(cls, model: nn.Module, layers: Iterable[Layer], frame: Frame) -> "Recording":
        """Runs the first samples of a batch. Raises ValueError, with the input's shape, where the model cannot take them."""
        shown: dict[str, list] = {}
        layers = list(layers)
        sites = [Site(layer, port) for layer in layers for port in ("input", "output")]
        frame = frame.head(2).map(torch.clone)  # tensors made in inference mode would have no version to compare
        capture = Capture(sites, lambda site, tensor: shown.setdefault(str(site), []).append((tensor, tensor._version)))
        capture.gate = True
        with frozen(model), torch.inference_mode(False), torch.no_grad(), capture, FlopCounterMode(display=False) as counter:
            try:
                logits = logits_of(frame.run(model))
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(_unfit(model, frame, error)) from error
        by_name = {str(site): site.layer for site in sites}
        seen = {name: _seen(by_name[name], shows, len(frame), logits) for name, shows in shown.items()}
        return cls(seen, counter.get_total_flops() // len(frame), logits.shape[-1])


def _seen(layer: Layer, shows: list, samples: int, logits: torch.Tensor) -> Seen:
    tensor, version = shows[0]
    rows = layer.rows(tensor, samples)
    _, width, positions = rows.raw.shape
    final = tensor.data_ptr() == logits.data_ptr() and tensor.shape == logits.shape
    return Seen(
        width,
        positions,
        tensor.ndim == 2 and len(tensor) == samples,
        len(shows),
        tensor.nbytes // samples,
        tensor._version != version,
        final,
    )


def _unfit(model: nn.Module, frame: Frame, error: Exception) -> str:
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"{type(model).__name__} cannot take the data, {frame.describe()}: {cause}; change the data's channels and size "
        "(dataset.channels=, dataset.size=), or the model"
    )


@dataclass(frozen=True)
class Plan:
    """Every statistic once, however many metrics ask for it.

    ``needs`` holds, for each site, what is added up there; ``lookup`` says which of those serves a metric's need.
    """

    layers: list[Layer]
    metrics: Mapping[str, Metric]
    recording: Recording
    groups: int = 8
    positions: int | None = None  # a sample of positions an image for pair statistics; None for all
    never_called: list[str] = field(default_factory=list)
    precision: str = "float32"  # of products; rows that are float64 keep it

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: list[Layer],
        metrics: Mapping[str, Metric],
        recording: Recording,
        groups: int = 8,
        positions: int | None = None,
        optional: bool = False,
        precision: str = "float32",
    ) -> "Plan":
        """A plan for a model's layers, after one recorded forward of a few samples.

        ``optional`` leaves out layers that the forward never calls (and says so); otherwise such a layer is an error, and
        so is a metric that needs weights at a layer without.
        """
        if precision not in ("float32", "float64"):
            raise ValueError(f"precision is {precision!r}; products are formed in float32 or float64")
        silent = [layer for layer in layers if f"{layer.name}.output" not in recording.seen]
        if silent and (not optional or len(silent) == len(layers)):
            raise ValueError(
                f"layer {silent[0].name!r} is never called by {type(model).__name__}.forward (its parent may read "
                "its weight directly): name another layer, such as the module that takes its output"
            )
        layers = [layer for layer in layers if layer not in silent]
        for name, metric in metrics.items():
            bare = next((layer for layer in layers if metric.weighted and layer.weight is None), None)
            if bare is not None:
                raise ValueError(
                    f"metric {name!r} needs weights, layer {bare.name!r} ({type(bare.module).__name__}) has none: "
                    "leave the metric out, or the layer (layers=)"
                )
        return cls(layers, metrics, recording, groups, positions, [layer.name for layer in silent], precision)

    def seen(self, layer: Layer, port: str) -> Seen:
        return self.recording.seen[f"{layer.name}.{'input' if port == 'input' else 'output'}"]

    def wanted(self, layer: Layer) -> set[Need]:
        """What the metrics want of a layer; a row a sample is the same in either view."""
        needs = {need for metric in self.metrics.values() for need in metric.needs().values()}
        return {self._one_view(layer, need) for need in needs}

    def needs(self, layer: Layer) -> list[Need]:
        """What is added up at a layer: moments of rows whose products are kept are read off those."""
        wanted = self.wanted(layer)
        return sorted((need for need in wanted if self._provider(need, wanted) == need), key=str)

    def lookup(self, layer: Layer, need: Need) -> tuple[Need, bool]:
        """The need that serves another, and whether its moments do."""
        need = self._one_view(layer, need)
        provider = self._provider(need, self.wanted(layer))
        return provider, provider != need

    def sites(self) -> list[Site]:
        ports = {layer: sorted({need.port for need in self.needs(layer)}) for layer in self.layers}
        return [Site(layer, port) for layer in self.layers for port in ports[layer]]

    @property
    def overwritten(self) -> set[str]:
        return {layer.name for layer in self.layers if self.seen(layer, "output").overwritten}

    @property
    def targets(self) -> set[str]:
        return {need.target for layer in self.layers for need in self.needs(layer) if need.target}

    @property
    def gradients(self) -> bool:
        return any(site.port == "output*grad" for site in self.sites())

    def sampled(self, need: Need) -> bool:
        """Whether a need reads a sample of the positions only."""
        return self.positions is not None and need.statistic in PAIRS and need.view == "positions"

    def groups_of(self, layer: Layer, need: Need) -> int:
        wide = need.statistic in PAIRS and self.seen(layer, need.port).width > GROUPED_WIDTH
        return 1 if wide else self.groups

    def nbytes(self, layer: Layer, need: Need) -> int:
        """Bytes of a statistic's sums over all its groups."""
        d, classes = self.seen(layer, need.port).width, self.recording.classes
        if need.statistic is Patches and layer.geometry is not None:
            d *= math.prod(layer.geometry.kernel)
        t = classes if need.target == "logits" else 1
        size = {Gram: d * d + 2 * d, Cross: d * t + 2 * d + 2 * t + t * t, ByClass: 2 * classes * d + d, Sizes: d, Zeros: d}
        return 8 * self.groups_of(layer, need) * size.get(need.statistic, 3 * d)

    def overhead(self) -> float:
        """Estimated cost of the pass over a bare forward (with its backward, where gradients are taken), as a share."""
        extra = 0.0
        for layer in self.layers:
            for need in self.needs(layer):
                seen = self.seen(layer, need.port)
                rows = min(seen.positions, self.positions or seen.positions) if self.sampled(need) else seen.positions
                rows = rows if need.view == "positions" else 1
                products = 2 * seen.width**2 * rows if need.statistic in PAIRS else 0
                extra += products + BALANCE * seen.nbytes * rows / seen.positions
        return extra / max(1, self.recording.flops * (3 if self.gradients else 1))

    @property
    def total_bytes(self) -> int:
        return sum(self.nbytes(layer, need) for layer in self.layers for need in self.needs(layer)) + self.waiting_bytes

    @property
    def waiting_bytes(self) -> int:
        """Rows that wait for company: buffers of small maps and of a row a sample."""
        return sum(4 * sum(CAPACITY.values()) * self.seen(*site).width for site in self.sites())

    def check(self, budget: float | None) -> None:
        """Raises MemoryError, with the ways out, where the plan takes more bytes than the budget."""
        if budget is None or self.total_bytes <= budget:
            return
        layer, need = max(((a, b) for a in self.layers for b in self.needs(a)), key=lambda pair: self.nbytes(*pair))
        raise MemoryError(
            f"the plan takes {self.total_bytes / 2**20:,.0f} MiB, budget.memory is {budget / 2**20:,.0f} MiB; the "
            f"largest is {need} at {layer.name} with {self.nbytes(layer, need) / 2**20:,.0f} MiB: choose fewer layers "
            "(layers=), fewer groups (groups=1), other metrics, or a larger budget"
        )

    def rows(self) -> list[dict]:
        """The plan as a table: a row a statistic of a layer."""
        return [
            {
                "layer": layer.name,
                "statistic": str(need),
                "width": self.seen(layer, need.port).width,
                "rows_per_sample": self._rows_a_sample(layer, need),
                "groups": self.groups_of(layer, need),
                "bytes": self.nbytes(layer, need),
            }
            for layer in self.layers
            for need in self.needs(layer)
        ]

    def _rows_a_sample(self, layer: Layer, need: Need) -> int:
        positions = self.seen(layer, need.port).positions
        if need.view == "samples":
            return 1
        return min(positions, self.positions or positions) if self.sampled(need) else positions

    def _one_view(self, layer: Layer, need: Need) -> Need:
        return (
            need._replace(view="samples") if self.seen(layer, need.port).flat and self.seen(layer, need.port).calls == 1 else need
        )

    def _provider(self, need: Need, wanted: set[Need]) -> Need:
        gram = need._replace(statistic=Gram)
        return gram if need.statistic is Moments and gram in wanted and not self.sampled(gram) else need
