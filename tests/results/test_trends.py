"""Trends and stability of scores over epochs: closed forms, missing values, and folders that do not fit."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import linregress, spearmanr

import nodelens as nl
from nodelens.results.trends import score_trends


def write(folder, values, columns=("rq",), layer="fc"):
    """values (epochs, units) of each column, as a training writes them, at epochs 0, 2, 4 and so on."""
    (folder / "epochs").mkdir(parents=True, exist_ok=True)
    index = pd.MultiIndex.from_product([[layer], range(values.shape[1])], names=["layer", "unit"])
    for k, row in enumerate(values):
        frame = pd.DataFrame(dict.fromkeys(columns, row) | {f"{columns[0]}_se": row}, index=index)
        frame.to_parquet(folder / "epochs" / f"units_{2 * k:03d}.parquet")


def test_a_line_has_its_slope_and_no_scatter(tmp_path):
    epochs = np.array([0.0, 2, 4, 6])
    write(tmp_path, np.stack([1 + 3 * epochs, 5 - epochs, np.full(4, 2.0)], 1))
    found = score_trends(tmp_path)["units"].droplevel("metric").loc["fc"]
    assert found["slope"].tolist() == pytest.approx([3, -1, 0])
    assert found["scatter"].tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    assert found["monotone"].tolist()[:2] == pytest.approx([1, -1])
    assert np.isnan(found["monotone"][2])
    assert found["first"].tolist() == [1, 5, 2]
    assert found["last"].tolist() == [19, -1, 2]


def test_trends_and_ranks_are_those_of_scipy(tmp_path):
    values = np.random.default_rng(0).standard_normal((5, 20)).cumsum(0)
    write(tmp_path, values)
    found = score_trends(tmp_path / "epochs", "rq", top=0.25)
    epochs = np.arange(5) * 2.0
    for unit in range(20):
        row, line = found["units"].loc[("fc", unit, "rq")], linregress(epochs, values[:, unit])
        assert row["slope"] == pytest.approx(line.slope)
        rest = values[:, unit] - line.intercept - line.slope * epochs
        assert row["scatter"] == pytest.approx(rest.std() * np.sqrt(5 / 3))
        assert row["monotone"] == pytest.approx(spearmanr(epochs, values[:, unit]).statistic)
    ranks = found["ranks"].set_index("epoch")
    assert ranks.loc[4, "before"] == pytest.approx(spearmanr(values[2], values[1]).statistic)
    assert ranks.loc[4, "with_last"] == pytest.approx(spearmanr(values[2], values[4]).statistic)
    tops = [set(np.argsort(-v)[:5]) for v in values]
    assert ranks["top_overlap"].tolist() == pytest.approx([len(t & tops[-1]) / 5 for t in tops])
    assert ranks.loc[8, ["with_last", "top_overlap"]].tolist() == pytest.approx([1, 1])
    assert np.isnan(ranks.loc[0, "before"])
    assert "rq: first with last epoch" in found.summary()


def test_a_value_that_is_missing_has_no_trend_and_leaves_the_ranks_of_the_others(tmp_path):
    values = np.arange(12.0).reshape(3, 4)
    values[1, 2] = np.nan
    write(tmp_path, values)
    found = score_trends(tmp_path)
    assert found["units"]["slope"].isna().tolist() == [False, False, True, False]
    assert found["ranks"]["with_last"].tolist() == pytest.approx([1, 1, 1])


def test_two_epochs_have_a_slope_and_no_scatter(tmp_path):
    write(tmp_path, np.array([[0.0, 1], [2, 1]]))
    found = score_trends(tmp_path)["units"]
    assert found["slope"].tolist() == [1, 0]
    assert found[["scatter", "monotone"]].isna().all(axis=None)


def test_folders_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tables of epochs .*: train with callbacks=measure"):
        score_trends(tmp_path)
    write(tmp_path / "one", np.ones((1, 3)))
    with pytest.raises(ValueError, match="has one epoch: a trend needs two or more"):
        score_trends(tmp_path / "one")
    write(tmp_path / "two", np.ones((2, 3)))
    with pytest.raises(ValueError, match="the epochs have no metric 'taylor'; they have rq"):
        score_trends(tmp_path / "two", "taylor")
    with pytest.raises(ValueError, match="top is 0; it is a share of the units of a layer"):
        score_trends(tmp_path / "two", top=0)
    other = pd.read_parquet(tmp_path / "two" / "epochs" / "units_002.parquet").iloc[:2]
    other.to_parquet(tmp_path / "two" / "epochs" / "units_004.parquet")
    with pytest.raises(ValueError, match=r"units_004.parquet has other units than .*units_000.parquet: give the epochs of one"):
        score_trends(tmp_path / "two")


def test_it_is_a_public_name():
    assert nl.score_trends is not None
