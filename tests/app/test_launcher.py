import os
import subprocess
import sys
from pathlib import Path

import pytest

import nodelens as nl

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_four_jobs_through_submitit(tmp_path):
    pytest.importorskip("submitit")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["metrics=[rq],[taylor]", "seed=0,1", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]
    more = ["hydra.sweep.dir=sweep", "dataset.calibration=64", "logger=none"]
    ended = subprocess.run(
        [sys.executable, "-m", "nodelens.app", "analyze", "-m", *words, *more],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    runs = nl.load_runs(f"{tmp_path}/sweep/*")
    assert sorted(runs["run"].unique()) == [f"{tmp_path}/sweep/{k}" for k in range(4)]
    assert runs.groupby("run")["seed"].first().tolist() == [0, 1, 0, 1]
