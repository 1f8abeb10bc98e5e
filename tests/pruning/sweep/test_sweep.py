import json
import multiprocessing
import time

import pandas as pd
import pytest
import torch
from command import command, snapshot
from pandas.testing import assert_frame_equal
from torch import nn

import nodelens as nl
from nodelens.app.tasks.prune import SweepEvaluator
from nodelens.network.batch import Batch
from nodelens.pruning.context import PruningContext
from nodelens.pruning.criteria.criterion import Criterion
from nodelens.pruning.removal_plan import RemovalPlan
from nodelens.pruning.sweep.ranking import areas
from nodelens.pruning.sweep.sweep import Sweep, cells

TWELVE = ("criterion=[rq,random]", "amounts=[0.25,0.5,0.75]", "seeds=[0,1]", "dataset.calibration=64", "logger=none")


def timeless(folder):
    """The table without durations."""
    table = pd.read_parquet(folder / "sweep.parquet")
    return table[[c for c in table if "latency" not in c and not c.endswith("_s") and c != "seconds"]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "whole"
    assert command("prune", *TWELVE, f"hydra.run.dir={folder}").code == 0
    return folder


def _prune_slowly(folder):
    torch.set_num_threads(1)  # threads do not survive a fork
    evaluate = SweepEvaluator.__call__
    SweepEvaluator.__call__ = lambda *args: time.sleep(0.3) or evaluate(*args)
    command("prune", *TWELVE, f"hydra.run.dir={folder}")


def test_a_killed_sweep_goes_on_and_ends_with_the_same_table(undisturbed, tmp_path):
    started = multiprocessing.get_context("fork").Process(target=_prune_slowly, args=(tmp_path / "run",))
    started.start()  # a fork: a new interpreter would import for seconds
    deadline = time.monotonic() + 90
    while len(list(tmp_path.glob("run/cells/*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    started.kill()
    started.join()
    done = snapshot(tmp_path / "run/cells")
    assert 4 <= len([name for name in done if name.endswith(".json") and not name.startswith(".")]) < 12
    measured = (tmp_path / "run/units.parquet").stat().st_mtime_ns
    ended = command("prune", *TWELVE, f"hydra.run.dir={tmp_path}/run")
    assert ended.code == 0, ended.err
    after = snapshot(tmp_path / "run/cells")
    assert {k: after[k] for k in done if k.endswith(".json")} == {k: v for k, v in done.items() if k.endswith(".json")}
    assert (tmp_path / "run/units.parquet").stat().st_mtime_ns == measured
    assert_frame_equal(timeless(tmp_path / "run"), timeless(undisturbed))


def test_a_finished_sweep_is_shown_again_and_stays_as_it_is(undisturbed):
    def kept():
        """All but the page, which is drawn again, and the log."""
        drawn = (".hydra", "prune.log", "report", "SHA256SUMS")
        return {name: value for name, value in snapshot(undisturbed).items() if not name.startswith(drawn)}

    before, page = kept(), (undisturbed / "report.html").read_text()
    ended = command("prune", *TWELVE, f"hydra.run.dir={undisturbed}")
    assert ended.code == 0, ended.err
    assert "already finished" in ended.out
    assert kept() == before
    assert (undisturbed / "report.html").read_text() == page


def test_a_sweep_has_one_row_per_cell_and_the_page_its_curve(undisturbed):
    table = pd.read_parquet(undisturbed / "sweep.parquet")
    assert len(table) == 12
    assert table.groupby("criterion").size().to_dict() == {"rq": 6, "random": 6}
    rq = table[table["criterion"] == "rq"]
    assert rq.groupby("amount")["plan"].nunique().eq(1).all(), "a criterion without chance does not vary with the seed"
    page = (undisturbed / "report.html").read_text()
    assert "no checkpoint was given" in page
    for name in ("curves", "pareto", "ranking"):
        assert f"data-name='{name}'" in page
    assert list(nl.load(undisturbed).units) == ["rq"], "measured once, for the criteria alone"
    assert (table["macs"] < table["dense_macs"]).all()
    assert (table["latency_batch1_ms"] > 0).all()
    assert (table[["val_accuracy", "val_pruned_accuracy", "val_dense_accuracy", "accuracy_se"]].notna()).all(axis=None)
    assert set(json.loads((undisturbed / "splits.json").read_text())) >= {"test", "val", "calibration", "fingerprint"}


def test_the_pruned_folder_holds_the_best_cell_on_validation_data(undisturbed):
    table = pd.read_parquet(undisturbed / "sweep.parquet")
    largest = table[table["amount"] == 0.75]
    best = largest.loc[largest["val_accuracy"].idxmax()]
    plan = RemovalPlan.load(undisturbed / "pruned/plan.json")
    assert plan.key == best["plan"]
    net = nl.load_pruned(undisturbed / "pruned")
    assert sum(p.numel() for p in net.parameters()) == best["params"]
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_every_choice_in_one_command(quiet_home):
    ended = command(
        "prune",
        "model=cnn",
        "criterion=[l2,random]",
        "allocation=[uniform,global]",
        "compensate=[bias,batch_norm]",
        "mode=[low,high]",
        "amounts=[0.5]",
        "budget.amount=macs",
        "schedule=iterative",
        "schedule.steps=2",
        "finetune=default",
        "finetune.epochs=1",
        "latency.batches=[]",
        "dataset.calibration=64",
        "dataset.batch_size=400",
        "hydra.run.dir=run",
        "save=l2-global-bias-low-0.5-0",
    )
    assert ended.code == 0, ended.err
    table = pd.read_parquet("run/sweep.parquet")
    assert len(table) == 2 * 2 * 2 * 2
    assert table["status"].eq("done").all()
    assert ((1 - table["macs_share"]) - 0.5).abs().max() < 0.05
    assert table["schedule"].eq("iterative:2").all()
    assert (table["val_accuracy"] >= table["val_pruned_accuracy"]).all(), "the best epoch, or the one before the first"
    assert RemovalPlan.load("run/pruned/plan.json").key == table.set_index("name").loc["l2-global-bias-low-0.5-0", "plan"]


def test_an_infeasible_cell_is_a_row_with_its_reason(quiet_home):
    ended = command(
        "prune",
        "criterion=[magnitude]",
        "compensate=[none,batch_norm]",
        "amounts=[0,0.99]",
        "hydra.run.dir=run",
        "dataset.calibration=64",
        "+model.net.hidden=[8,1]",
    )
    assert ended.code == 0, ended.err
    table = pd.read_parquet("run/sweep.parquet").set_index(["compensate", "amount"]).sort_index()
    assert table.loc[("none", 0.0), "accuracy"] == table["dense_accuracy"].iloc[0]
    assert table.loc[("none", 0.0), "units_removed"] == 0
    assert table.loc[("none", 0.99), "units_removed"] == 7, "a unit stays in every layer"
    assert table.loc["batch_norm", "status"].eq("infeasible").all()
    assert "has no batch norm to re-estimate" in table.loc[("batch_norm", 0.0), "error"]
    assert "cells infeasible" in ended.out


def test_dry_run_prints_every_axis_and_what_is_frozen(quiet_home):
    ended = command("prune", "model=cnn", "dry_run=true", "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    for words in ("params/unit", "MACs/unit", "frozen:", "the model's output", "groups,"):
        assert words in ended.out, words
    assert not (quiet_home / "run/sweep.parquet").exists()


def context():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return PruningContext.of(net, Batch.of(torch.rand(2, 4)))


def test_cells_that_remove_the_same_units_are_run_once(tmp_path):
    calls, it = [], context()
    criteria = [Criterion.of("magnitude"), Criterion.of("random")]
    todo = cells(criterion=criteria, amount=[0.5], seed=[0, 1, 2])
    sweep = Sweep(tmp_path, it, it.table(criteria), lambda pruned: calls.append(pruned.plan.key) or {"accuracy": 0.5})
    rows = sweep.run(todo)
    assert len(rows) == 6
    assert len(calls) == len(set(calls)) == len({r["plan"] for r in rows})
    assert todo[0].name == "magnitude-uniform-none-low-0.5-0"
    again = Sweep(tmp_path, it, it.table(criteria), lambda pruned: pytest.fail("it was there"))
    assert again.run(todo) == [json.loads((tmp_path / f"cells/{c.name}.json").read_text()) for c in todo]
    with pytest.raises(ValueError, match="is of a sweep with other options"):
        again.run(cells(criterion=criteria[:1], amount=[0.5], seed=[0], nan_policy=["keep"]))
    with pytest.raises(ValueError, match="the sweep has no amount"):
        cells(criterion=criteria, amount=[])
    with pytest.raises(ValueError, match=r"the cell magnitude-uniform-none-low-0\.5-0 twice"):
        cells(criterion=criteria[:1] * 2, amount=[0.5])


def test_cells_of_another_model_are_not_taken_for_those_of_this_one(tmp_path):
    first, other = context(), context()
    with torch.no_grad():
        other.model[0].weight.add_(1e-3)
    criteria = [Criterion.of("magnitude")]
    todo = cells(criterion=criteria, amount=[0.25, 0.5])
    Sweep(tmp_path, first, first.table(criteria), lambda pruned: {"accuracy": 0.5}).run(todo[:1])
    before = snapshot(tmp_path)
    sides = (
        f"holds results of a model with fingerprint {first.fingerprint}, this run has {other.fingerprint}: choose another folder"
    )
    with pytest.raises(ValueError, match=sides):
        Sweep(tmp_path, other, other.table(criteria), lambda pruned: pytest.fail("not run")).run(todo)
    assert snapshot(tmp_path) == before
    assert len(Sweep(tmp_path, first, first.table(criteria), lambda pruned: {"accuracy": 0.5}).run(todo)) == 2


def test_areas_compare_over_the_range_that_all_reach():
    rows = [("a", 0.5, 0.8, 0.5), ("a", 1.0, 0.6, 0.9), ("b", 0.5, 0.9, 0.6), ("b", 1.0, 0.5, 1.0)]
    table = pd.DataFrame(rows, columns=["criterion", "amount", "accuracy", "gone"])
    table = table.assign(allocation="uniform", compensate="none", mode="low", macs_share=1 - table["gone"], dense_accuracy=1.0)
    found = areas(table)
    assert found["upto"].eq(0.9).all()
    a = ((1 + 0.8) / 2 * 0.5 + (0.8 + 0.6) / 2 * 0.4) / 0.9
    b = ((1 + 0.9) / 2 * 0.6 + (0.9 + 0.6) / 2 * 0.3) / 0.9
    assert found["area"].tolist() == pytest.approx([b, a])
    assert found.index[0] == ("b", "uniform", "none", "low")


def test_a_criterion_that_cannot_score_a_group_does_not_stop_the_others(quiet_home):
    words = ("model=cnn", "amounts=[0.5]", "dataset.calibration=64", "latency.batches=[]")
    ended = command("prune", *words, "criterion=[l2,hrank,wanda]", "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    table = pd.read_parquet("run/sweep.parquet").set_index("criterion")
    assert table["status"].to_dict() == {"l2": "done", "hrank": "infeasible", "wanda": "done"}
    assert "by no two-dimensional convolution; leave it out with freeze=" in table.loc["hrank", "error"]
    assert list(nl.load("run").units) == ["l2", "wanda"]
    ended = command("prune", *words, "criterion=[hrank]", "hydra.run.dir=alone")
    assert ended.code == 1
    assert "leave it out with freeze=" in ended.err
