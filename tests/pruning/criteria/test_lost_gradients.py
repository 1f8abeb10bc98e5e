"""Parts of a model that gradients do not reach: a refusal that names the layer and the reason, never a score of 0."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import nodelens as nl
from nodelens.analysis.supernodes.hidden import HiddenPass, UnitSums
from nodelens.network.objective import Objective

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own, at re-entrant checkpoints
CRITERIA = ("taylor", "taylor_producer", "loss_proxy", "fisher_information", "scar_taylor", "scar_prot", "gradient_alignment")
OF_WEIGHTS = ("gradient", "fisher", "movement", "llm_pruner")
DATA = [(torch.randn(12, 6, generator=torch.Generator().manual_seed(k)), torch.arange(12) % 3) for k in range(2)]


class Net(nn.Module):
    """Two layers of an encoder, one behind it, a head; a second reader of the encoder's first layer where ``side`` is asked for."""

    def __init__(self, how: str):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.enc = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8))
            self.mid, self.head = nn.Linear(8, 7), nn.Linear(7, 3)
            self.side = nn.Linear(10, 8) if how.startswith("side") else None
        self.how = how
        if how == "frozen":
            self.enc.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.side is not None:
            return self._with_side(self.enc[:2](x))
        if self.how.startswith("checkpoint"):
            again = self.how == "checkpoint, re-entrant"
            h = checkpoint(self.mid, checkpoint(self.enc, x, use_reentrant=again), use_reentrant=again)
            return self.head(h.relu())
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "no_grad"):
            h = self.enc(x)
        h = self.mid(h.detach() if self.how == "detach" else h).relu()
        return checkpoint(self.head, h, use_reentrant=True) if self.how == "head, re-entrant" else self.head(h)

    def _with_side(self, h: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "side, no_grad"):
            z = self.side(h)
        if self.how == "side, unused":
            return self.head(self.mid(self.enc[2](h)).relu()), z
        return self.head(self.mid(self.enc[2](h) + (z.detach() if self.how == "side, detach" else z)).relu())


@cache
def scores(how: str, criterion: str, **options) -> Tensor:
    return torch.tensor(nl.prune(Net(how), criterion, 0.5, data=DATA, **options).table[criterion].to_numpy())


@pytest.mark.parametrize("criterion", CRITERIA + OF_WEIGHTS)
@pytest.mark.parametrize(("how", "reason"), [
    ("no_grad", r"runs under torch.no_grad\(\), or in a re-entrant checkpoint"),
    ("checkpoint, re-entrant", r"runs under torch.no_grad\(\), or in a re-entrant checkpoint \(use_reentrant=False"),
    ("detach", r"the loss depends on .*, but .detach\(\) or .data cuts its gradient"),
])  # fmt: skip
def test_a_part_without_gradients_is_refused_with_the_reason(criterion, how, reason):
    for apply in ("slice", "mask"):
        with pytest.raises(ValueError, match=rf"{criterion}: no gradient reached (group|layer) 'enc.0': .*{reason}.*leave"):
            nl.prune(Net(how), criterion, 0.5, data=DATA, apply=apply)


@pytest.mark.parametrize("criterion", [c for c in CRITERIA + OF_WEIGHTS if c != "scar_prot"])
@pytest.mark.parametrize("how", ["side, no_grad", "side, detach"])
def test_a_part_of_the_readers_or_makers_without_gradients_is_refused_too(criterion, how):
    with pytest.raises(ValueError, match=rf"{criterion}: no gradient reached .*'side'"):
        nl.prune(Net(how), criterion, 0.5, data=DATA)


def test_a_group_without_gradients_can_be_left_out():
    dense = nl.prune(Net("plain"), "taylor", 0.5, data=DATA).table
    found = nl.prune(Net("no_grad"), "taylor", 0.5, data=DATA, freeze=["enc.0"]).table
    assert found.index.levels[0].tolist() == ["enc.2", "mid"]
    assert_close(torch.tensor(found.to_numpy()), torch.tensor(dense.loc[["enc.2", "mid"]].to_numpy()))


@pytest.mark.parametrize("criterion", [*CRITERIA, "scar_curvature", *OF_WEIGHTS])
@pytest.mark.parametrize("how", ["frozen", "checkpoint", "head, re-entrant"])
def test_frozen_parameters_and_checkpoints_do_not_change_a_score(criterion, how):
    tolerance = 1e-5 if criterion in OF_WEIGHTS else 0  # gradients of samples are taken one by one where vmap cannot take them
    assert_close(scores(how, criterion), scores("plain", criterion), rtol=tolerance, atol=0, equal_nan=True)


@pytest.mark.parametrize("criterion", ["taylor", "loss_proxy", "gradient", "llm_pruner"])
def test_a_reader_on_which_the_loss_does_not_depend_adds_nothing(criterion):
    """Its own consumer weights have no gradient, so that only those of the others count."""
    scope = ["enc.0", "enc.2", "mid"]
    found = nl.prune(Net("side, unused"), criterion, 0.5, data=DATA, scope=scope, output=0).table[criterion]
    assert_close(torch.tensor(found.to_numpy()), scores("plain", criterion))


@pytest.mark.parametrize("criterion", ["taylor", "gradient", "movement", "fisher"])
def test_a_group_on_which_the_loss_does_not_depend_is_refused(criterion):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.other = Net("plain"), nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x), self.other(x)

    with pytest.raises(ValueError, match=rf"{criterion}: no gradient reached group 'other.0': the loss does not depend on it"):
        nl.prune(Unused(), criterion, 0.5, data=DATA, output=0)


@pytest.mark.parametrize("criterion", ["taylor", "gradient", "movement"])
def test_a_loss_without_a_gradient_is_named(criterion):
    with pytest.raises(ValueError, match=f"{criterion}: loss= gives a number without a gradient: compute it from the logits"):
        nl.prune(Net("plain"), criterion, 0.5, data=DATA, loss=lambda z, y: z.detach().sum())


@pytest.mark.parametrize(("how", "reason"), [("no_grad", "'enc.2' runs under"), ("side, detach", "the loss depends on 'side'")])
def test_supernodes_refuse_what_no_gradient_reaches(how, reason):
    model = Net(how)
    groups = nl.find_groups(model, DATA[0])
    with pytest.raises(ValueError, match=f"supernodes: no gradient reached group 'enc.0': {reason}"):
        HiddenPass(model, groups, "sequence", "sum", 1, 0).run(DATA, UnitSums(groups, 1, torch.device("cpu")), Objective.of(model))


@pytest.mark.parametrize("how", ["frozen", "checkpoint", "head, re-entrant"])
def test_supernodes_see_through_checkpoints(how):
    found = []
    for model in (Net(how), Net("plain")):
        groups = nl.find_groups(model, DATA[0])
        sums = UnitSums(groups, 1, torch.device("cpu"))
        HiddenPass(model, groups, "sequence", "sum", 1, 0).run(DATA, sums, Objective.of(model))
        found.append(sums.found)
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_supernodes_count_the_gradient_of_a_unit_with_two_readers_once():
    model = Net("side, plain")
    groups = nl.find_groups(model, DATA[0])
    sums = UnitSums(groups, 1, torch.device("cpu"))
    n = HiddenPass(model, groups, "sequence", "sum", 1, 0).run(DATA, sums, Objective.of(model))
    expected = nl.analyze(model, DATA, ["scar_loss_proxy"], list(groups)).units["scar_loss_proxy"]
    for group in groups:
        found = 0.5 * sums.found[group.name, "square"].sum(0) / n
        assert_close(found, torch.tensor(expected.loc[group.name].to_numpy()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("how", ["checkpoint", "head, re-entrant"])
def test_a_recomputation_counts_no_row_twice(how):
    names = ["activation_mean", "taylor", "scar_curvature", "rq"]
    a, b = (nl.analyze(Net(each), DATA, names, ["mid", "head"]) for each in (how, "plain"))
    assert a.units.equals(b.units)
    assert a.metadata["rows"] == b.metadata["rows"]


def test_a_layer_without_gradients_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"no gradient reached layer 'mid': .*cuts its gradient; leave the layer out \(layers=\)"):
        nl.analyze(Cut(), DATA, ["taylor"], "mid")


class Cut(Net):
    """Cuts the gradient behind the middle layer."""

    def __init__(self):
        super().__init__("plain")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.enc(x)).detach().relu())
