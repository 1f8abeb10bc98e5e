"""The cost of a model as a function of kept units: parameters, and multiply-accumulates (MACs) per sample."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

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
    """The size of a tensor, or of an expert's part, after removing units, times its number of uses."""

    uses: float
    size: tuple[int, ...]
    sliced: tuple[tuple[int, str, int], ...] = ()  # (dimension, group, positions per unit)

    def __call__(self, removed: Mapping[str, int]) -> float:
        left = list(self.size)
        for dim, group, places in self.sliced:
            left[dim] -= places * removed.get(group, 0)
        return self.uses * math.prod(left)


class _Sum(NamedTuple):
    """A sum of blocks, of which only those are computed anew that a removed group slices."""

    dense: float
    by_group: Mapping[str, list[_Block]]

    @classmethod
    def of(cls, blocks: Sequence[_Block]) -> "_Sum":
        by_group: dict[str, list[_Block]] = defaultdict(list)
        for block in blocks:
            for name in dict.fromkeys(group for _, group, _ in block.sliced):
                by_group[name].append(block)
        return cls(math.fsum(block({}) for block in blocks), by_group)

    def __call__(self, removed: Mapping[str, int]) -> int:
        changed = {id(block): block for name in removed for block in self.by_group.get(name, ())}.values()
        return round(math.fsum([self.dense, *(block(removed) for block in changed), *(-block({}) for block in changed)]))


@dataclass(frozen=True)
class Cost:
    """Parameters and MACs as functions of kept counts, {group: units}.

    Parameters: distinct tensors; tied ones count once. MACs: positions times weights (two FLOPs each) of Linear layers,
    convolutions, recurrent layers, routers and experts, and the products of queries with keys and of scores with values in
    attention modules whose heads form a group; causal attention counts in full. Biases, norms, embeddings and activations do not
    count. MACs are 0 without a batch. Removing whole experts does not change the MACs of experts, because their tokens are routed
    to others.
    """

    units: Mapping[str, int]
    weights: tuple[_Block, ...]
    products: tuple[_Block, ...]

    @classmethod
    def of(cls, model: nn.Module, groups: Iterable[PruningGroup], batch: Batch | None = None) -> "Cost":
        """Counts the parameters, and the MACs in one forward pass of two samples of the batch."""
        groups = [*groups, *(groups.opt_in if isinstance(groups, PruningGroups) else ())]
        slices: dict[_Owned, list[tuple[PruningGroup, GroupSlice]]] = defaultdict(list)
        for group in groups:
            for piece in group.slices:
                slices[piece.module, piece.tensor].append((group, piece))
        weights = _blocks({_owned(name): (p, 1.0) for name, p in model.named_parameters()}, slices)
        if batch is None:
            return cls({g.name: g.n for g in groups}, weights, ())
        positions = _positions(model, batch)
        routed = {owned: [pair for pair in pairs if not _of_whole_experts(*pair)] for owned, pairs in slices.items()}
        products = _blocks(positions, routed)
        attention = [_Block(g.attention_macs * _pairs(g, positions), (g.n,), ((0, g.name, 1),)) for g in groups if g.attention_macs]
        attention += [_Block(g.product_macs, (g.n,), ((0, g.name, 1),)) for g in groups if g.product_macs]
        return cls({g.name: g.n for g in groups}, weights, (*products, *attention))

    def params(self, kept: Mapping[str, int] | None = None) -> int:
        """Parameters with these counts; a group that is not named keeps all units."""
        return self._sliced[0](self._removed(kept))

    def macs(self, kept: Mapping[str, int] | None = None) -> int:
        """MACs per sample with these counts."""
        return self._sliced[1](self._removed(kept))

    def _removed(self, kept: Mapping[str, int] | None) -> dict[str, int]:
        """The groups that lose units, and how many."""
        return {name: self.units[name] - count for name, count in (kept or {}).items() if count != self.units[name]}

    def price(self, budget: Budget, kept: Mapping[str, int] | None = None) -> int:
        """Units, parameters or MACs with these counts."""
        if budget == "units":
            return sum((kept or {}).get(name, n) for name, n in self.units.items())
        return self.params(kept) if budget == "params" else self.macs(kept)

    @cached_property
    def _sliced(self) -> tuple["_Sum", "_Sum"]:
        return _Sum.of(self.weights), _Sum.of(self.products)


def _blocks(
    tensors: Mapping[_Owned, tuple[Tensor, float]], slices: Mapping[_Owned, list[tuple[PruningGroup, GroupSlice]]]
) -> tuple[_Block, ...]:
    """One block per sliced tensor, or per expert of it, and one block for all tensors that no group slices."""
    fixed, blocks = 0.0, []
    for owned, (tensor, uses) in tensors.items():
        pairs = slices.get(owned, [])
        if not pairs:
            fixed += uses * tensor.numel()
            continue
        common = tuple((piece.dim, group.name, piece.index.shape[1]) for group, piece in pairs if piece.entry is None)
        if all(piece.entry is None for _, piece in pairs):
            blocks.append(_Block(uses, tuple(tensor.shape), common))
            continue
        own: dict[int | None, list[tuple[int, str, int]]] = defaultdict(list)
        for group, piece in pairs:
            own[piece.entry].append((piece.dim, group.name, piece.index.shape[1]))
        for expert in range(len(tensor)):  # an equal part of the tensor each, which may also lose whole experts
            blocks.append(_Block(uses / len(tensor), tuple(tensor.shape), (*common, *own[expert])))
    return (*blocks, _Block(fixed, ()))


def _of_whole_experts(group: PruningGroup, piece: GroupSlice) -> bool:
    """Whether the slice is of the experts' own tensors in a group of whole experts."""
    return group.router is not None and piece.role == "producer"


def _positions(model: nn.Module, batch: Batch) -> dict[_Owned, tuple[Tensor, float]]:
    """{tensor: (weight, number of positions per sample that multiply it)}."""
    paths = {module: path for path, module in model.named_modules()}
    batch, uses = batch.head(2), defaultdict[_Owned, float](float)

    def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        for tensor, times in _multiplied(module, (*args, *kwargs.values()), output).items():
            uses[paths[module], tensor] += times / len(batch)

    matrices = [m for m in model.modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))]
    with eval_mode(model), torch.no_grad(), observed(matrices, see):
        batch.run(model)
    return {owned: (getattr(model.get_submodule(owned[0]), owned[1]), times) for owned, times in uses.items()}


def _multiplied(module: nn.Module, inputs: tuple, output: Any) -> dict[str, float]:
    """{tensor: uses} in one call: positions of a layer, mean number of tokens per expert."""
    x = tensor_of(inputs)
    if isinstance(module, nn.MultiheadAttention):
        return _of_attention(module, inputs)
    experts = [name for name, p in module.named_parameters(recurse=False) if p.ndim == 3]
    if experts and not isinstance(module, nn.modules.conv._ConvNd):
        choices = [v for v in inputs if isinstance(v, Tensor) and not v.is_floating_point()]
        tokens = choices[0].numel() if choices else x.numel() // x.shape[-1] if x is not None else 0
        return {name: tokens / len(getattr(module, name)) for name in experts if name != "bias" and "bias" not in name}
    weight = getattr(module, "weight", None)
    if x is not None and isinstance(module, nn.RNNBase):
        return {name: x.numel() / x.shape[-1] for name, p in module.named_parameters(recurse=False) if p.ndim == 2}
    if x is None or not isinstance(weight, Tensor) or isinstance(module, nn.Embedding):
        return {}
    if isinstance(module, nn.modules.conv._ConvNd):
        seen = x if module.transposed else tensor_of(output)
        return {"weight": seen.numel() / seen.shape[1]}  # type: ignore[union-attr]
    return {"weight": x.numel() / x.shape[-1]} if weight.ndim == 2 else {}


def _of_attention(module: nn.MultiheadAttention, inputs: tuple) -> dict[str, float]:
    """{tensor: positions} of the input projections of torch's attention module; its output projection is a layer."""
    queries, keys, values = ([v for v in inputs if isinstance(v, Tensor) and v.is_floating_point()] * 3)[:3]
    counts = [x.numel() / x.shape[-1] for x in (queries, keys, values)]
    if module.in_proj_weight is not None:
        return {"in_proj_weight": sum(counts) / 3}
    return dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), counts, strict=True))


def _pairs(group: PruningGroup, positions: Mapping[_Owned, tuple[Tensor, float]]) -> float:
    """Pairs of positions in attention: positions of the queries times positions of the keys."""
    tensors = [(piece.module, piece.tensor) for piece in group.by_role("producer")]
    counts = [positions[tensor][1] for tensor in tensors if tensor in positions]
    return counts[0] * counts[-1] if counts else 0.0


def _owned(name: str) -> _Owned:
    path, _, tensor = name.rpartition(".")
    return path, tensor
