"""Groups of samples, intervals, errors that mean nothing, and samples that repeat."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import t as student
from torch import nn

import nodelens as nl
from nodelens.metrics import get_metric
from nodelens.statistics import repeats
from nodelens.statistics.repeats import Repeats
from nodelens.statistics.sample_hash import balanced_cuts, groups_of, mix


def rows(n, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net():
    layer = nn.Linear(3, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(rows(4, 7))
        layer.bias.zero_()
    return nn.Sequential(nn.Identity(), layer)


def measured(data, metrics=("activation_variance",), **options):
    return nl.analyze(net(), data, list(metrics), "1", **options)


@pytest.mark.parametrize(("n", "groups"), [(16, 8), (19, 8), (400, 8), (5, 8), (0, 4), (7, 1)])
def test_balanced_groups_have_equal_sizes(n, groups):
    hashes = mix(torch.arange(n))
    found = groups_of(hashes, groups, 3, balanced_cuts(hashes, groups, 3))
    sizes = torch.bincount(found, minlength=groups)
    assert len(sizes) == groups
    assert int(sizes.sum()) == n
    assert int(sizes.max() - sizes.min()) <= 1
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    again = balanced_cuts(hashes[order], groups, 3)
    torch.testing.assert_close(groups_of(hashes, groups, 3, again), found, rtol=0, atol=0)


def test_samples_with_one_hash_stay_together():
    hashes = mix(torch.arange(12) // 3)
    found = groups_of(hashes, 4, 0, balanced_cuts(hashes, 4))
    assert all(len(set(part.tolist())) == 1 for part in found.split(3))


def test_a_list_of_batches_fills_every_group_whatever_the_batch_size():
    x = rows(16, seed=9)
    found = [measured(list(x.split(size))) for size in (1, 5, 16)]
    for result in found:
        assert result.metadata["samples_by_group"] == [2] * 8
        assert result.metadata["filled_groups"] == 8
        pd.testing.assert_frame_equal(result.units, found[0].units, rtol=1e-9)
    streamed = measured(iter(x.split(5)))
    assert sum(streamed.metadata["samples_by_group"]) == 16
    assert streamed.metadata["filled_groups"] == sum(map(bool, streamed.metadata["samples_by_group"])) < 8
    np.testing.assert_allclose(streamed.units["activation_variance"], found[0].units["activation_variance"], rtol=1e-12)


def test_an_interval_takes_the_quantile_of_the_groups_that_are_filled():
    x = rows(16, seed=9)  # whose hashes leave groups empty
    for data in ([x], iter([x])):
        result = measured(data)
        free = result.metadata["filled_groups"] - 1
        for level in (0.95, 0.5):
            reach = student.ppf(0.5 + level / 2, free) * result.units["activation_variance_se"]
            found = result.interval("activation_variance", level)
            np.testing.assert_allclose(found["high"] - found["low"], width_on_the_logarithm(result, reach), rtol=1e-9)
            assert found.index.equals(result.units.index)


def width_on_the_logarithm(result, reach):
    value = result.units["activation_variance"]
    return value * np.exp(reach / value) - value * np.exp(-reach / value)


def test_an_interval_is_symmetric_about_the_value_unless_its_metric_says_otherwise(tmp_path):
    result = measured([rows(40)], ["rq", "activation_kurtosis", "effective_rank"])
    found = nl.load(result.save(tmp_path)).interval("activation_kurtosis")
    assert result.metadata["metrics"]["activation_kurtosis"]["log_interval"]
    np.testing.assert_allclose(np.sqrt(found["low"] * found["high"]), result.units["activation_kurtosis"], rtol=1e-9)
    found = result.interval("effective_rank")
    reach = student.ppf(0.975, 7) * result.layers["effective_rank_se"]
    np.testing.assert_allclose(found["low"], result.layers["effective_rank"] - reach, rtol=1e-12)
    assert found.index.equals(result.layers.index)


def test_mistakes_in_intervals_are_named():
    result = measured([rows(40)], ["rq", "magnitude"])
    with pytest.raises(ValueError, match="'magnitude' has no standard error in this result; those that have one: rq"):
        result.interval("magnitude")
    with pytest.raises(ValueError, match="level is 95; it is the share of intervals that hold the truth, between 0 and 1"):
        result.interval("rq", 95)


def reason_of(result, column):
    return {m["column"]: m["reason"] for m in result.metadata["missing"]}[column]


@pytest.mark.parametrize("n", [2, 3])
def test_two_or_three_samples_have_no_standard_error(n):
    result = measured([rows(n)])
    assert result.units["activation_variance"].notna().all()
    assert result.units["activation_variance_se"].isna().all()
    assert result.interval("activation_variance").isna().all(axis=None)
    assert reason_of(result, "activation_variance_se") == "fewer than 4 samples"
    assert measured([rows(4)]).units["activation_variance_se"].notna().all()


def test_counts_and_largest_values_have_no_standard_error():
    names = ["component_count", "activation_max_ratio", "activation_outlier_index"]
    result = measured([rows(100)], names)
    assert result.layers["component_count_se"].isna().all()
    assert "a count changes in steps" in reason_of(result, "component_count_se")
    for name in names[1:]:
        assert result.units[name].notna().all()
        assert result.units[f"{name}_se"].isna().all()
        assert "largest value" in reason_of(result, f"{name}_se")
    inside = nl.analyze(net(), [rows(100)], [get_metric("activation_outlier_index", quantile=0.9)], "1").units
    assert inside["activation_outlier_index_se"].notna().all()


def test_the_effective_sample_size_of_independent_rows_is_their_number_on_average():
    """8 groups: without the factor 5/7 the mean would be 1.4 n; a draw spreads by sqrt(2/3) of it."""
    wide = nn.Sequential(nn.Identity(), nn.Linear(1000, 1000, bias=False, dtype=torch.float64))
    with torch.no_grad():
        wide[1].weight.copy_(torch.eye(1000, dtype=torch.float64))
    x = torch.randn(400, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = nl.analyze(wide, [x], ["n_eff"], "1").units["n_eff"]
    assert abs(found.mean() / 400 - 1) < 5 * math.sqrt(2 / 3) / math.sqrt(1000)
    three = nl.analyze(wide, [x], ["n_eff"], "1", groups=3)
    assert three.units["n_eff"].isna().all()
    assert "fewer than four groups" in reason_of(three, "n_eff")


def with_ids(x, ids, size):
    return [{"x": a, "ids": b} for a, b in zip(x.split(size), torch.as_tensor(ids).split(size), strict=True)]


@pytest.mark.parametrize("size", [3, 20])
def test_the_same_content_under_different_ids_is_a_warning(size):
    x = rows(20)
    x[[5, 9]], x[12] = x[2].clone(), x[11].clone()
    assert measured(with_ids(rows(20), range(20), size)).metadata["warnings"] == []
    (warning,) = measured(with_ids(x, range(20), size)).metadata["warnings"]
    assert "3 of 20 samples (15.0%) have the content of another one under another id" in warning
    same = [2 if k in (5, 9) else 11 if k == 12 else k for k in range(20)]
    assert measured(with_ids(x, same, size)).metadata["warnings"] == []
    assert measured(list(x.split(size))).metadata["warnings"] == [], "without ids, copies are in one group"


def test_padding_and_other_inputs_tell_contents_apart():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(1, 2)

        def forward(self, input_ids, attention_mask, image):
            return self.fc(input_ids.float()[..., None]).mean(1) + image

    ids, mask = torch.tensor([[5, 7, 0], [0, 5, 7], [5, 7, 0]]), torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "image": torch.tensor([[1.0], [1.0], [2.0]]), "ids": torch.arange(3)}
    (warning,) = nl.analyze(Text(), [batch], ["activation_mean"], "fc").metadata["warnings"]
    assert warning.startswith("1 of 3 samples")


def test_few_hashes_are_kept_and_the_share_of_repeats_stays_right(monkeypatch):
    monkeypatch.setattr(repeats, "LIMIT", 500)
    contents = mix(torch.arange(10_000) // 2)  # each content under two ids
    found = []
    for size in (70, 10_000):
        held = Repeats()
        for a, b in zip(contents.split(size), torch.arange(10_000).split(size), strict=True):
            held.add(a, b)
        found.append(held.kept())
        assert len(held.kept()) == 500
        assert held.share() == (250, 500)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
