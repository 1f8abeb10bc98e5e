"""Values of environment variables are used, and written nowhere: only their names are."""

import json

import numpy as np
import pytest
from command import command
from omegaconf import OmegaConf

import nodelens as nl
from nodelens.app.config import load_config, recorded, resolved

TOKEN, PLACE = "hunter2-4f9c", "secret-place-77"
NET = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, token, classes, channels, size):
        assert token == "hunter2-4f9c"
        super().__init__(nn.Flatten(), nn.Linear(channels * size * size, 8), nn.ReLU(), nn.Linear(8, classes))
"""
WORDS = (
    "model.net._target_=secret_net.Net",
    "model.net.token=${oc.env:NL_TOKEN}",
    "model.net.classes=2",
    "model.net.channels=1",
    "model.net.size=3",
    "dataset=npz",
    "dataset.path=${oc.env:NL_PLACE}/a.npz",
    "dataset.channels=1",
    "dataset.size=3",
    "dataset.classes=2",
    "seed=${oc.env:NL_SEED}",
)


@pytest.fixture
def home(quiet_home, monkeypatch):
    monkeypatch.setenv("NL_TOKEN", TOKEN)
    monkeypatch.setenv("NL_PLACE", str(quiet_home / PLACE))
    monkeypatch.setenv("NL_SEED", "3")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.syspath_prepend(quiet_home)
    (quiet_home / "secret_net.py").write_text(NET)
    (quiet_home / PLACE).mkdir()
    x = np.random.default_rng(0).random((64, 3, 3), np.float32)
    np.savez(quiet_home / PLACE / "a.npz", x=x, y=np.arange(64) % 2)
    return quiet_home


def found_in(*folders):
    """Files that hold a secret."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if any(word.encode() in path.read_bytes() for word in (TOKEN, PLACE))]


def test_no_file_of_a_run_holds_a_secret(home):
    ended = command("train", *WORDS, "trainer.max_epochs=1", "logger=[csv,wandb]", "hydra.run.dir=trained")
    assert ended.code == 0, ended.err
    best = next((home / "trained/checkpoints").glob("*.ckpt"))
    best.rename(home / PLACE / "best.ckpt")
    weights = "ckpt_path=${oc.env:NL_PLACE}/best.ckpt"
    for task, words in (
        ("analyze", ["metrics=[rq]", "logger=[csv,wandb]"]),
        ("prune", ["criterion=[l1]", "amounts=[0.5]", "latency.batches=[]", "logger=[csv,wandb]"]),
    ):
        ended = command(task, *WORDS, weights, *words, f"hydra.run.dir={task}")
        assert ended.code == 0, ended.err
        assert command(task, *WORDS, weights, *words, f"hydra.run.dir={task}").code == 0, "the same settings"
    assert found_in(*(home / task for task in ("trained", "analyze", "prune")), *home.glob("wandb*")) == []
    stored = nl.load("analyze").metadata
    assert stored["config"]["model"]["net"]["token"] == "${oc.env:NL_TOKEN}"
    assert stored["config"]["seed"] == 3
    assert stored["weights"]["ckpt_path"] == "${oc.env:NL_PLACE}/best.ckpt"
    assert stored["weights"]["trained_by"]["dataset"]["path"] == "${oc.env:NL_PLACE}/a.npz"
    assert json.loads((home / "prune/pruned/config.json").read_text())["net"]["token"] == "${oc.env:NL_TOKEN}"
    same_cut = command("analyze", *WORDS, weights, "dataset.val=0.3", "metrics=[rq]", "logger=none", "hydra.run.dir=other")
    assert "the weights were trained on this data set with dataset.val=" in same_cut.err


def test_references_defaults_and_nested_values_stay_names(monkeypatch):
    monkeypatch.setenv("NL_TOKEN", TOKEN)
    monkeypatch.setenv("NL_SEED", "5")
    more = ["+model.a=${oc.env:NL_TOKEN}", "+model.b=x/${model.a}", "+model.c='${oc.decode:${oc.env:NL_TOKEN}}'"]
    more += ["+model.d=${oc.env:NL_ABSENT,7}", "+model.e=[${oc.env:NL_TOKEN}]", "+model.f=${oc.env:NL_ABSENT,null}"]
    cfg = load_config("analyze", [*more, "seed=${oc.env:NL_SEED}", "budget.width=${oc.env:NL_SEED}"])
    model = recorded(cfg)["model"]
    assert {key: model[key] for key in "abcdef"} == {
        "a": "${oc.env:NL_TOKEN}",
        "b": "x/${oc.env:NL_TOKEN}",
        "c": "${oc.env:NL_TOKEN}",
        "d": "${oc.env:NL_ABSENT,7}",
        "e": ["${oc.env:NL_TOKEN}"],
        "f": "${oc.env:NL_ABSENT,null}",
    }
    assert (recorded(cfg)["seed"], recorded(cfg)["budget"]["width"]) == (5, 5)
    assert resolved(cfg)["model"]["b"] == f"x/{TOKEN}", "the values themselves are used"
    assert OmegaConf.to_container(cfg, resolve=True)["model"]["a"] == TOKEN
