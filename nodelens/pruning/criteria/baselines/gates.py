"""Criteria of gates: slopes of the summed loss in a factor on the unit, taken sample by sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from nodelens.network.batch import Batch
from nodelens.network.experts import Call
from nodelens.network.groups import GroupSlice, PruningGroup
from nodelens.network.hooks import Edit
from nodelens.pruning.surgery.mask import channel_dim

from .base import Baseline, Found
from .passes import Need, Sums, counted

Side = Literal["consumer", "producer"]
Unit = Literal["sequence", "token"]


class GateSums(Sums):
    """Sums of q^2 and |q| over samples, or over tokens that are not padded, and how many there are.

    q = dL/dz of one gate z = 1 a sample and unit, which multiplies what every consumer reads of the unit (or every producer puts
    out for it): the sum of x dL/dx over positions, places and consumers, formed before any square.

    The gates of an expert's units act on the tokens that go to it; for any other token q is 0, and the token, or the sample, counts
    all the same: experts' scores compare as those of one wide FFN. There q = u du w, du what the expert's weights make of dL/d out.
    The gate of a whole expert acts on what it puts out, weighted, while the router's choice stays: q = w <out, dL/d out>.
    """

    def __init__(self, model: nn.Module, groups: Sequence[PruningGroup], side: Side = "consumer", unit: Unit = "sequence"):
        super().__init__(model, groups)
        self.side, self.unit = side, unit
        self.gated: dict[str, list[tuple[PruningGroup, GroupSlice]]] = {}
        self.routed: dict[str, list[tuple[PruningGroup, GroupSlice]]] = {}  # of experts
        self.whole = {group.by_role("producer")[0].module: group for group in groups if group.router is not None}
        for group in groups:
            if group.router is not None:
                continue
            slices = [piece for piece in group.by_role(side) if piece.of(model).ndim > 1]
            for piece in slices:
                (self.gated if piece.entry is None else self.routed).setdefault(piece.module, []).append((group, piece))
            if unit == "token" and (len(slices) > 1 or channel_dim(model.get_submodule(slices[0].module)) != -1):
                reads = ", ".join(f"{c.module} ({type(model.get_submodule(c.module)).__name__})" for c in slices)
                raise ValueError(
                    f"group {group.name!r} has no tokens of its own: it is read by {reads}, not by one linear layer; "
                    "take unit: sequence"
                )
        self.paths, self.mixtures = list(self.gated), list(dict.fromkeys([*self.routed, *self.whole]))
        for group in groups:
            self.totals |= {(group.name, what): self.zeros(group.n) for what in ("square", "absolute")}
            self.totals[group.name, "rows"] = self.zeros(1)
        self.gates: dict[str, Tensor] = {}
        self.calls: list[tuple[str, Call]] = []
        self.zeros_added: list[Tensor] = []  # to what each call puts out: their slope is that of the output
        self.owners: dict[tuple[GroupSlice, int], Tensor] = {}

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self.gates, self.calls, self.zeros_added = {}, [], []

    def edits(self) -> tuple[Mapping[str, Edit], Mapping[str, Edit]]:
        own: dict[str, Edit] = {path: partial(self._multiply, path) for path in self.gated}
        behind: dict[str, Edit] = dict.fromkeys(self.mixtures, self._plus_zero)
        return (behind, own) if self.side == "consumer" else (behind | own, {})

    def leaves(self) -> list[Tensor]:
        return [*self.gates.values(), *self.zeros_added]

    def called(self, path: str, call: Call) -> None:
        self.calls.append((path, call))

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        slopes = [torch.zeros_like(t) if g is None else g for t, g in zip(self.leaves(), gradients, strict=True)]
        for name, gate in zip(self.gates, slopes, strict=False):
            q = gate.double()  # (samples, rows, units)
            mask = self.batch.mask
            q = q[mask] if self.unit == "token" and mask is not None and mask.shape == q.shape[:2] else q.flatten(0, 1)
            self._add(name, q, len(q))
        with torch.no_grad():
            self._take_routed(slopes[len(self.gates) :])
        self.calls, self.zeros_added = [], []

    def add(self, name: str, q: Tensor) -> None:
        """Takes rows of a group's q, (rows, units) float64; those that are 0 need not be among them."""
        self.totals[name, "square"] += q.square().sum(0)
        self.totals[name, "absolute"] += q.abs().sum(0)

    def _add(self, name: str, q: Tensor, rows: int) -> None:
        """Takes a group's q of some rows, and counts them once, however often data are read."""
        self.add(name, q.to(self.device))
        if self.round == 0:
            self.totals[name, "rows"] += rows

    def _take_routed(self, slopes: Sequence[Tensor]) -> None:
        """Takes the slopes of the loss in what each call of experts put out."""
        for path in self.mixtures:
            shown = [(call, g) for (own, call), g in zip(self.calls, slopes, strict=True) if own == path]
            counts = [counted(call, self.batch) for call, _ in shown]
            if path in self.whole and shown:
                self._take_whole(
                    self.whole[path], [_of_whole(call, g, keep) for (call, g), keep in zip(shown, counts, strict=True)], counts
                )
            for group, piece in self.routed.get(path, ()):
                parts = [self._of_expert(piece, call, g, keep) for (call, g), keep in zip(shown, counts, strict=True)]
                if self.unit == "token":
                    for (q, _), keep in zip(parts, counts, strict=True):
                        self._add(group.name, q, int(keep.sum()))
                elif parts:
                    total = parts[0][0].new_zeros(len(self.batch), group.n)
                    for q, sample in parts:
                        total.index_add_(0, sample, q)
                    self._add(group.name, total, len(total))

    def _take_whole(self, group: PruningGroup, parts: Sequence[Tensor], counts: Sequence[Tensor]) -> None:
        """Takes whole experts' q at each token of some calls, (samples, positions, experts)."""
        if self.unit == "token":
            for q, keep in zip(parts, counts, strict=True):
                self._add(group.name, q[keep], int(keep.sum()))
        else:
            self._add(group.name, torch.stack([q.sum(1) for q in parts]).sum(0), len(self.batch))

    def _of_expert(self, piece: GroupSlice, call: Call, g: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """An expert's q at each token that goes to it and counts, (r, units) float64, and the samples of these, (r,)."""
        assert piece.entry is not None
        share = call.share(piece.entry).only(counts.flatten())
        slope = call.hidden_gradient(piece.entry, share, g) * share.weights
        raw = call.experts.raw(piece.entry, call.rows[share.at])
        if self.side == "consumer":
            q = call.experts.hidden(raw).double() * slope.double()
        else:
            with torch.enable_grad():
                leaf = raw.detach().requires_grad_()
                (made,) = torch.autograd.grad(call.experts.hidden(leaf), leaf, slope.to(leaf.dtype))
            q = raw.double() * made.double()
        places = piece.places if self.side == "consumer" else piece.index
        return q[:, places.to(q.device)].sum(2), share.tokens // counts.shape[1]

    def _plus_zero(self, output: Tensor) -> Tensor:
        """What experts put out, plus a zero at which the slope of the loss is taken."""
        self.zeros_added.append(torch.zeros_like(output).requires_grad_())
        return output + self.zeros_added[-1]

    def mean(self, group: PruningGroup, what: Literal["square", "absolute"]) -> Tensor:
        """E q^2 or E|q| a unit."""
        return (self.totals[group.name, what] / self.totals[group.name, "rows"]).cpu()

    def _multiply(self, path: str, x: Tensor) -> Tensor:
        """What passes, times the gates of its units; half precision is multiplied, and its slopes summed, in float32."""
        samples, dim = len(self.batch), channel_dim(self.model.get_submodule(path)) % x.ndim
        if len(x) % samples:
            raise ValueError(f"{path} shows {len(x)} rows for a batch of {samples} samples: rows must belong to samples")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        behind = x.shape[dim + 1 :].numel()
        rows = wide.reshape(samples, -1, x.shape[dim], behind)
        for group, piece in self.gated[path]:
            gate = self._gate(group, rows)
            padded = torch.cat([gate, gate.new_ones(*gate.shape[:2], 1)], 2)
            rows = rows * padded[..., self._owner(group, piece, x.shape[dim])].to(rows.dtype)[..., None]
        return rows.reshape(x.shape).to(x.dtype)

    def _gate(self, group: PruningGroup, rows: Tensor) -> Tensor:
        """The group's gates in this batch, (samples, 1 or tokens, units): the same for all that is multiplied by them."""
        if group.name not in self.gates:
            tokens = rows.shape[1] if self.unit == "token" else 1
            dtype = torch.float64 if tokens == 1 else rows.dtype  # a gate a token would take twice the rows' memory
            ones = torch.ones(len(rows), tokens, group.n, dtype=dtype, device=rows.device)
            self.gates[group.name] = ones.requires_grad_()
        return self.gates[group.name].to(rows.device)

    def _owner(self, group: PruningGroup, piece: GroupSlice, width: int) -> Tensor:
        """The unit at each place, (width,); the number of units where there is none."""
        if (piece, width) not in self.owners:
            places = piece.places if self.side == "consumer" else piece.index
            owner = torch.full((width,), group.n)
            owner[places.flatten()] = torch.arange(group.n).repeat_interleave(places.shape[1])
            self.owners[piece, width] = owner.to(self.device)
        return self.owners[piece, width]


def _of_whole(call: Call, g: Tensor, counts: Tensor) -> Tensor:
    """Each expert's q at each token, (samples, positions, experts) float64; 0 where it does not go there, or does not count."""
    g = g.flatten(0, -2)
    q = torch.zeros(call.tokens, len(call.experts), dtype=torch.float64, device=g.device)
    for expert in range(len(call.experts)):
        share = call.share(expert).only(counts.flatten())
        out = call.experts.output(expert, call.hidden(expert, share)).double() * share.weights.double()
        q[share.tokens, expert] = (out * g[share.at].double()).sum(1)
    return q.unflatten(0, counts.shape)


@dataclass(frozen=True)
class Taylor(Baseline):
    """First-order change of a sample's loss when the unit goes, at a gate before all that read it.

    The paper squares per mini-batch; here it is per sample, so that the batch size does not matter. ``abs`` takes sizes.

    Formula: E_n q^2, or E_n|q|; q = sum of x_u dL/dx_u over positions, places and consumers, L the sample's summed loss
    Shapes: x of what consumers read -> (units,)
    Unit:   that of the loss squared (of the loss with ``abs``), >= 0
    NaN:    never
    Source: Molchanov et al. 2019, 1906.10771, eq. 8 (gates); 2017, 1611.06440, eq. 7 (sizes)
    """

    names: ClassVar = ("taylor",)
    needs: ClassVar = "gates"
    whole: ClassVar = True
    abs: bool = False

    def sums(self) -> tuple[Need, ...]:
        return (Need(GateSums),)

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        return found.sums[Need(GateSums)].mean(group, "absolute" if self.abs else "square")


@dataclass(frozen=True)
class TaylorProducer(Baseline):
    """First-order change of a sample's loss when what makes the unit is zeroed, its bias included.

    It is not ``taylor``: what a norm's shift or a curved activation puts behind the producer stays. Behind a batch norm in train
    mode it would be 0; scores are taken in eval mode.

    Formula: E_n (sum of y_u dL/dy_u)^2 over positions and producers, y their own outputs; = E_n (sum of w g_nw over P(u), biases
             included)^2
    Shapes: y of what producers put out -> (units,)
    Unit:   that of the loss squared, >= 0
    NaN:    never
    Source: Molchanov et al. 2019, 1906.10771, eq. 8 (weights of a filter)
    """

    names: ClassVar = ("taylor_producer",)
    needs: ClassVar = "gates"

    def sums(self) -> tuple[Need, ...]:
        return (Need(GateSums, ("producer",)),)

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        return found.sums[self.sums()[0]].mean(group, "square")


@dataclass(frozen=True)
class LossProxy(Baseline):
    """What a unit's removal costs in a second-order model of the loss whose Hessian is the empirical Fisher information.

    ``unit: sequence`` adds q over a sample first (for images the order is ``taylor``'s), ``token`` takes every token alone.

    Formula: 0.5 E q^2, q = sum of x_u dL/dx_u over places, and over positions and consumers of a sequence
    Shapes: x of what consumers read -> (units,)
    Unit:   that of the loss squared, >= 0
    NaN:    never
    Raises: ValueError for ``token`` where other than one linear layer reads the group
    Source: 2604.23475; LeCun et al. 1990, Optimal Brain Damage, eq. 5
    """

    names: ClassVar = ("loss_proxy",)
    needs: ClassVar = "gates"
    whole: ClassVar = True
    unit: Unit = "sequence"

    def sums(self) -> tuple[Need, ...]:
        return (Need(GateSums, ("consumer", "token")) if self.unit == "token" else Need(GateSums),)

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        return 0.5 * found.sums[self.sums()[0]].mean(group, "square")


BASELINES: tuple[type[Baseline], ...] = (Taylor, TaylorProducer, LossProxy)
