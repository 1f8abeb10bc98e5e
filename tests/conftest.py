"""What tests share: where real data lie, an environment that reaches no network."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")


def folder(variable: str) -> Path:
    """The folder an environment variable names; the test is skipped, with the reason, where it is not set."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set: it names a folder of real data")
    return Path(os.environ[variable])


@pytest.fixture
def real_data() -> Path:
    return folder("NODELENS_DATA")


@pytest.fixture
def quiet_home(tmp_path, monkeypatch):
    """A working folder of its own, where runs may write."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path
