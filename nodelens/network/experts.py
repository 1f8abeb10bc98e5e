"""Experts that share tensors: where each one's hidden units lie, and what they are in a call that no hook sees into."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nodelens.statistics.rows import Rows

from .architecture import UnclearError
from .layers import Layer

PACK = 16  # positions that packed samples are filled up to a multiple of: batches of other routes keep one shape


@dataclass(frozen=True, eq=False)
class Experts:
    """E experts of m hidden units each: u = f(A_e x + a_e), and B_e u + b_e is put out, times the router's weight.

    made: the name of the tensor of all A_e, (E, m, d), or (E, 2 m, d) where a unit has a gate; ``down_proj`` that of all B_e,
    (E, d, m). turned: both are stored as (E, in, out). f is the module's own. blocked: whether the module is called with rows
    (E n, d) alone, a block an expert.
    """

    module: nn.Module
    made: str
    units: int
    gated: bool
    turned: bool
    blocked: bool

    @classmethod
    def of(cls, module: nn.Module) -> "Experts | None":
        """Those of a module that keeps them in ``gate_up_proj`` (or ``up_proj``) and ``down_proj``; None for any other module.

        Raises UnclearError where the tensors are not understood.
        """
        held = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
        made = "gate_up_proj" if "gate_up_proj" in held else "up_proj"
        if made not in held or "down_proj" not in held or not held[made].ndim == held["down_proj"].ndim == 3:
            return None
        up, down = held[made], held["down_proj"]
        if other := held.keys() - {made, f"{made}_bias", "down_proj", "down_proj_bias"}:
            raise UnclearError(f"holds {', '.join(sorted(other))} beside its experts' weights")
        gated = bool(getattr(module, "has_gate", made == "gate_up_proj"))
        layouts = [t for t in (False, True) if getattr(module, "is_transposed", t) == t and _fits(up, down, 1 + gated, t)]
        if len(layouts) != 1:
            raise UnclearError(f"{made} {tuple(up.shape)} and down_proj {tuple(down.shape)} do not tell where the units lie")
        blocked = len(inspect.signature(type(module).forward).parameters) == 2  # itself and the rows
        return cls(module, made, down.shape[2 - layouts[0]], gated, layouts[0], blocked)

    def __len__(self) -> int:
        return len(self._held("down_proj"))

    def raw(self, expert: int, x: Tensor) -> Tensor:
        """A_e x + a_e of rows (r, d)."""
        return self._linear(self.made, expert, x)

    def hidden(self, raw: Tensor) -> Tensor:
        """u, (r, m). Raises ValueError where the module has neither a method for it nor an activation."""
        gate, act = (getattr(self.module, name, None) for name in ("_apply_gate", "act_fn"))
        if self.gated and gate is not None:
            return gate(raw)
        if act is None:
            raise ValueError(f"{type(self.module).__name__} has no act_fn: the formula of its experts is not known")
        if not self.gated:
            return act(raw)
        first, second = raw.chunk(2, -1)
        return act(first) * second

    def written(self, expert: int, u: Tensor) -> Tensor:
        """B_e u + b_e, (r, d)."""
        return self._linear("down_proj", expert, u)

    def slopes(self, expert: int, g: Tensor) -> Tensor:
        """B_e' g, (r, m): the slope of the loss in u from that in what the expert writes, (r, d)."""
        weight = self._held("down_proj")[expert]
        return g.to(weight.dtype) @ (weight.mT if self.turned else weight)

    def _linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight, bias = self._held(name)[expert], self.module._parameters.get(f"{name}_bias")
        y = x.to(weight.dtype) @ (weight if self.turned else weight.mT)
        return y if bias is None else y + bias.detach()[expert]

    def _held(self, name: str) -> Tensor:
        held = self.module._parameters[name]
        assert held is not None
        return held.detach()


class Share(NamedTuple):
    """What one expert gets in a call: which tokens (r,), where they stand in rows and output (r,), their weights (r, 1)."""

    tokens: Tensor
    at: Tensor
    weights: Tensor

    def only(self, counts: Tensor) -> "Share":
        """The part of tokens that count, (tokens,) bool."""
        keep = counts[self.tokens]
        return Share(*(part[keep] for part in self))


@dataclass(frozen=True, eq=False)
class Call:
    """One call of experts: rows (n, d), ids (n, k) of the experts that each token goes to, their weights (n, k).

    Or rows (E n, d) alone, a block an expert, weighted before: a token that does not go there is a row of zeros (Llama 4).
    """

    experts: Experts
    rows: Tensor
    ids: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def of(cls, experts: Experts, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Call":
        """Reads what a module of some name was called with. Raises ValueError for another form."""
        given = [t.detach().flatten(0, -2) for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim > 1]
        if experts.blocked and len(given) == 1 and len(given[0]) % len(experts) == 0:
            return cls(experts, given[0])
        fits = len(given) == 3 and given[1].shape == given[2].shape and len({len(t) for t in given}) == 1
        if not fits or given[1].is_floating_point() or not given[2].is_floating_point():
            shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in given)
            raise ValueError(
                f"{name} ({type(experts.module).__name__}) is called with {shapes or 'no tensor'}; experts are seen where they are "
                "called with rows (n, d), expert ids (n, k) and weights (n, k): leave them out, or score them by weights"
            )
        return cls(experts, *given)

    @property
    def tokens(self) -> int:
        return len(self.rows) if self.ids is not None else len(self.rows) // len(self.experts)

    def share(self, expert: int) -> Share:
        """What an expert gets, in the order of the tokens."""
        if self.rows.is_meta:  # as if all got the same
            count = self.tokens if self.ids is None else -(-self.ids.numel() // len(self.experts))
            tokens = self.rows.new_empty(count, dtype=torch.long)
            return Share(tokens, tokens, self.rows.new_empty(count, 1))
        if self.ids is None or self.weights is None:
            block = self.rows.unflatten(0, (len(self.experts), -1))[expert]
            (tokens,) = block.any(1).nonzero(as_tuple=True)
            return Share(tokens, expert * self.tokens + tokens, block.new_ones(len(tokens), 1))
        tokens, slots = (self.ids == expert).nonzero(as_tuple=True)
        return Share(tokens, tokens, self.weights[tokens, slots, None])

    def hidden(self, expert: int, share: Share) -> Tensor:
        """An expert's u at what it gets, (r, m)."""
        return self.experts.hidden(self.experts.raw(expert, self.rows[share.at]))

    def slopes(self, expert: int, share: Share, g: Tensor) -> Tensor:
        """The slope of the loss in w u, (r, m), from that in what the call put out, in its shape; times w that in u."""
        return self.experts.slopes(expert, g.flatten(0, -2)[share.at])

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
            out = self.experts.written(expert, self.hidden(expert, share)).double() * share.weights.double()
            found[share.tokens, expert] = (out * g[share.at].double()).sum(1)
        return found

    def assigned(self) -> Tensor:
        """1 where a token goes to an expert, else 0, (tokens, experts) float64."""
        found = torch.zeros(self.tokens, len(self.experts), dtype=torch.float64, device=self.rows.device)
        for expert in range(len(self.experts)):
            found[self.share(expert).tokens, expert] = 1
        return found

    def kept(self) -> "Call":
        """The same, rows in memory of their own: later operations may write into what a hook saw."""
        return replace(self, rows=self.rows.clone())

    def check(self, name: str, output: Any) -> None:
        """Raises ValueError where the experts' own formula does not give what the module put out: nothing is scored by a guess.

        Compared are the norms of tokens, to 1e-4 of the largest, in half precision to 1e-2.
        """
        if self.rows.is_meta:
            return
        fits = isinstance(output, Tensor) and output.numel() == self.rows.numel()
        off = self._distance(output.detach().flatten(0, -2)) if fits else torch.inf
        if not off <= (1e-4 if self.rows.dtype.itemsize >= 4 else 1e-2):
            raise ValueError(
                f"{name} ({type(self.experts.module).__name__}) puts out something else than its experts' weights say (off by "
                f"{off:.1e} of its size): the formula of its hidden units is not known; leave it out, or score it by weights"
            )

    def _distance(self, output: Tensor) -> float:
        wide = torch.promote_types(output.dtype, torch.float32)
        finite = output.isfinite().all(1)
        total = torch.zeros_like(output, dtype=wide)
        for expert in range(len(self.experts)):
            share = self.share(expert)
            if len(share.tokens):
                written = self.experts.written(expert, self.hidden(expert, share)).to(wide) * share.weights.to(wide)
                total.index_add_(0, share.at, written)
        if not finite.any():
            return 0.0
        size = output[finite].to(wide).norm(dim=1).max()
        apart = (total - output)[finite].norm(dim=1).max()
        return float(apart / size) if apart else 0.0


class Routed(NamedTuple):
    """Numbers of one expert's hidden units, values (r, m), at the tokens that it gets, (r,) of ``every`` in the batch."""

    values: Tensor
    tokens: Tensor
    every: int

    def clone(self) -> Tensor:
        """The values alone, in memory of their own."""
        return self.values.clone()


@dataclass(frozen=True, eq=False)
class ExpertLayer(Layer):
    """The hidden units of one of a module's experts; a row is a token that goes to it."""

    experts: Experts = field(kw_only=True)
    expert: int = field(kw_only=True)

    @property
    def mixture(self) -> str:
        """The name of the module of all experts."""
        return self.name.rpartition("[")[0]

    def rows(self, tensor: Any, samples: int, mask: Tensor | None = None) -> Rows:
        """``Routed`` numbers as rows, each sample's own side by side, filled up to the longest; padded tokens are not among them.

        Raises ValueError where the samples do not divide the tokens.
        """
        values, tokens, every = tensor
        if every % samples:
            raise ValueError(
                f"layer {self.name!r} shows {every} tokens for a batch of {samples} samples: they must belong to samples"
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
        longest += PACK * (longest == length)  # nothing shall take these places for tokens
        wide = torch.promote_types(values.dtype, torch.float32)
        raw = values.new_zeros(samples, longest, values.shape[1], dtype=wide)
        raw[sample, slot] = values.to(wide)
        keep = torch.zeros(samples, longest, dtype=torch.bool, device=tokens.device)
        keep[sample, slot] = True
        return Rows(raw.transpose(1, 2), keep, grid=(longest,))


def expert_layers(name: str, module: nn.Module) -> list[ExpertLayer]:
    """A layer an expert, ``name[e].hidden``, of a module of some name; none where it has no experts that are understood."""
    try:
        experts = Experts.of(module)
    except UnclearError:
        return []
    every = range(len(experts)) if experts else ()
    return [ExpertLayer(f"{name}[{e}].hidden", module, "hidden", experts=experts, expert=e) for e in every]  # type: ignore[arg-type]


def _fits(up: Tensor, down: Tensor, blocks: int, turned: bool) -> bool:
    """Whether they are (E, blocks m, d) and (E, d, m) or, turned, (E, d, blocks m) and (E, m, d)."""
    if turned:
        up, down = up.mT, down.mT
    return tuple(up.shape) == (len(down), blocks * down.shape[2], down.shape[1])
