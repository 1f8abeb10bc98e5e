"""The page of a training: what several starts have logged, and the analyses of its epochs."""

import json

import numpy as np
import pandas as pd
import pytest

import nodelens as nl
from nodelens.report import training_page, write_training_page
from nodelens.report.plot import whole_ticks
from nodelens.results import trends
from nodelens.results.findings import Findings
from nodelens.results.training_history import history_of


def log(folder, **columns):
    folder.mkdir(parents=True)
    pd.DataFrame(columns).to_csv(folder / "metrics.csv", index=False)


def test_a_later_start_hides_no_value_of_an_earlier_one(tmp_path):
    log(tmp_path / "csv/version_9", **{"epoch": [0, 1], "train/loss": [3.0, 2.0], "val/loss": [3.5, 2.5]})
    log(tmp_path / "csv/version_10", **{"epoch": [1, 2], "train/loss": [None, 1.0], "val/loss": [2.4, 1.5]})
    log(tmp_path / "csv/version_0_backup", **{"epoch": [0], "train/loss": [99.0]})
    (tmp_path / "csv/version_11").mkdir()
    found = history_of(tmp_path)
    assert found["train/loss"].tolist() == [3.0, 2.0, 1.0]
    assert found["val/loss"].tolist() == [3.5, 2.4, 1.5]


@pytest.fixture
def training(tmp_path):
    """Three epochs of one layer, with two variants of an analysis that have figures of the same names."""
    index = pd.MultiIndex.from_product([["fc1"], range(6)], names=["layer", "unit"])
    (tmp_path / "epochs").mkdir()
    for epoch in range(3):
        rng = np.random.default_rng(epoch)
        pd.DataFrame({"rq": rng.random(6)}, index=index).to_parquet(tmp_path / f"epochs/units_{epoch:03d}.parquet")
    kinds = [{"layer": "fc1", "type": "core", "count": k, "damage": 0.1 * k} for k in (1, 2)]
    types = pd.DataFrame(kinds).assign(random=0.0, random_low=-0.1, random_high=0.1)
    gap = {"layer": "fc2", "what": "types", "reason": "it has no <unit>"}
    for name in ("first", "second"):
        frames = {"types": types, "pairs": pd.DataFrame()}
        Findings("cascade", frames, [f"lines of {name}"], metadata={"missing": [gap]}).save(tmp_path / "epochs" / name)
    (tmp_path / "result.json").write_text(json.dumps({"accuracy": 0.5, "samples": 3, "epochs": 3}))
    return tmp_path


def test_each_analysis_has_its_own_figures_and_says_what_is_missing(training):
    page = write_training_page(training, figures=["svg"]).read_text()
    written = {file.name for file in (training / "figures").glob("*.svg")}
    assert {"first-types.svg", "second-types.svg"} <= written
    assert page.count("it has no &lt;unit&gt;") == 2
    assert "Cascade: second" in page


def test_tables_of_epochs_are_read_once(training, monkeypatch):
    read, calls = trends.epoch_tables, []
    for module in (trends, training_page):
        monkeypatch.setattr(module, "epoch_tables", lambda folder: calls.append(folder) or read(folder))
    write_training_page(training)
    assert len(calls) == 1
    pd.testing.assert_frame_equal(trends.trends_of(read(training))["ranks"], nl.score_trends(training)["ranks"])


@pytest.mark.parametrize(
    ("epochs", "shown"),
    [
        ([], None),
        ([3], [3]),
        (range(3), [0, 1, 2]),
        (range(30), [0, 5, 10, 15, 20, 25]),
        ([2, 400], [50, 100, 150, 200, 250, 300, 350, 400]),
    ],
)
def test_epochs_have_ticks_at_whole_numbers(epochs, shown):
    assert whole_ticks(epochs).get("tickvals") == shown
