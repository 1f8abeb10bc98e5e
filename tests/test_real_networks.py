"""A trained network and real images, from the command line: the class lies in a file outside the package."""

import sys

import numpy as np
import pytest
from command import command

import nodelens as nl


@pytest.fixture
def resnet20(real_data, quiet_home, monkeypatch):
    monkeypatch.delitem(sys.modules, "nets", raising=False)  # the tests' own networks go by the same name
    monkeypatch.syspath_prepend(str(real_data))
    return [
        "model.net._target_=nets.CifarResNet",
        "model.net.depth=20",
        f"ckpt_path={real_data}/models/cifar_resnet20/model.safetensors",
        "dataset=npz",
        f"dataset.path={real_data}/images/cifar10_test_first500.npz",
        "dataset.mean=[0.485,0.456,0.406]",
        "dataset.std=[0.229,0.224,0.225]",
        "logger=none",
    ]


def test_a_pretrained_network_keeps_its_accuracy_and_every_unit_is_measured(resnet20):
    ended = command("analyze", *resnet20, "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    result = nl.load("run")
    assert result.metadata["evaluation"]["accuracy"] == pytest.approx(0.910)
    assert result.metadata["evaluation"]["samples"] == result.metadata["samples"] == 500
    assert len(result.units) == 7 * 16 + 6 * 32 + 6 * 64 + 10
    assert not result.units.isna().any().any()
    assert not result.layers.isna().any().any()


@pytest.mark.slow
def test_batch_size_changes_no_column_by_more_than_a_hundred_thousandth(resnet20):
    found = []
    for size in (7, 64):
        ended = command("analyze", *resnet20, f"dataset.batch_size={size}", f"hydra.run.dir=run{size}")
        assert ended.code == 0, ended.err
        found.append(nl.load(f"run{size}"))
    for table in ("units", "layers"):
        a, b = (getattr(result, table).select_dtypes("number") for result in found)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-30)
