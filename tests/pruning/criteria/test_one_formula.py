"""A name is one formula: what nl.analyze finds at a pruning group is the table that nl.prune ranks by."""

from functools import cache

import numpy as np
import pytest
import torch
from cases_criteria import conv_data, conv_groups, conv_net
from expert_families import BATCH, TOKENS, build
from nets import batches, generator
from torch import nn

import nodelens as nl
from nodelens.metrics import get_metric, list_metrics
from nodelens.network.batch import Batch
from nodelens.network.groups import PruningGroup
from nodelens.pruning.context import PruningContext
from nodelens.pruning.criteria.criterion import Criterion
from nodelens.pruning.groups.find import find_groups

UNITS = [name for name in list_metrics() if get_metric(name).shape == "unit"]
OF_MAPS = {"hrank", "chip", "bn_scale", "network_slimming"}  # of images, and of a group with a batch norm
OF_TOKENS = {"scar_prot", "scar_conn", "supernode_protection_score", "supernode_connectivity_score"}  # of one linear layer's


class Ffn(nn.Module):
    """Tokens through two hidden layers, whose units linear layers read."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def ffn(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Ffn().double()
    x = torch.randn(40, 4, generator=generator(1), dtype=torch.float64)
    return net, list(find_groups(net, Batch.of(x[:2]))), batches(x, torch.arange(40) % 3, 16)


def conv(name):
    groups = conv_groups()
    return conv_net(), groups[:1] if name in OF_MAPS else groups, batches(*conv_data(60), 25)


OF_LINEAR = {"spectral_alignment", "weight_activation_alignment"}  # NaN for the kernels of a convolution
LEFT_OUT = {ffn: OF_MAPS, conv: OF_LINEAR}
CASES = [(kind, name) for kind in (ffn, conv) for name in UNITS if name != "router_load" and name not in LEFT_OUT[kind]]


@cache
def both(kind, of_maps):
    """What nl.analyze finds, and the table that nl.prune ranks by: all metrics at once."""
    names = [name for k, name in CASES if k is kind and (name in OF_MAPS) == of_maps]
    net, groups, data = kind("hrank" if of_maps else "")
    metrics = {name: get_metric(name, **({"unit": "sequence"} if name in OF_TOKENS and kind is conv else {})) for name in names}
    before = {k: t + torch.arange(t.numel()).reshape(t.shape) / 10 for k, t in net.state_dict().items()}
    options = {"precision": "float64", "initial": before}
    shown = nl.analyze(net, data, metrics, groups, **options).units
    written: list[PruningGroup] = [] if kind is ffn else groups
    asked = {"custom_groups": written, "scope": [group.name for group in groups], "columns": metrics}
    context = PruningContext.of(net, Batch.of(data[0]), data, **asked, options=options)
    return shown, context.table([Criterion.of(name) for name in names])


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_analyze_at_a_group_is_the_table_that_prune_ranks_by(kind, name):
    shown, table = both(kind, name in OF_MAPS)
    drawn = name == "random"  # for each seed
    ranked = Criterion.of(name).score(shown.rename_axis(index=["group", "unit"])) if drawn else table[name]
    assert list(ranked.index) == list(shown.index)
    np.testing.assert_allclose(ranked, shown[name], rtol=1e-12, atol=0, equal_nan=True)
    assert ranked.notna().any()


def test_whole_experts_and_their_channels_agree_too():
    model, groups = build("mixtral")
    batch = [BATCH | {"labels": TOKENS}]
    for chosen, names in (
        (groups.opt_in, ["router_load", "taylor", "loss_proxy", "magnitude"]),
        (groups, ["wanda", "flap", "taylor"]),
    ):
        shown = nl.analyze(model, batch, names, list(chosen), precision="float64").units[names]
        columns = {name: get_metric(name) for name in names}
        scope = ["expert"] if chosen is groups.opt_in else "*"
        context = PruningContext.of(
            model, Batch.of(batch[0]), batch, scope=scope, columns=columns, options={"precision": "float64"}
        )
        ranked = context.table([Criterion.of(name) for name in names])
        np.testing.assert_allclose(ranked.loc[shown.index, names], shown, rtol=1e-12, atol=0)
