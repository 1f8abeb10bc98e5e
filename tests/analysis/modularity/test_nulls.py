"""Null models: graphs with the same weights and degrees, random correlations, and what z and p say."""

import numpy as np
import pytest
from scipy.stats import kstest

from nodelens.analysis.modularity.correlation_null import correlation_matrix, groups_matrix, random_correlations
from nodelens.analysis.modularity.find_modules import modules_of
from nodelens.analysis.modularity.graph import Graph
from nodelens.analysis.modularity.layer_modules import Search
from nodelens.analysis.modularity.shuffles import scaled, shuffled
from nodelens.analysis.modularity.significance import Significance


def symmetric(matrix):
    upper = np.triu(matrix, 1)
    return upper + upper.T


def random_graph(units, kind, rng):
    kinds = {
        "uniform": lambda: rng.random((units, units)),
        "binary": lambda: (rng.random((units, units)) < 0.4).astype(float),
        "normal": lambda: np.abs(rng.standard_normal((units, units))),
    }
    return symmetric(kinds[kind]())


@pytest.mark.parametrize("kind", ["uniform", "binary", "normal"])
def test_shuffled_graphs_have_the_degrees_and_nearly_the_weights(kind):
    weights = random_graph(20, kind, np.random.default_rng(0))
    drawn = list(shuffled(weights, 7, np.random.default_rng(1)))
    assert len(drawn) == 7
    for other in drawn:
        np.testing.assert_allclose(other.sum(1), weights.sum(1), rtol=1e-9)
        np.testing.assert_array_equal(other, other.T)
        assert not other.diagonal().any()
        assert (other >= 0).all()
        np.testing.assert_allclose(np.sort(other.ravel()), np.sort(weights.ravel()), rtol=0.1, atol=0.05)
        upper = np.triu_indices(20, 1)
        assert abs(np.corrcoef(other[upper], weights[upper])[0, 1]) < 0.5


def test_a_shuffled_binary_graph_is_binary():
    weights = random_graph(24, "binary", np.random.default_rng(3))
    for other in shuffled(weights, 3, np.random.default_rng(0)):
        np.testing.assert_array_equal(other.sum(1), weights.sum(1))
        assert set(np.unique(other)) == {0.0, 1.0}


def test_few_shuffles_at_once_and_all_at_once_are_both_shuffles(monkeypatch):
    monkeypatch.setattr("nodelens.analysis.modularity.shuffles.MEMORY", 400)  # one at a time
    weights = random_graph(20, "uniform", np.random.default_rng(0))
    drawn = list(shuffled(weights, 3, np.random.default_rng(1)))
    assert len(drawn) == 3
    np.testing.assert_allclose(drawn[2].sum(1), weights.sum(1), rtol=1e-9)


def test_the_seed_decides_the_shuffles():
    weights = random_graph(12, "uniform", np.random.default_rng(0))
    first, again = (list(shuffled(weights, 2, np.random.default_rng(5))) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_graphs_too_small_to_shuffle_stay():
    weights = random_graph(3, "uniform", np.random.default_rng(0))
    np.testing.assert_allclose(next(shuffled(weights, 1, np.random.default_rng(0))), weights)


def test_factors_give_the_degrees():
    weights = random_graph(9, "uniform", np.random.default_rng(0))
    degrees = weights.sum(1) * np.linspace(0.8, 1.2, 9)
    np.testing.assert_allclose(scaled(weights, degrees).sum(1), degrees, rtol=1e-9)


def p_values(kind, simulations, units=20, shuffles=9):
    found = []
    for seed in range(simulations):
        rng = np.random.default_rng([seed, len(kind)])
        weights = random_graph(units, kind, rng)
        search = Search(
            absolute=True, gamma=1.0, method="louvain", starts=1, sparsify=None, shuffles=shuffles, null_model="degrees"
        )
        found.append(search(weights, rng).null.p - rng.random() / (shuffles + 1))  # ranks are discrete: spread them evenly
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform", "binary", "normal"])
def test_p_is_uniform_for_random_graphs(kind):
    assert kstest(p_values(kind, 200), "uniform").pvalue > 0.01


def test_p_is_uniform_in_a_short_simulation():
    assert kstest(p_values("uniform", 50), "uniform").pvalue > 0.01


def test_planted_modules_are_beyond_the_null():
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 3
    weights = random_graph(24, "uniform", rng) * (1 + (labels[:, None] == labels))
    found = Search(True, 1.0, "louvain", 2, None, 19, "degrees")(weights, rng)
    assert found.null.p == 1 / 20
    assert found.null.z > 3
    assert found.null.mean < found.modules.q


def test_z_and_p_count_ties_and_the_value_itself():
    assert Significance.of(2.0, [1.0, 2.0, 3.0]) == Significance(2.0, 1.0, 0.0, 3 / 4)
    assert Significance.of(9.0, [1.0, 2.0, 3.0]).p == 1 / 4
    assert Significance.of(1.0, [1.0, 1.0 + 1e-15]).p == 1  # rounding is a tie
    assert np.isnan(Significance.of(1.0, [1.0, 1.0]).z)
    none = Significance.of(1.0, [])
    assert np.isnan([none.mean, none.std, none.z, none.p]).all()


def blocks(rows, rng, common=0.0, shared=0.7, units=24, modules=3):
    factors = rng.standard_normal((rows, modules))[:, np.arange(units) % modules]
    return shared * factors + rng.standard_normal((rows, units)) + common * rng.standard_normal((rows, 1))


def test_nothing_of_independent_units_is_left_but_rarely():
    rng = np.random.default_rng(0)
    largest = [np.linalg.eigvalsh(each)[-1] for each in random_correlations(30, 300, 50, rng)]
    edge = (1 + np.sqrt(30 / 300)) ** 2
    assert np.mean(largest) == pytest.approx(edge, rel=0.1)
    left = [groups_matrix(each, 300).any() for each in random_correlations(30, 300, 50, rng)]
    assert np.mean(left) < 0.5


@pytest.mark.parametrize("rows", [12, 200])
def test_random_correlations_are_those_of_independent_rows(rows):
    rng = np.random.default_rng(0)
    ours = np.array([np.square(each[np.triu_indices(20, 1)]).mean() for each in random_correlations(20, rows, 60, rng)])
    plain = np.array([np.square(np.corrcoef(rng.standard_normal((rows, 20)).T)[np.triu_indices(20, 1)]).mean() for _ in range(60)])
    assert ours.mean() == pytest.approx(plain.mean(), rel=0.1)
    assert ours.mean() == pytest.approx(1 / (rows - 1), rel=0.1)


def test_the_common_mode_is_no_module():
    rng = np.random.default_rng(1)
    only_common = correlation_matrix(np.cov(blocks(2000, rng, common=1.0, shared=0.0).T))
    assert not groups_matrix(only_common, 2000).any()
    both = correlation_matrix(np.cov(blocks(2000, rng, common=1.0).T))
    found = Search(False, 1.0, "louvain", 2, None, 9, "correlation").of_correlations(both, 2000, rng)
    assert found.modules.labels.tolist() == [0, 1, 2] * 8
    assert found.null.p == 1 / 10


@pytest.mark.parametrize("method", ["louvain", "spectral", "monte_carlo"])
def test_separate_blocks_of_correlations_are_modules_of_their_own(method):
    labels = np.repeat(range(3), (5, 4, 6))
    for shared in (0.5, 0.7, 0.9):
        correlations = np.where(labels[:, None] == labels, shared, 0.0) + (1 - shared) * np.eye(15)
        found = Search(False, 1.0, method, 2, None, 3, "correlation").of_correlations(correlations, 500, np.random.default_rng(0))
        assert found.modules.labels.tolist() == labels.tolist()
        assert found.modules.components == 3
        assert found.modules.q == pytest.approx(groups_matrix(correlations, 500)[labels[:, None] == labels].sum())


def test_eigenvalues_of_the_groups_are_those_above_the_noise():
    correlations = correlation_matrix(np.cov(blocks(500, np.random.default_rng(2)).T))
    values = np.linalg.eigvalsh(groups_matrix(correlations, 500) * correlations.sum())
    kept = [v for v in np.linalg.eigvalsh(correlations) if v > (1 + np.sqrt(24 / 500)) ** 2]
    np.testing.assert_allclose(np.sort(values)[-len(kept) :], kept)
    assert len(kept) == 3


def test_units_without_variance_are_no_covariance():
    with pytest.raises(ValueError, match="2 units have associations but no variance: this is no covariance matrix"):
        correlation_matrix(np.diag([1.0, -0.1, -0.1]) + 0.1)


def test_the_modules_of_correlations_need_another_method_than_leiden():
    with pytest.raises(ValueError, match="method=leiden finds modules of graphs, and null_model=correlation has none"):
        Search(False, 1.0, "leiden", 1, None, 0, "correlation").of_correlations(np.eye(4) + 0.1, 9, np.random.default_rng(0))


def test_the_null_of_a_graph_is_found_by_the_same_search():
    graph = Graph.of(random_graph(16, "uniform", np.random.default_rng(0)))
    one = modules_of(graph, "spectral", 1.0, 1, np.random.default_rng(0)).q
    assert Search(True, 1.0, "spectral", 1, None, 5, "degrees")(graph.weights, np.random.default_rng(0)).modules.q == one
