"""The figures of each page in a notebook: what a loaded run lists is what it draws, and it is what its page shows."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command import command
from hostile import hostile_result, hostile_sweep, hostile_training

import nodelens as nl
from nodelens.pruning.sweep.ranking import best_cell
from nodelens.report.metric_figures import first_of
from nodelens.report.notebook import kinds_of
from nodelens.report.training_figures import units_over_epochs
from nodelens.results.files import write_json
from nodelens.results.result import Result

FEW = ("model=cnn", "dataset.calibration=64", "logger=none")
OF_UNITS = ["overview", "units", "agreement"]


def run(folder, task, *words):
    ended = command(task, *FEW, *words, f"hydra.run.dir={folder}")
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    words = ("criterion=[magnitude,taylor]", "amounts=[0.25,0.5]", "latency.batches=[]")
    return run(tmp_path_factory.mktemp("notebook") / "prune", "prune", *words)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    words = ("callbacks=measure", "metrics=[rq,taylor]", "trainer.max_epochs=2")
    return run(tmp_path_factory.mktemp("notebook") / "train", "train", *words)


def on_page(folder):
    """{name: figure} of the page of a run."""
    page = (folder / "report.html").read_text()
    keys = {name: key for key, name in re.findall(r"<figure class='plot' data-plot='([^']*)' data-name='([^']*)'", page)}
    return {name: json.loads(re.search(f"id='data-{key}'>(.*?)</script>", page, re.DOTALL)[1]) for name, key in keys.items()}


def check_kinds(folder, wanted, tmp_path):
    """Every kind that is listed is drawn, in a notebook as on the page, and exported with its data."""
    result, page = nl.load(folder), on_page(folder)
    assert kinds_of(result) == wanted
    assert result.summary().splitlines()[-1] == f"plots: {', '.join(wanted)}"
    for kind in wanted:
        figure = result.plot(kind)
        assert figure.layout.title.text
        if kind in page:
            assert json.loads(figure.to_json())["data"] == page[kind]["data"]
        assert nl.export(figure, tmp_path / f"{kind}.svg").stat().st_size > 1000
        assert (tmp_path / f"{kind}.csv").read_text().count("\n") > 1
    assert set(page) <= set(wanted)
    assert result.plot().layout.title == result.plot(wanted[0]).layout.title
    with pytest.raises(ValueError, match=f"this result has no plot 'x'. It has {', '.join(wanted)}$"):
        result.plot("x")


def test_a_sweep_lists_and_draws_the_figures_of_its_page(sweep, tmp_path):
    check_kinds(sweep, ["curves", "pareto", "ranking", "kept", *OF_UNITS, "scatter"], tmp_path)
    words = nl.load(sweep)._repr_html_()
    assert "cells finished: 4 of 4; criteria: 2; test accuracy, dense: " in words
    assert "plots: curves, pareto" in words


def test_a_training_lists_and_draws_the_figures_of_its_page(training, tmp_path):
    own = ["loss", "epochs", "units_over_epochs", "stability"]
    check_kinds(training, [*own, *OF_UNITS, "scatter"], tmp_path)
    result = nl.load(training)
    assert "epochs: 2; epochs measured: 2; units are those after epoch: 1" in result.summary()
    pd.testing.assert_frame_equal(result.units, pd.read_parquet(training / "epochs/units_001.parquet"))
    assert result.metadata["evaluation"]["accuracy"] == json.loads((training / "result.json").read_text())["accuracy"]
    assert result.plot("epochs", metric="taylor").layout.yaxis.title.text == "taylor"


def test_a_training_without_measurement_has_its_loss(tmp_path):
    write_json(tmp_path / "result.json", {"accuracy": 0.5, "loss": 1.0, "samples": 3, "epochs": 2})
    history = pd.DataFrame({"epoch": [0, 1], "train/loss": [2.0, 1.0]})
    history.to_csv(tmp_path / "history.csv", index=False)
    result = nl.load(tmp_path)
    assert kinds_of(result) == ["loss"]
    assert not len(result.units)
    assert "test accuracy, 3 samples of the split test: 50.00 %; epochs: 2" in result._repr_html_()
    assert list(result.plot("loss").data[0].y) == [2.0, 1.0]
    (tmp_path / "result.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no finished training: result.json is missing; run its command again"):
        nl.load(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    write_json(tmp_path / "result.json", [1])
    with pytest.raises(ValueError, match=r"result.json is \[1\]; it is a dictionary: restore it from a copy, or run the training"):
        nl.load(tmp_path)


def test_names_of_layers_are_text_and_analyses_of_epochs_have_their_figures(tmp_path):
    trained, pruned = nl.load(hostile_training(tmp_path / "train")), nl.load(hostile_sweep(tmp_path / "prune"))
    assert list(trained.analyses) == ["clusters", "modularity", "lens"]
    for result in (trained, pruned):
        for kind in kinds_of(result):
            assert "<script" not in json.dumps(json.loads(result.plot(kind).to_json()))
    assert "<script" not in trained._repr_html_()
    assert trained.plot("clusters.types").data
    every = [*kinds_of(trained), *kinds_of(pruned), *kinds_of(hostile_result())]
    page = (Path(__file__).parents[2] / "docs/report.md").read_text()
    assert [kind for kind in every if kind not in trained.analyses and f"`{kind}`" not in page] == []


def test_a_cell_shows_the_share_of_units_that_it_keeps(tmp_path):
    folder = hostile_sweep(tmp_path)
    result, table = nl.load(folder), pd.read_parquet(folder / "sweep.parquet")
    best = best_cell(table)["name"]
    assert result.plot("kept")._table["cell"].unique().tolist() == [best]
    cell = "taylor-uniform-none-low-0.5-0"
    figure = result.plot("kept", cell=cell)
    assert list(figure.data[0].x) == [0.5, 1.0]
    assert figure._table.to_dict("records")[0] == {"group": "fc1", "share": 0.5, "cell": cell}
    with pytest.raises(ValueError, match=r"no finished cell 'taylor' to plot\..* There are .*taylor-uniform-none-low-0.25-0, "):
        result.plot("kept", cell="taylor")
    (folder / "cells" / f"{cell}.json").unlink()
    with pytest.raises(ValueError, match=rf"what cell '{cell}' removed cannot be read in .*cells: choose another cell"):
        result.plot("kept", cell=cell)
    for file in (folder / "cells").glob("*.json"):
        file.unlink()
    assert "kept" not in kinds_of(result)


def test_every_unit_has_a_line_up_to_two_hundred_and_the_median_one_of_its_own():
    index = pd.MultiIndex.from_product([["a", "b"], range(300)], names=["layer", "unit"])
    rng = np.random.default_rng(0)
    tables = {epoch: pd.DataFrame({"rq": rng.random(600), "snr": 0.0}, index) for epoch in (0, 2, 5)}
    tables[0].iloc[301, 0], tables[5].iloc[302, 0] = np.nan, np.inf
    plot = units_over_epochs(tables, "rq", "b")
    *units, median = plot.figure.data
    assert len(units) == 200
    last = [line.y[-1] for line in units]
    assert last[:-1] == sorted(last[:-1])
    values = np.stack([table["rq"].to_numpy()[300:] for table in tables.values()])
    np.testing.assert_allclose(median.y, [np.nanmedian(np.where(np.isfinite(row), row, np.nan)) for row in values])
    assert plot.table.shape == (300, 3)
    assert set(plot.table.index.get_level_values("layer")) == {"b"}
    first = units_over_epochs(tables)
    assert (first.title, first.figure.layout.yaxis.title.text) == ("Every unit over epochs: a", "rq")


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("units_over_epochs", {"layer": "fc9"}, "no layer 'fc9' to plot. There are"),
        ("units_over_epochs", {"metric": "taylr"}, "no metric 'taylr' to plot. Did you mean 'taylor'. There are rq, taylor"),
        ("loss", {"metric": "rq"}, r"plot\('loss'\) takes no metric: it is an option of epochs, units_over_epochs, units$"),
        ("epochs", {"cell": "a"}, r"plot\('epochs'\) takes no cell: no plot has this option$"),
        ("los", {}, "this result has no plot 'los'. Did you mean 'loss'. It has loss, epochs"),
        (3, {}, "this result has no plot '3'"),
    ],
)
def test_what_cannot_be_drawn_says_what_can(kind, options, words, training):
    with pytest.raises(ValueError, match=words):
        nl.load(training).plot(kind, **options)


def test_an_empty_result_has_no_plots():
    empty = Result(pd.DataFrame(), pd.DataFrame())
    assert kinds_of(empty) == []
    with pytest.raises(ValueError, match=r"this result has no plot .overview.. It has none"):
        empty.plot()


def test_of_many_names_an_error_lists_twenty():
    names = [f"layer{k}" for k in range(30)]
    assert first_of(names, "layer7", "layer")[:2] == ["layer7", "layer0"]
    with pytest.raises(ValueError, match=r"no layer 'x' to plot. There are layer0, .*, layer19 and 10 more$"):
        first_of(names, "x", "layer")
