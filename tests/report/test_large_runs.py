"""Pages of large runs: what is in the page is bounded, and everything else lies beside it."""

import json

import numpy as np
import pandas as pd
import pytest

from nodelens.report import write_page
from nodelens.report.pruning_figures import front_of
from nodelens.report.pruning_page import kept_shares
from nodelens.report.training_page import write_training_page
from nodelens.report.unit_data import sample
from nodelens.results.files import write_json
from nodelens.results.result import Result
from nodelens.results.training_history import history_of

SIZES = {"a": 3, "b": 30_000, "c": 2_000}


@pytest.fixture(scope="module")
def large():
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_tuples([(layer, k) for layer, n in SIZES.items() for k in range(n)], names=["layer", "unit"])
    units = pd.DataFrame(rng.random((len(index), 30)), index, [f"m{k}" for k in range(30)])
    layers = pd.DataFrame({"units": list(SIZES.values())}, index=pd.Index(SIZES, name="layer"))
    return Result(units, layers, {}, {"schema_version": 1, "metrics": {}, "missing": [], "samples": 1, "seed": 0})


def beside(folder, key):
    return json.loads((folder / f"report_files/{key}.js").read_text().partition(",")[2].removesuffix(");"))


def test_units_of_a_large_run_lie_beside_its_page(large, tmp_path):
    page = write_page(large.save(tmp_path / "run"))
    assert page.stat().st_size < 2_000_000
    about = json.loads(page.read_text().partition("id='data-units'>")[2].partition("</script>")[0])
    assert about["sampled"]
    assert about["pieces"] == [["a"], ["b"], ["b"], ["c"]], "a layer that is too large for one piece has several of its own"
    pieces = [beside(tmp_path / "run", f"units-{k}") for k in range(4)]
    assert [piece["rows"] for piece in pieces] == [3, 25_000, 5_000, 2_000]
    (tmp_path / "run/report_files/units-9.js").write_text("of an earlier page")
    write_page(tmp_path / "run")
    assert not (tmp_path / "run/report_files/units-9.js").exists()


def test_a_sample_has_units_of_every_layer(large):
    found = sample(large.units, 1000)
    counts = found.groupby(level="layer").size()
    assert counts["a"] == 3
    assert counts["b"] == round(1000 * 30_000 / 32_003)
    assert found.index.is_unique
    pd.testing.assert_frame_equal(found, large.units.loc[found.index])


def test_the_front_is_what_no_other_point_beats():
    rng = np.random.default_rng(0)
    cost, value = rng.integers(0, 8, 60).astype(float), rng.integers(0, 8, 60).astype(float)
    front = front_of(cost, value)
    better = [
        (cost[j] <= cost[i]) & (value[j] >= value[i]) & ((cost[j] < cost[i]) | (value[j] > value[i]))
        for i in front
        for j in range(60)
    ]
    assert not any(better)
    points = {(cost[i], value[i]) for i in front}
    beaten = [any((c <= cost[i]) & (v >= value[i]) for c, v in points) for i in range(60)]
    assert all(beaten)
    assert front_of(cost, -value, lower=True) == front
    assert front_of(np.array([np.nan]), np.array([1.0])) == []


def test_kept_shares_are_those_of_the_cell_that_was_carried_out(tmp_path):
    write_json(tmp_path / "cells/a.json", {"removed": {"fc1": [0, 3]}})
    (tmp_path / "cells/c.json").write_text("damaged")
    sweep = pd.DataFrame({"name": list("abcd"), "status": ["done"] * 3 + ["infeasible"], "carried_out_as": ["a", "a", "c", None]})
    found = kept_shares(tmp_path, sweep, pd.Series({"fc1": 8, "fc2": 4}))
    pd.testing.assert_frame_equal(found, pd.DataFrame({"fc1": [0.75, 0.75], "fc2": [1.0, 1.0]}, index=["a", "b"]))


def test_the_last_start_of_a_training_counts(tmp_path):
    for version, losses in ((0, [3.0, 2.0]), (1, [1.0])):
        (tmp_path / f"csv/version_{version}").mkdir(parents=True)
        log = pd.DataFrame({"epoch": range(version, version + len(losses)), "train/loss": losses, "lr": 1.0})
        log.to_csv(tmp_path / f"csv/version_{version}/metrics.csv", index=False)
    assert history_of(tmp_path)["train/loss"].tolist() == [3.0, 1.0]
    assert list(history_of(tmp_path)) == ["train/loss"]
    with pytest.raises(FileNotFoundError, match=r"has no finished training: result.json is missing; run its command again"):
        write_training_page(tmp_path)


def test_an_analysis_without_figures_says_so():
    from nodelens.results.findings import Findings

    with pytest.raises(ValueError, match=r"mine has no figures: its tables are in tables\(\)"):
        Findings("mine", {}).plot()
    table = pd.DataFrame({"layer": [0], "precision_at_1": [0.5], "precision_at_1_se": [0.1]})
    with pytest.raises(ValueError, match=r"lens has no figure 'x'. It has lens"):
        Findings("lens", {"layers": table}).plot("x")
    with pytest.raises(ValueError, match=r"this result has no plot .scatter.. It has none"):
        Result(pd.DataFrame(), pd.DataFrame()).plot("scatter")
