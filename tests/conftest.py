"""What tests share: where real data lie, an environment that reaches no network."""

import os
from pathlib import Path

import pytest
from real import folder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")


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
