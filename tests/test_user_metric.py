"""A metric as a user writes one: a class in a package of their own, a YAML file in a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from command import command

from nodelens.config import load_config

ROOT = Path(__file__).parents[1]
CODE = '''
from dataclasses import dataclass
from typing import ClassVar

from nodelens.metrics import Metric, Need
from nodelens.statistics import Moments


@dataclass(frozen=True)
class Snr(Metric):
    """Mean over standard deviation of a unit's activation."""

    names: ClassVar = ("snr",)
    nan: ClassVar = "a unit that does not vary"
    power: float = 1.0

    def needs(self):
        return {"y": Need(Moments, "output")}

    def __call__(self, weight, y):
        return (y.mean / y.variance.sqrt()) ** self.power
'''
FILE = "snr:\n  _target_: PACKAGE.metrics.Snr\n  power: 1.0\n"
SMALL = ("dataset.calibration=64", "hydra.run.dir=run", "layers=[fc1]")


@pytest.fixture
def own(quiet_home, monkeypatch):
    """A working folder with a package and a folder of YAML files; nothing of nodelens is touched."""
    name = f"package_of_{quiet_home.name}"  # modules of an earlier test stay in this process
    (quiet_home / name).mkdir()
    (quiet_home / name / "__init__.py").touch()
    (quiet_home / name / "metrics.py").write_text(CODE)
    (quiet_home / "my conf/metrics").mkdir(parents=True)
    (quiet_home / "my conf/metrics/snr.yaml").write_text(FILE.replace("PACKAGE", name))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return quiet_home


def columns(folder):
    units = pd.read_parquet(folder / "run/units.parquet")
    assert units["snr"].notna().any()
    return [c for c in units.columns if c.startswith(("snr", "rq"))]


PLACES = [("--config-dir", "my conf"), ("hydra.searchpath=['file://my conf']",), ("hydra.searchpath=['my conf']",)]


@pytest.mark.parametrize("place", PLACES, ids=" ".join)
def test_it_runs_from_the_command_line(own, place):
    ended = command("analyze", *place, "metrics=[rq,snr]", "metrics.snr.power=2.0", *SMALL)
    assert ended.code == 0, ended.err
    assert columns(own) == ["rq", "rq_se", "snr", "snr_se"]


def test_a_folder_on_the_flag_and_one_on_the_path_are_both_seen(own):
    (own / "more/metrics").mkdir(parents=True)
    (own / "more/metrics/mine.yaml").write_text("defaults: [rq]\n")
    ended = command("analyze", "--config-dir", "more", "hydra.searchpath=['file://my conf']", "metrics=[mine,snr]", *SMALL)
    assert ended.code == 0, ended.err
    assert columns(own) == ["rq", "rq_se", "snr", "snr_se"]


def test_it_runs_in_a_process_of_its_own_started_in_the_folder(own):
    words = ["analyze", "--config-dir", "my conf", "metrics=[snr]", *SMALL]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = "from nodelens.cli import script; script()"  # the console script: no folder on the path
    ended = subprocess.run(
        [sys.executable, "-P", "-c", script, *words], cwd=own, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert columns(own) == ["snr", "snr_se"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hydra.searchpath=[file://nowhere]", "metrics=[snr]"], "hydra.searchpath: no folder at "),
        (["hydra.searchpath=[pkg://nowhere.conf]", "metrics=[snr]"], "hydra.searchpath: no folder at pkg://nowhere.conf"),
        (["hydra.searchpath=['file://my conf']", "metrics=[snrr]"], "metrics: no option 'snrr'. Did you mean 'snr'?"),
        (["--config-dir", "my conf", "metrics=[snr]", "metrics.snr.power=much"], "metrics.snr.power is 'much'"),
        (["metrics=[snr]"], "metrics: no option 'snr'"),
        (["metrics=[snr]"], " more, which --help lists"),
    ],
    ids=str,
)
def test_a_mistake_is_a_line(own, words, said):
    ended = command("analyze", *words, *SMALL)
    assert ended.code == 1
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert said in ended.err


def test_a_notebook_finds_it_by_the_same_words(own):
    cfg = load_config("analyze", ["hydra.searchpath=['file://my conf']", "metrics=[snr]"])
    assert list(cfg.metrics) == ["snr"]
