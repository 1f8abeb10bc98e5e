"""Products of the first-order change of the loss of each unit with those of the supernodes."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from nodelens.network.batch import Batch
from nodelens.network.group_layer import GroupLayer
from nodelens.network.objective import Objective
from nodelens.statistics.processes import reduce_tensor
from nodelens.statistics.rows import Rows

from .model_sums import LossReduction, ModelSums, Unit
from .supernode import correlations, largest, share_of


class SupernodeProducts(ModelSums):
    """Sums of q^2 in a first round over the data; in a second, sums of q and of its products with the q of the supernodes.

    ``reduction: mean`` divides the gradients of a sample by its predicted tokens.
    """

    rounds: ClassVar[int] = 2

    def __init__(
        self, model: nn.Module, groups: Sequence[GroupLayer], unit: Unit, fraction: float, reduction: LossReduction = "sum"
    ):
        super().__init__(model, groups)
        self.unit, self.fraction, self.port = unit, fraction, self.watches(unit, fraction, reduction)
        self.cores: dict[str, Tensor] = {}
        for group in groups:
            self.totals |= {(group.name, "square"): self.zeros(group.group.n), (group.name, "rows"): self.zeros(1)}

    @classmethod
    def watches(cls, *options: Any) -> str:
        return "output*grad" + ("/tokens" if options[2:] == ("mean",) else "")

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self.held: dict[str, Tensor] = {}

    def see(self, layer: GroupLayer, rows: Rows) -> None:
        if self.unit == "token":
            self._add(layer.name, rows.raw.double().transpose(1, 2)[rows.mask()])
        else:
            q = rows.sample_totals().raw[:, :, 0].double()
            self.held[layer.name] = self.held.get(layer.name, 0) + q

    def end(self, logits: Tensor | None, objective: Objective) -> None:
        for name, q in self.held.items():
            self._add(name, q if self.batch.labelled is None else q[self.batch.labelled.to(q.device)])

    def _add(self, name: str, q: Tensor) -> None:
        """Adds rows of q of a group, (rows, units) float64."""
        q = q.to(self.device)
        if not self.cores:
            self.totals[name, "square"] += q.square().sum(0)
            self.totals[name, "rows"] += len(q)
        else:
            self.totals[name, "sum"] += q.sum(0)
            self.totals[name, "products"] += q.T @ q[:, self.cores[name]]

    def again(self) -> None:
        super().reduce()
        for group in self.groups:
            core = largest(self.totals[group.name, "square"], share_of(group.group.n, self.fraction))
            self.cores[group.name] = core
            self.totals |= {
                (group.name, "sum"): self.zeros(group.group.n),
                (group.name, "products"): self.zeros(group.group.n, len(core)),
            }

    def reduce(self) -> None:
        for key in self.totals:
            if key[1] in ("sum", "products"):
                self.totals[key] = reduce_tensor(self.totals[key])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"cores": dict(self.cores)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.cores = dict(state["cores"])

    def mean_square(self, group: str) -> Tensor:
        """E q^2 of each unit."""
        return (self.totals[group, "square"] / self.totals[group, "rows"]).cpu()

    def correlation(self, group: str, eps: float = 0.0) -> Tensor:
        """Correlations of each unit's q with the q of the supernodes, (units, supernodes)."""
        n, core = self.totals[group, "rows"], self.cores[group].to(self.totals[group, "rows"].device)
        mean, square = self.totals[group, "sum"] / n, self.totals[group, "square"] / n
        shared = self.totals[group, "products"] / n - mean[:, None] * mean[core]
        spread = (square - mean.square()).clamp_min(0)
        return correlations(shared, spread, spread[core], eps).cpu()
