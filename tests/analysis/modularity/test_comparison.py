"""How alike partitions and associations are: closed forms, twins, golden numbers, and chance."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from real import folder
from scipy.stats import spearmanr

from nodelens.analysis.modularity.compare_modules import compare_modules, match_units
from nodelens.analysis.modularity.comparison import (
    adj_spearman,
    alignment_score,
    alignment_significance,
    ami,
    ari,
    element_similarity,
    matched,
    overlap,
    transfer_modularity,
    variation_of_information,
)
from nodelens.analysis.modularity.graph import modularity
from nodelens.results.result import Result


def partition_of(table):
    """Two partitions with the overlaps of a table."""
    pairs = [(i, j) for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)]
    return np.array(pairs).T


def random_pair(seed=0, units=30):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 4, units), rng.integers(0, 3, units)


def weights_of(units, seed=0):
    upper = np.triu(np.random.default_rng(seed).random((units, units)), 1)
    return upper + upper.T


def test_golden_alignments_agree():
    golden = json.loads((folder("NODELENS_GOLDEN") / "alignment.json").read_text())
    for case, options in golden["options"].items():
        assert alignment_score(**options) == pytest.approx(golden["expected"][case], rel=1e-8)


def test_modules_are_matched_by_the_best_assignment_and_not_greedily():
    assert alignment_score(*partition_of([[5, 4], [4, 0]])) == pytest.approx(8 / 13)


def test_alignment_is_the_best_over_all_assignments():
    a, b = random_pair()
    table = overlap(a, b)
    best = max(sum(table[i, j] for j, i in enumerate(rows)) for rows in itertools.permutations(range(4), 3))
    assert alignment_score(a, b) == pytest.approx(best / 30)
    assert alignment_score(b, a) == alignment_score(a, b)


def test_units_in_no_module_count_where_they_are():
    assert alignment_score([0, 0, 1, 1, -1, -1], [0, 0, 1, 1, 1, -1]) == 1  # of the four units with a module in the first
    assert alignment_score([0, 0, 1, 1], [0, 0, -1, 1]) == 1
    assert np.isnan(alignment_score([0, 0], [-1, -1]))


@pytest.mark.parametrize("measure", [alignment_score, ami, ari, element_similarity])
def test_equal_partitions_are_alike_under_any_names(measure):
    a, _ = random_pair()
    assert measure(a, a) == pytest.approx(1)
    assert measure(a, 3 - a) == pytest.approx(1)
    assert variation_of_information(a, 3 - a) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("measure", [alignment_score, ami, ari, element_similarity, variation_of_information])
def test_the_order_of_units_and_of_partitions_does_not_matter(measure):
    a, b = random_pair(1)
    order = np.random.default_rng(0).permutation(len(a))
    assert measure(a[order], b[order]) == pytest.approx(measure(a, b))
    assert measure(b, a) == pytest.approx(measure(a, b))


@pytest.mark.parametrize("measure", [ami, ari, element_similarity, variation_of_information])
def test_only_units_with_a_module_in_both_count(measure):
    a, b = random_pair(2)
    wider = np.append(a, [-1, 0, -1]), np.append(b, [1, -1, -1])
    assert measure(*wider) == pytest.approx(measure(a, b))
    assert np.isnan(measure([-1, 0], [0, -1]))


def test_variation_of_information_is_that_of_the_definition():
    a, b = random_pair(3)
    joint = overlap(a, b) / len(a)
    pa, pb = joint.sum(1), joint.sum(0)
    mutual = sum(p * np.log(p / (pa[i] * pb[j])) for (i, j), p in np.ndenumerate(joint) if p)
    expected = -(pa * np.log(pa)).sum() - (pb * np.log(pb)).sum() - 2 * mutual
    assert variation_of_information(a, b) == pytest.approx(expected)
    assert variation_of_information([0, 0, 0, 0], [0, 1, 2, 3]) == pytest.approx(np.log(4))


def test_element_similarity_is_that_of_the_definition():
    a, b = random_pair(4, units=12)
    in_a, in_b = ((x[:, None] == x) / (x[:, None] == x).sum(1)[:, None] for x in (a, b))
    assert element_similarity(a, b) == pytest.approx((1 - np.abs(in_a - in_b).sum(1) / 2).mean())


def test_transfer_is_the_modularity_with_the_other_modules():
    weights, (_, b) = weights_of(30), random_pair(5)
    assert transfer_modularity(weights, b) == pytest.approx(modularity(weights, b))
    cliques = np.kron(np.eye(3), np.ones((4, 4)))
    own = np.arange(12) // 4
    assert transfer_modularity(cliques, own, own) == pytest.approx(1)
    assert transfer_modularity(cliques, np.arange(12) // 6, own) == pytest.approx(modularity(cliques, np.arange(12) // 6) * 3 / 2)
    assert np.isnan(transfer_modularity(weights, b, np.zeros(30, int)))  # Q of one module is 0


def test_spearman_is_over_pairs_of_units_live_in_both():
    a, b = weights_of(8), weights_of(8, 1)
    upper = np.triu_indices(8, 1)
    assert adj_spearman(a, b) == pytest.approx(spearmanr(a[upper], b[upper])[0])
    assert adj_spearman(-a, a) == pytest.approx(1)
    assert adj_spearman(-a, a, absolute=False) == pytest.approx(-1)
    dead = np.zeros((9, 9))
    dead[:8, :8] = a
    assert adj_spearman(dead, np.pad(b, (0, 1), constant_values=0.5)) == pytest.approx(adj_spearman(a, b))
    assert np.isnan(adj_spearman(np.ones((4, 4)), weights_of(4)))


def test_shuffled_units_align_by_chance():
    found = [alignment_significance(*random_pair(seed), shuffles=19, seed=seed).p for seed in range(60)]
    assert 0.35 < np.mean(found) < 0.75
    a, _ = random_pair()
    same = alignment_significance(a, a, shuffles=99)
    assert same.p == 1 / 100
    assert same.mean < 0.6
    assert same.z > 5


def test_matched_modules_take_the_names_of_the_reference():
    reference = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert matched(np.array([2, 2, 2, 0, 0, 0, 1, 1, 1]), reference).tolist() == reference.tolist()
    split = matched(np.array([5, 5, 5, 1, 1, 1, 0, 0, 3]), reference)
    assert split.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3]
    assert matched(np.array([-1, 0, 0, 1]), np.array([0, 1, 1, -1]), unused=7).tolist() == [-1, 1, 1, 7]


def test_partitions_of_other_units_are_refused():
    with pytest.raises(ValueError, match="the partitions have 2 and 3 units: compare modules of the same units"):
        alignment_score([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="the associations have 4 and 5 units: compare those of the same layer"):
        adj_spearman(weights_of(4), weights_of(5))


def result_of(seed, units=20, layers=("fc1", "fc2")):
    """A result with modules of two layers by two associations."""
    rng = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product([layers, range(units)], names=["layer", "unit"])
    columns = {f"module_{name}": pd.Categorical(rng.integers(0, 3, len(index))) for name in ("a", "b")}
    matrices = {(layer, name): weights_of(units, seed) for layer in layers for name in ("a", "b")}
    return Result(pd.DataFrame(columns, index=index), pd.DataFrame(index=list(layers)), matrices)


def labels_of(result, layer, name):
    return result.units.loc[layer, f"module_{name}"].astype(int).to_numpy()


def test_modules_are_compared_across_associations_layers_and_runs():
    one, two = result_of(0), result_of(1)
    within = compare_modules(one, "associations", shuffles=9)
    assert within[["run", "layer", "association_a", "association_b"]].to_numpy().tolist() == [
        ["0", "fc1", "a", "b"],
        ["0", "fc2", "a", "b"],
    ]
    assert within["ami"][0] == pytest.approx(ami(labels_of(one, "fc1", "a"), labels_of(one, "fc1", "b")))
    assert within["adj_spearman"][0] == pytest.approx(1)
    layers = compare_modules(one, "layers", shuffles=9)
    assert layers[["association", "layer_a", "layer_b"]].to_numpy().tolist() == [["a", "fc1", "fc2"], ["b", "fc1", "fc2"]]
    runs = compare_modules({"first": one, "second": two}, shuffles=9)
    assert len(runs) == 4
    assert set(runs["run_a"]) == {"first"}
    row = runs[(runs["layer"] == "fc2") & (runs["association"] == "b")].iloc[0]
    a, b = labels_of(one, "fc2", "b"), labels_of(two, "fc2", "b")
    assert row["alignment"] == alignment_score(a, b)
    assert row["transfer"] == pytest.approx(transfer_modularity(weights_of(20, 0), b))
    assert row["transfer_normalized_back"] == pytest.approx(transfer_modularity(weights_of(20, 1), a, b), nan_ok=True)


def test_tables_of_units_are_compared_without_their_associations():
    tables = {"0": result_of(0).units, "1": result_of(1).units.reset_index(), "2": result_of(2).units}
    found = compare_modules(tables, shuffles=5)
    assert len(found) == 3 * 4
    assert found["adj_spearman"].isna().all()
    assert found["ami"].notna().all()


def test_units_of_another_network_are_put_into_the_order_of_the_first():
    one = result_of(0)
    order = np.random.default_rng(0).permutation(20)
    other = Result(one.units.copy(), one.layers, {key: m[np.ix_(order, order)] for key, m in one.matrices.items()})
    for name in ("a", "b"):
        for layer in ("fc1", "fc2"):
            other.units.loc[layer, f"module_{name}"] = other.units.loc[layer, f"module_{name}"].to_numpy()[order]
    units = dict.fromkeys(("fc1", "fc2"), np.argsort(order))
    found = compare_modules([one, other], units=units, shuffles=9)
    assert (found["alignment"] == 1).all()
    np.testing.assert_allclose(found["adj_spearman"], 1)
    partly = compare_modules([one, other], units={"fc1": np.where(np.arange(20) < 15, np.argsort(order), -1)}, shuffles=9)
    assert partly[partly["layer"] == "fc1"]["ami"].tolist() == [1, 1]


def test_units_are_matched_by_the_correlation_of_their_activations():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((200, 6))
    order = np.array([3, 0, 5, 1, 4, 2])
    b = (2 * a + 0.3 * rng.standard_normal(a.shape) + 7)[:, order]
    assert match_units(a, b).tolist() == np.argsort(order).tolist()
    assert (match_units(a, b[:, :4]) == -1).sum() == 2


def test_what_cannot_be_compared_is_named():
    one = result_of(0)
    with pytest.raises(ValueError, match="across is 'epochs'; it is one of associations, layers, runs"):
        compare_modules(one, "epochs")
    with pytest.raises(ValueError, match=r"units= says how two runs correspond, and there are 1 with across='runs'"):
        compare_modules(one, units={})
    with pytest.raises(ValueError, match=r"no result has modules: run nl.analyze\(..., analysis=\[\"modularity\"\]\) first"):
        compare_modules(Result(one.units[[]], one.layers))
    with pytest.raises(ValueError, match="fc1 has 20 units in 0 and 12 in 1: compare networks of the same widths, or give units="):
        compare_modules([one, result_of(1, units=12)])
    with pytest.raises(ValueError, match="units= names unit 30 of fc1, which has 20"):
        compare_modules([one, result_of(1)], units={"fc1": [30]})
    with pytest.raises(ValueError, match=r"activations have the shape \(rows, units\), .* these have \(3, 2\) and \(4, 2\)"):
        match_units(np.ones((3, 2)), np.ones((4, 2)))
    with pytest.raises(ValueError, match="activations are not finite: leave rows with NaN or infinity out"):
        match_units(np.full((3, 2), np.nan), np.ones((3, 2)))
