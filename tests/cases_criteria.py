"""Every published criterion by name, and small networks and pruning groups to score with them."""

import torch
from nets import generator
from published import PUBLISHED
from torch import Tensor, nn

from nodelens.metrics import get_metric
from nodelens.metrics.feature_maps import HRank
from nodelens.network.groups import GroupSlice, PruningGroup, identity, span
from nodelens.pruning.criteria.scoring import score_table

FORMS = {
    "taylor_abs": get_metric("taylor", abs=True),
    "el2": get_metric("llm_pruner", form="el2"),
    "mix": get_metric("llm_pruner", form="mix"),
    "vector": get_metric("llm_pruner", form="vector"),
}
SCAR = {name for name in PUBLISHED if "scar" in name or "supernode" in name}  # by hand in test_supernodes.py
OF_EXPERTS = {"router_load"}  # by hand in test_pruning_experts.py
OF_UNITS = [name for name in PUBLISHED if name not in OF_EXPERTS]
EVERY = {name: get_metric(name, **({"unit": "sequence"} if name in SCAR else {})) for name in OF_UNITS} | FORMS
OF_WEIGHTS = {"magnitude", "l1", "l2", "group_l2", "bn_scale", "fpgm", "lamp", "random"}
NOT_OF_MAPS = {k: v for k, v in EVERY.items() if not isinstance(v, HRank) and k != "bn_scale"}


def linear(path: str, index: Tensor, reads: str, places: Tensor | None = None, kind: str = "ffn") -> PruningGroup:
    """Units between two layers, with the bias of the first."""
    made = (GroupSlice(path, "weight", 0, index, "producer"), GroupSlice(path, "bias", 0, index, "producer"))
    return PruningGroup(
        path, kind, len(index), (*made, GroupSlice(reads, "weight", 1, index if places is None else places, "consumer"))
    )


class ConvNet(nn.Module):
    """Convolution, batch norm, ReLU in place, convolution, ReLU, flatten, linear: groups of 3 and of 4 channels."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.bn(self.a(x)))
        return self.fc(torch.relu(self.b(x)).flatten(1))


def conv_net(seed: int = 0) -> ConvNet:
    """In float64 and train mode, with a shift and moments in the batch norm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ConvNet().double()
        for tensor in (net.bn.weight, net.bn.bias):
            tensor.data.normal_()
        net.bn.running_mean.normal_()
        net.bn.running_var.uniform_(0.5, 2)
    return net


def conv_groups() -> list[PruningGroup]:
    i = identity(3)
    norm = [GroupSlice("bn", t, 0, i, "tied") for t in ("weight", "bias", "running_mean", "running_var")]
    first = linear("a", i, "b", kind="channel")
    return [
        PruningGroup("a", "channel", 3, (*first.slices[:2], *norm, first.slices[2])),
        linear("b", identity(4), "fc", span(4, 9), "channel"),
    ]


def conv_data(n: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 5, 5, generator=generator(1), dtype=torch.float64), torch.randint(5, (n,), generator=generator(2))


def of(group: PruningGroup, model: nn.Module, name: str, data=None, loss=None, seed: int = 0, **options) -> Tensor:
    """The scores of one criterion on one group."""
    extra = {} if loss is None else {"loss": loss}
    table = score_table(model, [group], {name: get_metric(name, **options)}, data, seed=seed, **extra)
    return torch.from_numpy(table[name].to_numpy().copy())
