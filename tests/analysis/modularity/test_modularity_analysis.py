"""analysis=[modularity]: tables, columns and pictures of planted associations, what is missing, and options."""

import itertools

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import nn

import nodelens as nl
from nodelens.analysis.modularity.find_modules import find_modules
from nodelens.analysis.modularity.layer_modules import WIDEST, sorted_matrix
from nodelens.analysis.modularity.modularity_analysis import ModularityAnalysis
from nodelens.metrics import Metric, get_metric
from nodelens.results.findings import load_findings
from nodelens.results.result import Result


class _Known(Metric):
    """A metric of pairs, whose matrices are given."""

    names = ("known",)
    kind = "pair"


def planted(labels, rng, noise=0.3):
    weights = noise * np.triu(rng.random((len(labels), len(labels))), 1)
    return weights + weights.T + (labels[:, None] == labels)


def result_of(matrices, samples=100):
    widths = {layer: len(matrix) for (layer, _), matrix in matrices.items()}
    index = pd.MultiIndex.from_tuples([(layer, k) for layer, n in widths.items() for k in range(n)], names=["layer", "unit"])
    layers = pd.DataFrame({"units": widths}, index=pd.Index(list(widths), name="layer"))
    return Result(pd.DataFrame(index=index), layers, dict(matrices), {"samples": samples, "missing": []})


def run(matrices, seed=0, samples=100, **options):
    names = dict.fromkeys(dict.fromkeys(name for _, name in matrices), _Known())
    analysis = ModularityAnalysis(**({"associations": names, "shuffles": 5, "alignments": 50} | options))
    return analysis(None, (), result=result_of(matrices, samples), seed=seed)


LABELS = {"fc1": np.arange(30) % 3, "fc2": np.arange(20) // 5}


@pytest.fixture(scope="module")
def found():
    rng = np.random.default_rng(0)
    return run({(layer, name): planted(labels, rng) for name in ("up", "down") for layer, labels in LABELS.items()})


def test_planted_modules_are_columns_of_units(found):
    assert list(found.units) == ["module_up", "module_down"]
    for column in found.units:
        for layer, labels in LABELS.items():
            assert adjusted_rand_score(found.units.loc[layer, column], labels) == 1


def test_the_table_of_modules_has_one_row_per_layer_and_association(found):
    table = found["modules"].set_index(["layer", "association"])
    assert list(table.index) == [("fc1", "up"), ("fc1", "down"), ("fc2", "up"), ("fc2", "down")]
    assert table["modules"].tolist() == [3, 3, 4, 4]
    np.testing.assert_allclose(table["soft_number"], [3, 3, 4, 4])
    assert (table["dead"] == 0).all()
    assert (table["p"] == 1 / 6).all()
    assert (table["z"] > 2).all()
    assert (table["q"] > table["q_null"]).all()
    assert set(table["null_model"]) == {"degrees"}


def test_associations_of_a_layer_are_compared(found):
    table = found["comparison"]
    assert table[["layer", "association_a", "association_b"]].to_numpy().tolist() == [["fc1", "up", "down"], ["fc2", "up", "down"]]
    assert (table[["alignment", "ami", "ari", "element_sim"]] == 1).all(axis=None)
    assert (table["alignment_p"] == 1 / 51).all()
    np.testing.assert_allclose(table[["transfer_normalized", "transfer_normalized_back"]], 1)


def test_the_lines_name_layer_association_and_chance(found):
    lines = found.summary().splitlines()
    assert lines[0].startswith("fc1, up: 3 modules of 30 units, Q 0.")
    assert "by chance (degrees), z " in lines[0]
    assert lines[4].startswith("fc1, up and down: alignment 1.00 (")
    assert found.metadata["missing"] == []


def test_what_is_found_is_what_find_modules_finds(found):
    association = planted(LABELS["fc1"], np.random.default_rng(0))
    assert found["modules"]["q"][0] == pytest.approx(find_modules(association).q, abs=1e-12)


def test_findings_are_saved_and_loaded(found, tmp_path):
    found.save(tmp_path)
    again = load_findings(tmp_path)
    pd.testing.assert_frame_equal(again["modules"], found["modules"])
    pd.testing.assert_frame_equal(again.units, found.units)
    np.testing.assert_array_equal(again.matrices["fc1", "sorted_up"], found.matrices["fc1", "sorted_up"])


def test_a_layer_alone_has_the_numbers_that_it_has_among_others(found):
    rng = np.random.default_rng(0)
    alone = run({("fc1", "up"): planted(LABELS["fc1"], rng)})
    pd.testing.assert_frame_equal(alone["modules"], found["modules"][:1])


def test_pictures_are_in_order_of_modules(found):
    picture = found.matrices["fc2", "sorted_up"]
    inside = np.kron(np.eye(4), np.ones((5, 5))).astype(bool) & ~np.eye(20, dtype=bool)
    assert picture[inside].min() > picture[~inside].max()


def test_a_wide_layer_has_a_picture_of_means():
    labels = np.arange(600) % 2
    weights = np.where(labels[:, None] == labels, 3.0, 1.0) - 3 * np.eye(600)
    search = ModularityAnalysis(associations={"known": _Known()}, shuffles=0, starts=1)
    wide = search(None, (), result=result_of({("fc", "known"): weights}))
    picture = wide.matrices["fc", "sorted_known"]
    assert picture.shape == (WIDEST, WIDEST)
    assert picture[0, 1] == 3
    assert picture[0, -1] == 1
    assert sorted_matrix.__doc__
    assert np.isnan(wide["modules"]["p"]).all()


def bad_matrices():
    rng = np.random.default_rng(1)
    good = planted(LABELS["fc1"], rng)
    scattered, rows, apart = good.copy(), good.copy(), good.copy()
    scattered[3, 8] = scattered[8, 3] = np.nan
    rows[4], rows[:, 4] = np.nan, np.nan
    apart[:15, 15:] = apart[15:, :15] = 0
    return {
        ("good", "up"): good,
        ("tiny", "up"): np.ones((2, 2)),
        ("zero", "up"): np.zeros((6, 6)),
        ("scattered", "up"): scattered,
        ("rows", "up"): rows,
        ("apart", "up"): apart,
        ("signed", "up"): good - 0.5,
    }


def test_layers_without_modules_are_gaps_and_the_others_go_on():
    found = run(bad_matrices(), absolute=False)
    gaps = {row["layer"]: row["reason"] for row in found.metadata["missing"]}
    assert gaps["tiny"] == "only 2 units are live of 2, and modules need 3: leave the layer out"
    assert gaps["zero"] == "all associations of the 6 units are zero or undefined: there is no graph; leave the layer out"
    assert "such as units 3 and 8: measure more rows" in gaps["scattered"]
    assert gaps["rows"].startswith("1 of 30 units have no association with any unit (NaN)")
    assert "associations are negative" in gaps["signed"]
    assert gaps["signed"].endswith("take absolute=True")
    assert set(gaps) == {"tiny", "zero", "scattered", "rows", "signed"}
    assert {row["what"] for row in found.metadata["missing"]} == {"module_up"}
    assert found["modules"]["layer"].tolist() == ["good", "rows", "apart"]
    assert found["modules"]["dead"].tolist() == [0, 1, 0]
    assert found["modules"]["components"].tolist() == [1, 1, 2]
    assert (found.units.loc["zero", "module_up"] == -1).all()
    assert found.units.loc[("rows", 4), "module_up"] == -1
    assert all("\n" not in reason for reason in gaps.values())
    lines = found.summary()
    assert "tiny, up: only 2 units are live of 2" in lines
    assert "apart, up: the graph has 2 components without links between them" in lines


def test_a_network_without_any_modules_has_empty_tables(tmp_path):
    found = run({("zero", "up"): np.zeros((5, 5))})
    assert not len(found["modules"])
    assert found.units is None
    assert found.lines == [
        "zero, up: all associations of the 5 units are zero or undefined: there is no graph; leave the layer out"
    ]
    found.save(tmp_path)
    assert list(load_findings(tmp_path)["comparison"]) == list(found["comparison"])


def test_an_association_that_was_not_measured_is_a_gap():
    names = {"known": _Known(), "other": _Known()}
    matrices = {("fc1", "known"): planted(LABELS["fc1"], np.random.default_rng(0))}
    found = ModularityAnalysis(associations=names, shuffles=0)(None, (), result=result_of(matrices))
    assert found.metadata["missing"] == [
        {"layer": "fc1", "what": "module_other", "reason": "other was not measured: leave the layer out, or the association"}
    ]
    assert list(found.units) == ["module_known"]


def test_covariances_have_the_null_of_correlations_and_others_keep_degrees():
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((400, 3))  # of negative correlation: modules that correlate at all would merge
    rows = (factors - factors.mean(1, keepdims=True))[:, LABELS["fc1"]] + rng.standard_normal((400, 30))
    matrices = {("fc1", "forward_cov"): np.cov(rows.T), ("fc1", "known"): planted(LABELS["fc1"], rng)}
    found = run(matrices, null_model="correlation", samples=400)
    assert found["modules"]["null_model"].tolist() == ["correlation", "degrees"]
    assert adjusted_rand_score(found.units["module_forward_cov"], LABELS["fc1"]) == 1
    assert found["modules"]["p"][0] == 1 / 6
    few = run({("fc1", "forward_cov"): np.cov(rng.standard_normal((400, 30)).T)}, null_model="correlation", samples=400)
    assert few["modules"]["p"][0] > 1 / 6


def test_null_none_has_no_z_and_p():
    found = run({("fc1", "up"): planted(LABELS["fc1"], np.random.default_rng(0))}, null_model="none")
    assert found["modules"][["z", "p", "q_null"]].isna().all(axis=None)
    assert "by chance" not in found.summary()


def test_modules_of_a_network_join_its_result():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2))
    data = [(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(64, dtype=torch.long))]
    analysis = ModularityAnalysis(associations="redundancy", shuffles=3)
    result = nl.analyze(net, data, metrics=["rq"], analysis=analysis)
    assert result.matrices["0", "redundancy"].shape == (12, 12)
    expected = find_modules(result.matrices["0", "redundancy"])
    labels = result.units.loc["0", "module_redundancy"].astype(int).to_numpy()
    assert adjusted_rand_score(labels, expected.labels) == 1
    assert result.analyses["modularity"].metadata["missing"][0]["layer"] == "2"
    assert "modularity: 0, redundancy: " in result.summary()


class Separate(nn.Module):
    """Three groups of units, each of inputs of its own; whole numbers, so that the sums over all inputs of +-1 are exact."""

    def __init__(self, sizes=(5, 4, 6)):
        super().__init__()
        self.fc, self.out = nn.Linear(9, sum(sizes)), nn.Linear(sum(sizes), 2)
        parts = [torch.randint(1, 4, (size, 3), generator=torch.Generator().manual_seed(size)).float() for size in sizes]
        self.fc.weight.data, self.fc.bias.data = torch.block_diag(*parts), torch.zeros(sum(sizes))
        self.blocks = np.repeat(range(len(sizes)), sizes)

    def forward(self, x):
        return self.out(self.fc(x).relu())


@pytest.mark.parametrize("method", ["louvain", "spectral", "monte_carlo"])
def test_modules_of_a_disconnected_graph_are_those_of_its_components(method):
    net, every = Separate(), torch.tensor(list(itertools.product([-1.0, 1.0], repeat=9)))
    analysis = ModularityAnalysis(associations="forward_cov", shuffles=3, method=method)
    result = nl.analyze(net, every.split(100), metrics=["forward_cov"], analysis=analysis, layers="fc")
    matrix = np.abs(result.matrices["fc", "forward_cov"])
    np.fill_diagonal(matrix, 0)
    graph = nx.from_numpy_array(matrix)
    parts = list(nx.connected_components(graph))
    assert {frozenset(part) for part in parts} == {frozenset(np.flatnonzero(net.blocks == k)) for k in range(3)}
    labels = result.units.loc["fc", "module_forward_cov"].to_numpy(int)
    assert all(len(set(net.blocks[labels == k])) == 1 for k in range(labels.max() + 1))
    row = result.analyses["modularity"]["modules"].iloc[0]
    modules = [set(np.flatnonzero(labels == k)) for k in range(labels.max() + 1)]
    assert row["components"] == 3
    assert row["q"] == pytest.approx(nx.community.modularity(graph, modules), abs=1e-12)
    best = max(nx.community.modularity(graph, nx.community.louvain_communities(graph, seed=seed)) for seed in range(5))
    assert row["q"] >= best - 1e-12 or method == "spectral"
    assert "fc, forward_cov: the graph has 3 components without links between them" in result.summary()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"null_model": "er"}, "null_model is 'er'; it is one of degrees, correlation, none"),
        ({"method": "walktrap"}, "method is 'walktrap'; it is one of louvain"),
        ({"sparsify": 0.0}, "sparsify is 0.0; it is the share of pairs that keep an edge"),
        (
            {"null_model": "correlation", "sparsify": 0.1},
            "null_model=correlation reads the correlations themselves: leave sparsify",
        ),
        ({"shuffles": -1}, "shuffles is -1; it is a number of random draws, 0 for none"),
        ({"associations": ()}, "associations is empty; give names of metrics of pairs of units, such as forward_cov"),
        ({"associations": ["rq"]}, "rq has one value per unit, and modules are found in a metric of pairs of units"),
        ({"rows": 1}, "rows is 1; it is a number of independent rows, at least 2"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModularityAnalysis(**({"associations": ["redundancy"]} | options))


def test_pair_metrics_return_their_matrix():
    needed = ModularityAnalysis(associations=["redundancy"]).required_metrics()
    assert needed == {"redundancy": get_metric("redundancy", reduce="none")}
