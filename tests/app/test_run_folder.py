"""Nothing in a run folder is used again for other settings, another network, other data or other code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import command, snapshot
from torch import nn

import nodelens as nl
from nodelens.app.config import build
from nodelens.results import identity
from nodelens.results.identity import check_identity, code_version

ANALYZE = ("metrics=[rq]", "dataset.calibration=64", "logger=none")
PRUNE = ("criterion=[magnitude]", "amounts=[0.25,0.5]", "dataset.calibration=64", "latency.batches=[]", "logger=none")
TRAIN = ("trainer.max_epochs=1", "logger=none")
WORDS = {"analyze": ANALYZE, "prune": PRUNE, "train": TRAIN}
OTHER = {
    "analyze": (
        "metrics=[activation_mean]",
        "metrics=[rq], this one has metrics=[activation_mean]",
    ),
    "prune": ("criterion=[l2]", "criterion.l2.l2=null, this one has criterion.l2.l2=1.0"),
    "train": ("model.optimizer.lr=0.5", "this one has model.optimizer.lr=0.5"),
}


def kept(folder):
    """Files and their bytes, without the log of the command itself."""
    return {name: file for name, file in snapshot(folder).items() if not name.startswith(".hydra") and not name.endswith(".log")}


def refused(task, *words, said):
    """The run folder stays as it is, and one line says why."""
    before = kept(Path("run"))
    ended = command(task, *words, "hydra.run.dir=run")
    assert ended.code == 1
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    for part in said:
        assert part in ended.err
    assert "choose another folder" in ended.err
    assert kept(Path("run")) == before


def told_by(first):
    """The tasks; those beside the first, which compare by the same code, are slow."""
    return [first, *(pytest.param(task, marks=pytest.mark.slow) for task in WORDS if task != first)]


# process 1 lives; what a process that has ended left half written is removed
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("slurm-123.out", ".units.parquet.1.part")]


@pytest.mark.parametrize("foreign", ["notes.txt", "figures/old.png", *MORE])
def test_a_foreign_file_does_not_switch_the_comparison_of_settings_off(foreign, quiet_home):
    file = quiet_home / "run" / foreign
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    assert command("analyze", *ANALYZE, "hydra.run.dir=run").code == 0
    assert (quiet_home / "run/settings.json").is_file()
    refused("analyze", *ANALYZE, OTHER["analyze"][0], said=[OTHER["analyze"][1]])
    assert command("analyze", *ANALYZE, "hydra.run.dir=run").code == 0, "the same settings"
    assert file.read_text() == "mine"


@pytest.mark.parametrize("task", WORDS)
def test_each_task_compares_its_settings_and_the_other_tasks(task, quiet_home):
    (quiet_home / "run").mkdir()
    (quiet_home / "run/notes.txt").write_text("mine")
    ended = command(task, *WORDS[task], "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    change, said = OTHER[task]
    refused(task, *WORDS[task], change, said=[said])
    other = next(name for name in WORDS if name != task)
    refused(other, *WORDS[other], said=["holds a run with"])
    (quiet_home / "run/settings.json").unlink()
    refused(task, *WORDS[task], said=["run holds results without settings.json"])


def test_settings_are_there_before_anything_else_and_go_with_a_run_that_fails(quiet_home, monkeypatch):
    (quiet_home / "run").mkdir()
    (quiet_home / "run/notes.txt").write_text("mine")
    assert command("analyze", *ANALYZE, "layers=conv*", "hydra.run.dir=run").code == 1
    assert command("analyze", *ANALYZE, "layers=fc*", "hydra.run.dir=run").code == 0, "the corrected run"

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nodelens.data.images.ImageData.setup", stop)
    assert command("analyze", *ANALYZE, "hydra.run.dir=killed").code == 1
    assert (quiet_home / "killed/settings.json").is_file()
    monkeypatch.undo()
    monkeypatch.chdir(quiet_home)
    ended = command("analyze", *ANALYZE, "seed=1", "hydra.run.dir=killed")
    assert "killed holds a run with seed=0, this one has seed=1" in ended.err


def test_a_dry_run_before_a_run_is_of_the_same_settings(quiet_home):
    assert command("analyze", *ANALYZE, "dry_run=true", "hydra.run.dir=run").code == 0
    assert command("analyze", *ANALYZE, "hydra.run.dir=run").code == 0


def weights(path, seed):
    net = build(nl.load_config("analyze").model, "model").net
    generator = torch.Generator().manual_seed(seed)
    torch.save({k: torch.randn(v.shape, generator=generator) for k, v in net.state_dict().items()}, path)


@pytest.mark.parametrize("task", ["analyze", pytest.param("prune", marks=pytest.mark.slow)])  # of prune, the next test
def test_a_checkpoint_that_was_replaced_is_another_network(task, quiet_home):
    weights("net.pt", 0)
    words = (*WORDS[task], "ckpt_path=net.pt")
    assert command(task, *words, "hydra.run.dir=run").code == 0
    first = json.loads((quiet_home / "run/metadata.json").read_text())["model"]["fingerprint"]
    weights("net.pt", 1)
    refused(task, *words, said=[f"run holds results of a model with fingerprint {first}, this run has ", "former weights back"])
    weights("net.pt", 0)
    ended = command(task, *words, "hydra.run.dir=run")
    assert "already finished" in ended.out


def test_a_sweep_does_not_mix_cells_of_two_networks(quiet_home, monkeypatch):
    weights("net.pt", 0)
    words = (*PRUNE, "amounts=[0.1,0.2,0.3,0.4]", "ckpt_path=net.pt")
    from nodelens.app.tasks.prune import SweepEvaluator

    calls, evaluate = [], SweepEvaluator.__call__

    def stop_after_three(self, pruned):
        calls.append(pruned)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return evaluate(self, pruned)

    monkeypatch.setattr(SweepEvaluator, "__call__", stop_after_three)
    assert command("prune", *words, "hydra.run.dir=run").code == 1
    assert len(list((quiet_home / "run/cells").glob("*.json"))) == 3
    monkeypatch.setattr(SweepEvaluator, "__call__", evaluate)
    weights("net.pt", 1)
    refused("prune", *words, said=["run holds results of a model with fingerprint"])
    weights("net.pt", 0)
    assert command("prune", *words, "hydra.run.dir=run").code == 0


@pytest.mark.parametrize("task", told_by("train"))
def test_other_data_at_the_same_path_are_other_data(task, quiet_home):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (300, 8, 8), dtype=np.uint8), np.arange(300) % 3
    words = [w for w in WORDS[task] if "calibration" not in w]
    words += ["dataset=npz", "dataset.path=a.npz", "dataset.calibration=20", "dataset.classes=3", "dataset.channels=1"]
    np.savez("a.npz", x=x, y=y)
    ended = command(task, *words, "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    x[7, 0, 0] ^= 1
    np.savez("a.npz", x=x, y=y)
    refused(task, *words, said=["run holds results of data with fingerprint ", "former data back"])


@pytest.mark.parametrize("task", told_by("prune"))
def test_other_code_is_not_continued(task, quiet_home, monkeypatch):
    assert command(task, *WORDS[task], "hydra.run.dir=run").code == 0
    now = code_version()
    monkeypatch.setattr("nodelens.app.tasks.run_folder.code_version", lambda net: "nodelens 0.0.1")
    refused(task, *WORDS[task], said=[f"run holds results of the code {now}, this run has nodelens 0.0.1: ", "or go back to it"])


def test_initial_weights_that_were_replaced(quiet_home):
    weights("start.pt", 0)
    words = ("metrics=[delta_alignment]", "dataset.calibration=64", "logger=none", "initial_path=start.pt")
    assert command("analyze", *words, "hydra.run.dir=run").code == 0
    weights("start.pt", 1)
    refused("analyze", *words, said=["holds results of initial weights with fingerprint", "put the former ones back"])


def test_results_without_fingerprints_are_not_used_again(quiet_home):
    assert command("analyze", *ANALYZE, "hydra.run.dir=run").code == 0
    (quiet_home / "run/identity.json").unlink()
    refused("analyze", *ANALYZE, said=["run holds results without identity.json, the fingerprints of the model, data and code"])


def test_fingerprints_are_compared_where_there_are_results_only(tmp_path):
    check_identity(tmp_path, {"model": "a", "code": "1"})
    check_identity(tmp_path, {"model": "b", "code": "1"})
    (tmp_path / "cells").mkdir()
    check_identity(tmp_path, {"model": "b"})
    with pytest.raises(ValueError, match="a model with fingerprint b, this run has a: choose another folder, or put the former"):
        check_identity(tmp_path, {"model": "a", "code": "1"})
    assert json.loads((tmp_path / "identity.json").read_text()) == {"model": "b", "code": "1"}


def test_the_code_version_sees_the_files_of_the_package_and_of_the_network(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text("from torch import nn\n\nclass Own(nn.ReLU):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    from own_net import Own

    plain, own = nn.Sequential(nn.ReLU()), nn.Sequential(Own())
    assert code_version() == code_version(plain) != code_version(own)
    before = code_version(own)
    (tmp_path / "own_net.py").write_text("from torch import nn\n\nclass Own(nn.GELU):\n    pass\n")
    assert code_version(own) != before
    assert "nodelens" in before
    monkeypatch.setattr(identity, "__file__", str(tmp_path / "results/identity.py"))
    assert len({before, code_version()}) == 2, "another package"
