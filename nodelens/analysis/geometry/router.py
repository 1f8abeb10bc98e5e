"""Routers of mixtures of experts: how many tokens each expert gets."""

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
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "top_k")


@dataclass(frozen=True, eq=False)
class RouterCounts:
    """The load of the E experts of a layer, as sums over tokens.

    Shapes: counts (E,) int64, assignments; tokens (1,) int64; weight (E,) float64, summed weights of the assignments;
            probability (E,) float64, summed softmax of the scores over all experts, whatever the weights are computed from
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
        """How balanced the load is.

        Formula: load_e = counts_e / sum counts; router_entropy -sum load ln load; router_entropy_norm / ln E;
                 load_imbalance E max load; top_expert_load max load, of most_used_expert; routed_assignments sum counts
        Unit:    nats, in [0, ln E]: ln E for a balanced load, ln k if the same k experts get all; load_imbalance in [1, E]
        NaN:     without tokens; router_entropy_norm of one expert
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
        """One row per expert: assignments and their share, mean weight and probability per token; NaN without tokens."""
        counts, n = self.counts.double(), self.tokens.double()
        found = {"load": counts / counts.sum(), "weight": self.weight / n, "probability": self.probability / n}
        return [
            {"expert": e, "assignments": int(self.counts[e])} | {name: float(v[e]) for name, v in found.items()}
            for e in range(len(counts))
        ]

    def _sums(self) -> tuple[Tensor, ...]:
        return self.counts, self.tokens, self.weight, self.probability


def router_tables(loads: Mapping[str, RouterCounts], blocks: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per router, and one row per expert. ``layer`` is the index of the block, or of the router outside blocks."""
    routers, experts = [], []
    for place, (name, load) in enumerate(loads.items()):
        layer = next((k for k, block in enumerate(blocks) if name.startswith(f"{block}.")), place)
        routers.append({"layer": layer} | load.columns | {"module": name})
        experts += [{"layer": layer} | row for row in load.experts()]
    return pd.DataFrame(routers), pd.DataFrame(experts)


def router_load(
    routed: Tensor, k: int | None = None, experts: int | None = None, mask: Tensor | None = None, weights: Tensor | None = None
) -> RouterCounts:
    """The load from router scores (n, E), floating, where each token takes the ``k`` largest, or from expert ids (n, k), integer.

    mask (n,) bool: tokens to count; weights (n, k): the router's weight of each id, NaN where unknown.
    Raises ValueError for scores without k, for ids without the number of experts, and for a k out of range.
    """
    scores = routed if routed.is_floating_point() else None
    size = experts if scores is None else scores.shape[1]
    if size is None or (scores is not None and k is None):
        raise ValueError(f"the load of {'expert ids needs experts=' if size is None else 'router scores needs k='}")
    if scores is not None and not 1 <= int(k or 0) <= size:
        raise ValueError(f"k is {k}; it must be from 1 to {size}, the number of experts")
    ids = routed if scores is None else scores.topk(int(k or 0), dim=1).indices
    return _load(ids, weights, scores, size, torch.ones(len(ids), dtype=torch.bool) if mask is None else mask)


def _load(ids: Tensor, weights: Tensor | None, scores: Tensor | None, experts: int, keep: Tensor) -> RouterCounts:
    keep = keep.to(ids.device)
    zeros = torch.zeros(experts, dtype=torch.float64, device=ids.device)
    every = keep[:, None].expand_as(ids).flatten().double()  # a masked token adds 0 to its expert
    where = ids.long().flatten()
    given = zeros + math.nan if weights is None else zeros.scatter_add(0, where, every * weights.flatten().double().nan_to_num())
    chance = zeros + math.nan if scores is None else _probabilities(scores).double().where(keep[:, None], 0).sum(0)
    return RouterCounts(zeros.scatter_add(0, where, every).long(), keep.sum().reshape(1), given, chance)


def _probabilities(scores: Tensor) -> Tensor:
    """Probabilities from scores (n, E). Some routers already return probabilities."""
    scores = scores.float()
    known = (scores >= 0).all(1) & ((scores.sum(1) - 1).abs() < 1e-3)
    return scores.where(known[:, None], scores.softmax(1))


@dataclass(frozen=True)
class Router:
    """A router module. k: number of experts per token, for a router that returns scores without expert ids."""

    name: str
    experts: int
    k: int | None = None


class Routers:
    """The routers of a model, and their load over unmasked tokens.

    A router is recognised by its output for n tokens: integers (n, k) below E, floats (n, k), their weights, and floats (n, E),
    its scores; otherwise by a class name *Router and scores (n, E) alone. ``discover`` finds them in one forward.
    """

    def __init__(self, model: nn.Module):
        self.names = {module: name for name, module in model.named_modules()}
        self.config = config_of(model)
        self.found: dict[nn.Module, Router] = {}
        self.loads: dict[str, RouterCounts] = {}
        self.tokens, self.keep = 0, torch.empty(0, dtype=torch.bool)

    def discover(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Hook on every module; inner modules are called before those that contain them. Raises ValueError for an unknown k."""
        ids, _, scores = _routing(output, self.tokens)
        if scores is None or any(inner in self.found for inner in module.modules()):
            return
        name, experts = self.names[module], scores.shape[1]
        if ids is not None and int(ids.max()) < experts:
            self.found[module] = Router(name, experts)
        elif "router" in type(module).__name__.lower() and experts == (experts_of(module) or experts_of(self.config)):
            k = _first(module, _TOP_K) or _first(self.config, _TOP_K)
            if k is None:
                raise ValueError(
                    f"{name} returns the scores of {experts} experts but no expert ids, and neither it nor the config has the "
                    f"number of experts per token: set config.{_TOP_K[0]}"
                )
            self.found[module] = Router(name, experts, k)

    def restore(self, found: Mapping[str, Router]) -> None:
        """Uses the routers that another process found."""
        modules = {name: module for module, name in self.names.items()}
        self.found = {modules[name]: router for name, router in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """The loads after a batch has ended."""
        return {name: list(load._sums()) for name, load in self.loads.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what ``state_dict`` returned."""
        self.loads = {name: RouterCounts(*sums) for name, sums in state.items()}

    def begin(self, batch: TokenBatch) -> None:
        self.keep = batch.mask.flatten()

    def see(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Adds the assignments of a router for the current batch."""
        router = self.found[module]
        ids, weights, scores = _routing(output, len(self.keep))
        if scores is None or (ids is None and router.k is None):
            raise ValueError(f"router {router.name} does not return one row for each of the {len(self.keep)} tokens of the batch")
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
    """The number of experts that a config or module names; None if it names none."""
    return _first(holder, _COUNTS)


def _routing(output: Any, tokens: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Ids (n, k) with their weights (both or neither) and scores (n, E) in the output of a module; None for what is missing."""
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
