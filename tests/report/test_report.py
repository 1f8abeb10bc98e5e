import base64
import re

import numpy as np
import pytest
from command import command
from PIL import Image
from rich.console import Console

import nodelens as nl
from nodelens.app.tasks.show import show_result
from nodelens.report import write_page
from nodelens.report.figures import short


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    ended = command("analyze", f"hydra.run.dir={folder}", "model=cnn", "dataset.calibration=64", "logger=none")
    assert ended.code == 0, ended.err
    return folder


def test_the_page_holds_its_figures_definitions_sources_and_gaps(run):
    page = (run / "report.html").read_text()
    figures = sorted(p.read_bytes() for p in (run / "figures").glob("*.png"))
    assert sorted(base64.b64decode(f) for f in re.findall(r"base64,([^']+)'", page)) == figures
    assert len(figures) == 3
    result = nl.load(run)
    for column, about in result.metadata["metrics"].items():
        assert column in page
        assert about["source"].split(",")[0].split("&")[0] in page
    for words in ("Definitions", "Missing values and their reasons", "of the split calibration", "no checkpoint", "relative=True"):
        assert words in page


@pytest.mark.parametrize("name", ["units", "agreement", "layers"])
def test_a_figure_has_something_in_it(name, run):
    with Image.open(run / f"figures/{name}.png") as image:
        assert 400 < image.width < 2400
        assert image.height > 200
        assert np.asarray(image.convert("L")).std() > 5


def test_the_page_is_made_of_the_saved_files_alone(run):
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert write_page(run).read_text() == before
    with pytest.raises(FileNotFoundError, match="has no finished run"):
        write_page(run / "figures")


def test_a_page_that_was_lost_comes_back(run):
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert command("analyze", f"hydra.run.dir={run}", "model=cnn", "dataset.calibration=64", "logger=none").code == 0
    assert (run / "report.html").read_text() == before


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
    assert short("a" * 50) == "…" + "a" * 39
    assert short("fc1") == "fc1"
