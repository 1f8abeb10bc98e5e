"""Influence, halo and flow across layers: golden numbers, planted clusters, and permutation baselines."""

import json

import numpy as np
import pytest
import torch
from real import folder
from scipy.stats import kstest

from nodelens.analysis.clustering import CrossLayerHaloAnalysis
from nodelens.analysis.clusters.influence import flow, flow_null, halo_null


def document():
    return json.loads((folder("NODELENS_GOLDEN") / "cross_layer_halo.json").read_text())


def test_golden_influence_halo_and_flow_agree():
    doc = document()
    x, wanted, tolerance = doc["inputs"], doc["expected"], doc["tolerance"]
    halo = CrossLayerHaloAnalysis(percentile=doc["options"]["halo"]["percentile"], use_activation_weight=True)
    influence = halo.compute_influence(torch.tensor(x["weights"]), torch.tensor(x["activations"], dtype=torch.float64))
    np.testing.assert_allclose(influence, wanted["influence"], rtol=1e-6)  # the weights were given as float32
    influence = halo.compute_influence(np.array(x["weights"]), x["activations"])
    np.testing.assert_allclose(influence, wanted["influence"], **tolerance["influence"])
    indices, share = halo.find_halo(influence, x["cluster"])
    np.testing.assert_allclose(share, wanted["share"], **tolerance["share"])
    assert list(indices) == wanted["halo"]
    names = {0: "rest", 1: "cluster"}, {0: "a", 1: "b"}
    found = halo.compute_cluster_to_cluster_flow(influence, x["source_labels"], x["target_labels"], *names)
    rows, columns = (doc["options"]["flow"][k] for k in ("rows", "columns"))
    np.testing.assert_allclose([[found[r][c] for c in columns] for r in rows], wanted["flow"], **tolerance["flow"])


def test_an_identity_as_next_layer_sends_each_unit_to_itself():
    halo = CrossLayerHaloAnalysis(percentile=75)
    influence = halo.compute_influence(np.eye(4), np.random.default_rng(0).standard_normal((50, 4)))
    indices, share = halo.find_halo(influence, [2])
    assert list(share) == [0, 0, 1, 0]
    assert list(indices) == [2]
    assert flow(influence, [0, 0, 1, 1], [0, 0, 1, 1]).to_numpy().tolist() == [[1, 0], [0, 1]]


def test_influence_is_the_slow_sum():
    chance = np.random.default_rng(1)
    weights, rows = chance.standard_normal((3, 2, 2, 2)), chance.standard_normal((9, 2, 4, 4)) * [[[[1]], [[3]]]]
    found = CrossLayerHaloAnalysis().compute_influence(weights, rows)
    for j in range(3):
        for i in range(2):
            size = sum(abs(weights[j, i, a, b]) for a in range(2) for b in range(2))
            assert found[j, i] == pytest.approx(size * rows[:, i].std())
    plain = CrossLayerHaloAnalysis(use_activation_weight=False).compute_influence(weights)
    np.testing.assert_allclose(plain, np.abs(weights).sum((2, 3)))


def test_flattened_maps_are_summed_over_the_positions_of_a_unit():
    chance = np.random.default_rng(2)
    weights, maps = chance.standard_normal((5, 3 * 4)), chance.standard_normal((30, 3, 2, 2)) * chance.uniform(0, 2, (3, 2, 2))
    found = CrossLayerHaloAnalysis().compute_influence(weights, maps)
    slow = np.zeros((5, 3))
    for c in range(3):
        for p in range(4):
            slow[:, c] += np.abs(weights[:, 4 * c + p]) * maps.reshape(30, 3, 4)[:, c, p].std()
    np.testing.assert_allclose(found, slow, rtol=1e-12)


def test_a_receiver_without_input_has_no_share_and_no_halo():
    influence = np.array([[1.0, 1.0], [0.0, 0.0], [3.0, 1.0]])
    indices, share = CrossLayerHaloAnalysis(percentile=0).find_halo(influence, np.array([True, False]))
    assert list(indices) == [0, 2]
    assert np.isnan(share[1])
    assert CrossLayerHaloAnalysis().find_halo(np.zeros((2, 2)), [0])[0].tolist() == []


def planted(units=24, receivers=30, strength=4.0):
    """Influence in which the first quarter of the units sends most to the first fifth of the receivers."""
    influence = np.random.default_rng(3).uniform(0.5, 1.5, (receivers, units))
    influence[: receivers // 5, : units // 4] *= strength
    return influence, np.arange(units) < units // 4, np.arange(receivers) < receivers // 5


def test_a_planted_halo_is_found_above_the_null():
    influence, sources, targets = planted()
    indices, _ = CrossLayerHaloAnalysis(percentile=80).find_halo(influence, sources)
    assert list(indices) == list(np.flatnonzero(targets))
    found = halo_null(influence, sources, 80, permutations=199)
    assert found["p"] == 1 / 200
    assert found["z"] > 5
    assert found["share"] > found["null"]


def test_a_planted_flow_is_found_above_the_null():
    influence, sources, targets = planted()
    labels = np.where(sources, "critical", "rest"), np.where(targets, "critical", "rest")
    found = flow_null(influence, *labels, permutations=199).set_index(["source", "target"])
    assert found.loc[("critical", "critical"), "p"] == 1 / 200
    assert found.loc[("critical", "rest"), "p"] == 1
    assert found.groupby("source")["flow"].sum().tolist() == pytest.approx([1, 1])


def test_p_values_of_random_clusters_are_uniform():
    p_halo, p_flow = [], []
    for seed in range(120):
        chance = np.random.default_rng(seed)
        influence = chance.exponential(size=(20, 16))
        cluster = chance.permutation(16) < 5
        p_halo.append(halo_null(influence, cluster, 80, 60, seed)["p"])
        p_flow.append(flow_null(influence, cluster, np.arange(20) < 7, 60, seed)["p"].iloc[0])
    assert kstest(p_halo, "uniform").pvalue > 0.01
    assert kstest(p_flow, "uniform").pvalue > 0.01


def test_names_join_clusters():
    influence = np.ones((3, 3))
    found = CrossLayerHaloAnalysis().compute_cluster_to_cluster_flow(
        influence, torch.tensor([0, 1, 2]), [0, 0, 1], {0: "background", 1: "critical", 2: "background"}
    )
    assert found == {"background": {"0": pytest.approx(2 / 3), "1": pytest.approx(1 / 3)}, "critical": found["background"]}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda h: CrossLayerHaloAnalysis(percentile=101), "percentile is 101; it is a number from 0 to 100"),
        (lambda h: h.compute_influence(np.ones(3), np.ones((2, 3))), r"weights have the shape \(3,\): give \(receivers, units\)"),
        (
            lambda h: h.compute_influence(np.ones((2, 3))),
            "use_activation_weight=True needs activations=, what the next layer reads",
        ),
        (lambda h: h.compute_influence(np.ones((2, 3)), np.ones(3)), r"activations have the shape \(3,\): give \(rows, units\)"),
        (lambda h: h.compute_influence(np.ones((2, 3)), np.ones((5, 4))), "the weights read 3 units and the activations have 4"),
        (lambda h: h.compute_influence("w", np.ones((5, 4))), "weights are no array of numbers, but str"),
        (lambda h: h.find_halo(np.ones((2, 3)), []), "cluster_indices is empty: a halo belongs to one unit or more"),
        (lambda h: h.find_halo(np.ones((2, 3)), [3]), "give numbers of units from 0 to 2, or one bool per unit"),
        (lambda h: h.find_halo(np.ones(3), [0]), r"influence has the shape \(3,\): give \(receivers, units\)"),
        (lambda h: h.compute_cluster_to_cluster_flow(np.ones((2, 3)), [0, 1], [0, 1]), "there are 2 labels for 3 units"),
        (lambda h: h.compute_cluster_to_cluster_flow(np.ones((2, 3)), [0, 1, 1], [0]), "there are 1 labels for 2 receivers"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(CrossLayerHaloAnalysis())
