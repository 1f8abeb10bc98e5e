import sys

import pandas as pd
import pytest
import torch
import yaml
from command import command, snapshot
from ids import label
from torch.testing import assert_close

import nodelens as nl
from nodelens.app.config import build
from nodelens.app.tasks.progress import console
from nodelens.app.tasks.show import show_plan

try:
    import tensorboard  # noqa: F401

    TENSORBOARD = True
except ImportError:
    TENSORBOARD = False
SHORT = ("dataset.calibration=64", "metrics=[rq,taylor]")
NET = """
from torch import nn

class MyNet(nn.Sequential):
    def __init__(self, depth: int = 1):
        super().__init__(nn.Flatten(), *[nn.Linear(64, 64) for _ in range(depth)], nn.Linear(64, 10))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train") / "run"
    ended = command(
        "train",
        f"hydra.run.dir={folder}",
        "metrics=[rq,taylor]",
        "callbacks=[default,early_stopping,measure]",
        "logger=[csv,tensorboard]" if TENSORBOARD else "logger=csv",
        "callbacks.measure.every=5",
        "trainer.max_epochs=12",
    )
    assert ended.code == 0, ended.err
    return folder, ended


def test_a_training_leaves_its_checkpoints_curves_and_epochs(trained):
    folder, ended = trained
    assert "checkpoint: " in ended.out
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "SHA256SUMS"}
    curves = pd.read_csv(folder / "csv/version_0/metrics.csv")
    assert {"val/acc", "train/loss", "units/fc1/rq", "test/accuracy"} <= set(curves.columns)
    assert bool(list(folder.rglob("events*"))) == TENSORBOARD
    assert sorted(p.name for p in (folder / "epochs").glob("units_*")) == [
        "units_000.parquet",
        "units_005.parquet",
        "units_010.parquet",
    ]
    assert (folder / "splits.json").is_file()


def test_what_was_trained_is_analysed(trained, quiet_home):
    best = trained[0] / "checkpoints/best.ckpt"
    ended = command("analyze", f"ckpt_path={trained[0]}", "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    assert f"weights: {best}" in ended.out.replace("\n", "")
    assert {p.name for p in (quiet_home / "run").iterdir()} >= {
        "units.parquet",
        "layers.parquet",
        "metadata.json",
        "report.html",
        "plotly.min.js",
        "settings.json",
        "csv",
        ".hydra",
        "analyze.log",
    }
    result = nl.load("run")
    assert result.metadata["evaluation"]["accuracy"] >= 0.95
    assert result.metadata["evaluation"]["split"] == "test"
    assert list(result.units.index) == [
        (layer, unit) for layer, width in (("fc1", 64), ("fc2", 64), ("head", 10)) for unit in range(width)
    ]
    explained = {(m["layer"], m["column"]): m["count"] for m in result.metadata["missing"]}
    holes = {
        (layer, c): int(n) for c in result.units for layer, n in result.units[c].isna().groupby(level="layer").sum().items() if n
    }
    holes |= {(layer, c): 1 for c in result.layers for layer in result.layers.index[result.layers[c].isna()]}
    assert {k: v for k, v in holes.items() if not k[1].endswith("_se")} == {
        k: v for k, v in explained.items() if not k[1].endswith("_se")
    }
    assert all(m["reason"] for m in result.metadata["missing"])
    assert result.metadata["weights"]["trained_by"]["task"] == "train"
    assert result.metadata["weights"]["file"] == "checkpoints/best.ckpt"

    before = snapshot(quiet_home / "run")
    again = command("analyze", f"ckpt_path={trained[0]}", "hydra.run.dir=run")
    assert again.code == 0
    assert "already finished" in again.out
    after, drawn = snapshot(quiet_home / "run"), ("report.html", "SHA256SUMS")
    kept = [name for name in before if not name.startswith((".hydra", "analyze.log"))]
    assert {name: after[name][1] for name in kept} == {name: before[name][1] for name in kept}
    assert [name for name in kept if after[name] != before[name] and not name.startswith(("report_files", *drawn))] == []


def test_a_finished_training_is_not_repeated(trained):
    before = snapshot(trained[0] / "checkpoints")
    ended = command("train", *yaml.safe_load((trained[0] / ".hydra/overrides.yaml").read_text()), f"hydra.run.dir={trained[0]}")
    assert ended.code == 0
    assert "already finished" in ended.out
    assert snapshot(trained[0] / "checkpoints") == before


def test_an_interrupted_training_goes_on_from_its_last_epoch(quiet_home):
    words = ["trainer.max_epochs=4", "callbacks=measure", "metrics=[rq]", "dataset.calibration=64"]
    whole = nl.load_config("train", [*words, "paths.output_dir=whole"])
    assert nl.run(whole).result.metadata["epochs_measured"] == [0, 1, 2, 3]

    class StopHereError(Exception):
        """In place of a kill."""

    cut = nl.load_config("train", [*words, "paths.output_dir=cut"])
    with pytest.MonkeyPatch.context() as patch:
        from nodelens.training.callbacks import Measure

        write = Measure._write

        def stop(self, trainer, *rest):
            write(self, trainer, *rest)
            if trainer.current_epoch == 2:
                raise StopHereError

        patch.setattr(Measure, "_write", stop)
        with pytest.raises(StopHereError):
            nl.run(cut)
    before = (quiet_home / "cut/epochs/units_000.parquet").stat().st_mtime_ns
    nl.run(cut)
    assert (quiet_home / "cut/epochs/units_000.parquet").stat().st_mtime_ns == before
    assert (quiet_home / "cut/epochs/units_003.parquet").is_file()
    last = torch.load("cut/checkpoints/last.ckpt", weights_only=True)
    assert (last["epoch"], last["global_step"]) == (3, torch.load("whole/checkpoints/last.ckpt", weights_only=True)["global_step"])


def test_weights_alone_are_no_training_to_go_on_with(trained, quiet_home):
    torch.save(torch.load(trained[0] / "checkpoints/best.ckpt", weights_only=True)["state_dict"], "weights.pt")
    ended = command("train", "ckpt_path=weights.pt")
    assert ended.err == "nodelens: weights.pt has weights but no training state to resume: start from them with model.weights=\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", sys.stdout)
        run = nl.run(nl.load_config("analyze", ["model.weights=weights.pt", *SHORT]))
        assert run.score == run.result.metadata["evaluation"]["accuracy"] >= 0.95
        assert sorted(path.name for path in run.folder.glob("*.parquet")) == ["layers.parquet", "units.parquet"]


def test_a_network_of_ones_own_from_a_file_beside_the_run(quiet_home):
    (quiet_home / "my_net.py").write_text(NET)
    ended = command("analyze", "model.net._target_=my_net.MyNet", "model.net.depth=3", "hydra.run.dir=run", *SHORT)
    assert ended.code == 0, ended.err
    assert "the weights of MyNet are random; pass ckpt_path=... to measure a trained model" in ended.out
    assert list(nl.load("run").layers.index) == ["1", "2", "3", "4"]
    wrong = command("analyze", "model.net._target_=my_net.MyNet", "model.net.dept=3")
    assert wrong.err == "nodelens: model.net.dept: my_net.MyNet takes no 'dept'. Did you mean 'depth'? It takes: depth\n"


def test_a_config_of_ones_own_joins_the_group(quiet_home):
    (quiet_home / "mine/metrics").mkdir(parents=True)
    (quiet_home / "mine/metrics/raw.yaml").write_text("raw: {_target_: nodelens.metrics.RayleighQuotient, relative: false}\n")
    ended = command("analyze", "--config-dir", "mine", "metrics=[rq,raw]", "hydra.run.dir=run", "dataset.calibration=64")
    assert ended.code == 0, ended.err
    assert {"rq", "raw"} <= set(nl.load("run").units)
    assert "Did you mean 'raw'?" in command("analyze", "--config-dir", "mine", "metrics=[raws]").err


def test_a_sweep_of_metrics_is_a_job_each(quiet_home):
    ended = command("analyze", "metrics=[rq],[synergy]", "-m", "hydra.sweep.dir=sweep", "dataset.calibration=64")
    assert ended.code == 0, ended.err
    assert [[c for c in nl.load(f"sweep/{k}").units if not c.endswith("_se")] for k in (0, 1)] == [["rq"], ["synergy"]]
    runs = nl.load_runs("sweep/*")
    assert sorted(runs["run"].unique()) == ["sweep/0", "sweep/1"]


def test_a_plan_alone_is_shown_and_nothing_measured(quiet_home):
    ended = command("analyze", "dry_run=true", "hydra.run.dir=run")
    assert ended.code == 0
    assert "sums take" in ended.out
    assert "buffered rows" in ended.out
    assert not (quiet_home / "run/units.parquet").exists()


def test_a_plan_says_what_is_left_out(capsys):
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    nl.analyze(net, [torch.randn(9, 4)], width=7, on_plan=lambda plan: show_plan(console(), plan))
    shown = " ".join(capsys.readouterr().out.split())
    assert "the data have no labels, so there is no loss: synergy, taylor are left out" in shown
    assert "0 is 8 wide, width is 7: redundancy, effective_rank, participation_ratio, which need" in shown


def test_pruning_groups_are_measured_as_prune_scores_them(quiet_home):
    words = ("model=cnn", "layers=groups", "metrics=[taylor,wanda]", "dataset.calibration=64")
    ended = command("analyze", *words, "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    units = nl.load("run").units
    assert units.index.unique("layer").tolist() == [f"blocks.block{k}.conv" for k in (1, 2, 3)]
    assert units[["taylor", "wanda"]].notna().all(axis=None)
    ended = command("analyze", *words, "dry_run=true", "hydra.run.dir=plan")
    assert ended.code == 0, ended.err
    assert "Moments(output*grad, samples)" in ended.out


def test_options_reach_the_numbers(quiet_home):
    raw = nl.load_config("analyze", ["metrics=[rq]", "metrics.rq.relative=false", "paths.output_dir=raw", "logger=none"])
    share = nl.load_config("analyze", ["metrics=rq", "paths.output_dir=share", "logger=none"])
    nl.run(raw)
    nl.run(share)
    ratio = nl.load("raw").units["rq"] / nl.load("share").units["rq"]
    assert_close(
        *(torch.tensor(f(ratio.groupby(level="layer")).to_numpy()) for f in (lambda g: g.min(), lambda g: g.max())),
        rtol=1e-9,
        atol=0,
    )
    assert not list(quiet_home.rglob("metrics.csv"))


def test_the_change_of_the_weights_is_measured_from_the_start_of_training_on(tmp_path):
    ended = command(
        "train",
        f"hydra.run.dir={tmp_path}/t",
        "metrics=[delta_alignment]",
        "callbacks=measure",
        "trainer.max_epochs=2",
        "logger=none",
    )
    assert ended.code == 0, ended.err
    epochs = [pd.read_parquet(tmp_path / f"t/epochs/units_00{k}.parquet") for k in range(2)]
    assert all(e["delta_alignment"].between(0, 1).all() for e in epochs)
    assert (epochs[1]["delta_alignment"] != epochs[0]["delta_alignment"]).all()


def test_a_file_of_the_weights_at_the_start_and_every_pair_of_layers(tmp_path):
    from safetensors.torch import save_file

    net = build(nl.load_config("analyze").model, "model").net
    save_file({k: torch.zeros_like(v) for k, v in net.state_dict().items()}, tmp_path / "zero.safetensors")
    ended = command(
        "analyze",
        f"hydra.run.dir={tmp_path}/a",
        "metrics=[delta_alignment,rq,linear_cka]",
        f"initial_path={tmp_path}/zero.safetensors",
        "pairs=all",
        "bias=true",
        "logger=none",
        *SHORT[:1],
    )
    assert ended.code == 0, ended.err
    found = nl.load(tmp_path / "a")
    assert found.units["delta_alignment"].to_numpy() == pytest.approx(found.units["rq"].to_numpy(), rel=1e-5)
    assert "rq_bias" in found.units
    assert len(found.edges) == 3
    assert "head" in ended.out
    assert (tmp_path / "a/edges.parquet").is_file()
    assert "data-name='pairs'" in (tmp_path / "a/report.html").read_text()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["metrics=[delta_alignment]"], "the initial weights of layer 'fc1' (Linear) are unknown: give initial_path="),
        (["metrics=[linear_cka]", "pairs=[[fc1,fc9]]"], "pairs names fc9; measured are fc1, fc2, head"),
        (["metrics=[linear_cka]", "pairs=some"], "pairs is 'some'; it is consecutive, all, or a list"),
        (["metrics=[bn_scale]"], "reads the scale of a batch norm, but none follows layer 'fc1'"),
        (["metrics=[rq]", "layers='fc1.input'"], "metric 'rq' needs weights, but layer 'fc1.input' (Linear) has none"),
        (["metrics=[mi]", "metrics.mi.permutations=-1"], "permutations is -1"),
    ],
    ids=label,
)
def test_what_a_metric_lacks_is_said_in_a_line(tmp_path, overrides, words):
    ended = command("analyze", f"hydra.run.dir={tmp_path}/x", "logger=none", *SHORT[:1], *overrides)
    assert ended.code != 0
    assert words in ended.err


OWN_LOSS = """
from torch.nn.functional import cross_entropy

def doubled(logits, labels):
    return 2 * cross_entropy(logits, labels, reduction="sum")

def first(output):
    return output
"""


def test_the_task_the_output_and_the_loss_can_be_chosen(quiet_home, monkeypatch):
    (quiet_home / "ownloss.py").write_text(OWN_LOSS)
    monkeypatch.syspath_prepend(quiet_home)
    common = ("dataset.calibration=64", "metrics=taylor")
    assert command("analyze", *common, "hydra.run.dir=plain").code == 0
    own = ("objective.loss=ownloss.doubled", "objective.output=ownloss.first", "objective.task=classification")
    ended = command("analyze", *common, *own, "hydra.run.dir=own")
    assert ended.code == 0, ended.err
    plain, doubled = (nl.load(quiet_home / name) for name in ("plain", "own"))
    assert doubled.units["taylor"].to_numpy() == pytest.approx(4 * plain.units["taylor"].to_numpy(), rel=1e-5)
    assert doubled.metadata["evaluation"]["loss"] == pytest.approx(2 * plain.metadata["evaluation"]["loss"], rel=1e-6)
    about = {"task": "classification", "output": "first", "loss": "doubled", "loss_scale": "sum"}
    assert doubled.metadata["objective"] == about
    ended = command("prune", "criterion=taylor", "amounts=[0.5]", "objective.task=none", "hydra.run.dir=none")
    assert ended.code == 1
    assert "task is none, so there is no loss" in ended.err


@pytest.mark.parametrize("name", ["ownloss.missing", "nowhere.loss", "operator"])
def test_a_loss_that_cannot_be_imported_is_a_line(name, quiet_home):
    (quiet_home / "ownloss.py").write_text(OWN_LOSS)
    ended = command("analyze", "metrics=taylor", f"objective.loss={name}")
    assert ended.code == 1
    assert f"objective.loss={name}" in ended.err
