"""Figures of modules, from what is saved."""

import numpy as np
import pytest

from nodelens.analysis.modularity.modularity_analysis import ModularityAnalysis
from nodelens.metrics import Metric
from nodelens.report import write_figures
from nodelens.report.modularity_figures import figures_of


class _Given(Metric):
    """A metric of pairs, whose matrices are given."""

    names = ("given",)
    kind = "pair"


def found_in(matrices):
    import pandas as pd

    from nodelens.results.result import Result

    layers = list(dict.fromkeys(layer for layer, _ in matrices))
    index = pd.MultiIndex.from_product([layers, range(12)], names=["layer", "unit"])
    result = Result(pd.DataFrame(index=index), pd.DataFrame(index=pd.Index(layers, name="layer")), matrices)
    names = dict.fromkeys(dict.fromkeys(name for _, name in matrices), _Given())
    return ModularityAnalysis(associations=names, shuffles=2, alignments=9, starts=1)(None, (), result=result)


@pytest.fixture(scope="module")
def blocks():
    return np.kron(np.eye(3), np.ones((4, 4)))


def test_figures_are_drawn_from_the_saved_findings(blocks, tmp_path):
    matrices = {(layer, name): blocks for layer in ("fc1", "fc2") for name in ("a", "b", "c")}
    found_in(matrices).save(tmp_path)
    paths = write_figures(tmp_path)
    assert sorted(path.name for path in paths) == ["alignment.png", "graphs.png", "q.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_one_association_and_a_layer_without_modules_are_drawn(blocks):
    found = found_in({("fc1", "a"): blocks, ("fc2", "a"): np.zeros((12, 12))})
    assert [plot.name for plot in figures_of(found)] == ["q", "graphs"]
    nothing = found_in({("fc2", "a"): np.zeros((12, 12))})
    assert list(figures_of(nothing)) == []


def test_the_alignment_of_each_layer_is_chosen_in_a_menu(blocks):
    names = ("a", "b", "c")
    two = found_in({(layer, name): blocks for layer in ("fc1", "fc2") for name in names} | {("fc3", "a"): blocks})
    plot = list(figures_of(two))[-1]
    assert plot.title == "Do associations find the same modules?"
    (menu,) = plot.figure.layout.updatemenus
    assert [button.label for button in menu.buttons] == ["fc1", "fc2"], "one association has nothing to compare"
    assert [trace.visible for trace in plot.figure.data] == [True, False]
    for trace in plot.figure.data:
        assert np.isnan(np.diag(trace.z)).all()
        assert trace.z[0, 1] == trace.z[1, 0] == 1, "the same matrix has the same modules"
    one = list(figures_of(found_in({("fc1", name): blocks for name in names})))[-1]
    assert one.title == "Do associations find the same modules? fc1"
    assert not one.figure.layout.updatemenus
