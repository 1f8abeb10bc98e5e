import json
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import wandb_run
import yaml
from command import command

import nodelens as nl
from nodelens.app.wandb_logger import wandb_logger
from nodelens.app.wandb_run import origin_of_weights
from nodelens.results.files import remove
from nodelens.results.loggers import close, log_result, log_run

pytest.importorskip("wandb")


SHORT = ("dataset.calibration=64", "seed=3", "hydra.run.dir=run")
RUNS = {
    "train": ("logger=wandb", "callbacks=measure", "metrics=[rq,effective_rank]", "trainer.max_epochs=3"),
    "analyze": ("logger=[wandb,csv]", "metrics=[rq]"),
    "prune": ("logger=wandb", "criterion=[magnitude,random]"),
}


@pytest.fixture(autouse=True)
def quiet_wandb(quiet_home, monkeypatch):
    monkeypatch.delenv("WANDB_DIR")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of each task, each made once."""
    made = {}

    def of(task):
        if task not in made:
            home = tmp_path_factory.mktemp(task)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(home)
                ended = command(task, *RUNS[task], *SHORT)
            assert ended.code == 0, ended.err
            made[task] = home / "run"
        return made[task]

    return of


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


def test_an_offline_run_holds_the_curves_and_the_table(run):
    path, rows = run_of(run("train"))
    curve = {row["epoch"]: row["units/fc1/rq"] for row in rows if "units/fc1/rq" in row and "epoch" in row}
    assert sorted(curve) == [0, 1, 2]
    assert len(set(curve.values())) == 3
    for epoch, value in curve.items():
        units = pd.read_parquet(run("train") / f"epochs/units_{epoch:03d}.parquet")
        assert value == pytest.approx(units["rq"].xs("fc1", level="layer").mean())
    assert [row["epoch"] for row in rows if "val/acc" in row] == [0, 1, 2]
    assert any("layers/fc1/effective_rank" in row for row in rows)
    assert any("test/accuracy" in row for row in rows)
    units = table(path, rows, "units")
    assert units["columns"][:3] == ["layer", "unit", "rq"]
    assert len(units["data"]) == 64 + 64 + 10


def test_an_analysis_logs_its_numbers_and_tables(run):
    path, rows = run_of(run("analyze"))
    (found,) = [row for row in rows if "final/accuracy" in row]
    result = nl.load(run("analyze"))
    assert found["final/accuracy"] == pytest.approx(result.metadata["evaluation"]["accuracy"])
    assert found["units/head/rq"] == pytest.approx(result.units["rq"].xs("head", level="layer").mean())
    assert len(table(path, rows, "layers")["data"]) == 3
    assert "final/accuracy" in (run("analyze") / "csv/version_0/metrics.csv").read_text()


def test_a_sweep_logs_its_curves(run):
    path, rows = run_of(run("prune"))
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


@pytest.mark.parametrize("task", RUNS)
def test_a_run_is_filed_under_its_task_with_its_config(task, run):
    path, _ = run_of(run(task))
    about = wandb_run.about(path)
    assert (about["project"], about["job_type"], about["group"], about["tags"]) == ("nodelens", task, "", [])
    assert about["name"] == "/".join(run(task).parts[-2:])
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
    words = ("metrics=[rq]", "logger=wandb", "dataset.calibration=64")
    ended = command("analyze", "-m", "seed=1,2,3,4", *words, "hydra.sweep.dir=deep/sweeps/lr")
    assert ended.code == 0, ended.err
    runs = [wandb_run.about(run_of(quiet_home / f"deep/sweeps/lr/{job}")[0]) for job in range(4)]
    assert [(run["group"], run["config"]["seed"], run["job_type"]) for run in runs] == [
        ("sweeps/lr", seed, "analyze") for seed in (1, 2, 3, 4)
    ]
    assert [run["name"].split()[0] for run in runs] == ["0", "1", "2", "3"]
    assert all(f"seed={run['config']['seed']}" in run["name"] for run in runs)
    assert len({run["id"] for run in runs}) == 4
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    assert command("analyze", "-m", "seed=1", *words, "hydra.sweep.dir=again").code == 0
    assert wandb_run.about(run_of(quiet_home / "again/0")[0])["group"] == "mine"


def test_nothing_is_passed_that_wandb_warns_of(quiet_home):
    assert "anonymous" not in wandb_logger("run", "train")._wandb_init


def test_wandb_can_be_switched_off(quiet_home, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    ended = command("analyze", "metrics=[rq]", "logger=wandb", "hydra.run.dir=run", "dataset.calibration=64")
    assert ended.code == 0, ended.err
    assert not list(quiet_home.rglob("run-*.wandb"))


def test_the_three_tasks_log_media_artifacts_and_where_weights_are_from(quiet_home):
    more = ("logger=wandb", "dataset.calibration=64")
    ended = command("train", *more, "callbacks=measure", "metrics=[rq]", "trainer.max_epochs=2", "hydra.run.dir=trained")
    assert ended.code == 0, ended.err
    path, rows = run_of(quiet_home / "trained")
    trained = wandb_run.about(path)["id"]
    assert {row["epoch"] for row in rows if "histograms/fc1/rq._type" in str(row) or "histograms/fc1/rq" in row} == {0, 1}
    assert wandb_run.steps(path)["units/*"] == "epoch"
    made = wandb_run.artifacts(path)
    assert made[f"checkpoint-{trained}"] == {"type": "model", "aliases": ["best", "latest"], "files": ["best.ckpt"]}
    assert "units_001.parquet" in made[f"results-{trained}"]["files"]
    assert wandb_run.later(path, "summary")["test/accuracy"] > 0.5

    weights = "ckpt_path=trained"
    ended = command("analyze", *more, weights, "metrics=[rq]", "hydra.run.dir=analyzed")
    assert ended.code == 0, ended.err
    path, rows = run_of(quiet_home / "analyzed")
    origin = f"nodelens/checkpoint-{trained}:best"
    assert wandb_run.later(path, "config")["checkpoint_artifact"] == origin
    assert any("figures/units" in key for row in rows for key in row)
    (made,) = wandb_run.artifacts(path).values()
    assert (made["type"], made["aliases"]) == ("dataset", ["latest"])
    assert {"units.parquet", "metadata.json"} <= {*made["files"]}
    summary = wandb_run.later(path, "summary")
    assert summary["final/accuracy"] == nl.load("analyzed").metadata["evaluation"]["accuracy"]
    assert summary["units"] == 64 + 64 + 10

    ended = command("prune", *more, weights, "criterion=[l1]", "amounts=[0.5]", "latency.batches=[]", "hydra.run.dir=cut")
    assert ended.code == 0, ended.err
    path, rows = run_of(quiet_home / "cut")
    made = wandb_run.artifacts(path)
    (pruned,) = [name for name in made if name.startswith("pruned-")]
    assert wandb_run.steps(path)["prune/*"] == "prune/amount"
    assert made[pruned]["aliases"] == ["latest", "pruned"]
    assert {"model.safetensors", "plan.json", "README.md"} <= {*made[pruned]["files"]}
    assert wandb_run.later(path, "config")["checkpoint_artifact"] == origin
    assert wandb_run.later(path, "summary")["final/best_criterion"] == "l1"
    assert any("figures/curves" in key for row in rows for key in row)
    assert len(table(path, rows, "units")["data"]) == 128
    assert origin_of_weights(quiet_home / "cut/pruned/model.safetensors") == f"nodelens/{pruned}:pruned"


def test_a_resumed_run_is_one_run(quiet_home):
    words = ("logger=wandb", "dataset.calibration=64", "trainer.max_epochs=1", "hydra.run.dir=run")
    assert command("train", *words).code == 0
    remove(quiet_home / "run/result.json")  # as if the run had been killed before its score was written
    ended = command("train", *words)
    assert ended.code == 0, ended.err
    assert "resume" not in ended.err
    paths = sorted((quiet_home / "run").rglob("run-*.wandb"))
    assert len(paths) == 2
    assert len({wandb_run.about(path)["id"] for path in paths}) == 1


def test_artifacts_can_be_left_out_and_downloads_are_recognised(quiet_home):
    words = ("logger=wandb", "logger.wandb.artifacts=false", "metrics=[rq]", "hydra.run.dir=run", "dataset.calibration=64")
    assert command("analyze", *words).code == 0
    assert wandb_run.artifacts(run_of(quiet_home / "run")[0]) == {}
    assert origin_of_weights(quiet_home / "artifacts/checkpoint-abc:v3/best.ckpt") == "checkpoint-abc:v3"
    assert origin_of_weights(quiet_home / "elsewhere/best.ckpt") is None
    (quiet_home / "wandb.json").write_text('{"id": "../x", "checkpoint": "a/b:best"}')
    assert origin_of_weights(quiet_home / "best.ckpt") is None


def with_checkpoint(home, use_artifact):
    """The config of an online run that is told which checkpoint it reads."""

    class Config(dict):
        def update(self, values, allow_val_change):
            super().update(values)

    logger = wandb_logger(str(home), "analyze", offline=False)
    logger._experiment = SimpleNamespace(config=Config(), use_artifact=use_artifact)
    logger.use_checkpoint(str(home / "artifacts/checkpoint-abc:v3/best.ckpt"))
    return logger._experiment.config


def test_online_the_checkpoint_is_an_input_of_the_run(quiet_home):
    used = []
    assert with_checkpoint(quiet_home, used.append) == {"checkpoint_artifact": "checkpoint-abc:v3"}
    assert used == ["checkpoint-abc:v3"]


def test_an_artifact_that_is_not_online_is_a_warning(quiet_home, capsys):
    import wandb

    def missing(name):
        raise wandb.errors.CommError("artifact\n not found")

    with_checkpoint(quiet_home, missing)
    said = capsys.readouterr().out.replace("\n", " ").split()
    assert " ".join(said) == (
        "warning: W&B does not record checkpoint-abc:v3 as an input: artifact not found; 'wandb sync' uploads an offline run"
    )


def test_only_the_checkpoint_that_was_logged_is_its_artifact(quiet_home):
    run = quiet_home / "run"
    (run / "checkpoints").mkdir(parents=True)
    about = {"id": "abc", "checkpoint": "p/checkpoint-abc:best", "checkpoint_file": "epoch=3.ckpt"}
    (run / "wandb.json").write_text(json.dumps(about))
    assert origin_of_weights(run / "checkpoints/epoch=3.ckpt") == "p/checkpoint-abc:best"
    assert origin_of_weights(run) == "p/checkpoint-abc:best"
    assert origin_of_weights(run / "checkpoints/last.ckpt") is None
    assert origin_of_weights(run / "checkpoints/epoch=2.ckpt") is None
    (run / "wandb.json").write_text(json.dumps({key: about[key] for key in ("id", "checkpoint")}))  # of an earlier version
    assert origin_of_weights(run / "checkpoints/best.ckpt") == "p/checkpoint-abc:best"
    assert origin_of_weights(run / "checkpoints/last.ckpt") is None


def test_figures_are_drawn_only_for_a_logger_that_shows_them(quiet_home, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = wandb_logger(str(quiet_home), "analyze")
    log_run([logger], quiet_home, None, {}, {}, lambda: pytest.fail("drawn for nobody"))
    close([logger])


HOSTILE = ("<script>alert(1)</script>", "=cmd('x')", "é漢", 'a "quoted" [bold]name[/bold]')


def test_hostile_names_are_text_in_tables(quiet_home):
    net = torch.nn.Sequential()
    for name in HOSTILE:
        net.add_module(name, torch.nn.Linear(3, 3))
    found = nl.analyze(net, [torch.randn(8, 3)], ["magnitude"], task="none")
    logger = wandb_logger(str(quiet_home), "analyze")
    log_result([logger], found)
    close([logger])
    path, rows = run_of(quiet_home)
    assert [row[0] for row in table(path, rows, "units")["data"]][::3] == list(HOSTILE)
    assert any(f"units/{HOSTILE[0]}/magnitude" in row for row in rows)
    assert any(key.startswith(f"histograms/{HOSTILE[3]}/magnitude") for row in rows for key in row)


def test_the_sweep_file_of_wandb_agent_makes_commands_that_compose():
    sweep = yaml.safe_load((Path(__file__).parents[2] / "examples/wandb_sweep.yaml").read_text())
    task = sweep["program"].removesuffix(".py")
    words = [word for word in sweep["command"] if "=" in word]
    chosen = [f"{name}={each['values'][0]}" for name, each in sweep["parameters"].items()]
    cfg = nl.load_config(task, [*words, *chosen])
    assert (cfg.logger.wandb.offline, list(cfg.criterion)) == (False, ["taylor"])
    assert sweep["metric"]["name"] == "final/area"
