"""Processes that Slurm starts, where one answers; ``SLURM_CONF`` may name the configuration of one on this machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pandas.testing import assert_frame_equal

import nodelens as nl

ROOT = Path(__file__).parents[2]
WORDS = ("analyze", "metrics=[rq,magnitude]", "dataset.calibration=64", "logger=none")


def started(folder, *before, more=()):
    words = [*before, sys.executable, "-m", "nodelens.app", *WORDS, *more]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_two_tasks_of_srun_find_what_one_process_finds(tmp_path):
    if shutil.which("srun") is None or subprocess.run(["sinfo", "-h"], capture_output=True, check=False, timeout=30).returncode:
        pytest.skip("no Slurm answers here: sinfo fails")
    started(tmp_path, more=["hydra.run.dir=one"])
    words = ["srun", "--ntasks-per-node=2", "--overcommit", "--time=5"]
    more = ["trainer=ddp", "trainer.strategy=ddp", "trainer.devices=2", "trainer.num_nodes=1", "hydra.run.dir=two"]
    out = started(tmp_path, *words, more=more)
    assert out.count("2 processes: sums of ") == 1, out
    one, two = (nl.load(tmp_path / name) for name in ("one", "two"))
    assert two.metadata["processes"] == 2
    assert_frame_equal(two.units, one.units, rtol=1e-5, check_exact=False)
