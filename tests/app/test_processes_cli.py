import json

import pandas as pd
import pytest
from command import command
from pandas.testing import assert_frame_equal

import nodelens as nl

WORDS = ("model=cnn", "dataset.calibration=100", "logger=none")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    ended = command("analyze", *WORDS, f"hydra.run.dir={folder}")
    assert ended.code == 0, ended.err
    return nl.load(folder)


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_processes_find_what_one_finds(devices, alone, quiet_home):
    ended = command("analyze", *WORDS, "trainer=ddp", f"trainer.devices={devices}", "hydra.run.dir=run", "dataset.batch_size=32")
    assert ended.code == 0, ended.err
    found = nl.load("run")
    assert found.metadata["processes"] == devices
    assert f"{devices} processes: sums of " in (quiet_home / "run/analyze.log").read_text()
    assert found.metadata["model"]["fingerprint"] == alone.metadata["model"]["fingerprint"]
    assert_frame_equal(found.units, alone.units, rtol=1e-5, atol=1e-12, check_exact=False)
    assert_frame_equal(found.layers, alone.layers, rtol=1e-5, atol=1e-12, check_exact=False)
    for key in ("accuracy", "loss", "ece", "samples"):
        assert found.metadata["evaluation"][key] == pytest.approx(alone.metadata["evaluation"][key], rel=1e-5)


def test_two_processes_train_and_measure(quiet_home):
    ended = command(
        "train",
        "trainer=ddp",
        "trainer.max_epochs=2",
        "callbacks=measure",
        "metrics=[rq,taylor]",
        "dataset.calibration=64",
        "hydra.run.dir=run",
    )
    assert ended.code == 0, ended.err
    assert (quiet_home / "run/epochs/units_001.parquet").is_file()
    assert json.loads((quiet_home / "run/result.json").read_text())["samples"] == 359
    curves = pd.read_csv(quiet_home / "run/csv/version_0/metrics.csv")
    assert curves["val/acc"].count() == curves["units/fc1/rq"].count() - 1 == 2  # and once more at the end
    assert curves["test/accuracy"].count() == 1
    kept = pd.read_csv(quiet_home / "run/history.csv", index_col="epoch")
    logged = curves.groupby("epoch")[["train/loss", "train/acc", "val/loss", "val/acc"]].mean()
    assert_frame_equal(kept.drop(columns="batches"), logged.loc[[0, 1]], check_like=True, check_index_type=False)


def test_two_processes_prune_as_one_does(quiet_home):
    words = ("criterion=[taylor,random]", "dataset.calibration=64", "logger=none")
    tables = []
    for k, more in enumerate(((), ("trainer=ddp",))):
        ended = command("prune", *words, *more, f"hydra.run.dir=run{k}")
        assert ended.code == 0, ended.err
        table = pd.read_parquet(f"run{k}/sweep.parquet")
        tables.append(table[[c for c in table if "latency" not in c and not c.endswith("_s") and c != "seconds"]])
    assert_frame_equal(*tables, rtol=1e-5, check_exact=False)
