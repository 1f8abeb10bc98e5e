"""Samples without a target: every metric of a target or of a gradient has the values of the data without them."""

import math

import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import nn

import nodelens as nl
from nodelens.analysis.supernodes.hidden import HiddenPass, UnitSums
from nodelens.metrics import get_metric
from nodelens.network.missing import with_label, with_target
from nodelens.network.objective import Objective

TOP = -0.5 * math.log(1e-6)
OF_TARGETS = {
    "mi": {"permutations": 3},
    "synergy": {"permutations": 3},
    "pid_redundancy": {},
    "pid_unique": {},
    "mi_given_target": {"permutations": 3},
    "mi_given_class": {"permutations": 3},
    "mi_binning": {"permutations": 3},
    "class_mi": {"permutations": 3},
    "class_synergy": {"permutations": 3},
    "conditional_rq": {},
    "delta_rq": {},
}
OF_GRADIENTS = (
    "taylor",
    "taylor_saliency",
    "fisher_information",
    "scar_taylor",
    "scar_curvature",
    "scar_loss_proxy",
    "loss_proxy",
    "gradient_alignment",
)
OF_GROUPS = ("taylor", "taylor_producer", "loss_proxy", "fisher", "llm_pruner", "movement", "scar_prot")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(2, 5, 3, padding=1), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.fc(self.conv(x).relu().mean((2, 3))).relu())


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture(scope="module")
def batches():
    """Batches of all samples, a third of them without a target and with larger inputs; and of those with a target only."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(90, 2, 4, 4, generator=g, dtype=torch.float64), torch.randint(3, (90,), generator=g)
    ids, missing = torch.arange(90), torch.rand(90, generator=g) < 1 / 3
    given = x.mean((1, 2, 3)) + torch.randn(90, generator=g, dtype=torch.float64)
    x[missing] = 2 * x[missing] + 3

    def made(chosen):
        data = {"x": x, "labels": y.where(~missing, -100), "targets": given.where(~missing, torch.nan), "ids": ids}
        return [{k: t[chosen][a : a + 13] for k, t in data.items()} for a in range(0, int(chosen.sum()), 13)]

    return made(torch.ones_like(missing)), made(~missing)


def same(found, expected, rtol=1e-9):
    for one, other in ((found.units, expected.units), (found.layers, expected.layers)):
        values = [c for c in one if not c.endswith("_se")]
        assert_frame_equal(one[values], other[values], rtol=rtol, atol=1e-12)


OTHERS = [pytest.param(target, marks=pytest.mark.slow) for target in ("correct_logit", None)]


@pytest.mark.parametrize("target", ["logit_margin", "given", *OTHERS])
def test_metrics_of_a_target_read_the_samples_that_have_one(net, batches, target):
    metrics = {}
    for name, options in OF_TARGETS.items():
        takes = target and "target" in nl.get_metric(name).options
        metrics[name] = get_metric(name, **options, **({"target": target} if takes else {}))
    metrics |= {f"class_mi {m}": get_metric("class_mi", method=m, permutations=2) for m in ("pooled", "gaussian")}
    metrics["class_synergy gaussian"] = get_metric("class_synergy", method="gaussian", permutations=2)
    metrics["class_synergy pooled"] = get_metric("class_synergy", method="gaussian", covariance="pooled", permutations=2)
    every, known = batches
    found, expected = (nl.analyze(net, data, metrics, groups=4) for data in (every, known))
    same(found, expected)
    assert found.units[list(metrics)].notna().all(axis=None)


def test_metrics_of_a_gradient_read_the_samples_that_have_a_label(net, batches):
    every, known = batches
    same(nl.analyze(net, every, OF_GRADIENTS), nl.analyze(net, known, OF_GRADIENTS))


@pytest.mark.parametrize("name", OF_GROUPS)
def test_criteria_of_pruning_groups_read_the_samples_that_have_a_label(net, batches, name):
    every, known = batches
    groups = nl.find_groups(net, torch.randn(2, 2, 4, 4, dtype=torch.float64))
    if name == "movement":  # one batch: steps of several batches depend on which samples they hold
        every, known = ([{k: torch.cat([b[k] for b in data]) for k in data[0]}] for data in (every, known))
    same(nl.analyze(net, every, [name], groups), nl.analyze(net, known, [name], groups))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_sums_of_supernodes_count_the_samples_that_have_a_label(net, batches, reduction):
    groups = list(nl.find_groups(net, torch.randn(2, 2, 4, 4, dtype=torch.float64)))

    def sums(data):
        found = UnitSums(groups, 4, torch.device("cpu"))
        HiddenPass(net, groups, "sequence", reduction, 4, 0).run(data, found, Objective.of(net, task="classification"))
        return found.found

    every, known = map(sums, batches)
    for key, value in every.items():
        torch.testing.assert_close(value, known[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("task", ["regression", "multilabel"])
@pytest.mark.parametrize("size", [9, 90])
def test_labels_that_are_no_classes(net, task, size):
    g = torch.Generator().manual_seed(2)
    x, ids = torch.randn(90, 2, 4, 4, generator=g, dtype=torch.float64), torch.arange(90)
    y, missing = torch.randn(90, 3, generator=g, dtype=torch.float64), torch.rand(90, generator=g) < 1 / 3
    y = y if task == "regression" else (y > 0).double()
    x[missing], y[missing] = 2 * x[missing] + 3, torch.nan if task == "regression" else -100.0
    metrics = {name: get_metric(name) for name in ("taylor", "scar_loss_proxy")} | {"mi": get_metric("mi", target="loss")}

    def found(chosen):
        parts = zip(*(t[chosen].split(size) for t in (x, y, ids)), strict=True)
        data = [{"x": a, "labels": b, "ids": i} for a, b, i in parts]
        assert [int(Objective.of(net, task=task).batch(b).predicted.sum()) for b in data] == [
            int((b["labels"].isfinite() & (b["labels"] != -100)).any(1).sum()) for b in data
        ]
        return nl.analyze(net, data, metrics, task=task)

    same(found(torch.ones_like(missing)), found(~missing))


def test_half_of_the_targets_are_missing():
    g = torch.Generator().manual_seed(0)
    y = torch.randn(400, 2, generator=g, dtype=torch.float64)
    z = y[:, 0].clone()
    z[::2] = torch.nan
    net = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.eye(2))
    metric = get_metric("mi", target="given")
    (unit, _), known = nl.analyze(net, [{"input": y, "targets": z}], [metric]).units.iloc[:, 0], z.isfinite()
    assert unit == pytest.approx(TOP, abs=1e-9)
    assert float(metric.compute(outputs=y, targets=z)[0]) == pytest.approx(TOP, abs=1e-9)
    shifted = (y + 5).where(~known[:, None], y)
    z = (y[:, 0] + torch.randn(400, generator=g, dtype=torch.float64)).where(known, torch.nan)
    expected = -0.5 * math.log(1 - float(torch.corrcoef(torch.stack([y[known, 0], z[known]]))[0, 1]) ** 2)
    assert float(metric.compute(outputs=shifted, targets=z)[0]) == pytest.approx(expected, rel=1e-9)
    assert nl.analyze(net, [{"input": shifted, "targets": z}], [metric]).units.iloc[0, 0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in OF_TARGETS if name != "conditional_rq"])
def test_tensors_given_in_hand(name):
    g = torch.Generator().manual_seed(0)
    t = {
        "inputs": torch.randn(60, 4, generator=g),
        "weights": torch.randn(3, 4, generator=g),
        "logits": torch.randn(60, 3, generator=g),
    }
    t |= {"labels": torch.randint(3, (60,), generator=g)}
    known = torch.arange(60) % 3 > 0
    t["inputs"][~known] += 4
    t["labels"][~known] = -100
    rows = {k: v if k == "weights" else v[known] for k, v in t.items()}
    metric = get_metric(name)
    torch.testing.assert_close(metric.compute(**t), metric.compute(**rows), rtol=1e-5, atol=1e-6)


def test_sums_of_different_rows_are_refused():
    from nodelens.statistics import ByClass, Cross, Gram, Moments

    y, z = torch.randn(10, 2), torch.randn(10)
    z[:4] = math.nan
    with pytest.raises(ValueError, match="the units cover 10 rows, those with the target 6: compute both from the rows"):
        get_metric("mi")(None, y=Moments.of(y), z=Cross.of(y, z))
    by_class = ByClass.of(y, torch.tensor([-100] * 4 + [0, 1] * 3))
    with pytest.raises(ValueError, match="the units cover 10 rows, those with the target 6"):
        get_metric("class_synergy", method="gaussian", covariance="pooled")(None, y=by_class, every=Gram.of(y))


def test_which_samples_have_a_label():
    assert with_label(None) is None
    assert with_label(torch.tensor([0, -1, 5])) is None
    assert with_label(torch.tensor([0, -100])).tolist() == [True, False]
    assert with_label(torch.tensor([-100.0, torch.nan])).tolist() == [True, False]
    assert with_label(torch.tensor([[-100, 3], [-100, -100]])).tolist() == [True, False]
    assert with_label(torch.tensor([[3, -100], [3, 4]]), "causal_lm").tolist() == [False, True]  # the first is not predicted
    assert with_label(torch.tensor([[-100.0, 1.0], [-100.0, torch.nan]]), "multilabel").tolist() == [True, False]
    assert with_label(torch.tensor([-100, 3]), "regression") is None
    assert with_target("label", torch.tensor([0, -100])).tolist() == [True, False]
    assert with_target("label", torch.tensor([-1.5, torch.nan])).tolist() == [True, False]
    assert with_target("given", torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [-5.0, 1.0]])).tolist() == [True, False, True]
