"""Routers of mixtures of experts: which expert gets how many of the tokens."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pandas as pd
import torch
from torch import Tensor, nn

from nodelens.network.architecture import config_of
from nodelens.statistics.processes import reduce_tensor

from .tokens import TokenBatch

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "top_k")


@dataclass(frozen=True, eq=False)
class RouterCounts:
    """What the E experts of a layer get, as sums that add.

    Shapes: counts (E,) int64, assignments; tokens (1,) int64; weight (E,) float64, the weights that the router gave with them;
            probability (E,) float64, softmax of its scores over all experts, also where it makes weights of them otherwise
    """

    counts: Tensor
    tokens: Tensor
    weight: Tensor
    probability: Tensor

    def __add__(self, other: Self) -> Self:
        return type(self)(*(a + b for a, b in zip(self._sums(), other._sums(), strict=True)))

    def reduced(self, device: torch.device) -> Self:
        """The sum over processes, on the CPU. Collective."""
        return type(self)(*(reduce_tensor(t.to(device)).cpu() for t in self._sums()))

    @property
    def columns(self) -> dict[str, float]:
        """How even the load is.

        Formula: load_e = counts_e / sum counts; router_entropy -sum load ln load; router_entropy_norm / ln E;
                 load_imbalance E max load; top_expert_load max load, of most_used_expert; routed_assignments sum counts
        Unit:    nats, in [0, ln E]: ln E where all get as many, ln k where the same k get all; load_imbalance in [1, E]
        NaN:     without a token; router_entropy_norm of one expert
        Source:  Fedus, Zoph & Shazeer 2022, 2101.03961, eq. 5 (the load)
        """
        counts, experts = self.counts.double().cpu(), len(self.counts)
        load = counts / counts.sum()
        entropy = float(torch.special.entr(load).sum())
        top = float(load.max())
        return {
            "router_entropy": entropy,
            "router_entropy_norm": entropy / math.log(experts) if experts > 1 else math.nan,
            "load_imbalance": experts * top,
            "most_used_expert": int((load == top).nonzero()[0, 0]) if counts.any() else math.nan,
            "top_expert_load": top,
            "routed_assignments": int(counts.sum()),
        }

    def experts(self) -> list[dict[str, float]]:
        """A row an expert: assignments and their share, mean weight and probability a token; NaN without tokens."""
        counts, n = self.counts.double(), self.tokens.double()
        found = {"load": counts / counts.sum(), "weight": self.weight / n, "probability": self.probability / n}
        return [
            {"expert": e, "assignments": int(self.counts[e])} | {name: float(v[e]) for name, v in found.items()}
            for e in range(len(counts))
        ]

    def _sums(self) -> tuple[Tensor, ...]:
        return self.counts, self.tokens, self.weight, self.probability


def router_tables(loads: Mapping[str, RouterCounts], blocks: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row a router, and a row an expert of each; ``layer`` is the block it lies in, else its place in the model's order."""
    routers, experts = [], []
    for place, (name, load) in enumerate(loads.items()):
        layer = next((k for k, block in enumerate(blocks) if name.startswith(f"{block}.")), place)
        routers.append({"layer": layer} | load.columns | {"module": name})
        experts += [{"layer": layer} | row for row in load.experts()]
    return pd.DataFrame(routers), pd.DataFrame(experts)


def router_load(
    routed: Tensor, k: int | None = None, experts: int | None = None, mask: Tensor | None = None, weights: Tensor | None = None
) -> RouterCounts:
    """The load of router scores (n, E), floating, of which each token takes the ``k`` largest, or of expert ids (n, k), integer.

    mask (n,) bool: which tokens count; weights (n, k): what the router gives with each id, NaN where it is not said.
    Raises ValueError for scores without k, ids without the number of experts, a k beyond it.
    """
    scores = routed if routed.is_floating_point() else None
    size = experts if scores is None else scores.shape[1]
    if size is None or (scores is not None and k is None):
        raise ValueError(f"the load of {'ids needs experts=' if size is None else 'router scores needs k='}, which is not known")
    if scores is not None and not 1 <= int(k or 0) <= size:
        raise ValueError(f"k is {k}; of {size} experts a token takes 1 to {size}")
    ids = routed if scores is None else scores.topk(int(k or 0), dim=1).indices
    return _load(ids, weights, scores, size, torch.ones(len(ids), dtype=torch.bool) if mask is None else mask)


def _load(ids: Tensor, weights: Tensor | None, scores: Tensor | None, experts: int, keep: Tensor) -> RouterCounts:
    keep = keep.to(ids.device)
    zeros = torch.zeros(experts, dtype=torch.float64, device=ids.device)
    every = keep[:, None].expand_as(ids).flatten().double()  # a pad adds 0 where it was sent
    where = ids.long().flatten()
    given = zeros + math.nan if weights is None else zeros.scatter_add(0, where, every * weights.flatten().double().nan_to_num())
    chance = zeros + math.nan if scores is None else _shares(scores).double().where(keep[:, None], 0).sum(0)
    return RouterCounts(zeros.scatter_add(0, where, every).long(), keep.sum().reshape(1), given, chance)


def _shares(scores: Tensor) -> Tensor:
    """Probabilities of scores (n, E); some routers put them out themselves."""
    scores = scores.float()
    known = (scores >= 0).all(1) & ((scores.sum(1) - 1).abs() < 1e-3)
    return scores.where(known[:, None], scores.softmax(1))


@dataclass(frozen=True)
class Router:
    """A module that routes. k: how many of the largest scores a token takes, where it puts out no ids."""

    name: str
    experts: int
    k: int | None = None


class Routers:
    """The routers of a model, and what they do with the tokens that count.

    A router is known by what it puts out for n tokens: integers (n, k) below E, with floats (n, k), their weights, and (n, E),
    its scores; else by its class's name, *Router, with scores (n, E) alone. ``look`` finds them in one forward.
    """

    def __init__(self, model: nn.Module):
        self.names = {module: name for name, module in model.named_modules()}
        self.config = config_of(model)
        self.found: dict[nn.Module, Router] = {}
        self.loads: dict[str, RouterCounts] = {}
        self.tokens, self.keep = 0, torch.empty(0, dtype=torch.bool)

    def look(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Sees a module's call; inner modules are called before those that hold them. Raises ValueError where k is not known."""
        ids, _, scores = _decided(output, self.tokens)
        if scores is None or any(inner in self.found for inner in module.modules()):
            return
        name, experts = self.names[module], scores.shape[1]
        if ids is not None and int(ids.max()) < experts:
            self.found[module] = Router(name, experts)
        elif "router" in type(module).__name__.lower() and experts == (experts_of(module) or experts_of(self.config)):
            k = _first(module, _CHOSEN) or _first(self.config, _CHOSEN)
            if k is None:
                raise ValueError(
                    f"{name} puts out the scores of {experts} experts and no choice, and neither it nor the config says how many "
                    f"a token takes: set config.{_CHOSEN[0]}"
                )
            self.found[module] = Router(name, experts, k)

    def restore(self, found: Mapping[str, Router]) -> None:
        """Takes over what another process found."""
        modules = {name: module for module, name in self.names.items()}
        self.found = {modules[name]: router for name, router in found.items()}

    def begin(self, batch: TokenBatch) -> None:
        self.keep = batch.mask.flatten()

    def see(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Adds what a router decided for the batch that passes."""
        router = self.found[module]
        ids, weights, scores = _decided(output, len(self.keep))
        if scores is None or (ids is None and router.k is None):
            raise ValueError(f"router {router.name} decided on other rows than the {len(self.keep)} tokens of the batch")
        if ids is None or router.k is not None:
            ids, weights = scores.topk(int(router.k or 0), dim=1).indices, None
        load = _load(ids, weights, scores, router.experts, self.keep)
        held = self.loads.get(router.name)
        self.loads[router.name] = load if held is None else held + load

    def reduced(self, device: torch.device) -> dict[str, RouterCounts]:
        """{router: load} over all processes. Collective."""
        every = {}
        for router in self.found.values():
            none = torch.empty(0, 1, dtype=torch.int64)
            own = self.loads.get(router.name) or _load(
                none, none.double(), torch.empty(0, router.experts), router.experts, self.keep[:0]
            )
            every[router.name] = own.reduced(device)
        return every


def experts_of(holder: Any) -> int | None:
    """How many experts a config, or a module, speaks of; None for none."""
    return _first(holder, _COUNTS)


def _decided(output: Any, tokens: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Ids (n, k) and their weights, both or neither, and scores (n, E), in what a module puts out; None for what is not there."""
    parts = output if isinstance(output, (tuple, list)) else [output]
    flat = [t.reshape(tokens, -1) for t in parts if isinstance(t, Tensor) and t.ndim > 1 and t.numel() == tokens * t.shape[-1] > 0]
    floats = [t for t in flat if t.is_floating_point()]
    ids = next((t for t in flat if not t.is_floating_point() and t.dtype != torch.bool), None)
    if ids is None:
        return None, None, floats[-1] if floats else None
    weights = [t for t in floats[1:] if t.shape == ids.shape]
    known = weights and floats[0].shape[1] >= ids.shape[1]
    return (ids, weights[-1], floats[0]) if known else (None, None, None)


def _first(holder: Any, names: Iterable[str]) -> int | None:
    return next((n for name in names if isinstance(n := getattr(holder, name, None), int) and n > 0), None)
