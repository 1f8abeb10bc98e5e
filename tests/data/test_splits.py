"""Splits are disjoint, complete, seeded and sharded exactly."""

import json

import pytest
import torch

from nodelens.data import Digits
from nodelens.data.splits import make_splits, pick, shard


def splits(**options):
    return make_splits(**{"rows": 100, "own_test": 0, "val": 0.1, "test": 0.2, "calibration": 512, "seed": 0} | options)


@pytest.mark.parametrize("own_test", [0, 7])
@pytest.mark.parametrize("calibration", [0, 5, 512])
def test_each_sample_is_in_one_split(own_test, calibration):
    parts = splits(own_test=own_test, calibration=calibration)
    assert torch.cat(list(parts.values())).sort().values.tolist() == list(range(100 + own_test))
    free = 90 if own_test else 70
    assert len(parts["calibration"]) == min(calibration, free // 2)
    assert len(parts["val"]) == 10
    assert len(parts["test"]) == (own_test or 20)
    assert pick(parts, "all").tolist() == list(range(100 + own_test))


def test_a_seed_gives_the_same_splits_and_leaves_the_global_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = splits(), splits(), splits(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["val"], other["val"])
    fewer = splits(calibration=5)  # test and val are unchanged by a smaller calibration set
    assert torch.equal(first["val"], fewer["val"])
    assert torch.equal(first["test"], fewer["test"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"val": 1.0}, r"val is 1.0; give a share of the samples in \[0, 1\)"),
        ({"test": -0.1}, "test is -0.1"),
        ({"calibration": -1}, "calibration is -1; give a count"),
        ({"calibration": 0.5}, "calibration is 0.5; give a count"),
        ({"val": 0.5, "test": 0.5}, "no sample is left to train on: 100 samples, of which 50 go to val and 50 to test"),
        ({"rows": 0}, "no sample is left to train on: 0 samples"),
    ],
)
def test_invalid_shares_raise(options, words):
    with pytest.raises(ValueError, match=words):
        splits(**options)


def test_shards_are_exact_and_may_be_empty():
    parts = [shard(torch.arange(7), rank, 3).tolist() for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]
    assert shard(torch.arange(2), 2, 3).tolist() == []
    with pytest.raises(ValueError, match=r"rank 3 of world 3 does not exist"):
        shard(torch.arange(7), 3, 3)


def test_an_unknown_split_raises_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"no split 'calib'; did you mean 'calibration'. there are train, val, test"):
        pick(splits(), "calib")
    with pytest.raises(ValueError, match=r"no split 'zzz'; there are train"):
        Digits().loader("zzz")


def test_saved_splits_list_the_samples(tmp_path):
    data = Digits()
    file = data.save_splits(tmp_path / "run")
    saved = json.loads(file.read_text())
    assert {path.name for path in file.parent.iterdir()} == {"splits.json", "SHA256SUMS"}
    assert saved["val"] == data.indices["val"].tolist()
    assert "train" not in saved
    assert saved["sizes"] == {"test": 359, "val": 180, "calibration": 512, "train": 746}
    assert saved["fingerprint"] == data.fingerprint()
    assert saved["seed"] == 0
