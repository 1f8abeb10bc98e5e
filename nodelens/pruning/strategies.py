"""Pruning one layer: a keep mask over its units, from its weights, from tensors or from scores that are given."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from nodelens.engine.members import of_groups_only
from nodelens.messages import as_seed, kind_of, nearest
from nodelens.metrics import Metric, get_metric, list_metrics
from nodelens.metrics.need import Units
from nodelens.network.find_layers import find_layers
from nodelens.network.groups import PruningGroup
from nodelens.network.layers import Layer
from nodelens.pruning.allocation.allocate import Allocation, allocate
from nodelens.pruning.allocation.selection import Mode, select
from nodelens.pruning.surgery.layer_mask import apply_mask, sparsity, unmask, zero

from .removal_plan import check_removal

ALIGNMENT = "alignment"  # any metric of the catalogue, the Rayleigh quotient unless another is named
PRECOMPUTED = "precomputed"  # scores that the caller has
_OF_WEIGHTS = ("magnitude", "l1", "l2", "fpgm", "lamp", "random")
_SINGLE = ("magnitude", "l1", "l2", "random", PRECOMPUTED)  # that score single weights
_TENSORS = ("inputs", "outputs", "gradients", "labels", "targets", "logits", "next_outputs", "initial_weights", "norm_weights")


@dataclass(frozen=True)
class PruningConfig:
    """How a layer is pruned: the share of its units, and which: ``low`` scores go, or ``high``, or ``random`` ones.

    structured: whole units; else single weights (``magnitude`` and ``random`` alone). min_keep: units that stay; multiple: of which
    the number kept has to be. Scores are ranked by sign, never by size; ties fall by a permutation of the seed. Raises ValueError
    for an amount outside [0, 1), an unknown mode or a negative seed.
    """

    amount: float = 0.5
    structured: bool = True
    pruning_mode: Mode = "low"
    seed: int = 0
    min_keep: int = 1
    multiple: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", as_seed(self.seed))
        check_removal(self.amount, self.pruning_mode)


@dataclass(frozen=True)
class PruningStrategy:
    """A criterion and a config: ``prune(layer)`` says which units stay, and zeroes the others.

    A layer alone does not show what reads its units: networks are pruned by ``nl.prune``.

    >>> layer = nn.Linear(2, 4)
    >>> strategy = get_pruning_strategy("magnitude", config=PruningConfig(amount=0.5))
    >>> int(strategy.prune(layer).sum()), strategy.get_sparsity(layer)
    (2, 0.5)
    """

    name: str
    config: PruningConfig
    options: dict[str, Any]

    def prune(self, layer: nn.Module | Layer, amount: float | None = None, *, apply: bool = True, **tensors: Tensor) -> Tensor:
        """Keep mask over the layer's units, (units,) bool, or of the weight's shape; floor(amount n + 1/2) of n are removed.

        tensors: inputs, outputs, gradients (of the summed loss with respect to the outputs), labels, targets, as
        ``get_metric().compute`` takes them; weights are the layer's own. Weights and bias of removed units are set to zero unless
        ``apply`` is False. Raises ValueError for tensors that are missing or unknown, or a criterion that one layer does not show.
        """
        layer = _layer(layer)
        if layer.weight is None:
            raise ValueError(f"{layer.name} has no weights of its own: prune a Linear layer or a convolution")
        _check_tensors(self.name, tensors)
        scores = self.scores(layer, **tensors) if self.config.structured else self._weight_scores(layer)
        keep = self.create_pruning_mask(scores, amount)
        if apply:
            zero(layer.module, keep)
        return keep

    def prune_model(self, model: nn.Module, amount: float | None = None, layers: str | Sequence[str] = "*") -> dict[str, Tensor]:
        """Prunes each layer by its own weights: {layer: keep mask}. layers: what ``find_layers`` takes."""
        return {layer.name: self.prune(layer, amount) for layer in find_layers(model, layers)}

    def create_pruning_mask(
        self,
        importance_scores: Tensor,
        amount: float | None = None,
        structured: bool | None = None,
        dim: int = 0,
        pruning_mode: Mode | None = None,
    ) -> Tensor:
        """Keep mask of the scores' shape, bool, from scores alone; high means keep.

        structured: whole slices along ``dim``, by the sum of their scores; else single entries. None: as the config says, which
        makes no difference for scores of one dimension. Raises ValueError for an amount outside [0, 1) or an unknown mode.
        """
        amount, mode = self.config.amount if amount is None else amount, pruning_mode or self.config.pruning_mode
        check_removal(amount, mode)
        structured = self.config.structured if structured is None else structured
        if importance_scores.ndim == 1:
            return self._kept_units(importance_scores, amount, mode)
        if not structured:
            return self._kept_entries(importance_scores, amount, mode)
        keep = self._kept_units(importance_scores.movedim(dim, 0).flatten(1).sum(1), amount, mode)
        shape = [-1 if k == dim % importance_scores.ndim else 1 for k in range(importance_scores.ndim)]
        return keep.reshape(shape).expand_as(importance_scores)

    def apply_pruning(self, module: nn.Module, mask: Tensor, make_permanent: bool = False) -> None:
        """Masks the weights, for good or until ``clear_pruning_state``; mask: (units,), or of the weight's shape, nonzero stays."""
        (zero if make_permanent else apply_mask)(module, mask)

    def remove_pruning(self, module: nn.Module) -> None:
        """Takes the mask off and leaves zeros where it was."""
        unmask(module, permanent=True)

    def clear_pruning_state(self, module: nn.Module) -> None:
        """Takes the mask off and gives the weights back."""
        unmask(module)

    def get_sparsity(self, module: nn.Module) -> float:
        """Share of the entries of the layer's weight that are zero."""
        return sparsity(module)

    def scores(self, layer: nn.Module | Layer, **tensors: Tensor) -> Tensor:
        """The score of each unit, (units,), high means keep. Tensors and errors as in ``prune``."""
        layer = _layer(layer)
        _check_tensors(self.name, tensors)
        if self.name == PRECOMPUTED:
            return _given(self.options.get("scores"), (len(layer.weight),), layer)  # type: ignore[arg-type]
        if self.name in _OF_WEIGHTS:
            weight: Any = layer.weight
            units = Units(layer.name, len(weight), self.config.seed)
            return get_metric(self.name, **self.options)(units if self.name == "random" else weight)
        if self.name in _OF_TENSORS:
            return _OF_TENSORS[self.name](layer, tensors)
        if self.name != ALIGNMENT and of_groups_only(get_metric(self.name)):
            raise ValueError(f"{self.name} reads what consumes the units, which one layer does not show: use nl.prune")
        metric = _metric(self.name, self.options)
        if metric.shape != "unit":
            raise ValueError(f"{self.name} gives one value per {metric.shape}: a strategy ranks units")
        return metric.compute(**_own(layer), **tensors)

    def _weight_scores(self, layer: Layer) -> Tensor:
        """The score of each single weight, in the weight's shape."""
        weight: Any = layer.tensor
        if self.name not in _SINGLE:
            raise ValueError(f"structured=False takes magnitude or random, not {self.name}")
        if self.name == PRECOMPUTED:
            return _given(self.options.get("scores"), weight.shape, layer)
        return self._draws(weight.shape) if self.name == "random" else weight.abs().double().cpu()

    def _draws(self, shape: Sequence[int]) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(self.config.seed), dtype=torch.float64)

    def _kept_entries(self, scores: Tensor, amount: float, mode: Mode) -> Tensor:
        """Keep mask of single entries, of the scores' shape; ties go in the order of the entries."""
        values = (self._draws(scores.shape) if mode == "random" else scores).flatten()
        keep = torch.ones(values.numel(), dtype=torch.bool, device=values.device)
        keep[torch.argsort(-values if mode == "high" else values, stable=True)[: int(amount * values.numel() + 0.5)]] = False
        return keep.reshape(scores.shape)

    def _kept_units(self, scores: Tensor, amount: float, mode: Mode) -> Tensor:
        """Keep mask of scores (n,)."""
        config, group = self.config, PruningGroup("layer", "channel", len(scores), ())
        index = pd.MultiIndex.from_product([["layer"], range(group.n)], names=["group", "unit"])
        table = pd.Series(scores.tolist(), index, dtype=float)
        allocation = Allocation(min_keep=config.min_keep, multiple=config.multiple)
        kept = allocate([group], table, amount, allocation=allocation, mode=mode, seed=config.seed)
        keep = torch.ones(group.n, dtype=torch.bool)
        keep[list(select([group], table, kept, mode=mode, seed=config.seed).get("layer", []))] = False
        return keep


def get_pruning_strategy(name: str, config: PruningConfig | None = None, **options: Any) -> PruningStrategy:
    """A strategy by name, with its options: a published criterion, any unit metric, ``alignment``, or ``precomputed`` with scores=.

    scores: (units,), or of the weight's shape; high means keep. Raises ValueError for an unknown name or option.
    """
    if not isinstance(name, str):
        raise TypeError(f"a pruning strategy is given by its name, such as 'magnitude', not as {kind_of(name)}")
    known = list_pruning_strategies()
    if name not in known and name not in list_metrics():
        raise ValueError(f"no pruning strategy is called {name!r}.{nearest(name, known)} list_pruning_strategies() names all")
    if name == PRECOMPUTED:
        unknown = next((option for option in options if option != "scores"), None)
        if unknown is not None:
            raise ValueError(f"{name} has no option {unknown!r}; it takes scores.{nearest(unknown, ['scores'])}")
    else:
        _metric(name, options)
    return PruningStrategy(name, config or PruningConfig(), options)


def list_pruning_strategies() -> list[str]:
    """``alignment``, ``precomputed`` and the name of every metric that has a value per unit."""
    metrics = [name for name in list_metrics() if get_metric(name).shape == "unit"]
    return sorted({ALIGNMENT, PRECOMPUTED, *metrics})


def _metric(name: str, options: Mapping[str, Any]) -> Metric:
    options = dict(options)
    return get_metric(options.pop("metric", "rayleigh_quotient") if name == ALIGNMENT else name, **options)


def _check_tensors(name: str, tensors: Mapping[str, Tensor]) -> None:
    unknown = next((each for each in tensors if each not in _TENSORS), None)
    if unknown is not None:
        raise ValueError(f"{name} reads no {unknown!r}.{nearest(unknown, _TENSORS)} Tensors are {', '.join(_TENSORS)}")


def _layer(layer: nn.Module | Layer) -> Layer:
    return layer if isinstance(layer, Layer) else Layer(type(layer).__name__, layer)


def _given(scores: Any, shape: Sequence[int], layer: Layer) -> Tensor:
    """Scores that the caller has. Raises ValueError where there are none, or another number of them."""
    if scores is None:
        raise ValueError(f"{PRECOMPUTED} needs scores=, or use create_pruning_mask(scores)")
    scores = torch.as_tensor(scores).detach().cpu()
    if scores.shape != tuple(shape):
        raise ValueError(f"scores are {tuple(scores.shape)}, {layer.name} takes {tuple(shape)}")
    return scores


def _own(layer: Layer) -> dict[str, Any]:
    """The layer's weights as ``compute`` takes them, and a convolution's geometry."""
    module: Any = layer.module
    if not isinstance(module, nn.modules.conv._ConvNd):
        return {"weights": layer.weight}
    if module.transposed:
        raise ValueError(f"{layer.name} is a transposed convolution: metrics from tensors know none; use nl.prune")
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
            y = Layer(layer.name, copy.deepcopy(layer.module).double()).apply(x[None].double(), w)
        found.append(layer._by_unit((w * torch.autograd.grad(y, w, g[None].double())[0]).detach()))
    return torch.stack(found)


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
