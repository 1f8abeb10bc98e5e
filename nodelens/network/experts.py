"""Experts with stacked weights. Their activations are recomputed from the inputs, as fused kernels cannot be hooked."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nodelens.statistics.rows import Rows

from .architecture import UnclearError
from .layers import Layer

PACK = 16  # routed tokens are padded to a multiple of this, so that batches with different routing keep one shape


@dataclass(frozen=True, eq=False)
class Experts:
    """E experts with m hidden units each: u = f(A_e x + a_e); the output is B_e u + b_e, times the weight of the router.

    up_name: the name of the parameter that stacks all A_e, (E, m, d), or (E, 2 m, d) for gated units. ``down_proj`` stacks all
    B_e, (E, d, m). transposed: both are stored as (E, in, out). f is the activation of the module. blockwise: whether the module
    is called with rows (E n, d) alone, one block per expert.
    """

    module: nn.Module
    up_name: str
    units: int
    gated: bool
    transposed: bool
    blockwise: bool

    @classmethod
    def of(cls, module: nn.Module) -> "Experts | None":
        """The experts of a module with ``gate_up_proj`` (or ``up_proj``) and ``down_proj``; None for any other module.

        Raises UnclearError if the layout of the tensors is not understood.
        """
        held = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
        up_name = "gate_up_proj" if "gate_up_proj" in held else "up_proj"
        if up_name not in held or "down_proj" not in held or not held[up_name].ndim == held["down_proj"].ndim == 3:
            return None
        up, down = held[up_name], held["down_proj"]
        if other := held.keys() - {up_name, f"{up_name}_bias", "down_proj", "down_proj_bias"}:
            raise UnclearError(f"has parameters other than its experts' weights: {', '.join(sorted(other))}")
        gated = bool(getattr(module, "has_gate", up_name == "gate_up_proj"))
        layouts = [t for t in (False, True) if getattr(module, "is_transposed", t) == t and _fits(up, down, 1 + gated, t)]
        if len(layouts) != 1:
            raise UnclearError(
                f"{up_name} {tuple(up.shape)} and down_proj {tuple(down.shape)} do not show which axis holds the units"
            )
        blockwise = len(inspect.signature(type(module).forward).parameters) == 2  # itself and the rows
        return cls(module, up_name, down.shape[2 - layouts[0]], gated, layouts[0], blockwise)

    def __len__(self) -> int:
        return len(self._held("down_proj"))

    def raw(self, expert: int, x: Tensor) -> Tensor:
        """A_e x + a_e of rows (r, d)."""
        return self._linear(self.up_name, expert, x)

    def hidden(self, raw: Tensor) -> Tensor:
        """u, (r, m), from ``raw``. Raises ValueError if the module has neither a gate method nor an activation."""
        gate, act = (getattr(self.module, name, None) for name in ("_apply_gate", "act_fn"))
        if self.gated and gate is not None:
            return gate(raw)
        if act is None:
            raise ValueError(f"{type(self.module).__name__} has no act_fn: the activation of its experts is unknown")
        if not self.gated:
            return act(raw)
        first, second = raw.chunk(2, -1)
        return act(first) * second

    def output(self, expert: int, u: Tensor) -> Tensor:
        """B_e u + b_e, (r, d)."""
        return self._linear("down_proj", expert, u)

    def hidden_gradient(self, expert: int, g: Tensor) -> Tensor:
        """B_e' g, (r, m): the gradient of the loss in u, from its gradient g in the output of the expert, (r, d)."""
        weight = self._held("down_proj")[expert]
        return g.to(weight.dtype) @ (weight.mT if self.transposed else weight)

    def _linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight, bias = self._held(name)[expert], self.module._parameters.get(f"{name}_bias")
        y = x.to(weight.dtype) @ (weight if self.transposed else weight.mT)
        return y if bias is None else y + bias.detach()[expert]

    def _held(self, name: str) -> Tensor:
        held = self.module._parameters[name]
        assert held is not None
        return held.detach()


class Share(NamedTuple):
    """The tokens routed to one expert in a call: token numbers (r,), their index in rows and output (r,), weights (r, 1)."""

    tokens: Tensor
    at: Tensor
    weights: Tensor

    def only(self, counts: Tensor) -> "Share":
        """The tokens that count only, (tokens,) bool."""
        keep = counts[self.tokens]
        return Share(*(part[keep] for part in self))


@dataclass(frozen=True, eq=False)
class Call:
    """One call of experts: rows (n, d), ids (n, k) of the experts of each token, and their router weights (n, k).

    Or rows (E n, d) alone, one block per expert, already weighted: tokens not routed to an expert are rows of zeros (Llama 4).
    """

    experts: Experts
    rows: Tensor
    ids: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def of(cls, experts: Experts, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Call":
        """From the arguments of a call of the module with this name. Raises ValueError for any other signature."""
        given = [t.detach().flatten(0, -2) for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim > 1]
        if experts.blockwise and len(given) == 1 and len(given[0]) % len(experts) == 0:
            return cls(experts, given[0])
        fits = len(given) == 3 and given[1].shape == given[2].shape and len({len(t) for t in given}) == 1
        if not fits or given[1].is_floating_point() or not given[2].is_floating_point():
            shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in given)
            raise ValueError(
                f"{name} ({type(experts.module).__name__}) is called with {shapes or 'no tensor'}; supported are calls with rows "
                "(n, d), expert ids (n, k) and weights (n, k): leave these layers out, or score them by weights"
            )
        return cls(experts, *given)

    @property
    def tokens(self) -> int:
        return len(self.rows) if self.ids is not None else len(self.rows) // len(self.experts)

    def share(self, expert: int) -> Share:
        """The tokens routed to an expert, in order."""
        if self.rows.is_meta:
            return self._uniform
        if self.ids is None or self.weights is None:
            block = self.rows.unflatten(0, (len(self.experts), -1))[expert]
            (tokens,) = block.any(1).nonzero(as_tuple=True)
            return Share(tokens, expert * self.tokens + tokens, block.new_ones(len(tokens), 1))
        tokens, slots = (self.ids == expert).nonzero(as_tuple=True)
        return Share(tokens, tokens, self.weights[tokens, slots, None])

    @cached_property
    def _uniform(self) -> Share:
        """The share of each expert on the meta device, where the load is unknown: equal shares."""
        count = self.tokens if self.ids is None else -(-self.ids.numel() // len(self.experts))
        tokens = self.rows.new_empty(count, dtype=torch.long)
        return Share(tokens, tokens, self.rows.new_empty(count, 1))

    def hidden(self, expert: int, share: Share) -> Tensor:
        """The hidden units u of an expert at its tokens, (r, m)."""
        if self.rows.is_meta:  # not computed: the shapes of many experts are those of one
            return self.rows.new_empty(len(share.tokens), self.experts.units)
        return self.experts.hidden(self.experts.raw(expert, self.rows[share.at]))

    def hidden_gradient(self, expert: int, share: Share, g: Tensor) -> Tensor:
        """The gradient of the loss in w u, (r, m), from that in the output of the call; times w it is the gradient in u."""
        return self.experts.hidden_gradient(expert, g.flatten(0, -2)[share.at])

    def made(self, expert: int, share: Share, slope: Tensor) -> Tensor:
        """What an expert's first weights put out times the loss's slope in it, (r, rows of A_e), from the slope in u, (r, m)."""
        raw = self.experts.raw(expert, self.rows[share.at])
        with torch.enable_grad():
            leaf = raw.detach().requires_grad_()
            (slopes,) = torch.autograd.grad(self.experts.hidden(leaf), leaf, slope.to(leaf.dtype))
        return raw.double() * slopes.double()

    def whole(self, g: Tensor) -> Tensor:
        """<out_e, dL/d out> of each token and expert, out_e what the expert adds to the output, (tokens, experts) float64."""
        g, found = g.flatten(0, -2), torch.zeros(self.tokens, len(self.experts), dtype=torch.float64, device=g.device)
        for expert in range(len(self.experts)):
            share = self.share(expert)
            out = self.experts.output(expert, self.hidden(expert, share)).double() * share.weights.double()
            found[share.tokens, expert] = (out * g[share.at].double()).sum(1)
        return found

    def assigned(self) -> Tensor:
        """1 where a token goes to an expert, else 0, (tokens, experts) float64."""
        found = torch.zeros(self.tokens, len(self.experts), dtype=torch.float64, device=self.rows.device)
        for expert in range(len(self.experts)):
            found[self.share(expert).tokens, expert] = 1
        return found

    def copy(self) -> "Call":
        """A copy with its own rows, because later operations may overwrite a captured tensor."""
        return replace(self, rows=self.rows.clone())

    def check(self, name: str, output: Any) -> None:
        """Raises ValueError if the recomputed output differs from that of the module, so that no wrong formula is scored.

        The largest norm of the difference over tokens may be 1e-4 of the largest norm, or 1e-2 in half precision.
        """
        if self.rows.is_meta:
            return
        fits = isinstance(output, Tensor) and output.numel() == self.rows.numel()
        off = self._distance(output.detach().flatten(0, -2)) if fits else torch.inf
        if not off <= (1e-4 if self.rows.dtype.itemsize >= 4 else 1e-2):
            raise ValueError(
                f"{name} ({type(self.experts.module).__name__}) returns another output than its experts' weights give (relative "
                f"difference {off:.1e}): the formula of its hidden units is unknown; leave it out, or score it by weights"
            )

    def _distance(self, output: Tensor) -> float:
        wide = torch.promote_types(output.dtype, torch.float32)
        finite = output.isfinite().all(1)
        total = torch.zeros_like(output, dtype=wide)
        for expert in range(len(self.experts)):
            share = self.share(expert)
            if len(share.tokens):
                added = self.experts.output(expert, self.hidden(expert, share)).to(wide) * share.weights.to(wide)
                total.index_add_(0, share.at, added)
        if not finite.any():
            return 0.0
        size = output[finite].to(wide).norm(dim=1).max()
        apart = (total - output)[finite].norm(dim=1).max()
        return float(apart / size) if apart else 0.0


class Routed(NamedTuple):
    """Values of the hidden units of one expert, (r, m), at its tokens (r,), out of ``every`` tokens of the batch."""

    values: Tensor
    tokens: Tensor
    every: int

    def clone(self) -> Tensor:
        """A copy of the values alone."""
        return self.values.clone()


@dataclass(frozen=True, eq=False)
class ExpertLayer(Layer):
    """The hidden units of one expert of a module, with one row per token routed to it."""

    experts: Experts = field(kw_only=True)
    expert: int = field(kw_only=True)

    @property
    def mixture(self) -> str:
        """The name of the module that holds all experts."""
        return self.name.rpartition("[")[0]

    def rows(self, tensor: Any, samples: int, mask: Tensor | None = None) -> Rows:
        """``Routed`` values as rows, (samples, m, longest): the tokens of each sample, padded to the longest; padding is masked.

        Raises ValueError if the number of tokens is no multiple of the samples.
        """
        values, tokens, every = tensor
        if every % samples:
            raise ValueError(
                f"layer {self.name!r} has {every} tokens for a batch of {samples} samples: give equally many per sample"
            )
        length = every // samples
        if values.is_meta:
            longest = PACK * -(-len(tokens) // (samples * PACK))
            return Rows(values.new_empty(samples, values.shape[1], longest), grid=(longest,))
        if mask is not None and mask.shape == (samples, length):
            keep = mask.flatten()[tokens]
            values, tokens = values[keep], tokens[keep]
        sample = tokens // length
        counts = sample.bincount(minlength=samples)
        slot = torch.arange(len(tokens), device=tokens.device) - (counts.cumsum(0) - counts)[sample]
        longest = PACK * max(1, -(-int(counts.max()) // PACK))
        longest += PACK * (longest == length)  # so that no code mistakes these positions for the tokens of the sequence
        wide = torch.promote_types(values.dtype, torch.float32)
        raw = values.new_zeros(samples, longest, values.shape[1], dtype=wide)
        raw[sample, slot] = values.to(wide)
        keep = torch.zeros(samples, longest, dtype=torch.bool, device=tokens.device)
        keep[sample, slot] = True
        return Rows(raw.transpose(1, 2), keep, grid=(longest,))


def expert_layers(name: str, module: nn.Module) -> list[ExpertLayer]:
    """One layer per expert, ``name[e].hidden``, of the module with this name; empty if it has no experts of a known layout."""
    try:
        experts = Experts.of(module)
    except UnclearError:
        return []
    every = range(len(experts)) if experts else ()
    return [ExpertLayer(f"{name}[{e}].hidden", module, "hidden", experts=experts, expert=e) for e in every]  # type: ignore[arg-type]


def _fits(up: Tensor, down: Tensor, blocks: int, transposed: bool) -> bool:
    """Whether the shapes are (E, blocks m, d) and (E, d, m) or, transposed, (E, d, blocks m) and (E, m, d)."""
    if transposed:
        up, down = up.mT, down.mT
    return tuple(up.shape) == (len(down), blocks * down.shape[2], down.shape[1])
