"""Values of hidden units where they are read, and gradients of the loss there: sums over rows (tokens or samples) of a pass."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nodelens.engine.driver import Driver, device_of
from nodelens.engine.lost_gradients import check_arrived
from nodelens.engine.saved_work import SavedWork, reading
from nodelens.metrics.gradient import LossReduction
from nodelens.network.batch import Batch
from nodelens.network.experts import Call, ExpertLayer, Experts, Routed
from nodelens.network.group_layer import GroupLayer
from nodelens.network.groups import GroupSlice, PruningGroup
from nodelens.network.hooks import Awaited, Capture, Site, observed
from nodelens.network.layers import Layer
from nodelens.network.objective import Objective
from nodelens.pruning.surgery.mask import channel_dim
from nodelens.statistics.linalg import exact_products
from nodelens.statistics.processes import reduce_tensor, world

Unit = Literal["token", "sequence"]


class HiddenPass:
    """Passes the rows of every group to sums: u, values of units; g, gradients of the summed loss; q = u g, one value per unit.

    q is the first-order change of the loss when the unit is removed. It is first summed over the places of a unit, its readers and
    their calls, and with ``unit: sequence`` over positions. Each layer is reduced when the backward pass reaches it, so that no
    layer is buffered until the end. For experts in one tensor, u is the value read times the router's weight, at the tokens routed
    to the expert; at other tokens u is 0, and these tokens count as rows too. Samples without a label have no rows.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[PruningGroup], unit: Unit, reduction: LossReduction, folds: int, seed: int
    ):
        self.model, self.unit, self.reduction, self.folds, self.seed = model, unit, reduction, folds, seed
        self.device = device_of(model)
        self.read: dict[str, list[tuple[PruningGroup, GroupSlice]]] = {}
        for group in groups:
            for piece in check_readers(model, group, unit):
                self.read.setdefault(piece.module, []).append((group, piece))
        modules = {path: model.get_submodule(path) for path in self.read}
        self.experts = {path: found for path, module in modules.items() if (found := Experts.of(module)) is not None}

    def run(self, data: Iterable[Any], sums: "HiddenSums", objective: Objective, saved: SavedWork | None = None) -> int:
        """Runs every batch and returns the number of samples over all processes. Raises ValueError for empty data.

        saved: where the sums of an unfinished pass are kept.
        """
        self.sums, self.samples, self.ran, self.objective = sums, 0, False, objective
        modules = {path: self.model.get_submodule(path) for path in self.read}
        hooked = [Layer(path, module, "input") for path, module in modules.items() if path not in self.experts]
        mixed = [Layer(path, modules[path]) for path in self.experts]
        sites = [Site(layer, port) for layer in hooked for port in ("output", *sums.ports)]
        sites += [Site(layer, "grad") for layer in mixed]
        maps = [layer.name for layer in hooked if channel_dim(layer.module) == 1]  # a block may modify maps in place
        self.capture = capture = Capture(sites, self._see, maps, shares=True)
        driver = Driver(self.model, objective, self.folds, self.seed, graph=True)
        experts = observed((layer.module for layer in mixed), self._see_experts)
        with experts, reading(saved, self, objective.batch) as rest:
            driver.run(rest(data), self, capture)
        found = int(reduce_tensor(torch.tensor(self.samples, device=self.device)))
        if not found:
            raise ValueError("the data are empty: there is no batch to score units with")
        uncalled = next((str(site) for site in sites if self.ran and not capture.fired[str(site)]), None)
        if uncalled:
            raise ValueError(f"{uncalled} was never called by {type(self.model).__name__}.forward: remove its group from the scope")
        return found

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, and the number of samples in them."""
        return {"samples": self.samples, "sums": list(self.sums.found.values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what ``state_dict`` of a pass with the same sums returned."""
        self.samples = state["samples"]
        for own, value in zip(self.sums.found.values(), state["sums"], strict=True):
            own.copy_(value)

    def _lost(self) -> list[Awaited]:
        """The layers that read units, by group, whose gradients have not arrived."""
        lost = [awaited for awaited, arrived in self.capture.arrived.items() if not arrived]
        groups = {site.layer.name: [group for group, _ in self.read[site.layer.name]] for site, _ in lost}
        return [Awaited(Site(GroupLayer.of(self.model, g), s.port), layer) for s, layer in lost for g in groups[s.layer.name]]

    def begin(self, batch: Batch) -> None:
        """Prepares for the rows of a batch."""
        self.samples, self.ran = self.samples + len(batch), True
        self.batch, self.pending, self.partial = batch, dict[str, int](), dict[str, Tensor]()
        self.calls = {path: list[Call]() for path in self.experts}
        self.fold = batch.group.to(self.device)
        self.scale = None if self.reduction == "sum" else 1 / batch.predicted.clamp_min(1).double().to(self.device)

    def _see(self, site: Site, tensor: Tensor) -> None:
        path = site.layer.name
        if path in self.experts:
            self._see_routed(path, self.calls[path].pop(), tensor)  # backward visits the last call first
            return
        rows = site.layer.rows(tensor, len(self.batch), self.batch.mask_at(f"{path}.input"))
        rows = rows if self.batch.labelled is None else rows.kept(rows.mask() & self.batch.labelled[:, None])
        raw = rows.raw if rows.keep is None else rows.raw.where(rows.keep[:, None], 0)
        if site.port != "output":
            raw = self._reduced(raw)
        for group, piece in self.read[path]:
            x = _placed(raw, piece.places)
            if site.port == "output":
                self._count_call(group, rows.mask().sum(1))
                self.sums.values(group, x)
            elif site.port == "grad":
                self.sums.slopes(group, x)
            else:
                self._product(group, x.sum(2) if x.shape[2] > 1 else x[:, :, 0])

    def _see_experts(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        path = next(path for path, experts in self.experts.items() if experts.module is module)
        with torch.no_grad():
            call = Call.of(self.experts[path], path, args, kwargs)
            if not self.capture.fired[f"{path} call"]:
                call.check(path, output)
        self.capture.fired[f"{path} call"] += 1
        self.calls[path].append(call)
        count = self._mask(call).sum(1)
        for group, _ in self.read[path]:
            self._count_call(group, count)

    def _see_routed(self, path: str, call: Call, slope: Tensor) -> None:
        """Reduces the gradient at the output of experts."""
        for group, piece in self.read[path]:
            assert piece.entry is not None
            share = call.share(piece.entry)
            layer = ExpertLayer(group.name, call.experts.module, "hidden", experts=call.experts, expert=piece.entry)
            parts = (call.hidden(piece.entry, share) * share.weights, call.hidden_gradient(piece.entry, share, slope))
            routed = (Routed(part, share.tokens, call.tokens) for part in parts)
            u, g = (layer.rows(part, len(self.batch), self._mask(call)).raw for part in routed)
            u, g = _placed(u, piece.places), _placed(self._reduced(g), piece.places)
            self.sums.values(group, u)
            self.sums.slopes(group, g)
            self._product(group, (u * g).sum(2))

    def _mask(self, call: Call) -> Tensor:
        """The tokens of a call of experts that count, (samples, length) bool: no padding, and none of a sample without a label."""
        mask, labelled = self.batch.mask, self.batch.labelled
        every = torch.ones(len(self.batch), call.tokens // len(self.batch), dtype=torch.bool, device=self.device)
        every = mask if mask is not None and mask.shape == every.shape else every
        return every if labelled is None else every & labelled[:, None]

    def _reduced(self, slope: Tensor) -> Tensor:
        return slope if self.scale is None else slope * self.scale[:, None, None].to(slope)

    def _count_call(self, group: PruningGroup, count: Tensor) -> None:
        """Counts a forward call, whose gradient follows. The first call of a group defines its rows."""
        if group.name not in self.pending:
            labelled = self.batch.labelled
            one = torch.ones_like(count) if labelled is None else labelled.to(count)
            self.sums.rows(group, one if self.unit == "sequence" else count, self.fold)
        self.sums.positions(group, count)
        self.pending[group.name] = self.pending.get(group.name, 0) + 1

    def _product(self, group: PruningGroup, q: Tensor) -> None:
        if self.unit == "sequence":
            q = q.sum(2, keepdim=True)
        held = self.partial.pop(group.name, None)
        q = q if held is None else held + q
        self.pending[group.name] -= 1
        if self.pending[group.name]:
            self.partial[group.name] = q
        else:
            self.sums.products(group, q, self.fold)

    def end(self, predictions: Tensor | None) -> None:
        """Ends a batch: adds the partial sums of groups with calls on which the loss does not depend; q of these calls is 0."""
        check_arrived("supernodes", self.model, self._lost(), self.batch, self.objective)
        groups = {group.name: group for every in self.read.values() for group, _ in every}
        for name, q in self.partial.items():
            self.sums.products(groups[name], q, self.fold)


class HiddenSums:
    """Base class of sums over a pass. x (samples, units, places, positions); q (samples, units, rows); fold, count (samples,).

    Masked rows are 0. ``ports``: the gradient ports that are needed.
    """

    ports: tuple[str, ...] = ("output*grad",)
    found: dict[Any, Tensor]  # the sums

    def rows(self, group: PruningGroup, count: Tensor, fold: Tensor) -> None: ...
    def positions(self, group: PruningGroup, count: Tensor) -> None: ...
    def values(self, group: PruningGroup, x: Tensor) -> None: ...
    def slopes(self, group: PruningGroup, x: Tensor) -> None: ...
    def products(self, group: PruningGroup, q: Tensor, fold: Tensor) -> None: ...


class UnitSums(HiddenSums):
    """Sums per unit in float64: u^2 and g^2 over positions; q, |q| and, by fold of samples, q^2 over rows; maximum of |u|.

    ``found[group, name]``: power (u^2), slope (g^2), total (q), absolute (|q|), largest (units,); square (folds, units); rows
    (folds,); positions (1,).
    """

    ports = ("grad", "output*grad")

    def __init__(self, groups: Iterable[PruningGroup], folds: int, device: torch.device):
        self.found = {}
        for group in groups:
            shapes = dict.fromkeys(("power", "slope", "total", "absolute", "largest"), (group.n,))
            for what, shape in {**shapes, "square": (folds, group.n), "rows": (folds,), "positions": (1,)}.items():
                self.found[group.name, what] = torch.zeros(shape, dtype=torch.float64, device=device)

    def rows(self, group: PruningGroup, count: Tensor, fold: Tensor) -> None:
        self.found[group.name, "rows"].index_add_(0, fold, count.double())

    def positions(self, group: PruningGroup, count: Tensor) -> None:
        self.found[group.name, "positions"] += count.sum()

    def values(self, group: PruningGroup, x: Tensor) -> None:
        self.found[group.name, "power"] += _square(x)
        largest = self.found[group.name, "largest"]
        torch.maximum(largest, torch.linalg.vector_norm(x, torch.inf, dim=(0, 2, 3)).to(largest), out=largest)

    def slopes(self, group: PruningGroup, x: Tensor) -> None:
        self.found[group.name, "slope"] += _square(x)

    def products(self, group: PruningGroup, q: Tensor, fold: Tensor) -> None:
        self.found[group.name, "total"] += q.sum(2).sum(0, dtype=torch.float64)
        self.found[group.name, "absolute"] += torch.linalg.vector_norm(q, 1, dim=2).sum(0, dtype=torch.float64)
        squares = torch.linalg.vector_norm(q, dim=2).double().square()
        self.found[group.name, "square"].index_add_(0, fold, squares)

    def reduce(self) -> None:
        """Reduces the sums over all processes, to the CPU. Collective."""
        for key, value in self.found.items():
            if key[1] == "largest":
                every = value.new_zeros(world()[1], len(value))
                every[world()[0]] = value
                self.found[key] = reduce_tensor(every).amax(0).cpu()
            else:
                self.found[key] = reduce_tensor(value).cpu()


class ProductSums(HiddenSums):
    """Sums of q_i q_s over rows for chosen units i and s of each group, (i, s) float64."""

    def __init__(self, chosen: Mapping[str, tuple[Tensor, Tensor]], device: torch.device):
        self.chosen = {name: (i.to(device), s.to(device)) for name, (i, s) in chosen.items()}
        self.found = {name: torch.zeros(len(i), len(s), dtype=torch.float64, device=device) for name, (i, s) in self.chosen.items()}

    def products(self, group: PruningGroup, q: Tensor, fold: Tensor) -> None:
        i, s = self.chosen[group.name]
        with exact_products():
            self.found[group.name] += torch.einsum("bip,bsp->is", q[:, i], q[:, s])

    def reduce(self) -> None:
        """Reduces the sums over all processes, to the CPU. Collective."""
        self.found = {name: reduce_tensor(value).cpu() for name, value in self.found.items()}


def check_readers(model: nn.Module, group: PruningGroup, unit: Unit) -> list[GroupSlice]:
    """The slices that read a group. Raises ValueError if there are none, or if ``unit: token`` does not apply to the group."""
    slices = group.by_role("consumer")
    reads = ", ".join(f"{c.module} ({type(model.get_submodule(c.module)).__name__})" for c in slices)
    if not slices:
        raise ValueError(f"no module reads group {group.name!r}: remove it from the scope")
    if unit == "token" and (len(slices) > 1 or channel_dim(model.get_submodule(slices[0].module)) != -1):
        raise ValueError(
            f"group {group.name!r} is read by {reads}, not by one linear layer, so it has no value per token: set unit: sequence"
        )
    return slices


def _placed(raw: Tensor, places: Tensor) -> Tensor:
    """(samples, width, positions) as (samples, units, places, positions); no copy if each unit has one place."""
    if places.shape[1] == 1 and len(places) == raw.shape[1] and torch.equal(places[:, 0], torch.arange(len(places))):
        return raw[:, :, None]
    return raw[:, places.to(raw.device)]


def _square(x: Tensor) -> Tensor:
    """Sum of squares per unit, (units,) float64, without a copy of x."""
    return torch.linalg.vector_norm(x, dim=(2, 3)).double().square().sum(0)
