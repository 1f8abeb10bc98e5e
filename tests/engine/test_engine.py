"""The engine's promises: nothing left behind, nothing guessed, every refusal in words."""

import pytest
import torch
from nets import Mixed, Tokens, batches, build, images
from torch import nn

import nodelens as nl
from nodelens.app.config import load_config
from nodelens.engine.analyze import run_pass
from nodelens.engine.dry_run import DryRun
from nodelens.engine.plan import Plan
from nodelens.engine.request import as_metrics
from nodelens.metrics.sets import metric_set
from nodelens.network.batch import Batch
from nodelens.network.find_layers import find_layers
from nodelens.network.hooks import edit
from nodelens.network.objective import Objective
from nodelens.statistics.linalg import exact_products
from nodelens.statistics.sample_hash import content_hashes, mix


def hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules())


def plan_for(net, metrics, layers="*", **options):
    batch = Batch.of(batches(*images(), 8)[0])
    found = find_layers(net, layers)
    return Plan.of(net, found, as_metrics(metrics), DryRun.of(net, found, batch), optional=layers == "*", **options)


def test_the_model_is_as_it_was():
    net = build(Mixed)
    net.train()
    net.bn.eval()
    net.head.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    nl.analyze(net, batches(*images(), 16))
    assert hooks(net) == 0
    assert (net.training, net.bn.training, net.stem.training) == (True, False, True)
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["head.weight"]
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("where", ["forward", "data", "loss"])
def test_an_exception_leaves_no_hook(where):
    net = build(Mixed)

    def data():
        yield from batches(*images(), 16)[:2]
        if where == "data":
            raise KeyboardInterrupt
        yield torch.zeros(4, 3) if where == "forward" else batches(*images(), 16)[2]

    def loss(logits, labels):
        raise ArithmeticError("no loss")

    with pytest.raises((KeyboardInterrupt, ValueError, ArithmeticError)):
        nl.analyze(net, data(), ["taylor"] if where == "loss" else ["rq"], **({"loss": loss} if where == "loss" else {}))
    assert hooks(net) == 0
    assert all(p.requires_grad for p in net.parameters())


def test_global_randomness_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    nl.analyze(build(Mixed), batches(*images(), 16), positions=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_and_medium_precision_change_no_product():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    with exact_products():
        plain = x.T @ x
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), exact_products(), exact_products():
            assert torch.equal(x.T @ x, plain)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_inference_mode_first_and_training_after():
    net = build(Mixed)
    with torch.inference_mode():
        nl.analyze(net, batches(*images(), 16), ["rq"])
    net.train()
    net(images()[0]).sum().backward()
    assert net.stem.weight.grad is not None


def test_taylor_does_not_see_batch_size_or_the_loss_s_mean():
    net = build(Mixed)
    small, large = (nl.analyze(net, batches(*images(), size), ["taylor"]).units["taylor"] for size in (3, 96))
    assert torch.allclose(torch.tensor(small.to_numpy()), torch.tensor(large.to_numpy()), rtol=1e-5)


def test_each_statistic_is_kept_once_and_moments_come_from_products():
    plan = plan_for(build(Mixed), ["rq", "redundancy", "activation_variance", "activation_rms", "effective_rank"])
    stem = [str(need) for need in plan.needs(plan.layers[0])]
    assert stem == ["Gram(output, positions)", "Patches(input, positions)"]
    head = [str(need) for need in plan.needs(plan.layers[-1])]
    assert head == ["Gram(output, samples)", "Patches(input, samples)"], "one row per sample is the same in either view"


def test_pairs_too_wide_for_groups_leave_the_errors_of_the_rest():
    net = nn.Sequential(nn.Linear(6, 1100), nn.ReLU(), nn.Linear(1100, 3)).eval()
    data = batches(torch.randn(80, 6, generator=torch.Generator().manual_seed(0)), torch.arange(80) % 3, 20)
    found = nl.analyze(net, data, ["rq", "redundancy", "synergy_gaussian_mmi"], layers="0")
    assert found.units[["rq", "rq_se", "redundancy", "synergy_gaussian_mmi"]].notna().all(axis=None)
    assert found.units[["redundancy_se", "synergy_gaussian_mmi_se"]].isna().all(axis=None)
    reasons = {m["column"]: m["reason"] for m in found.metadata["missing"]}
    assert reasons["redundancy_se"] == "pair sums wider than 1024 are kept once, not once per group of samples"


def test_the_plan_tells_its_bytes_and_stands_by_them():
    net = build(Mixed)
    plan = plan_for(net, metric_set("default"))
    taken = run_pass(net, plan, batches(*images(), 16), Objective.of(net))
    for (layer, need), sums in taken.sums().items():
        told = plan.nbytes(next(la for la in plan.layers if la.name == layer), need)
        assert told * 0.7 <= sums.nbytes <= told + 8 * 8 * 12, (layer, str(need))
    assert plan.overhead() > 0


def test_over_the_budget_nothing_starts():
    with pytest.raises(MemoryError, match=r"the plan takes .* MiB, budget is 1000 bytes; the largest are buffered rows .* choose"):
        nl.analyze(build(Mixed), batches(*images(), 16), budget=1000)


def test_the_budget_is_that_of_the_command_line_unless_it_is_given():
    assert nl.AnalyzeOptions().budget == load_config("analyze").budget.memory == "8GB"
    wide = nn.Linear(4, 24_000)  # the sums of a full covariance take 2.4 GB per group and metric
    data = [torch.randn(8, 4)]
    with pytest.raises(MemoryError, match=r"budget is 1,907.3 MiB; the largest is Gram"):
        nl.analyze(wide, data, ["redundancy"], width=24_000, groups=1, budget="2GB")
    with pytest.raises(MemoryError, match=r"budget is 7,629.4 MiB"):
        nl.analyze(nn.Linear(4, 48_000), data, ["redundancy"], width=48_000)


def test_gradients_reach_a_model_that_reads_token_ids():
    data = [
        {
            "input_ids": torch.randint(11, (6, 5), generator=torch.Generator().manual_seed(0)),
            "attention_mask": torch.ones(6, 5, dtype=torch.long),
            "labels": torch.tensor([0, 1, 2, 0, 1, 2]),
        }
    ]
    assert (nl.analyze(build(Tokens), data, ["taylor"]).units["taylor"] > 0).all()


def test_keys_know_a_sample_by_its_content():
    x = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(content_hashes(x)[order], content_hashes(x[order]))
    assert len(content_hashes(x).unique()) == 20
    assert int(mix(1, 2)) != int(mix(2, 1))
    spread = torch.bincount(mix(torch.arange(80_000), 0) % 8)
    assert float((spread - 10_000).abs().max()) < 500


def test_an_edit_keeps_the_container_and_leaves_no_trace():
    class Pair(nn.Module):
        def forward(self, x):
            return x, "state"

    net = nn.Sequential(Pair())
    with edit({net[0]: lambda t: t * 0}):
        assert net(torch.ones(2))[1] == "state"
        assert float(net(torch.ones(2))[0].sum()) == 0
    assert float(net(torch.ones(2))[0].sum()) == 2


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        self.a(x)
        return self.b(x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: nl.analyze(build(Mixed), [], ["rq"]), "the data are empty"),
        (
            lambda: nl.analyze(build(Mixed), batches(*images(), 9), ["rq"], "unused"),
            "layer 'unused' is never called by Mixed.forward",
        ),
        (
            lambda: nl.analyze(build(Mixed), batches(*images(), 9), ["rq"], ["bn", "stem"]),
            r"metric 'rq' needs weights, but layer 'bn' \(BatchNorm2d\) has none",
        ),
        (
            lambda: nl.analyze(build(Mixed), [torch.zeros(4, 1, 9, 9)], ["rq"]),
            r"Mixed cannot take the data, input 0 \(2, 1, 9, 9\) float32: .*channels",
        ),
        (lambda: nl.analyze(build(Mixed), [images()[0]], ["class_mi"]), "target 'label' needs labels, but the data have none"),
        (lambda: nl.analyze(build(Mixed), [images()[0]], ["taylor"]), "the loss needs labels, but the data have none"),
        (lambda: nl.analyze(build(Mixed), [(images()[0], images()[1] + 9)], ["synergy"]), "4 classes, but a label is 12"),
        (lambda: nl.analyze(build(Mixed), [(images()[0], images()[1][:5])], ["synergy"]), "a batch has 96 samples and 5 labels"),
        (lambda: nl.analyze(build(Mixed), [(1, 2, 3)], ["rq"]), r"not a tuple of 3: \(int, int, int\)"),
        (lambda: nl.analyze(build(Mixed), batches(*images(), 9), ["rq", "rq"]), "metric 'rq' is given twice"),
        (
            lambda: nl.analyze(Unreached(), [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))], ["taylor"], "a"),
            "no gradient reached layer 'a'",
        ),
    ],
    ids=range(11),
)
def test_refusals_name_the_thing_and_the_way_out(call, words):
    with pytest.raises(ValueError, match=words):
        call()
