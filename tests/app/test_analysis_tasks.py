"""The group analysis of analyze.py: what it writes, what a second start repeats, what the page shows of it."""

import contextlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command import command, snapshot

import nodelens as nl
from nodelens.analysis.geometry.bundle import load_bundle
from nodelens.analysis.modularity.layer_modules import Search
from nodelens.data import Text
from nodelens.models.language import tiny_lm

SMALL = ("model=tiny_lm", "model.net.width=32", "model.net.layers=2", "model.net.heads=4", "model.net.mlp=48", "logger=none")
SMALL += ("dataset=text", "dataset.length=64", "dataset.max_tokens=6000")
POINTS = "analysis.geometry.hook_point=[residual_input,residual_output]"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of geometry without units, and what it printed."""
    home = tmp_path_factory.mktemp("geometry")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        ended = command("analyze", *SMALL, "analysis=geometry", "metrics=none", POINTS, "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    return home / "run", ended.out


def test_geometry_of_a_run_is_that_of_analyze_model(run):
    torch.manual_seed(0)
    net = tiny_lm(width=32, layers=2, heads=4, mlp=48).eval()
    data = Text(length=64, max_tokens=6000)
    data.setup()
    expected = nl.analyze_model(net, data.loader("all"), hook_point=["residual_input", "residual_output"])
    found = load_bundle(run[0] / "geometry")
    numbers = expected.metrics.select_dtypes("number").columns
    np.testing.assert_allclose(found.metrics[numbers], expected.metrics[numbers], rtol=1e-12)
    assert len(found.metrics) == 4
    assert list(found.novelty.transition) == ["0->1", "0->1"]


def test_the_terminal_and_the_page_say_what_was_found(run):
    folder, out = run
    assert "geometry: residual_input: participation ratio" in out
    page = (folder / "report.html").read_text()
    assert "Geometry of the residual stream" in page
    for name in ("geometry-dimensions", "geometry-spectra", "geometry-novelty"):
        assert f"data-name='{name}'" in page
    assert nl.load(folder).metadata["analyses"] == ["geometry"]


def test_a_second_start_repeats_nothing(run, monkeypatch):
    folder, _ = run
    monkeypatch.chdir(folder.parent)
    before = snapshot(folder / "geometry")
    ended = command("analyze", *SMALL, "analysis=geometry", "metrics=none", POINTS, "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    assert "already finished" in ended.out
    (folder / "metadata.json").rename(folder / "metadata.old")  # as a run that was stopped behind the analysis
    try:
        ended = command("analyze", *SMALL, "analysis=geometry", "metrics=none", POINTS, "hydra.run.dir=run")
    finally:
        (folder / "metadata.old").unlink()
    assert "geometry: already finished" in ended.out
    assert snapshot(folder / "geometry") == before


def test_units_and_an_analysis_go_into_one_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("analysis=geometry", "metrics=[activation_rms]", "layers=blocks[*].mlp.hidden".replace("[*]", ""))
    ended = command("analyze", *SMALL, *words, "hydra.run.dir=out/run")
    assert ended.code == 0, ended.err
    runs = nl.load_runs("out/**")  # the analysis's own folder is no run
    assert set(runs.run) == {"out/run"}
    assert len(runs) == 2 * 48


def test_an_analysis_is_refused_where_it_cannot_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = command("analyze", "analysis=geometry", "metrics=none", "logger=none", "hydra.run.dir=run")  # an mlp on images
    assert ended.code == 1
    assert "MLP has no blocks" in ended.err
    assert not (tmp_path / "run").exists()
    ended = command("analyze", "metrics=none", "hydra.run.dir=run")
    assert ended.code == 1
    assert "no metric is chosen" in ended.err
    ended = command("analyze", "analysis=geometri", "hydra.run.dir=run")
    assert "Did you mean 'geometry'?" in ended.err


def test_lines_say_the_largest_step_and_the_busiest_expert():
    metrics = pd.DataFrame(
        {"hook_point": "residual_input", "layer": [0, 1], "d_pr": [2.0, 3.5], "hidden_dim": 8, "tokens_observed": 100_000}
    )
    novelty = pd.DataFrame(
        {"hook_point": "residual_input", "transition": ["0->1", "1->2"], "linear_cka_debiased": [0.9, 0.4]},
    )
    router = pd.DataFrame({"layer": [0, 3], "load_imbalance": [1.1, 2.25]})
    lines = nl.GeometryResult(metrics, novelty, router).summary().splitlines()
    assert lines[0].endswith("participation ratio 2.0 at layer 0, 3.5 at layer 1, out of 8 dimensions; 100,000 tokens")
    assert lines[1].endswith("largest change from layer 1->2, debiased CKA 0.400")
    assert "layer 3" in lines[2]
    assert "2.25 times" in lines[2]


def test_a_selector_needs_no_quotes_of_its_own_and_is_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("metrics=[activation_mean]", "layers=blocks[1].mlp.hidden", "hydra.run.dir=run")
    ended = command("analyze", *SMALL, *words, r"dataset.select=regex:\b(the|it's)\b & 0:60, -1 & loss")
    assert ended.code == 0, ended.err
    about = nl.load("run").metadata
    assert about["config"]["dataset"]["select"] == r"regex:\b(the|it's)\b & 0:60, -1 & loss"
    counts = about["data"]["counts"]
    rows = next(row["rows"] for row in about["rows"])
    assert rows == counts["counted"] > 0
    assert counts["counted"] + counts["not_selected"] + counts["special_left_out"] == 64 * (6000 // 64)


def test_the_geometry_takes_the_budget_and_the_width_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("analysis=geometry", "metrics=none")
    ended = command("analyze", *SMALL, *words, "budget.width=16", "hydra.run.dir=refused")
    assert ended.code == 1
    assert "budget.width is 16" in ended.err
    ended = command("analyze", *SMALL, *words, "budget.width=16", "covariance=sketch:12", "hydra.run.dir=sketch")
    assert ended.code == 0, ended.err
    assert {w["covariance"] for w in load_bundle("sketch/geometry").metadata["covariance"]} == {"sketch:12"}
    ended = command(
        "analyze",
        *SMALL,
        *words,
        "analysis.geometry.metrics=spectrum",
        "budget.memory=600KiB",
        "budget.max_passes=2",
        "hydra.run.dir=passes",
    )
    assert ended.code == 0, ended.err
    assert len(load_bundle("passes/geometry").metadata["passes"]) == 2
    ended = command("analyze", *SMALL, *words, "budget.width=16", "dry_run=true", "hydra.run.dir=plan")
    assert ended.code == 0, ended.err
    assert "the pass would be refused: site" in ended.out


def test_a_finished_run_is_analysed_again_without_measuring(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("logger=none", "model.net.hidden=[12]", "metrics=[rq,activation_mean]")
    clusters = ("analysis=clusters", "analysis.clusters.draws=2")
    ended = command("analyze", *words, *clusters, "hydra.run.dir=first")
    assert ended.code == 0, ended.err
    again = ("logger=none", "model.net.hidden=[12]", "results=first")
    ended = command("analyze", *again, *clusters, "analysis.clusters.n_clusters=5", "hydra.run.dir=second")
    assert ended.code == 0, ended.err
    first, second = nl.load("first"), nl.load("second")
    pd.testing.assert_series_equal(first.units["activation_mean"], second.units["activation_mean"])
    assert second.metadata["results"] == "first"
    assert list(second.analyses) == ["clusters"]
    for words, line in {
        ("analysis=none",): "results= gives the tables to analyses, but none is chosen",
        ("analysis=clusters", "seed=1"): "results=first is of a network with the fingerprint",
        ("analysis=modularity",): "results=first lacks forward_cov",
    }.items():
        ended = command("analyze", *again, *words, "hydra.run.dir=third")
        assert ended.code == 1
        assert line in ended.err


def test_a_run_that_is_stopped_within_an_analysis_keeps_what_is_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        "model=mlp",
        "dataset.calibration=64",
        "metrics=[activation_variance]",
        "analysis=modularity",
        "layers=[relu1,relu2]",
        "logger=none",
    )
    words += ("model.net.hidden=[12,10]", "analysis.modularity.associations=[redundancy]", "analysis.modularity.shuffles=2")
    assert command("analyze", *words, "hydra.run.dir=whole").code == 0
    sought, seek = [], Search.__call__

    def stopped(self, association, rng):
        sought.append(len(association))
        if len(sought) == 2:
            raise KeyboardInterrupt
        return seek(self, association, rng)

    monkeypatch.setattr(Search, "__call__", stopped)
    with contextlib.suppress(KeyboardInterrupt):
        command("analyze", *words, "hydra.run.dir=run")
    assert not Path("run/metadata.json").exists()
    ended = command("analyze", *words, "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    assert "measuring: already finished" in ended.out
    assert sought == [12, 10, 10], "the first layer was not sought again"
    one, other = nl.load("run"), nl.load("whole")
    pd.testing.assert_frame_equal(one.units, other.units)
    pd.testing.assert_frame_equal(one.analyses["modularity"]["modules"], other.analyses["modularity"]["modules"])
    assert one.metadata["evaluation"] == other.metadata["evaluation"]
    assert not Path("run/sums").exists()
