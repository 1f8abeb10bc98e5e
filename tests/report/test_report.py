import json
import re

import numpy as np
import pytest
from command import command
from PIL import Image
from rich.console import Console

import nodelens as nl
from nodelens.app.tasks.show import show_result
from nodelens.report import write_page
from nodelens.report.plot import short


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    ended = command(
        "analyze", f"hydra.run.dir={folder}", "model=cnn", "dataset.calibration=64", "logger=none", "report.figures=[svg]"
    )
    assert ended.code == 0, ended.err
    return folder


def embedded(folder, key):
    """The data of a page under a key, in it or beside it."""
    beside = folder / "report_files" / f"{key}.js"
    if beside.is_file():
        return json.loads(beside.read_text().removeprefix(f'nodelens.put("{key}",').removesuffix(");"))
    return json.loads(re.search(f"id='data-{key}'>(.*?)</script>", (folder / "report.html").read_text(), re.DOTALL)[1])


def test_the_page_holds_its_figures_definitions_sources_and_gaps(run):
    page = (run / "report.html").read_text()
    names = re.findall(r"<figure class='plot' data-plot='([^']*)' data-name='([^']*)'", page)
    assert [name for _, name in names] == ["overview", "units", "agreement", "layers"]
    assert {path.stem for path in (run / "figures").glob("*.svg")} == {name for _, name in names}
    assert all(embedded(run, key)["data"] for key, _ in names)
    result = nl.load(run)
    for column, about in result.metadata["metrics"].items():
        assert column in page
        assert about["source"].split(",")[0].split("&")[0] in page
    for words in ("Definitions", "Missing values and their reasons", "on the split calibration", "no checkpoint", "relative=True"):
        assert words in page


def test_the_page_says_the_command_that_made_it(run):
    copied = re.search(r"data-copy='([^']*)'", (run / "report.html").read_text())[1]
    assert copied.startswith("python analyze.py ")
    assert "model=cnn" in copied
    assert "dataset.calibration=64" in copied


def test_the_script_lies_beside_the_page_in_it_or_on_the_network(run):
    assert "<script src='plotly.min.js'></script>" in (run / "report.html").read_text()
    assert (run / "plotly.min.js").stat().st_size > 1_000_000
    assert "<script src='https://cdn.plot.ly/plotly-" in write_page(run, "cdn").read_text()
    assert write_page(run, "inline").stat().st_size > 1_000_000
    with pytest.raises(ValueError, match=r"report.plotly is 'net'; it must be shared, inline or cdn"):
        write_page(run, "net")
    with pytest.raises(ValueError, match=r"report.figures has 'gif'; it must be a list of png, svg and pdf, such as \[pdf\]"):
        write_page(run, figures=["gif"])
    with pytest.raises(ValueError, match=r"report.figures has 'pdf'; it must be a list of png, svg and pdf, such as \[pdf\]"):
        write_page(run, figures="pdf")
    write_page(run)


def test_a_wrong_option_stops_before_anything_is_measured(tmp_path):
    ended = command("analyze", f"hydra.run.dir={tmp_path}/run", "report.plotly=net", "logger=none")
    assert ended.code == 1
    assert "report.plotly is 'net'" in ended.err
    assert not (tmp_path / "run/units.parquet").exists()


def test_units_are_kept_with_seven_digits(run):
    import base64

    units = nl.load(run).units
    found = {c["name"]: np.frombuffer(base64.b64decode(c["data"]), f"<{c['kind']}") for c in embedded(run, "units-0")["columns"]}
    np.testing.assert_allclose(found["rq"], units["rq"], rtol=1e-6)
    np.testing.assert_array_equal(found["unit"], units.index.get_level_values("unit"))


def test_the_page_is_made_of_the_saved_files_alone(run):
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert write_page(run).read_text() == before
    with pytest.raises(FileNotFoundError, match="has no finished run"):
        write_page(run / "figures")


def test_a_page_that_was_lost_comes_back(run):
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    words = ("model=cnn", "dataset.calibration=64", "logger=none", "report.figures=[svg]")
    assert command("analyze", f"hydra.run.dir={run}", *words).code == 0
    assert (run / "report.html").read_text() == before


def test_a_finished_run_is_shown_with_the_options_of_each_start(run):
    words = ("model=cnn", "dataset.calibration=64", "logger=none", f"hydra.run.dir={run}")
    ended = command("analyze", *words, "report.plotly=cdn", "report.figures=[png]")
    assert ended.code == 0, ended.err
    assert "already finished" in ended.out
    assert "https://cdn.plot.ly" in (run / "report.html").read_text()
    assert (run / "figures/overview.png").is_file()
    assert command("analyze", *words).code == 0
    assert "https://cdn.plot.ly" not in (run / "report.html").read_text()


@pytest.mark.parametrize("kind", ["overview", "units", "agreement", "layers", "scatter"])
def test_a_figure_is_the_same_in_a_notebook_and_on_paper(kind, run, tmp_path):
    figure = nl.load(run).plot(kind)
    assert figure.layout.title.text
    nl.export(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert 400 < image.width < 2400
        assert np.asarray(image.convert("L")).std() > 5
    assert (tmp_path / "a.csv").read_text().count("\n") > 3


def test_figures_for_papers_are_pdf_and_svg(run, tmp_path):
    result = nl.load(run)
    assert nl.export(result.plot("units", metric="rq"), tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    text = nl.export(result.plot("scatter", x="rq", y="magnitude", layer="head"), tmp_path / "a.svg").read_text()
    assert "magnitude" in text
    assert nl.export(result.plot("scatter", x="rq", y="magnitude", layer="head"), tmp_path / "b.svg").read_text() == text
    with pytest.raises(ValueError, match=r"written to .png, .svg, .pdf files, not to 'a.gif'"):
        nl.export(result.plot("units"), tmp_path / "a.gif")


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("unit", {}, "this result has no plot 'unit'.*units"),
        ("units", {"metric": "rqq"}, "no metric 'rqq' to plot. Did you mean 'rq'. There are activation_mean"),
        ("scatter", {"x": "rqq"}, "no metric 'rqq' to plot.*rq"),
        ("scatter", {"layer": "conv"}, "no layer 'conv' to plot"),
        ("overview", {"x": "rq"}, r"plot\('overview'\) takes no x: it is an option of scatter"),
        ("scatter", {"metric": "rq"}, r"plot\('scatter'\) takes no metric"),
    ],
)
def test_a_plot_that_there_is_not_names_those_that_there_are(kind, options, words, run):
    with pytest.raises(ValueError, match=words):
        nl.load(run).plot(kind, **options)


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_shows_every_number_within_its_width(width, run):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        show_result(console, nl.load(run))
    text = console.export_text()
    result = nl.load(run)
    assert max(map(len, text.splitlines())) <= width
    for column in result.metadata["metrics"]:
        assert column in text
    assert f"{result.layers['effective_rank'].iloc[0]:.4g}" in text


def test_long_names_are_cut_at_a_dot():
    assert short("resnet.encoder.stages.0.layers.0.layer.0.convolution") == "…stages.0.layers.0.layer.0.convolution"
    assert short("a" * 30 + "b" * 30) == "a" * 19 + "…" + "b" * 20, "of a name that is no path both ends stay"
    assert short("fc1") == "fc1"
