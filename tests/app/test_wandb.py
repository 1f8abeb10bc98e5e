import json
import time

import pandas as pd
import pytest
import wandb_run
from command import command

import nodelens as nl
from nodelens.app.wandb_logger import wandb_logger

pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def quiet_wandb(quiet_home, monkeypatch):
    monkeypatch.delenv("WANDB_DIR")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")


def run_of(folder):
    (path,) = folder.rglob("run-*.wandb")
    for _ in range(100):  # its writer is another process
        if wandb_run.ended(path):
            break
        time.sleep(0.2)
    return path, wandb_run.history(path)


def table(path, rows, name):
    """A logged table, from the file that stands beside the run."""
    (file,) = [row[f"{name}.path"] for row in rows if f"{name}.path" in row]
    return json.loads((path.parent / "files" / file).read_text())


def test_an_offline_run_holds_the_curves_and_the_table(quiet_home):
    ended = command(
        "train",
        "logger=wandb",
        "callbacks=measure",
        "metrics=[rq,effective_rank]",
        "trainer.max_epochs=3",
        "hydra.run.dir=run",
        "dataset.calibration=64",
    )
    assert ended.code == 0, ended.err
    path, rows = run_of(quiet_home / "run")
    curve = {row["epoch"]: row["units/fc1/rq"] for row in rows if "units/fc1/rq" in row and "epoch" in row}
    assert sorted(curve) == [0, 1, 2]
    assert len(set(curve.values())) == 3
    for epoch, value in curve.items():
        units = pd.read_parquet(f"run/epochs/units_{epoch:03d}.parquet")
        assert value == pytest.approx(units["rq"].xs("fc1", level="layer").mean())
    assert [row["epoch"] for row in rows if "val/acc" in row] == [0, 1, 2]
    assert any("layers/fc1/effective_rank" in row for row in rows)
    assert any("test/accuracy" in row for row in rows)
    units = table(path, rows, "units")
    assert units["columns"][:3] == ["layer", "unit", "rq"]
    assert len(units["data"]) == 64 + 64 + 10


def test_an_analysis_logs_its_numbers_and_tables(quiet_home):
    ended = command("analyze", "logger=[wandb,csv]", "metrics=[rq]", "hydra.run.dir=run", "dataset.calibration=64")
    assert ended.code == 0, ended.err
    path, rows = run_of(quiet_home / "run")
    (found,) = [row for row in rows if "final/accuracy" in row]
    result = nl.load("run")
    assert found["final/accuracy"] == pytest.approx(result.metadata["evaluation"]["accuracy"])
    assert found["units/head/rq"] == pytest.approx(result.units["rq"].xs("head", level="layer").mean())
    assert len(table(path, rows, "layers")["data"]) == 3
    assert "final/accuracy" in (quiet_home / "run/csv/version_0/metrics.csv").read_text()


def test_a_sweep_logs_its_curves(quiet_home):
    ended = command("prune", "logger=wandb", "criterion=[magnitude,random]", "hydra.run.dir=run", "dataset.calibration=64")
    assert ended.code == 0, ended.err
    path, rows = run_of(quiet_home / "run")
    assert [row["prune/amount"] for row in rows if "prune/magnitude/accuracy" in row] == [0.25, 0.5, 0.75]
    assert len(table(path, rows, "sweep")["data"]) == 6


def test_the_tables_of_an_analysis_are_logged(quiet_home):
    words = ("model=tiny_lm", "model.net.width=16", "model.net.layers=2", "model.net.mlp=24", "dataset=text", "dataset.length=32")
    words += ("dataset.max_tokens=2000", "metrics=none", "analysis=geometry", "logger=wandb", "hydra.run.dir=run")
    ended = command("analyze", *words)
    assert ended.code == 0, ended.err
    path, rows = run_of(quiet_home / "run")
    logged = table(path, rows, "geometry/metrics")
    saved = pd.read_csv(quiet_home / "run" / "geometry" / "metrics.csv")
    where = logged["columns"].index("d_pr")
    assert [row[where] for row in logged["data"]] == pytest.approx(list(saved.d_pr))


@pytest.mark.parametrize("task", ["train", "analyze", "prune"])
def test_a_run_is_filed_under_its_task_with_its_config(task, quiet_home):
    own = {"prune": ("criterion=magnitude", "amounts=[0.5]", "latency.batches=[]")}.get(task, ("metrics=[rq]",))
    words = ("logger=wandb", "hydra.run.dir=run", "dataset.calibration=64", "seed=3", *own)
    ended = command(task, *words, *(("trainer.max_epochs=1",) if task == "train" else ()))
    assert ended.code == 0, ended.err
    path, _ = run_of(quiet_home / "run")
    about = wandb_run.about(path)
    assert (about["project"], about["job_type"], about["group"], about["tags"]) == ("nodelens", task, "", [])
    assert about["config"]["seed"] == 3
    assert about["config"]["model"]["net"]["classes"] == 10  # a reference to the data set's


def test_the_environment_says_where_a_run_is_filed(quiet_home, monkeypatch):
    (quiet_home / "elsewhere").mkdir()
    filed = {"PROJECT": "mine", "RUN_GROUP": "sweep 1", "JOB_TYPE": "probe", "NAME": "first", "TAGS": "a,b"}
    for name, value in {**filed, "DIR": str(quiet_home / "elsewhere"), "MODE": "offline"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    words = ("metrics=[rq]", "logger=wandb", "hydra.run.dir=run", "dataset.calibration=64")
    assert command("analyze", *words).code == 0
    about = wandb_run.about(run_of(quiet_home / "elsewhere")[0])
    assert (about["project"], about["group"], about["job_type"], about["name"]) == ("mine", "sweep 1", "probe", "first")
    assert about["tags"] == ["a", "b"]
    chosen = wandb_logger("run", "analyze", project="other", group="g", tags=["c"], offline=False, save_dir="here")._wandb_init
    assert [chosen[key] for key in ("project", "group", "tags", "mode", "dir")] == ["other", "g", ["c"], "online", "here"]


def test_the_runs_of_a_multirun_form_a_group(quiet_home, monkeypatch):
    words = ("-m", "seed=1,2", "metrics=[rq]", "logger=wandb", "dataset.calibration=64", "hydra.sweep.dir=deep/sweeps/lr")
    ended = command("analyze", *words)
    assert ended.code == 0, ended.err
    runs = [wandb_run.about(run_of(quiet_home / f"deep/sweeps/lr/{job}")[0]) for job in (0, 1)]
    assert [(run["group"], run["config"]["seed"]) for run in runs] == [("sweeps/lr", 1), ("sweeps/lr", 2)]
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    words = (*words[:-1], "hydra.sweep.dir=again")
    assert command("analyze", *words).code == 0
    assert wandb_run.about(run_of(quiet_home / "again/0")[0])["group"] == "mine"


def test_nothing_is_passed_that_wandb_warns_of(quiet_home):
    assert "anonymous" not in wandb_logger("run", "train")._wandb_init


def test_wandb_can_be_switched_off(quiet_home, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    ended = command("analyze", "metrics=[rq]", "logger=wandb", "hydra.run.dir=run", "dataset.calibration=64")
    assert ended.code == 0, ended.err
    assert not list(quiet_home.rglob("run-*.wandb"))
