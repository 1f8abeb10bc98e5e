"""Figures on paper: whatever a page draws is drawn by matplotlib too, and its files replace nobody else's."""

import importlib
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from command import command
from transformers import LlamaConfig, LlamaForCausalLM

import nodelens as nl
from nodelens.analysis.cascade.cascade_analysis import CascadeAnalysis
from nodelens.analysis.clusters.clusters_analysis import ClustersAnalysis
from nodelens.analysis.clusters.halo_analysis import HaloAnalysis
from nodelens.analysis.modularity.modularity_analysis import ModularityAnalysis
from nodelens.analysis.patching.patching import AttributionPatching, LogitAttribution, Patching
from nodelens.analysis.supernodes.supernode_lesions import SupernodeLesions
from nodelens.analysis.supernodes.supernodes import Supernodes
from nodelens.analysis.validity.validity_analysis import ValidityAnalysis
from nodelens.report import paper
from nodelens.report.analysis_plots import kind_of, plots_of
from nodelens.report.charts import dots, panels
from nodelens.report.page import plots_of_result
from nodelens.report.plot import Plot, figure_of, names_axis
from nodelens.results.findings import Findings

REPORT = Path(paper.__file__).parent
KINDS = {file.stem.removesuffix("_figures") for file in REPORT.glob("*_figures.py") if "def figures_of" in file.read_text()}


@pytest.fixture(scope="module")
def result():
    """A small language model with every analysis that has figures."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**size, initializer_range=0.3)).eval()
    ids = torch.randint(1, 32, (16, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": part, "labels": part} for part in ids.split(4)]
    clean, corrupt = [3, 4, 5, 6], [3, 9, 5, 6]
    pair = {"clean": clean, "corrupt": corrupt, "answer": 5, "wrong": 9}
    modules = ModularityAnalysis(associations=["forward_cov"], shuffles=2, alignments=9, starts=1)
    supernodes = {
        "supernodes": Supernodes(supernode_fraction=0.125, connectivity_topk=4, resamples=2, draws=2, ablate=4),
        "sets": SupernodeLesions(draws=3, predictions=None),
    }
    analyses = {
        "clusters": ClustersAnalysis(draws=2),
        "halo": HaloAnalysis(permutations=20),
        "cascade": CascadeAnalysis(counts=(1, 2), draws=3, pairs=3, resamples=20),
        "validity": ValidityAnalysis(pairs=6, shares=(0.2, 0.4), curves=2, draws=3, resamples=20, predictions=None),
        "modularity": modules,
        "geometry": nl.get_analysis("geometry"),
        "logit_lens": nl.get_analysis("logit_lens"),
        "patching": Patching(["residual", "heads"], **pair),
        "attributed": AttributionPatching(["residual", "heads"], **pair),
        "logits": LogitAttribution(prompts=[clean], answer=5),
    }
    layers = [f"model.layers.{k}.mlp.{name}" for k in range(2) for name in ("gate_proj", "down_proj")]
    found = nl.analyze(model, data, ["taylor", "linear_cka"], layers, analysis=analyses)
    found.analyses |= nl.analyze(model, data, ["taylor"], list(nl.find_groups(model)), analysis=supernodes).analyses
    found.analyses["over_epochs"] = modules.over_epochs({0: found.analyses["modularity"], 1: found.analyses["modularity"]})
    found.analyses["types_over_epochs"] = ClustersAnalysis().over_epochs(dict.fromkeys((0, 1), found.analyses["clusters"]))
    return found


def test_every_kind_of_analysis_is_drawn_on_paper(result):
    drawn = {}
    for name, found in result.analyses.items():
        for plot in plots_of(found):
            assert paper.draw(plot.figure).axes, f"{name}.{plot.name}"
            drawn.setdefault(kind_of(found), []).append(plot.name)
    assert set(drawn) == KINDS, "a kind of figures that no analysis above has"
    assert drawn["patching"] == ["patching-residual", "patching-heads", "by-head", *drawn["patching"][3:]]
    for plot in plots_of_result(result):
        assert paper.draw(plot.figure).axes, plot.name


def test_predicted_tokens_are_drawn_on_paper():
    rows = [
        {"sample": 0, "layer": layer, "position": k, "token": "a$", "rank": 1, "predicted": " b\n$", "probability": 0.5}
        for layer in range(3)
        for k in range(4)
    ]
    frames = {"predictions": pd.DataFrame(rows), "layers": pd.DataFrame({"layer": [0], "kl": [1.0]})}
    tokens, lens = plots_of(Findings("lens", frames))
    assert paper.draw(tokens.figure).axes[0].texts[0].get_text() == r"_b\n\$"
    assert paper.draw(lens.figure).axes


def test_a_sweep_is_drawn_on_paper_and_a_finished_one_with_the_options_of_each_start(tmp_path):
    words = ("criterion=[magnitude,random]", "amounts=[0.25,0.5]", "latency.batches=[]", "logger=none", "dataset.calibration=64")
    first = command("prune", *words, f"hydra.run.dir={tmp_path}", "report.plotly=cdn")
    assert first.code == 0, first.err
    assert "https://cdn.plot.ly" in (tmp_path / "report.html").read_text()
    again = command("prune", *words, f"hydra.run.dir={tmp_path}", "report.figures=[pdf,svg]")
    assert again.code == 0, again.err
    assert "already finished" in again.out
    assert "https://cdn.plot.ly" not in (tmp_path / "report.html").read_text()
    assert {"curves.pdf", "curves.svg", "curves.csv", "pareto.pdf"} <= {file.name for file in (tmp_path / "figures").iterdir()}


def test_dots_have_their_own_colours_symbols_and_angles():
    marker = {"color": ["#0072b2", "rgba(213,94,0,0.5)", "#009e73"], "symbol": ["circle", "triangle-up", "circle-open"]}
    drawn = paper.draw(figure_of([dots([0, 1, 2], [0, 0, 0], marker=marker)]))
    plain, triangle, hollow = drawn.axes[0].collections
    assert plain.get_facecolor()[0][:3] == pytest.approx((0, 0x72 / 255, 0xB2 / 255))
    assert triangle.get_facecolor()[0] == pytest.approx((213 / 255, 94 / 255, 0, 0.5))
    assert len(hollow.get_facecolor()) == 0
    scaled = {"color": np.array([0.0, 5, 10]), "colorscale": "Viridis", "symbol": ["circle", "square", "circle"]}
    circles, square = paper.draw(figure_of([dots([0, 1, 2], [0, 0, 0], marker=scaled)])).axes[0].collections
    assert circles.norm.vmax == square.norm.vmax == 10, "one scale for all symbols"


def test_the_network_has_its_arrows_and_names_on_paper(result):
    network = next(plot for plot in plots_of_result(result) if plot.name == "network")
    axis = paper.draw(network.figure).axes[0]
    named = next(trace for trace in network.figure.data if trace.mode == "markers+text")
    assert [text.get_text() for text in axis.texts] == list(named.text)
    turned = paper.draw(figure_of([dots([0, 1], [0, 0], marker={"symbol": "triangle-up", "angle": np.array([0.0, 90.0])})]))
    up, right = (found.get_paths()[0].vertices for found in turned.axes[0].collections)
    np.testing.assert_allclose(right, np.stack([up[:, 1], -up[:, 0]], 1), atol=1e-9)


def test_a_figure_is_drawn_once_for_all_formats(monkeypatch, tmp_path):
    calls, draw = [], paper.draw
    monkeypatch.setattr(paper, "draw", lambda *given: calls.append(given) or draw(*given))
    plot = Plot("a/b", "", "", figure_of([dots([1], [2])]), pd.DataFrame({"x": [1]}))
    files = paper.write_plots([plot], tmp_path, ["png", "svg", "pdf"])
    assert [file.name for file in files] == ["a_b.png", "a_b.svg", "a_b.pdf"]
    assert all(file.stat().st_size for file in files)
    assert (tmp_path / "a_b.csv").read_text() == "x\n1\n"
    assert len(calls) == 1


def test_data_of_somebody_else_stay(tmp_path):
    figure, table = figure_of([dots([1], [2])]), pd.DataFrame({"x": [1]})
    (tmp_path / "results.csv").write_text("mine\n")
    with pytest.raises(ValueError, match=r"results.pdf has its data in results.csv, and .*results.csv holds other data: give the"):
        nl.export(figure, tmp_path / "results.pdf", table)
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]
    for number in (1, 2):  # those of an earlier export are replaced
        nl.export(figure, tmp_path / "own.svg", pd.DataFrame({"x": [number]}))
    assert (tmp_path / "own.csv").read_text() == "x\n2\n"


def test_an_export_leaves_the_backend_of_a_notebook_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(matplotlib, "use", lambda name: pytest.fail(f"the backend becomes {name}"))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import would fail
    importlib.reload(paper).export(figure_of([dots([1], [2])]), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size


@pytest.mark.parametrize("name", ["supernodes", "geometry"])
def test_results_of_every_analysis_have_plots(name, result):
    found = result.analyses[name]
    first, *_ = plots_of(found)
    assert found.plot().layout.title.text == found.plot(first.name).layout.title.text == first.title
    with pytest.raises(ValueError, match=f"{name} has no figure 'x'.*{first.name}"):
        found.plot("x")


def test_a_correlation_that_is_undefined_is_said(result):
    found = result.analyses["attributed"]
    found.metadata["spearman"] = None
    (plot,) = [plot for plot in plots_of(found) if plot.name == "exact"]
    assert "Spearman undefined" in plot.caption


def test_many_names_stand_upright_and_panels_share_what_they_share_on_the_page():
    figure = figure_of([dots([0.0], [1.0])], xaxis=names_axis([f"metric_{k}" for k in range(40)], tickangle=-45))
    ticks = paper.draw(figure).axes[0].get_xticklabels()
    assert {tick.get_rotation() for tick in ticks} == {90}
    assert max(tick.get_fontsize() for tick in ticks) < 7.1
    shared = panels(
        ["a", "b"], lambda name: [dots([0.0, 1.0], [1.0, 2.0 if name == "a" else 9.0])], axes={"y": {"rangemode": "tozero"}}
    )
    first, second = paper.draw(shared).axes
    assert first.get_ylim() == second.get_ylim()
    assert first.get_ylim()[0] == 0
    own = panels(["a", "b"], lambda name: [dots([0.0], [1.0])], shared=False)
    assert [axis.get_ylabel() for axis in paper.draw(own).axes] == ["a", "b"]


def test_a_front_has_steps_on_paper_as_on_the_page():
    front = {"type": "scatter", "mode": "lines", "x": [1, 2], "y": [0.5, 0.9]}
    steps, straight = (paper.draw(figure_of([front | {"line": style}])).axes[0].lines[0] for style in ({"shape": "hv"}, {}))
    assert (steps.get_drawstyle(), straight.get_drawstyle()) == ("steps-post", "default")
