"""Several passes give the table of one, in the memory that there is; a plan's bytes are those that its sums take."""

import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nets import Mixed, batches, build, images

import nodelens as nl
from nodelens.engine.analyze import run_pass
from nodelens.engine.dry_run import DryRun
from nodelens.engine.members import of_groups_only
from nodelens.engine.plan import Plan
from nodelens.engine.request import as_metrics
from nodelens.engine.several_passes import divided
from nodelens.metrics import METRICS, get_metric
from nodelens.metrics.sets import metric_set
from nodelens.network.batch import Batch
from nodelens.network.find_layers import find_layers
from nodelens.network.objective import Objective
from nodelens.statistics import (
    ByClass,
    ClassCross,
    ClassGram,
    ClassSizes,
    Cosines,
    Cross,
    Directions,
    Gram,
    Higher,
    MeanSizes,
    NormedGram,
    NormedPair,
    Pair,
    Patches,
    PatchesByClass,
    Quantiles,
    Sample,
    Sizes,
    Zeros,
)
from nodelens.statistics.sample import ROWS
from nodelens.statistics.weight_sums import WeightSums

EDGES = ["linear_cka", "linear_cka_debiased", "feature_subspace_novelty"]
METRICS_ASKED = [*metric_set("default"), *EDGES, "downstream_importance", "composite", "l2_norm", "total_correlation"]


def plan_of(net, data, metrics, layers="*", groups=8, pairs="consecutive"):
    found, batch = find_layers(net, layers), Batch.of(data[0], groups)
    return Plan.of(net, found, as_metrics(metrics), DryRun.of(net, found, batch), groups, None, True, pairs=pairs)


def equal(one, two, **how):
    """All that two results hold, but for the time, the passes, and the bytes of sums that several passes form again."""
    for table in ("units", "layers", "edges"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(two, table), **how)
    assert list(one.matrices) == list(two.matrices)
    for key, matrix in one.matrices.items():
        torch.testing.assert_close(torch.from_numpy(matrix), torch.from_numpy(two.matrices[key]), rtol=1e-9, atol=1e-12)
    a, b = ({k: v for k, v in r.metadata.items() if k not in ("seconds", "passes", "model_values", "traffic")} for r in (one, two))
    assert a == b
    assert one.metadata["model_values"] == pytest.approx(two.metadata["model_values"])


@pytest.fixture(scope="module")
def net():
    return build(Mixed).double()


@pytest.fixture(scope="module")
def data():
    return batches(*images(n=64, dtype=torch.float64), 16)


@pytest.fixture(scope="module")
def whole(net, data):
    return nl.analyze(net, data, METRICS_ASKED)


def smallest(plan, passes):
    """The least budget that so many passes fit in, to 2 %."""
    low, high = 0.0, float(plan.total_bytes)
    while high - low > 0.02 * plan.total_bytes:
        middle = (low + high) / 2
        try:
            divided(plan, middle, passes)
            high = middle
        except MemoryError:
            low = middle
    return high


@pytest.mark.parametrize("passes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_passes_give_the_result_of_one(net, data, whole, passes):
    budget = smallest(plan_of(net, data, METRICS_ASKED), passes)
    found = nl.analyze(net, data, METRICS_ASKED, budget=budget, max_passes=passes)
    equal(whole, found, rtol=1e-9)
    told = found.metadata["passes"]
    assert len(told) == passes
    assert [name for part in told for name in part["layers"]] == list(found.layers.index)
    assert all(part["bytes"] <= budget for part in told)


def test_the_same_sums_give_the_same_digits(net, data):
    metrics = ["rq", "redundancy", "taylor", "participation_ratio", "class_mi"]
    budget = smallest(plan_of(net, data, metrics), 3)
    one, three = nl.analyze(net, data, metrics), nl.analyze(net, data, metrics, budget=budget, max_passes=3)
    assert len(three.metadata["passes"]) == 3
    equal(one, three, check_exact=True)


@pytest.mark.parametrize("pairs", ["all", [["grouped", "head"], ["stem", "point"], ["stem", "head"]]], ids=["all", "some"])
def test_edges_of_any_pairs_keep_their_order(net, data, pairs):
    metrics = {"cka": get_metric("linear_cka", view="samples"), "pairs": get_metric("redundancy", reduce="none")}
    budget = smallest(plan_of(net, data, metrics, pairs=pairs), 2)
    one = nl.analyze(net, data, metrics, pairs=pairs)
    equal(one, nl.analyze(net, data, metrics, pairs=pairs, budget=budget, max_passes=2), rtol=1e-9)


def test_rows_that_are_not_finite_are_counted_once(net, data):
    x, y = (torch.cat(t) for t in zip(*data, strict=True))
    x[3, 0, 0, 0] = float("nan")
    metrics = ["redundancy", "linear_cka"]
    budget = smallest(plan_of(net, batches(x, y, 16), metrics), 2)
    with pytest.warns(UserWarning, match="1 of 64 rows"):
        one = nl.analyze(net, batches(x, y, 16), metrics)
    with pytest.warns(UserWarning, match="1 of 64 rows"):
        two = nl.analyze(net, batches(x, y, 16), metrics, budget=budget, max_passes=2)
    assert one.metadata["left_out"]
    assert one.metadata["left_out"] == two.metadata["left_out"]


def test_what_fits_is_one_pass(net, data):
    plan = plan_of(net, data, METRICS_ASKED)
    assert divided(plan, None) == [plan]
    assert divided(plan, plan.total_bytes, 5) == [plan]


def test_passes_are_few_and_even(net, data):
    plan = plan_of(net, data, METRICS_ASKED)
    parts = divided(plan, smallest(plan, 6), 6)
    assert [la.name for part in parts for la in part.measured] == [la.name for la in plan.layers]
    for passes in (2, 3, 4):
        budget = smallest(plan, passes)
        assert len(divided(plan, budget, 6)) <= passes  # no more than it takes, whatever is allowed
    assert max(part.total_bytes for part in divided(plan, plan.total_bytes - 1, 2)) < 0.9 * plan.total_bytes


def test_a_successor_is_there_in_the_pass_of_its_edge(net, data):
    plan = plan_of(net, data, ["linear_cka"])
    parts = divided(plan, smallest(plan, 3), 3)
    first, second = parts[0], parts[1]
    border = second.measured[0]
    assert first.needs(border), "the sums of the next layer are formed in both passes"
    assert second.needs(border)
    assert sum(part.total_bytes for part in parts) >= plan.total_bytes


def test_a_budget_that_more_passes_meet_says_how_many(net, data):
    plan = plan_of(net, data, METRICS_ASKED)
    budget = smallest(plan, 3)
    with pytest.raises(MemoryError, match=r"the plan takes .* or a larger budget; or max_passes=3 \(it is 1\): the largest") as e:
        nl.analyze(net, data, METRICS_ASKED, budget=budget)
    assert "the largest are buffered rows with " in str(e.value)


def test_a_layer_that_is_too_large_alone_is_named(net, data):
    with pytest.raises(MemoryError, match=r"more passes do not help: layer (dilated|grouped) alone takes"):
        nl.analyze(net, data, METRICS_ASKED, budget=1000, max_passes=9)


def test_data_that_can_be_read_once_are_refused(net, data):
    budget = smallest(plan_of(net, data, ["redundancy"]), 2)
    with pytest.raises(ValueError, match=r"the data are read 2 times, .* and are an iterator"):
        nl.analyze(net, iter(data), ["redundancy"], budget=budget, max_passes=2)


def test_data_that_change_between_passes_are_refused(net, data):
    class Fading:
        reads = 0

        def __iter__(self):
            self.reads += 1
            return iter(data if self.reads == 1 else data[:2])

    budget = smallest(plan_of(net, data, ["redundancy"]), 2)
    with pytest.raises(ValueError, match=r"pass 2 saw 32 samples, .* pass 1 64"):
        nl.analyze(net, Fading(), ["redundancy"], budget=budget, max_passes=2)


def test_passes_below_one_are_refused(net, data):
    with pytest.raises(ValueError, match=r"max_passes is 0"):
        nl.analyze(net, data, ["redundancy"], max_passes=0)


def share(rank, folder, budget):
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        net, every = build(Mixed).double(), batches(*images(n=64, dtype=torch.float64), 16)
        try:
            nl.analyze(net, iter(every[:2]) if rank else every[2:], ["redundancy"], budget=budget, max_passes=2)
        except ValueError as error:
            assert "are an iterator" in str(error)  # noqa: PT017  in both processes, of which one has an iterator
        else:
            raise AssertionError("nothing was refused")
        found = nl.analyze(net, every[rank::2], ["redundancy", "linear_cka"], budget=budget, max_passes=3)
        if rank == 0:
            found.save(folder)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_processes_divide_alike(net, data, tmp_path):
    budget = smallest(plan_of(net, data, ["redundancy", "linear_cka"]), 3)
    budget = min(budget, 0.99 * plan_of(net, data, ["redundancy"]).total_bytes)
    mp.spawn(share, args=(str(tmp_path), budget), nprocs=2)
    one, two = nl.analyze(net, data, ["redundancy", "linear_cka"]), nl.load(tmp_path)
    assert len(two.metadata["passes"]) > 1
    pd.testing.assert_frame_equal(one.units, two.units, rtol=1e-9)
    pd.testing.assert_frame_equal(one.edges, two.edges, rtol=1e-9)


# bytes

CNN = ["stem", "grouped", "dilated", "point", "head"]  # a transposed convolution reads no patches
LLAMA = ["model.layers.*.mlp.*_proj", "model.layers.*.self_attn.o_proj"]
OF_CLASSES = {ByClass, ClassSizes, ClassGram, ClassCross, PatchesByClass}
EVERY = {
    *OF_CLASSES,
    Cosines,
    Cross,
    Directions,
    Gram,
    Higher,
    MeanSizes,
    NormedGram,
    NormedPair,
    Pair,
    Patches,
    Quantiles,
    Sample,
    Sizes,
    WeightSums,
    Zeros,
}


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 40, (48, 12), generator=torch.Generator().manual_seed(0))
    return net, [{"input_ids": part, "labels": part} for part in ids.split(8)]


def every_metric():
    """The catalogue, with options that reach further statistics."""
    more = {
        "pc1": get_metric("mi", target="logit_pc1"),
        "permutations": get_metric("mi", permutations=2),
        "sizes": get_metric("activation_rms", spatial="mean_abs"),
        "classes": get_metric("class_mi", method="gaussian"),
        "class pairs": get_metric("class_synergy", method="gaussian"),
        "pair": get_metric("linear_cka", view="samples"),
        "backward_hess": get_metric("backward_hess", probes=2),  # exact, it takes minutes
        "forward_jac": get_metric("forward_jac", probes=2),
        "backward_jac": get_metric("backward_jac", probes=2),
    }
    return {metric.names[0]: metric() for metric in METRICS if not of_groups_only(metric())} | more


def fits(net, found, name, metric, dry_run):
    try:
        Plan.of(net, found, {name: metric}, dry_run, 3)
    except ValueError:  # it does not fit the model: no classes, no norm
        return False
    return True


@pytest.mark.parametrize("kind", ["cnn", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_plan_takes_the_bytes_it_says(kind):
    net, data = (build(Mixed), batches(*images(n=192), 64)) if kind == "cnn" else llama()
    layers = CNN if kind == "cnn" else LLAMA
    found, groups = find_layers(net, layers), 3
    dry_run = DryRun.of(net, found, Batch.of(data[0], groups))
    metrics = {name: metric for name, metric in every_metric().items() if fits(net, found, name, metric, dry_run)}
    plan = Plan.of(net, found, metrics, dry_run, groups)
    sums = run_pass(net, plan, data, Objective.of(net)).sums()
    for (name, need), held in sums.items():
        said = plan.nbytes(next(la for la in plan.layers if la.name == name), need)
        if need.statistic is Sample:  # room for more rows than there were: what each row takes is as said
            rows = sum(len(part.hashes) for part in held.parts)
            said = (said - 8 * plan.groups) // (plan.groups * ROWS) * rows + 8 * plan.groups
        if need.statistic is Quantiles:  # counts of few rows take fewer bytes and bins than the plan has for them
            assert held.nbytes < said
            held.parts = [part.widest() for part in held.parts]
        assert held.nbytes == said, f"{need} at {name}: {held.nbytes} bytes, the plan says {said}"
    assert {need.statistic for _, need in sums} >= (EVERY if kind == "cnn" else EVERY - OF_CLASSES)
