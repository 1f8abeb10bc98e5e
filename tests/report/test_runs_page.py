"""One page over many runs, made from saved results."""

import itertools
import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

import nodelens as nl
from nodelens.report.__main__ import main
from nodelens.report.charts import line
from nodelens.report.paper import write_plots
from nodelens.report.plot import Plot, figure_of
from nodelens.report.runs_figures import against_settings, intervals, rank_stability
from nodelens.report.settings import linked, settings_of, usual
from nodelens.results.findings import Findings
from nodelens.results.result import Result

UNITS = pd.MultiIndex.from_product([["fc1", "fc2"], range(6)], names=["layer", "unit"])


def run(dropout: float, l1: float, seed: int) -> Result:
    """A run whose metric is 2 dropout + seed / 10, with two modules of three units in each layer."""
    rng = np.random.default_rng(seed)
    value = 2 * dropout + seed / 10
    units = pd.DataFrame({"rq": value, "rq_se": 0.1}, index=UNITS)
    layers = pd.DataFrame({"type": "Linear", "units": 6}, index=pd.Index(["fc1", "fc2"], name="layer"))
    config = {"seed": seed, "model": {"net": {"dropout": dropout}, "l1": l1}, "task": "analyze"}
    score = {"accuracy": 0.9 - dropout, "loss": 1.0, "samples": 10, "split": "test"}
    metadata = {"schema_version": 1, "config": config, "evaluation": score}
    blocks = np.kron(np.eye(2), np.ones((3, 3))) + 0.1 * rng.random((6, 6))
    result = Result(units, layers, {(layer, "forward_cov"): blocks + blocks.T for layer in ("fc1", "fc2")}, metadata)
    names = ("forward_cov", "backward_jac")
    rows = [{"layer": layer, "association": a, "q": value / 2} for layer in ("fc1", "fc2") for a in names]
    pairs = [
        {"layer": layer, "association_a": names[0], "association_b": names[1], "alignment": 0.8, "alignment_null": 0.5}
        for layer in ("fc1", "fc2")
    ]
    labels = pd.DataFrame({"module_forward_cov": [0, 1, 0, 1, 0, -1] * 2}, index=UNITS)
    result.units = result.units.join(labels)
    frames = {"modules": pd.DataFrame(rows), "comparison": pd.DataFrame(pairs)}
    result.analyses["modularity"] = Findings("modularity", frames)
    result.metadata["analyses"] = ["modularity"]
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A grid of two settings and two seeds."""
    home = tmp_path_factory.mktemp("runs")
    for k, (dropout, l1, seed) in enumerate(itertools.product([0.0, 0.5], [0.0, 1e-3], [0, 1])):
        run(dropout, l1, seed).save(home / str(k))
    return home


def test_the_page_has_settings_scores_metrics_and_modules(runs, tmp_path):
    page = nl.compare(f"{runs}/*", tmp_path)
    text = page.read_text()
    assert "8 runs; model.net.dropout: 0.0, 0.5; model.l1: 0.0, 0.001" in text
    titles = ("Runs", "Scores", "Metrics", "Two runs, unit by unit", "Modules")
    assert all(f"<h2>{title}</h2>" in text for title in titles)
    assert "<td>across</td><td>0.8</td><td>0</td><td>0.5</td>" in text  # forward_cov and backward_jac
    names = set(re.findall(r"data-name='([^']*)'", text))
    assert names == {"runs", "accuracy", "rq", "metrics", "modularity-fc1", "modularity-fc2", "modules", "alignment"}


def test_settings_are_those_that_differ_without_seeds_and_scores(runs):
    frame = nl.load_runs(f"{runs}/*")
    assert settings_of(frame) == ["model.net.dropout", "model.l1"]
    assert frame.attrs["scores"] == ["accuracy"]


def test_the_usual_choice_is_the_most_frequent_one_then_the_smallest():
    frame = pd.DataFrame({"run": list("abcd"), "x": [1, 2, 2, 3], "y": ["q", "p", "q", "p"]})
    found = usual(frame, ["x", "y"])
    assert found["x"].tolist() == [False, True, True, False]
    assert found["y"].tolist() == [False, True, False, True]


def test_intervals_are_those_of_student():
    mean, reach = intervals(pd.Series([1.0, 2.0, 3.0, np.nan]))
    assert mean == 2
    assert reach == pytest.approx(4.302652729911275 / np.sqrt(3))  # the 97.5 % quantile for two degrees of freedom
    assert np.isnan(intervals(pd.Series([1.0]))[1])
    assert np.isnan(intervals(pd.Series([np.nan]))[0])


def test_the_command_writes_the_page_and_names_it(runs, tmp_path, capsys):
    folders = [str(path) for path in sorted(runs.iterdir())]
    assert main([*folders[:2], "--to", str(tmp_path / "page")]) == 0
    assert f"page: {tmp_path / 'page' / 'index.html'}" in capsys.readouterr().out
    assert "no setting differs but the seed" in (tmp_path / "page" / "index.html").read_text()


def test_no_run_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none*"), str(tmp_path / "other")]) == 1
    assert capsys.readouterr().err.startswith("error: no finished run matches '")


def test_names_of_runs_are_text(tmp_path):
    one = run(0.0, 0.0, 0)
    one.metadata["config"]["model"]["name"] = "<script>alert(1)</script>"
    one.save(tmp_path / "a")
    run(0.5, 0.0, 0).save(tmp_path / "b")
    page = nl.compare(f"{tmp_path}/*", tmp_path / "page").read_text()
    assert "<script>alert" not in page
    assert "alert(1)" in page


def test_no_name_of_a_layer_leads_out_of_the_folder(tmp_path):
    plot = Plot("modularity-../../fc1/<b>", "a title", "a caption", figure_of([line([1, 2], [3, 4])]))
    write_plots([plot], tmp_path / "page", ["png"])
    found = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")]
    assert found == ["page/modularity-.._.._fc1__b_.png"]


def test_ranks_across_seeds_are_mean_spearman_correlations():
    rows = [{"run": run, "layer": "a", "unit": k, "rq": value} for run, values in _RANKED.items() for k, value in enumerate(values)]
    found = rank_stability(pd.DataFrame(rows), ["rq"], [], "unit")
    pairs = [spearmanr(_RANKED[a], _RANKED[b])[0] for a, b in itertools.combinations(_RANKED, 2)]
    assert found.loc["a", "rq"] == pytest.approx(np.mean(pairs))
    one = pd.DataFrame([row for row in rows if row["run"] == "x"])
    assert np.isnan(rank_stability(one, ["rq"], [], "unit").loc["a", "rq"])


_RANKED = {"x": [1.0, 2.0, 3.0, 4.0], "y": [2.0, 1.0, 3.0, 5.0], "z": [4.0, 3.0, 2.0, 1.0]}


def test_a_page_over_runs_reads_no_matrices(runs, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("nodelens.results.result.load_file", lambda path: read.append(path) or {})
    nl.load_runs(f"{runs}/*")
    nl.load_runs(f"{runs}/*", rows="modularity.modules")
    assert read == []


def test_settings_that_runs_lack_or_that_change_together_leave_no_plot_empty(tmp_path):
    """Half of the runs measure another metric; the width and the name of the model change together."""
    for k, (width, seed) in enumerate(itertools.product([8, 16], [0, 1])):
        for other in (False, True):
            one = run(0.0, 0.0, seed)
            one.units["rq"] += width
            if other:
                one.units = one.units.rename(columns={"rq": "snr", "rq_se": "snr_se"})
            option = {"snr": {"power": 2}} if other else {"rq": {"relative": True}}
            one.metadata["config"] |= {"metrics": option, "model": {"name": f"net{width}", "net": {"width": width}}}
            one.metadata["evaluation"]["accuracy"] = width / 20
            one.save(tmp_path / "runs" / f"{k}{other}")
    frame = nl.load_runs(tmp_path / "runs")
    assert frame["run"].nunique() == 8, "all runs of a folder"
    assert sorted(settings_of(frame)) == ["model.name", "model.net.width"], "not to measure a metric is no setting"
    rows, settings = frame.drop_duplicates("run"), ["model.name", "model.net.width"]
    assert linked(rows, settings[0], settings[1:]) == ["model.net.width"]
    drawn = against_settings(rows, ["accuracy"], settings, None, usual(rows, settings)).table
    found = {name: rows["mean"].tolist() for name, rows in drawn.groupby("setting")}
    assert found == {"model.name": [0.8, 0.4], "model.net.width": [0.4, 0.8]}  # net16 before net8, 8 before 16
    assert main([str(tmp_path / "runs"), "--to", str(tmp_path / "page")]) == 0


def test_not_to_have_a_setting_is_a_choice():
    frame = pd.DataFrame({"run": list("abc"), "x": [1.0, None, None]})
    assert usual(frame, ["x"])["x"].tolist() == [False, True, True]
