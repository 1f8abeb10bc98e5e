import contextlib
import json
from importlib import import_module

import pandas as pd
import pytest
import torch
from command import command
from torch.testing import assert_close

import nodelens as nl
from nodelens.app.config import build
from nodelens.engine.saved_sums import SavedPass
from nodelens.models import load_weights
from nodelens.training.callbacks import Measure, _Batches

SHORT = ("trainer.max_epochs=1", "dataset.calibration=64", "callbacks=measure", "logger=none")


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_the_probe_is_the_calibration_set_in_eval_mode(quiet_home):
    assert command("train", "model=cnn", *SHORT, "metrics=[rq,taylor]", "hydra.run.dir=run").code == 0
    found = pd.read_parquet("run/epochs/units_000.parquet")
    assert json.loads((quiet_home / "run/epochs/metadata.json").read_text())["samples"] == 64
    words = ("metrics=[rq,taylor]", "dataset.calibration=64", "ckpt_path=run/checkpoints/last.ckpt", "hydra.run.dir=after")
    analysed = command("analyze", "model=cnn", *words)
    assert analysed.code == 0, analysed.err
    after = nl.load("after").units
    assert_close(torch.tensor(after.to_numpy()), torch.tensor(found.to_numpy()), rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_training_batches_are_measured_as_they_pass(accumulate, quiet_home):
    """With a learning rate of zero the weights stand still: streaming has to find what one pass over the training set finds."""
    words = ("model.optimizer.lr=0", "model.optimizer.weight_decay=0", "metrics=[taylor,activation_variance]")
    more = ("callbacks.measure.on=train", f"trainer.accumulate_grad_batches={accumulate}", "hydra.run.dir=run")
    ended = command("train", *words, *SHORT, *more)
    assert ended.code == 0, ended.err
    streamed = pd.read_parquet("run/epochs/units_000.parquet")
    cfg = nl.load_config("analyze", ["metrics=[taylor,activation_variance]", "dataset.calibration=64"])
    net = build(cfg.model, "model").net
    load_weights(net, "run/checkpoints/last.ckpt")
    data = build(cfg.dataset, "dataset")
    data.setup()
    whole = nl.analyze(net, data.loader("train"), build(cfg.metrics, "metrics")).units
    for metric in ("taylor", "activation_variance"):
        assert_close(torch.tensor(streamed[metric].to_numpy()), torch.tensor(whole[metric].to_numpy()), rtol=1e-4, atol=1e-12)


def test_hooks_go_when_training_raises(quiet_home, monkeypatch):
    seen = []

    def broken(self, *_):
        seen.append(self)
        raise ArithmeticError("in the middle")

    monkeypatch.setattr(Measure, "on_train_batch_end", broken)
    cfg = nl.load_config("train", [*SHORT, "callbacks.measure.on=train", "metrics=[taylor]"])
    modules = []
    monkeypatch.setattr(import_module("nodelens.app.tasks.train"), "fits", lambda net, data: modules.append(net))
    with pytest.raises(ArithmeticError, match="in the middle"):
        nl.run(cfg)
    assert seen[0].capture is None
    assert hooks(modules[0]) == 0


def test_every_second_epoch(quiet_home):
    words = ("trainer.max_epochs=3", "callbacks.measure.every=2", "metrics=[rq]")
    ended = command("train", *SHORT, *words, "+trainer.limit_train_batches=2", "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    assert sorted(p.name for p in (quiet_home / "run/epochs").glob("units*")) == ["units_000.parquet", "units_002.parquet"]


@pytest.mark.slow
def test_a_probe_that_is_stopped_continues_if_training_comes_to_the_same_weights(quiet_home, monkeypatch):
    words = ("model=mlp", *SHORT, "dataset.batch_size=16", "metrics=[rq,taylor]", "callbacks.measure.save_minutes=0")
    assert command("train", *words, "hydra.run.dir=whole").code == 0
    read, every = [], _Batches.__iter__

    def stopped(self):
        for number, batch in enumerate(every(self)):
            read.append(number)
            if len(read) == 4:  # the first reading of a batch is for the plan
                raise KeyboardInterrupt
            yield batch

    begun, restore = [], SavedPass.restore
    monkeypatch.setattr(_Batches, "__iter__", stopped)
    monkeypatch.setattr(SavedPass, "restore", lambda self, collected: begun.append(restore(self, collected)) or begun[-1])
    with contextlib.suppress(KeyboardInterrupt):
        command("train", *words, "hydra.run.dir=run")
    assert list(quiet_home.glob("run/epochs/sums/process0/**/*.pt"))
    assert command("train", *words, "hydra.run.dir=run").code == 0
    assert begun == [None, 0], "the second pass began with the sums of the first one"
    found, wanted = (pd.read_parquet(f"{run}/epochs/units_000.parquet") for run in ("run", "whole"))
    pd.testing.assert_frame_equal(found, wanted)
    assert not (quiet_home / "run/epochs/sums/process0").exists()
