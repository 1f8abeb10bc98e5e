"""Clusters in metric space: planted types, golden numbers, every mode and mapping, and laws."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from planted_types import TYPES, planted
from real import folder
from sklearn.metrics import adjusted_rand_score

from nodelens.analysis.clustering import MetricSpaceClustering
from nodelens.analysis.clusters.features import Features
from nodelens.analysis.clusters.metric_space import features_of
from nodelens.analysis.clusters.stability import ablations, best_number, numbers_of_clusters, stability
from nodelens.analysis.clusters.unit_types import types_by_centroid, types_by_score

MAPPINGS = ("greedy", "global_penalized", "global_simple", "global_prototype")


def document():
    return json.loads((folder("NODELENS_GOLDEN") / "metric_space_clustering.json").read_text())


def test_golden_types_and_silhouettes_agree():
    doc = document()
    x = doc["inputs"]
    for case, options in doc["options"].items():
        found = MetricSpaceClustering(**options).fit(x["rq"], x["redundancy"], x["synergy"], layer_name="conv1")
        assert list(found.types) == doc["expected"][case]["types"], case
        assert found.silhouette == pytest.approx(doc["expected"][case]["silhouette"], rel=1e-8)
        assert found.layer_name == "conv1"


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("seed", range(3))
def test_planted_types_are_recovered_by_every_mapping(mapping, seed):
    values, kinds = planted(seed=seed)
    found = MetricSpaceClustering(type_mapping_mode=mapping, seed=seed).fit(*values)
    assert list(found.types) == list(kinds)
    assert found.type_counts == dict.fromkeys(TYPES, 12)
    assert found.type_mapping == dict(enumerate(TYPES))
    assert list(found.sizes) == [12] * 4


def test_units_in_another_order_or_as_tensors_change_nothing():
    values, _ = planted(noise=0.6)
    found = MetricSpaceClustering(6).fit(*values)
    order = np.random.default_rng(5).permutation(len(values[0]))
    other = MetricSpaceClustering(6).fit(*(torch.tensor(v[order]) for v in values))
    assert list(other.types) == list(found.types[order])
    assert list(other.labels) == list(found.labels[order])
    np.testing.assert_allclose(other.centroids, found.centroids, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_unit_of_a_metric_changes_nothing(scale):
    (rq, redundancy, synergy), _ = planted(noise=0.4)
    found, other = (
        MetricSpaceClustering().fit(rq, redundancy, synergy),
        MetricSpaceClustering().fit(scale * rq, redundancy / scale, synergy + 100),
    )
    assert list(other.labels) == list(found.labels)
    assert other.silhouette == pytest.approx(found.silhouette, rel=1e-6)


def test_centroids_are_means_of_the_standardized_features():
    values, kinds = planted()
    found = MetricSpaceClustering().fit(*values)
    features = np.stack([np.log(values[0]), values[1], values[2]], 1)
    z = (features - features.mean(0)) / features.std(0)
    for k, kind in found.type_mapping.items():
        np.testing.assert_allclose(found.centroids[k], z[kinds == kind].mean(0), rtol=1e-10)


def test_units_without_a_value_are_in_no_cluster_and_change_nothing():
    values, kinds = planted()
    holes = [np.append(v, [1.0, 1.0, 1.0]) for v in values]
    holes[0][-3], holes[1][-2], holes[2][-1] = np.nan, np.inf, np.nan
    found = MetricSpaceClustering().fit(*holes)
    assert list(found.types) == [*kinds, "none", "none", "none"]
    assert list(found.labels[-3:]) == [-1, -1, -1]
    assert found.type_counts["none"] == 3
    assert found.silhouette == MetricSpaceClustering().fit(*values).silhouette


def test_a_quotient_of_zero_counts_as_a_tiny_one():
    values, kinds = planted()
    values[0][kinds == "background"] = 0.0
    assert list(MetricSpaceClustering().fit(*values).types) == list(kinds)


def test_more_than_four_clusters_leave_the_others_to_the_background():
    chance = np.random.default_rng(0)
    centroids = chance.standard_normal((7, 3))
    for mapping in MAPPINGS:
        found = types_by_centroid(centroids, mapping)
        assert sorted(found) == sorted([*TYPES, *["background"] * 3]), mapping
    assert types_by_score(np.array([1.0, 5.0, 3.0, 2.0, 4.0])) == [
        "background",
        "critical",
        "redundant",
        "background",
        "synergistic",
    ]


@pytest.mark.parametrize("mapping", MAPPINGS[1:])
def test_a_global_mapping_has_the_largest_total_of_all_assignments(mapping):
    from itertools import permutations

    from nodelens.analysis.clusters.unit_types import _scores

    for seed in range(20):
        centroids = np.random.default_rng(seed).standard_normal((5, 3))
        scores = _scores(centroids, mapping)
        best = max(permutations(range(5), 4), key=lambda p: sum(scores[p[t], t] for t in range(4)))
        found = types_by_centroid(centroids, mapping)
        assert [found[k] for k in best] == list(TYPES)


def test_modes_with_a_score_name_the_types_by_it():
    values, kinds = planted()
    score = np.select([kinds == "background", kinds == "redundant", kinds == "synergistic"], [9.0, 5.0, 2.0], 1.0)
    score = score + np.random.default_rng(1).uniform(0, 0.1, len(score))
    named = {"background": "critical", "redundant": "synergistic", "synergistic": "redundant", "critical": "background"}
    for mode in ("importance_reassign", "score_augmented", "quantile"):
        found = MetricSpaceClustering().fit(*values, importance_scores=score, clustering_mode=mode)
        assert list(found.types) == [named[kind] for kind in kinds], mode


def test_quantiles_divide_the_scores_alone():
    score = np.random.default_rng(0).permutation(40).astype(float)
    noise = np.random.default_rng(1).uniform(1, 2, (3, 40))
    found = MetricSpaceClustering().fit(*noise, importance_scores=score, clustering_mode="quantile")
    assert list(found.types == "critical") == list(score >= 30)
    assert list(found.types == "background") == list(score < 10)
    assert list(found.types == "synergistic") == list((score >= 20) & (score < 30))
    assert found.columns == ("rq", "redundancy", "synergy")


def test_a_unit_without_a_score_is_in_no_cluster():
    values, kinds = planted()
    score = np.where(kinds == "critical", 4.0, 1.0) + np.arange(len(kinds)) / 100
    score[5] = np.nan
    for mode in ("importance_reassign", "score_augmented", "quantile"):
        found = MetricSpaceClustering().fit(*values, importance_scores=score, clustering_mode=mode)
        assert list(np.flatnonzero(found.labels < 0)) == [5], mode


@pytest.mark.parametrize("ablation", ["rq_red", "rq_syn", "red_syn", "rq_only", "red_only", "syn_only"])
def test_an_ablation_reads_the_other_metrics_alone(ablation):
    values, _ = planted()
    parts = {"rq": 0, "red": 1, "syn": 2}
    gone = [k for name, k in parts.items() if name not in ablation.split("_")]
    others = [v.copy() for v in values]
    for k in gone:
        others[k] = np.random.default_rng(k).uniform(1, 2, len(others[k]))
    clustering = MetricSpaceClustering()
    found, other = clustering.fit(*values, ablation=ablation), clustering.fit(*others, ablation=ablation)
    assert list(found.labels) == list(other.labels)
    assert found.centroids.shape == (4, 3 - len(gone))


def test_any_columns_of_a_table_are_clustered():
    values, kinds = planted()
    units = pd.DataFrame(dict(zip(("rq", "redundancy", "synergy"), values, strict=True)) | {"taylor": np.arange(48.0) % 4})
    clustering = MetricSpaceClustering()
    assert list(clustering.fit_columns(units).types) == list(kinds)
    two = clustering.fit_columns(units, ["taylor", "rq"])
    assert set(two.types) == {"none"}
    assert list(clustering.fit_columns(units, ["synergy", "rq", "redundancy"]).types) == list(kinds)
    four = MetricSpaceClustering(3).fit_columns(units, ["taylor", "rq", "redundancy", "synergy"])
    assert set(four.types) == {"none"}
    assert set(four.labels) == {0, 1, 2}
    one = clustering.fit_columns(units, "taylor", score="taylor", clustering_mode="importance_reassign")
    assert list(one.types == "critical") == list(units["taylor"] == 3)


def test_stable_clusters_have_an_index_of_one_and_noise_has_not():
    values, _ = planted()
    clustering = MetricSpaceClustering()
    sure = stability(clustering, features(values), draws=20)
    assert sure == (1.0, 1.0, 1.0, 20)
    chance = np.random.default_rng(0).standard_normal((48, 3))
    unsure = stability(clustering, Features("noise", ("a", "b", "c"), chance), draws=20)
    assert unsure.low <= unsure.mean <= unsure.high
    assert unsure.mean < 0.8


def test_stability_follows_the_seed():
    noise = Features("noise", ("a", "b", "c"), np.random.default_rng(0).standard_normal((30, 3)))
    first, again, other = (stability(MetricSpaceClustering(seed=s), noise, draws=5) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_number_of_clusters_with_the_largest_silhouette_is_the_planted_one():
    values, _ = planted()
    table = numbers_of_clusters(MetricSpaceClustering(), features(values), range(2, 8))
    assert best_number(table) == 4
    assert list(table.index) == [2, 3, 4, 5, 6, 7]
    assert best_number(table, least=5) == 5 if table.loc[5, "silhouette"] == table["silhouette"].loc[5:].max() else True


def test_ablations_compare_with_all_features():
    values, _ = planted()
    values[2] = np.random.default_rng(3).uniform(0, 1, 48)  # synergy tells nothing
    found = ablations(MetricSpaceClustering(), features(values))
    assert list(found.index) == [
        "rq+redundancy+synergy",
        "rq+redundancy",
        "rq+synergy",
        "redundancy+synergy",
        "rq",
        "redundancy",
        "synergy",
    ]
    assert found.loc["rq+redundancy+synergy", ["ari", "ami"]].tolist() == [1, 1]
    own = MetricSpaceClustering().fit(*values)
    some = MetricSpaceClustering().fit(*values, ablation="rq_red")
    assert found.loc["rq+redundancy", "ari"] == pytest.approx(adjusted_rand_score(own.labels, some.labels))
    assert found.loc["synergy", "ari"] < 0.5


def features(values):
    return Features.of("layer", dict(zip(("rq", "redundancy", "synergy"), values, strict=True)), log=["rq"])


V = planted()[0]
FEW = np.array([1.0, 1, 2, 2, 3, 3, 3, 3])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MetricSpaceClustering(1), "n_clusters is 1; it is a whole number, 2 or more"),
        (lambda: MetricSpaceClustering(type_mapping_mode="greed"), "type_mapping_mode is 'greed'; it is one of greedy, global_pen"),
        (
            lambda: MetricSpaceClustering(5).fit(FEW, FEW, FEW, "conv1"),
            "layer 'conv1' cannot be divided into 5 clusters: only 3 of its 8 units differ in rq, redundancy, synergy; set "
            "n_clusters to 3 or less, or leave the layer out",
        ),
        (
            lambda: MetricSpaceClustering(4).fit([1, np.nan, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4], "fc"),
            "layer 'fc' cannot be divided into 4 clusters: it has 3 units with a value of rq, redundancy, synergy .1 have",
        ),
        (
            lambda: MetricSpaceClustering(4).fit([np.nan] * 6, range(6), range(6), "fc"),
            "it has 0 units with a value of rq, redundancy, synergy .6 have none.; leave the layer out",
        ),
        (lambda: MetricSpaceClustering(3).fit(*V, "fc"), "layer 'fc': 3 clusters cannot have the four types critical, redundant"),
        (lambda: MetricSpaceClustering().fit(V[0], V[1][:-1], V[2], "fc"), "different numbers of units .rq 48, redundancy 47, syn"),
        (
            lambda: MetricSpaceClustering().fit(V, V[1], V[2], "fc"),
            r"layer 'fc': rq has the shape \(3, 48\): give one number per unit",
        ),
        (lambda: MetricSpaceClustering().fit(["a"], [1], [1], "fc"), "layer 'fc': rq is no column of numbers"),
        (lambda: MetricSpaceClustering().fit(*V, ablation="rq"), "ablation is 'rq'; it is one of all, rq_red"),
        (lambda: MetricSpaceClustering().fit(*V, clustering_mode="kmeans"), "clustering_mode is 'kmeans'; it is one of geometric"),
        (
            lambda: MetricSpaceClustering().fit(*V, "fc", clustering_mode="quantile"),
            "layer 'fc': clustering_mode 'quantile' needs scores, one per unit: give importance_scores, or choose another mode",
        ),
        (
            lambda: MetricSpaceClustering().fit(*V, "fc", importance_scores=V[0]),
            "clustering_mode 'geometric' needs no scores: leave them out, or choose another mode",
        ),
        (
            lambda: MetricSpaceClustering().fit(*V, "fc", importance_scores=V[0][1:], clustering_mode="quantile"),
            "layer 'fc' has 48 units and 47 scores: give one per unit",
        ),
        (
            lambda: MetricSpaceClustering().fit(*V, "fc", importance_scores=[0.0] * 47 + [1.0], clustering_mode="quantile"),
            "layer 'fc': 4 clusters were asked for and only 1 have units, because many scores are equal: lower n_clusters",
        ),
        (
            lambda: MetricSpaceClustering().fit_columns(pd.DataFrame({"rq": V[0]}), layer_name="fc"),
            "layer 'fc' has no column redundancy, synergy: measure it, or name others; the table has rq",
        ),
        (lambda: features_of(pd.DataFrame({"rq": V[0]}), [], "fc"), "layer 'fc': there is no column to cluster by"),
        (lambda: stability(MetricSpaceClustering(), features(V), draws=0), "draws is 0 and level 0.95: give at least 1 draw"),
    ],
)
def test_mistakes_are_named_with_the_layer_and_the_way_out(call, words):
    with pytest.raises(ValueError, match=words):
        call()
