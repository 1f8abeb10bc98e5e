"""Modularity, and the methods that look for the partition with the largest one, beside networkx and planted modules."""

import itertools
import json

import networkx as nx
import numpy as np
import pytest
import torch
from real import folder
from sklearn.metrics import adjusted_rand_score

from nodelens.analysis.modularity.find_modules import find_modules
from nodelens.analysis.modularity.graph import (
    Graph,
    connected_parts,
    modularity,
    modularity_matrix,
    quality,
    soft_num_clusters,
    sparsify,
)
from nodelens.analysis.modularity.louvain import _split
from nodelens.analysis.modularity.monte_carlo import choice
from nodelens.analysis.modularity.moves import Partition, move_locally, refine
from nodelens.analysis.modularity.spectral import spectral_matrix

METHODS = ("louvain", "spectral", "monte_carlo")


def symmetric(matrix):
    upper = np.triu(matrix, 1)
    return upper + upper.T


def random_graph(units, kind, seed=0):
    rng = np.random.default_rng(seed)
    modules = rng.integers(0, 4, units)
    kinds = {
        "uniform": lambda: rng.random((units, units)),
        "binary": lambda: (rng.random((units, units)) < 0.2).astype(float),
        "heavy": lambda: rng.exponential(size=(units, units)) ** 3,
        "modular": lambda: rng.random((units, units)) * (1 + (modules[:, None] == modules)),
    }
    return symmetric(kinds[kind]())


def planted(units=60, modules=4, inside=0.5, outside=0.05, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(units) % modules)
    return symmetric((rng.random((units, units)) < np.where(labels[:, None] == labels, inside, outside)).astype(float)), labels


def sets_of(labels):
    return [set(np.flatnonzero(labels == k).tolist()) for k in np.unique(labels)]


def plain_modularity(weights, labels, gamma=1.0):
    """The sum of the definition, pair by pair."""
    k, total = weights.sum(1), weights.sum()
    pairs = itertools.product(range(len(weights)), repeat=2)
    return sum(
        weights[i, j] / total - gamma * k[i] * k[j] / total**2 for i, j in pairs if labels[i] == labels[j] and labels[i] >= 0
    )


@pytest.fixture(scope="module")
def golden():
    return json.loads((folder("NODELENS_GOLDEN") / "modularity.json").read_text())


def test_golden_numbers_of_partitions_agree(golden):
    for case, options in golden["options"].items():
        expected = golden["expected"][case]
        if case.startswith("soft"):
            assert soft_num_clusters(options["partition"]) == pytest.approx(expected, rel=1e-8)
        elif "partition" in options:
            assert modularity(golden["inputs"][options["graph"]], options["partition"]) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("graph", ["planted_weighted", "planted_binary"])
def test_golden_partitions_are_found(golden, graph, method):
    expected = golden["expected"][f"spectral_{graph}"]
    found = find_modules(golden["inputs"][graph], method, starts=2)
    assert found.q == pytest.approx(expected["Q"], rel=1e-8)
    assert adjusted_rand_score(found.labels, expected["partition"]) == 1


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["uniform", "binary", "heavy"])
def test_q_is_the_sum_of_the_definition_and_that_of_networkx(kind, gamma):
    weights, labels = random_graph(24, kind), np.random.default_rng(1).integers(0, 3, 24)
    found = modularity(weights, labels, gamma)
    assert found == pytest.approx(plain_modularity(weights, labels, gamma), abs=1e-12)
    theirs = nx.community.modularity(nx.from_numpy_array(weights), sets_of(labels), resolution=gamma)
    assert found == pytest.approx(theirs, abs=1e-10)


def test_known_values_of_q():
    cliques = np.kron(np.eye(5), np.ones((3, 3)))
    assert modularity(cliques, np.arange(15) // 3) == pytest.approx(1 - 1 / 5)
    assert modularity(cliques, np.zeros(15, int)) == pytest.approx(0, abs=1e-15)
    assert np.isnan(modularity(np.eye(4), np.zeros(4, int)))
    assert modularity(torch.as_tensor(cliques), torch.arange(15) // 3) == pytest.approx(1 - 1 / 5)


def test_units_in_no_module_do_not_count_in_q():
    weights, labels = random_graph(12, "uniform"), np.array([0] * 5 + [1] * 4 + [-1] * 3)
    assert modularity(weights, labels) == pytest.approx(plain_modularity(weights, labels), abs=1e-12)


def test_sizes_eight_three_and_one_are_two_and_a_bit_modules():
    assert soft_num_clusters([0] * 8 + [1] * 3 + [2]) == pytest.approx(2.27950705695)
    assert soft_num_clusters([0, 0, 1, 1, -1]) == pytest.approx(2)
    assert np.isnan(soft_num_clusters([-1, -1]))


@pytest.mark.parametrize("method", METHODS)
def test_planted_modules_are_recovered(method):
    weights, labels = planted()
    found = find_modules(weights, method, starts=3)
    assert adjusted_rand_score(labels, found.labels) == 1
    assert found.q == pytest.approx(modularity(weights, labels), abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_permuted_units_permute_the_modules(method):
    weights = planted(seed=3)[0] * random_graph(60, "uniform")  # without ties between partitions
    order = np.random.default_rng(2).permutation(len(weights))
    first, again = find_modules(weights, method), find_modules(weights[np.ix_(order, order)], method)
    assert again.q == pytest.approx(first.q, abs=1e-12)
    assert adjusted_rand_score(first.labels[order], again.labels) == 1


def test_a_scale_of_the_association_changes_nothing():
    weights = random_graph(30, "modular")
    assert find_modules(1e-9 * weights).labels.tolist() == find_modules(weights).labels.tolist()


def test_the_same_seed_finds_the_same_modules():
    weights = random_graph(40, "uniform")
    assert find_modules(weights, seed=4).labels.tolist() == find_modules(weights, seed=4).labels.tolist()


def test_the_largest_q_of_a_small_graph_is_found():
    weights = random_graph(7, "uniform", seed=5)
    best = max(modularity(weights, labels) for labels in itertools.product(range(3), repeat=7))
    assert find_modules(weights).q == pytest.approx(best, abs=1e-12)


def test_three_separate_cliques_have_two_thirds_by_the_leading_algebraic_eigenvector():
    cliques = np.kron(np.eye(3), np.ones((4, 4)))  # the largest absolute eigenvalue is another one, and leads to 0.54
    assert find_modules(cliques, "spectral").q == pytest.approx(2 / 3)


def test_a_bipartite_graph_is_not_split_by_the_most_negative_eigenvalue():
    sides = np.kron([[0, 1], [1, 0]], np.ones((4, 4)))
    assert find_modules(sides, "spectral").q == pytest.approx(0, abs=1e-12)
    assert find_modules(sides, "spectral").number == 1


def test_a_larger_gamma_gives_more_modules():
    weights, _ = planted(inside=0.6, outside=0.2)
    assert find_modules(weights, gamma=0.2).number < find_modules(weights).number < find_modules(weights, gamma=3.0).number


KINDS = ("uniform", "binary", "heavy", "modular")
GRAPHS = [(units, kind) for units in (64, 96) for kind in KINDS]
GRAPHS += [pytest.param(128, kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.mark.parametrize(("units", "kind"), GRAPHS)
def test_q_is_not_below_the_best_of_networkx_with_as_many_starts(units, kind):
    weights = random_graph(units, kind, seed=units)
    graph = nx.from_numpy_array(weights)
    theirs = max(nx.community.modularity(graph, nx.community.louvain_communities(graph, seed=seed)) for seed in range(5))
    assert find_modules(weights, starts=5).q >= theirs - 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(("units", "kind"), [(n, kind) for n in (256, 384) for kind in ("uniform", "binary", "heavy", "modular")])
def test_q_of_larger_graphs_is_not_below_the_best_of_networkx(units, kind):
    weights = random_graph(units, kind, seed=units)
    graph = nx.from_numpy_array(weights)
    theirs = max(nx.community.modularity(graph, nx.community.louvain_communities(graph, seed=seed)) for seed in range(2))
    assert find_modules(weights, starts=2).q >= theirs - 1e-12


def test_sums_and_gains_are_those_of_the_definition_after_moves():
    matrix = modularity_matrix(random_graph(20, "uniform"))
    rng = np.random.default_rng(0)
    state = Partition(matrix, rng.integers(0, 4, 20))
    for _ in range(40):
        before, unit, module = quality(matrix, state.labels), int(rng.integers(20)), int(rng.integers(len(state.sums)))
        gain = state.gains()[module, unit]
        if np.isfinite(gain):
            state.move(unit, module)
            assert quality(matrix, state.labels) - before == pytest.approx(2 * gain, abs=1e-12)
        np.testing.assert_allclose(state.sums[state.labels[unit]], matrix[state.labels == state.labels[unit]].sum(0), atol=1e-12)
        np.testing.assert_allclose(state.sums_of(unit), state.sums[:, unit], atol=1e-12)


def test_no_single_move_helps_after_local_moves_and_exchanges_never_lose():
    matrix, rng = modularity_matrix(random_graph(40, "binary")), np.random.default_rng(0)
    state = Partition(matrix, rng.integers(0, 5, 40))
    move_locally(state, rng)
    assert state.gains().max() <= 1e-12
    before = quality(matrix, state.labels)
    improved = refine(state)
    assert (quality(matrix, state.labels) > before) == improved


def test_spectral_modules_are_a_local_maximum():
    matrix = modularity_matrix(random_graph(30, "modular"))
    assert Partition(matrix, spectral_matrix(matrix)).gains().max() <= 1e-12


@pytest.mark.parametrize("target", [0.05, 0.15, 0.5])
def test_the_choice_of_a_monte_carlo_step_has_the_target_entropy(target):
    for scale in (1e-8, 1.0):
        shares = choice(scale * np.random.default_rng(0).standard_normal(6), target)
        assert -(shares * np.log(shares)).sum() == pytest.approx(target, abs=0.01)
        assert shares.sum() == pytest.approx(1)
    assert choice(np.array([1.0, 1.0, 0.0]), 0.15) == pytest.approx([0.5, 0.5, 0], abs=1e-6)


def test_connected_parts_are_those_of_networkx():
    rng = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.05, 0.2):
        weights = np.triu(rng.random((40, 40)) < density, 1).astype(float)
        weights += weights.T
        labels = rng.integers(0, 3, 40)
        for own in (None, labels):
            linked = weights if own is None else weights * (own[:, None] == own)
            parts = sorted(sorted(nodes) for nodes in nx.connected_components(nx.from_numpy_array(linked)))
            assert sorted(map(sorted, sets_of(connected_parts(weights, own)))) == parts


def test_two_modules_that_were_merged_are_split_again():
    planted = np.repeat(np.arange(4), 12)
    weights = np.where(planted[:, None] == planted, 1.0, 0.1) - 1.0 * np.eye(48)
    matrix = modularity_matrix(weights)
    found = _split(matrix, np.array([0, 0, 1, 2])[planted], np.random.default_rng(0))
    assert [set(found[planted == k]) for k in range(4)] in ([{0}, {3}, {1}, {2}], [{3}, {0}, {1}, {2}])


def test_modules_are_connected():
    weights = random_graph(40, "binary", seed=9)
    graph = nx.from_numpy_array(weights)
    assert all(nx.is_connected(graph.subgraph(nodes)) for nodes in sets_of(find_modules(weights, gamma=0.1).labels))


def test_units_of_two_components_share_no_module():
    weights = np.zeros((20, 20))
    weights[:10, :10], weights[10:, 10:] = random_graph(10, "uniform"), random_graph(10, "uniform", seed=1)
    found = find_modules(weights, gamma=0.01)
    assert found.components == 2
    assert found.labels.tolist() == [0] * 10 + [1] * 10


def test_dead_units_are_in_no_module():
    weights, labels = planted(24, 3, inside=0.9)
    wide = np.zeros((27, 27))
    wide[:24, :24] = weights
    wide[25], wide[:, 25] = np.nan, np.nan
    np.fill_diagonal(wide, 7)  # a diagonal does not count
    found = find_modules(wide)
    assert found.labels[24:].tolist() == [-1, -1, -1]
    assert found.dead == 3
    assert adjusted_rand_score(labels, found.labels[:24]) == 1
    assert modularity(wide, found.labels) == pytest.approx(found.q)


def test_absolute_values_are_the_weights():
    weights = random_graph(20, "modular")
    signs = symmetric(np.random.default_rng(0).choice([-1.0, 1.0], (20, 20)))
    assert find_modules(weights * signs).q == find_modules(weights).q


def test_sparsify_keeps_the_share_of_pairs():
    weights = random_graph(16, "uniform")
    kept = sparsify(weights, 0.25)
    assert kept.sum() / 2 == 30
    assert set(np.unique(kept)) == {0.0, 1.0}
    assert weights[kept == 1].min() > weights[(kept == 0) & ~np.eye(16, dtype=bool)].max()
    assert sparsify(random_graph(16, "binary"), 0.1).sum() == random_graph(16, "binary").sum()  # ties are kept
    assert Graph.of(weights, sparse=0.25).weights.sum() == 60


def test_leiden_finds_what_louvain_does():
    pytest.importorskip("leidenalg")
    weights, labels = planted()
    assert adjusted_rand_score(find_modules(weights, "leiden", starts=2).labels, labels) == 1


def test_leiden_without_its_package_names_the_way_out(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "leidenalg", None)
    with pytest.raises(ValueError, match=r"method=leiden needs the package leidenalg: pip install .*, or take method=louvain"):
        find_modules(np.ones((4, 4)), "leiden")


def with_nan(i, j):
    weights = random_graph(8, "uniform")
    weights[i, j] = weights[j, i] = np.nan
    return weights


@pytest.mark.parametrize(
    ("association", "options", "message"),
    [
        (np.ones((2, 3)), {}, r"an association has the shape \(units, units\), this one \(2, 3\)"),
        (np.zeros((5, 5)), {}, "all associations of the 5 units are zero or undefined: there is no graph; leave the layer out"),
        (np.full((5, 5), np.nan), {}, "all associations of the 5 units are zero or undefined"),
        (np.ones((2, 2)), {}, "only 2 units are live of 2, and modules need 3: leave the layer out"),
        (np.ones((1, 1)), {}, "all associations of the 1 units are zero or undefined"),
        (
            with_nan(2, 5),
            {},
            "2 units have associations that are NaN or infinite with some units .* such as units 2 and 5: measure",
        ),
        (
            np.triu(np.ones((4, 4))),
            {},
            r"the association is not symmetric: .* differ by up to 1, the largest entry is 1: symmetrize",
        ),
        (-np.ones((4, 4)), {"absolute": False}, "6 of 6 associations are negative, .* weights >= 0: take absolute=True"),
        (np.ones((4, 4)), {"method": "walktrap"}, "method is 'walktrap'; it is one of louvain, spectral, monte_carlo, leiden"),
        (np.ones((4, 4)), {"gamma": 0}, "gamma is 0; a resolution is above 0"),
        (np.ones((4, 4)), {"starts": 0}, "starts is 0; it is the number of seeded starts, at least 1"),
        (np.ones((4, 4)), {"sparsify": 1.5}, "sparsify is 1.5; it is the share of pairs that keep an edge"),
    ],
)
def test_what_is_no_graph_is_refused(association, options, message):
    with pytest.raises(ValueError, match=message):
        find_modules(association, **options)


@pytest.mark.parametrize(
    ("association", "labels", "message"),
    [
        (np.ones((3, 3)), [0, 1], "there are 2 labels, and the association has 3 units"),
        (-np.ones((3, 3)), [0, 1, 1], "6 entries are negative, and modularity is defined for weights >= 0: take abs"),
        (np.ones((3, 3)), [[0, 1, 1]], r"labels have the shape \(units,\), these \(1, 3\)"),
        (np.ones((3, 3)), [0, 0.5, 1], "labels are integers, and 0.5 is none"),
    ],
)
def test_what_has_no_modularity_is_refused(association, labels, message):
    with pytest.raises(ValueError, match=message):
        modularity(association, labels)
