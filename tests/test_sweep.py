import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from command import command, snapshot
from pandas.testing import assert_frame_equal
from torch import nn

import nodelens as nl
from nodelens.frame import Frame
from nodelens.layers import find_layers
from nodelens.pruning import Cell, RemovalPlan, cells, gates, masked, random_scores, remove, run_sweep, scores

ROOT = Path(__file__).parents[1]
TWELVE = ("criterion=[rq,random]", "amounts=[0.25,0.5,0.75]", "seeds=[0,1]", "dataset.calibration=64", "logger=none")


def units(**columns):
    n = len(next(iter(columns.values()))) // 2
    index = pd.MultiIndex.from_tuples([(layer, u) for layer in ("a", "b") for u in range(n)], names=["layer", "unit"])
    return pd.DataFrame(columns, index=index)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "whole"
    assert command("prune", *TWELVE, f"hydra.run.dir={folder}").code == 0
    return folder


def test_a_killed_sweep_goes_on_and_ends_with_the_same_table(undisturbed, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = (
        "import time, nodelens.evaluate as e; once = e.evaluate\n"
        "def slow(*a): time.sleep(.3); return once(*a)\n"
        "e.evaluate = slow\nimport nodelens.cli; nodelens.cli.prune()"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", code, *TWELVE, f"hydra.run.dir={tmp_path}/run"],
        env=env,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 90
    while len(list(tmp_path.glob("run/cells/*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    done = snapshot(tmp_path / "run/cells")
    assert 4 <= len([name for name in done if name.endswith(".json") and not name.startswith(".")]) < 12
    measured = (tmp_path / "run/units.parquet").stat().st_mtime_ns
    ended = command("prune", *TWELVE, f"hydra.run.dir={tmp_path}/run")
    assert ended.code == 0, ended.err
    after = snapshot(tmp_path / "run/cells")
    assert {k: after[k] for k in done if not k.startswith(".")} == {k: v for k, v in done.items() if not k.startswith(".")}
    assert (tmp_path / "run/units.parquet").stat().st_mtime_ns == measured
    assert_frame_equal(pd.read_parquet(tmp_path / "run/sweep.parquet"), pd.read_parquet(undisturbed / "sweep.parquet"))


def test_a_finished_sweep_is_shown_again_and_stays_as_it_is(undisturbed):
    before = {k: v for k, v in snapshot(undisturbed).items() if not k.startswith((".hydra", "prune.log"))}
    ended = command("prune", *TWELVE, f"hydra.run.dir={undisturbed}")
    assert ended.code == 0, ended.err
    assert "already finished" in ended.out
    assert {k: v for k, v in snapshot(undisturbed).items() if not k.startswith((".hydra", "prune.log"))} == before


def test_a_sweep_has_a_row_a_cell_and_the_page_its_curve(undisturbed):
    table = pd.read_parquet(undisturbed / "sweep.parquet")
    assert len(table) == 12
    assert table.groupby("criterion").size().to_dict() == {"rq": 6, "random": 6}
    rq = table[table["criterion"] == "rq"]
    assert rq.groupby("amount")["plan"].nunique().eq(1).all(), "a criterion without chance does not vary with the seed"
    assert (undisturbed / "figures/curves.png").is_file()
    assert "no checkpoint was given" in (undisturbed / "report.html").read_text()
    assert [c for c in nl.load(undisturbed).units if not c.endswith("_se")] == ["rq"], "measured once, for the criteria alone"


def test_the_other_end_of_the_scale(quiet_home):
    ended = command(
        "prune", "criterion=composite", "amounts=[0,0.99]", "hydra.run.dir=run", "dataset.calibration=64", "+model.net.hidden=[8,1]"
    )
    assert ended.code == 0, ended.err
    table = pd.read_parquet("run/sweep.parquet").set_index("amount")
    assert table.loc[0.0, "accuracy"] == table.loc[0.0, "dense_accuracy"]
    assert table.loc[0.0, "removed"] == 0
    assert table.loc[0.99, "removed"] == 7, "a unit stays in every layer"
    assert json.loads(Path("run/cells/composite-0.99-0.json").read_text())["removed_units"].keys() == {"fc1"}


def test_cells_that_remove_the_same_units_are_evaluated_once(tmp_path):
    calls = []

    def evaluate(plan):
        calls.append(plan.key)
        return {"accuracy": 0.5, "loss": 1.0, "ece": 0.1}

    todo = cells({"m": {"m": 1.0}, "random": "random"}, [0.5], [0, 1, 2])
    rows = run_sweep(tmp_path, units(m=[1.0, 2, 3, 4] * 2), {"m": {"m": 1.0}, "random": "random"}, todo, evaluate)
    assert len(rows) == 6
    assert len(calls) == len(set(calls)) == len({r["plan"] for r in rows})
    assert Cell("m", 0.5, 0).name == "m-0.5-0"


def test_ties_are_broken_by_the_seed_and_the_same_way_twice():
    tied = units(m=[1.0] * 20)["m"]
    first, again, other = (remove(tied, 0.5, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.removed != other.removed
    assert first.removed["a"] != first.removed["b"]
    assert first.removed["a"] != list(range(5)), "ties do not fall to the first units"


def test_the_lowest_go_a_unit_without_a_score_stays_and_high_is_the_other_way():
    scored = units(m=[3.0, float("nan"), 1, 2, 1, 2, 3, 4])["m"]
    assert remove(scored, 0.5).removed == {"a": [2, 3], "b": [0, 1]}
    assert remove(scored, 0.5, mode="high").removed == {"a": [0, 3], "b": [2, 3]}
    assert remove(scored, 0.75).removed["a"] == [0, 2, 3]
    assert remove(scored, 0.99).count == 6
    assert remove(scored, 0.0) == RemovalPlan({})


@pytest.mark.parametrize(
    ("amount", "mode", "said"), [(1.0, "low", "amount is 1.0"), (-0.1, "low", "amount is -0.1"), (0.5, "lo", "mode is 'lo'")]
)
def test_what_cannot_be_removed_is_refused(amount, mode, said):
    with pytest.raises(ValueError, match=said):
        remove(units(m=[1.0, 2])["m"], amount, mode=mode)


def test_a_composite_adds_ranks_with_their_signs():
    table = units(big=[1000.0, 3000, 2000, 5, 6, 7], small=[0.3, 0.1, 0.2, 0.1, 0.1, 0.1])
    assert scores(table, {"big": 1.0, "small": -0.5}).tolist() == [-0.5, 1.0, 0.25, -0.25, 0.25, 0.75]
    assert scores(table, {"big": -2.0}).tolist() == [-2000, -6000, -4000, -10, -12, -14]
    with pytest.raises(ValueError, match="the criterion reads huge; the table has big, small"):
        scores(table, {"huge": 1.0})
    assert random_scores(table, 0).equals(random_scores(table, 0))
    assert not random_scores(table, 0).equals(random_scores(table, 1))


@pytest.mark.parametrize("norm", [True, False])
def test_what_is_removed_is_zero_where_it_is_read(norm):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), *([nn.BatchNorm2d(4)] if norm else []), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten())
    for p in net.parameters():
        nn.init.constant_(p, 0.7)  # a norm's bias of 0.7 would pass the ReLU
    x, net = torch.rand(3, 1, 6, 6), net.eval()
    doors = gates(net, find_layers(net, "*"), Frame.of(x))
    assert doors["0"].name == ("1" if norm else "0")
    seen = []
    net[-2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    before = net(x)
    with masked(doors, RemovalPlan({"0": [1, 3]})):
        net(x)
    assert (seen[1][:, [1, 3]] == 0).all()
    assert (seen[1][:, [0, 2]] > 0).all()
    assert torch.equal(net(x), before), "nothing is left behind"
    with (
        pytest.raises(ValueError, match="the plan removes units of 9; there are gates for 0"),
        masked(doors, RemovalPlan({"9": [0]})),
    ):
        pass
