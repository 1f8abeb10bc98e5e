"""What a model costs when units are gone: parameters, and multiply-accumulates (MACs) a sample."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nodelens.network.batch import Batch, tensor_of
from nodelens.network.eval_mode import eval_mode
from nodelens.network.groups import GroupSlice, PruningGroup, PruningGroups
from nodelens.network.hooks import observed

Budget = Literal["units", "params", "macs"]
_Owned = tuple[str, str]  # a module's path, a tensor's name there


@dataclass(frozen=True)
class _Block:
    """A tensor, or an expert's part of one: each dimension less what groups take from it, times how often it counts."""

    often: float
    size: tuple[int, ...]
    taken: tuple[tuple[int, str, int], ...] = ()  # (dimension, group, places a unit)

    def __call__(self, removed: Mapping[str, int]) -> float:
        left = list(self.size)
        for dim, group, places in self.taken:
            left[dim] -= places * removed.get(group, 0)
        return self.often * math.prod(left)


@dataclass(frozen=True)
class Cost:
    """Parameters and MACs as functions of kept counts, {group: units}: a convolution costs what it reads times what it puts out.

    Parameters: distinct tensors, tied ones once. MACs: of Linear layers, convolutions, routers and experts, positions times
    weights (two FLOPs each), and the products of queries with keys and of scores with values of attention that has a group, a
    causal one counted full. Biases, norms, embeddings and activations are not counted. MACs are 0 where no sample was shown.
    Where a whole expert goes, its tokens go to others: the MACs of experts stay.
    """

    units: Mapping[str, int]
    weights: tuple[_Block, ...]
    products: tuple[_Block, ...]

    @classmethod
    def of(cls, model: nn.Module, groups: Iterable[PruningGroup], batch: Batch | None = None) -> "Cost":
        """Counts; MACs by one forward of two samples of the batch."""
        groups = [*groups, *(groups.opt_in if isinstance(groups, PruningGroups) else ())]
        slices: dict[_Owned, list[tuple[PruningGroup, GroupSlice]]] = defaultdict(list)
        for group in groups:
            for piece in group.slices:
                slices[piece.module, piece.tensor].append((group, piece))
        weights = _blocks({_owned(name): (p, 1.0) for name, p in model.named_parameters()}, slices)
        if batch is None:
            return cls({a.name: a.n for a in groups}, weights, ())
        positions = _positions(model, batch)
        products = _blocks(positions, {owned: [pair for pair in pairs if not _whole(*pair)] for owned, pairs in slices.items()})
        attention = [_Block(a.attention_macs * _pairs(a, positions), (a.n,), ((0, a.name, 1),)) for a in groups if a.attention_macs]
        return cls({a.name: a.n for a in groups}, weights, (*products, *attention))

    def params(self, kept: Mapping[str, int] | None = None) -> int:
        """Parameters with these counts; a group that is not named keeps all."""
        return self._sum(self.weights, kept or {})

    def macs(self, kept: Mapping[str, int] | None = None) -> int:
        """MACs a sample with these counts."""
        return self._sum(self.products, kept or {})

    def price(self, budget: Budget, kept: Mapping[str, int] | None = None) -> int:
        """What a budget counts."""
        if budget == "units":
            return sum((kept or {}).get(name, n) for name, n in self.units.items())
        return self.params(kept) if budget == "params" else self.macs(kept)

    def _sum(self, blocks: Iterable[_Block], kept: Mapping[str, int]) -> int:
        removed = {name: self.units[name] - count for name, count in kept.items()}
        return round(math.fsum(block(removed) for block in blocks))


def _blocks(
    tensors: Mapping[_Owned, tuple[Tensor, float]], slices: Mapping[_Owned, list[tuple[PruningGroup, GroupSlice]]]
) -> tuple[_Block, ...]:
    """A block a tensor that groups piece, an expert one each; all that no group slices in one."""
    fixed, found = 0.0, []
    for owned, (tensor, often) in tensors.items():
        here = slices.get(owned, [])
        if not here:
            fixed += often * tensor.numel()
            continue
        taken = tuple((piece.dim, group.name, piece.index.shape[1]) for group, piece in here if piece.entry is None)
        if all(piece.entry is None for _, piece in here):
            found.append(_Block(often, tuple(tensor.shape), taken))
            continue
        for expert in range(len(tensor)):  # all keep as many of their own: a part of a tensor that may lose whole ones
            own = tuple((piece.dim, group.name, piece.index.shape[1]) for group, piece in here if piece.entry == expert)
            found.append(_Block(often / len(tensor), tuple(tensor.shape), (*taken, *own)))
    return (*found, _Block(fixed, ()))


def _whole(group: PruningGroup, piece: GroupSlice) -> bool:
    """Whether a piece takes whole experts from the tensors that these share."""
    return group.router is not None and piece.role == "producer"


def _positions(model: nn.Module, batch: Batch) -> dict[_Owned, tuple[Tensor, float]]:
    """How often a sample multiplies each weight, with the weight itself."""
    paths = {module: path for path, module in model.named_modules()}
    batch, often = batch.head(2), defaultdict[_Owned, float](float)

    def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        for tensor, times in _multiplied(module, (*args, *kwargs.values()), output).items():
            often[paths[module], tensor] += times / len(batch)

    matrices = [m for m in model.modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))]
    with eval_mode(model), torch.no_grad(), observed(matrices, see):
        batch.run(model)
    return {owned: (getattr(model.get_submodule(owned[0]), owned[1]), times) for owned, times in often.items()}


def _multiplied(module: nn.Module, read: tuple, output: Any) -> dict[str, float]:
    """{tensor: times} of one call: positions of a layer, tokens an expert on average."""
    x = tensor_of(read)
    experts = [name for name, p in module.named_parameters(recurse=False) if p.ndim == 3]
    if experts and not isinstance(module, nn.modules.conv._ConvNd):
        choices = [v for v in read if isinstance(v, Tensor) and not v.is_floating_point()]
        tokens = choices[0].numel() if choices else x.numel() // x.shape[-1] if x is not None else 0
        return {name: tokens / len(getattr(module, name)) for name in experts if name != "bias" and "bias" not in name}
    weight = getattr(module, "weight", None)
    if x is None or not isinstance(weight, Tensor) or isinstance(module, nn.Embedding):
        return {}
    if isinstance(module, nn.modules.conv._ConvNd):
        seen = x if module.transposed else tensor_of(output)
        return {"weight": seen.numel() / seen.shape[1]}  # type: ignore[union-attr]
    return {"weight": x.numel() / x.shape[-1]} if weight.ndim == 2 else {}


def _pairs(group: PruningGroup, positions: Mapping[_Owned, tuple[Tensor, float]]) -> float:
    """Pairs of positions that attention compares: those of its queries times those of its keys."""
    made = [
        positions[piece.module, piece.tensor][1] for piece in group.by_role("producer") if (piece.module, piece.tensor) in positions
    ]
    return made[0] * made[-1] if made else 0.0


def _owned(name: str) -> _Owned:
    path, _, tensor = name.rpartition(".")
    return path, tensor
