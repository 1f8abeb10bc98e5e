"""What tests share: where real data lie, an environment that reaches no network."""

import gc
import os
import signal
from pathlib import Path

import pytest

for name in list(os.environ):  # a user who is logged in to W&B, or within a Slurm job, is no part of the tests
    if name.startswith(("WANDB_", "SLURM_", "SUBMITIT_")) and name != "SLURM_CONF":
        del os.environ[name]
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup; processes that tests start would ignore it, too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
gc.disable()  # until everything is collected


def pytest_collection_finish():
    """Modules and tests live to the end: the garbage collector need not visit their millions of objects again and again."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)  # visits of young objects would take three seconds of a hundred
    gc.enable()


@pytest.fixture
def real_data() -> Path:
    from real import folder  # imports torch, which the process that starts the workers does without

    return folder("NODELENS_DATA")


@pytest.fixture
def compiler():
    """Skips a test where the loops cannot be compiled."""
    from nodelens.statistics import compiled

    try:
        compiled.library("float32")
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["torch", "compiled"])
def back_end(request) -> str:
    """What forms sums over positions: a test that uses this runs once by each."""
    from nodelens.statistics import kernels

    if request.param == "compiled":
        request.getfixturevalue("compiler")
    with kernels.using(request.param):
        yield request.param


@pytest.fixture
def quiet_home(tmp_path, monkeypatch):
    """A working folder of its own, where runs may write."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path
