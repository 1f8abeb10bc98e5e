"""What else is installed on a machine changes nothing: a command srun, a package that is missing."""

import os
import warnings

import pytest
import torch
from command import command
from torch import nn

from nodelens.app.config import build
from nodelens.training.finetune import Finetune

SHORT = ("dataset.calibration=64", "metrics=[rq]", "logger=none")


@pytest.fixture
def login_node(tmp_path, monkeypatch):
    """A machine with srun, and a list of all warnings."""
    srun = tmp_path / "bin/srun"
    srun.parent.mkdir()
    srun.write_text("#!/bin/sh\nexit 1\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{srun.parent}:{os.environ['PATH']}")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield seen


def hints(seen):
    return [str(warning.message) for warning in seen if "srun" in str(warning.message)]


@pytest.mark.slow  # the first runs below give no hint at all
@pytest.mark.parametrize("words", [("train", "trainer.max_epochs=1"), ("analyze",)], ids=["train", "analyze"])
def test_a_command_on_a_login_node_gives_no_hint_about_srun(words, login_node, quiet_home):
    ended = command(*words, *SHORT, "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    assert hints(login_node) == []


def test_neither_does_finetuning(login_node):
    x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    Finetune([(x, y)], [(x, y)], epochs=1)(nn.Linear(4, 2), lambda model: None)
    assert hints(login_node) == []


RUNS = [("train", "trainer.max_epochs=1"), ("analyze",), ("prune", "criterion=magnitude", "amounts=[0.5]")]


@pytest.mark.parametrize("words", RUNS, ids=["train", "analyze", "prune"])
def test_a_first_run_gives_no_hints_of_other_packages(words, login_node, quiet_home):
    ended = command(*words, *(word for word in SHORT if words[0] != "prune" or "metrics" not in word), "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    assert [str(warning.message) for warning in login_node] == []
    log = (quiet_home / f"run/{words[0]}.log").read_text()
    assert "Tip:" not in log
    assert "weights_only" not in log


def test_lightning_gives_the_hint_otherwise(login_node):
    """What the tests above can see."""
    from lightning.pytorch import Trainer

    Trainer(accelerator="cpu", logger=False)
    assert hints(login_node)


def test_a_logger_without_its_package_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "absent_logger.py").write_text("def logger():\n    raise ModuleNotFoundError('install tensorboard')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"logger.mine: install tensorboard"):
        build({"_target_": "absent_logger.logger"}, "logger.mine")
