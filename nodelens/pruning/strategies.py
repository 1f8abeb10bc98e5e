"""Pruning one layer at hand: a keep mask over its units, from its weights or from tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from nodelens.engine.members import of_groups_only
from nodelens.messages import nearest
from nodelens.metrics import get_metric, list_metrics
from nodelens.metrics.need import Units
from nodelens.network.groups import GroupSlice, PruningGroup, identity
from nodelens.network.layers import Layer
from nodelens.pruning.allocation.allocate import Allocation, allocate
from nodelens.pruning.allocation.selection import Mode, select

from .removal_plan import check_removal

ALIGNMENT = "alignment"  # any metric of the catalogue, the Rayleigh quotient unless another is named
_OF_WEIGHTS = ("magnitude", "l1", "l2", "fpgm", "lamp", "random")


@dataclass(frozen=True)
class PruningConfig:
    """How a layer is pruned: the share of its units, and which: ``low`` scores go, or ``high``, or ``random`` ones.

    structured: whole units; else single weights (``magnitude`` and ``random`` alone). min_keep: units that stay; multiple: of which
    the number kept has to be. Scores are ranked by sign, never by size; ties fall by a permutation of the seed. Raises ValueError
    for an amount outside [0, 1) or an unknown mode.
    """

    amount: float = 0.5
    structured: bool = True
    pruning_mode: Mode = "low"
    seed: int = 0
    min_keep: int = 1
    multiple: int = 1

    def __post_init__(self) -> None:
        check_removal(self.amount, self.pruning_mode)


@dataclass(frozen=True)
class PruningStrategy:
    """A criterion and a config: ``prune(layer)`` says which units stay, and zeroes the others."""

    name: str
    config: PruningConfig
    options: dict[str, Any]

    def prune(self, layer: nn.Module | Layer, amount: float | None = None, *, apply: bool = True, **tensors: Tensor) -> Tensor:
        """Keep mask over the layer's units, (units,) bool; floor(amount units + 1/2) are removed.

        tensors: inputs, outputs, gradients (of the summed loss in the outputs), labels, targets, as ``get_metric().compute`` takes
        them; weights are the layer's own. The removed units' weights and bias are set to zero unless ``apply`` is False. What reads
        the layer is not known here: networks are pruned by ``nl.prune``. Raises ValueError for tensors that are missing, or a
        criterion that a layer alone does not tell.
        """
        layer = layer if isinstance(layer, Layer) else Layer(type(layer).__name__, layer)
        weight = layer.weight
        if weight is None:
            raise ValueError(f"{layer.name} has no weights of its own: prune a Linear layer or a convolution")
        amount = self.config.amount if amount is None else amount
        check_removal(amount, self.config.pruning_mode)
        if not self.config.structured:
            return self._single_weights(layer, amount, apply)
        scores = self.scores(layer, **tensors)
        group = PruningGroup("layer", "channel", len(weight), ())
        table = pd.Series(
            scores.tolist(), pd.MultiIndex.from_product([["layer"], range(group.n)], names=["group", "unit"]), dtype=float
        )
        mode, seed = self.config.pruning_mode, self.config.seed
        allocation = Allocation(min_keep=self.config.min_keep, multiple=self.config.multiple)
        kept = allocate([group], table, amount, allocation=allocation, mode=mode, seed=seed)
        gone = select([group], table, kept, mode=mode, seed=seed).get("layer", [])
        keep = torch.ones(group.n, dtype=torch.bool)
        keep[list(gone)] = False
        if apply:
            _zero(layer, ~keep)
        return keep

    def scores(self, layer: nn.Module | Layer, **tensors: Tensor) -> Tensor:
        """The score of each unit, (units,), high means keep. Tensors and errors as in ``prune``."""
        layer = layer if isinstance(layer, Layer) else Layer(type(layer).__name__, layer)
        if self.name in _OF_WEIGHTS:
            weight: Any = layer.weight
            units = Units(layer.name, len(weight), self.config.seed)
            return get_metric(self.name, **self.options)(units if self.name == "random" else weight)
        if self.name in _OF_TENSORS:
            return _OF_TENSORS[self.name](layer, tensors)
        if self.name not in (ALIGNMENT, *_OF_TENSORS) and of_groups_only(get_metric(self.name)):
            raise ValueError(f"{self.name} reads what consumes the units, which a layer alone does not tell: use nl.prune")
        name, options = self.name, dict(self.options)
        if name == ALIGNMENT:
            name = options.pop("metric", "rayleigh_quotient")
        metric = get_metric(name, **options)
        if metric.shape != "unit":
            raise ValueError(f"{name} gives a value a {metric.shape}: a strategy ranks units")
        return metric.compute(**_own(layer), **tensors)

    def _single_weights(self, layer: Layer, amount: float, apply: bool) -> Tensor:
        """Keep mask of the weight's shape."""
        weight: Any = layer.module.weight
        if self.name not in ("magnitude", "l1", "l2", "random"):
            raise ValueError(f"structured=False takes magnitude or random, not {self.name}")
        draws = torch.rand(weight.numel(), generator=torch.Generator().manual_seed(self.config.seed), dtype=torch.float64)
        size = (
            draws
            if self.name == "random" or self.config.pruning_mode == "random"
            else weight.detach().abs().flatten().double().cpu()
        )
        order = torch.argsort(-size if self.config.pruning_mode == "high" else size, stable=True)
        keep = torch.ones(weight.numel(), dtype=torch.bool)
        keep[order[: int(amount * weight.numel() + 0.5)]] = False
        keep = keep.reshape(weight.shape)
        if apply:
            with torch.no_grad():
                weight.mul_(keep.to(weight))
        return keep


def get_pruning_strategy(name: str, config: PruningConfig | None = None, **options: Any) -> PruningStrategy:
    """A strategy by name: a published criterion, any unit metric of the catalogue, or ``alignment``; options are its own.

    Raises ValueError for an unknown name or option, with the nearest that there is.
    """
    known = list_pruning_strategies()
    if name not in known and name not in list_metrics():
        raise ValueError(f"no pruning strategy is called {name!r}.{nearest(name, known)} list_pruning_strategies() names all")
    if name != ALIGNMENT:
        get_metric(name, **options)
    return PruningStrategy(name, config or PruningConfig(), options)


def list_pruning_strategies() -> list[str]:
    """``alignment`` and the name of every metric that has a value per unit."""
    metrics = [name for name in list_metrics() if get_metric(name).shape == "unit"]
    return sorted({ALIGNMENT, *metrics})


def _producer(layer: Layer) -> GroupSlice:
    module: Any = layer.module
    transposed = isinstance(module, nn.modules.conv._ConvNd) and module.transposed
    if transposed and module.groups > 1:
        raise ValueError(f"{layer.name} is a grouped transposed convolution: its units do not lie along one dimension")
    dim = 1 if transposed or hasattr(module, "nf") else 0
    return GroupSlice("", "weight", dim, identity(module.weight.shape[dim]), "producer")


def _zero(layer: Layer, gone: Tensor) -> None:
    module: Any = layer.module
    piece = _producer(layer)
    with torch.no_grad():
        module.weight.index_fill_(piece.dim, gone.nonzero()[:, 0].to(module.weight.device), 0)
        if module.bias is not None:
            module.bias.masked_fill_(gone.to(module.bias.device), 0)


def _own(layer: Layer) -> dict[str, Any]:
    """The layer's weights as ``compute`` takes them, and a convolution's geometry."""
    module: Any = layer.module
    if not isinstance(module, nn.modules.conv._ConvNd):
        return {"weights": layer.weight}
    if module.transposed:
        raise ValueError(f"{layer.name} is a transposed convolution: metrics in hand know none; use nl.prune")
    return {"weights": layer.tensor} | {k: getattr(module, k) for k in ("stride", "padding", "dilation", "groups", "padding_mode")}


def _needed(tensors: dict[str, Tensor], name: str, *wanted: str) -> list[Tensor]:
    missing = [k for k in wanted if tensors.get(k) is None]
    if missing:
        raise ValueError(f"{name} needs {' and '.join(f'{m}=' for m in missing)}")
    return [tensors[k] for k in wanted]


def _taylor(layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
    outputs, gradients = _needed(tensors, "taylor", "outputs", "gradients")
    return get_metric("taylor").compute(outputs=outputs, gradients=gradients)


def _loss_proxy(layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
    return _taylor(layer, tensors) / 2


def _sample_gradients(layer: Layer, tensors: dict[str, Tensor], name: str) -> Tensor:
    """Products w g_w of each sample, (n, units, fan_in) float64."""
    inputs, gradients = _needed(tensors, name, "inputs", "gradients")
    weight: Any = layer.tensor
    found = []
    for x, g in zip(inputs, gradients, strict=True):
        w = weight.double().requires_grad_()
        with torch.enable_grad():
            y = Layer(layer.name, _double(layer.module)).apply(x[None].double(), w)
        found.append(layer._by_unit((w * torch.autograd.grad(y, w, g[None].double())[0]).detach()))
    return torch.stack(found)


def _double(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module).double()


def _gradient(layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
    return _sample_gradients(layer, tensors, "gradient").sum(0).abs().sum(1)


def _movement(layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
    return -_sample_gradients(layer, tensors, "movement").sum((0, 2))


def _fisher(layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
    return _sample_gradients(layer, tensors, "fisher").square().mean(0).sum(1) / 2


_OF_TENSORS: dict[str, Callable[[Layer, dict[str, Tensor]], Tensor]] = {
    "taylor": _taylor,
    "taylor_producer": _taylor,
    "loss_proxy": _loss_proxy,
    "gradient": _gradient,
    "movement": _movement,
    "fisher": _fisher,
}
