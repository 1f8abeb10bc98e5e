"""Connectivity of units within their layer."""

import numpy as np
import pandas as pd
import torch
from torch import nn

import nodelens as nl
from nodelens.analysis.modularity.connectivity import connectivity_table
from nodelens.analysis.modularity.find_modules import Modules
from nodelens.analysis.modularity.graph import Graph
from nodelens.analysis.modularity.layer_modules import LayerModules
from nodelens.analysis.modularity.modularity_analysis import ModularityAnalysis
from nodelens.analysis.modularity.significance import Significance


def table(weights, labels):
    graph = Graph.of(np.array(weights, float), absolute=False, signed=True)
    modules = Modules(graph.labels(np.array(labels)), 0.0)
    found = LayerModules(modules, Significance.of(0.0, ()), graph, "none")
    return connectivity_table(found, np.arange(len(graph.live))).set_index("unit")


def test_links_inside_and_outside_of_modules_are_told_apart():
    weights = [[0, 3, 1, 0, 0, 0], [3, 0, 1, 0, 2, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 4, 0], [0, 2, 0, 4, 0, 0], [0] * 6]
    found = table(weights, [0, 0, 0, 1, 1])
    assert found.index.tolist() == [0, 1, 2, 3, 4], "a dead unit has no row"
    assert found["strength"].tolist() == [4, 6, 2, 4, 6]
    inside = np.array([4, 4, 2])
    np.testing.assert_allclose(found["within_z"], [*((inside - inside.mean()) / inside.std()), 0, 0], atol=1e-12)
    np.testing.assert_allclose(found["participation"], [0, 1 - (4 / 6) ** 2 - (2 / 6) ** 2, 0, 0, 1 - (4 / 6) ** 2 - (2 / 6) ** 2])


def test_the_sign_of_an_association_does_not_count():
    weights = np.array([[0, 3, -1], [3, 0, 1], [-1, 1, 0]])
    pd.testing.assert_frame_equal(table(weights, [0, 0, 1]), table(np.abs(weights), [0, 0, 1]))


def test_an_analysis_has_a_row_for_each_live_unit_of_each_association():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9))
    with torch.no_grad():
        net[0].weight[4], net[0].bias[4] = 0, -1
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    analysis = ModularityAnalysis(associations=["forward_cov"], shuffles=0, starts=1)
    result = nl.analyze(net, [x], [], ["1", "2"], analysis=analysis)
    rows = result.analyses["modularity"]["connectivity"]
    assert list(rows) == ["layer", "association", "unit", "module", "strength", "within_z", "participation"]
    assert len(rows) == 11 + 9
    own, matrix = rows[rows["layer"] == "1"], np.abs(result.matrices["1", "forward_cov"])
    assert 4 not in own["unit"].tolist()
    labels = result.units.loc["1", "module_forward_cov"]
    assert own["module"].tolist() == labels[labels >= 0].tolist()
    np.testing.assert_allclose(own["strength"], (matrix.sum(1) - matrix.diagonal())[own["unit"]], rtol=1e-6)
    assert own["participation"].between(0, 1).all()
