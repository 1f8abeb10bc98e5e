"""Clusters over a training: shares of types, agreement of consecutive epochs, and their pictures."""

import numpy as np
import pandas as pd
import pytest

from nodelens.analysis.clusters.clusters_analysis import ClustersAnalysis
from nodelens.report.clusters_epochs_figures import figures_of
from nodelens.report.epoch_pictures import ranked
from nodelens.results.findings import Findings, load_findings


def after(clusters, types):
    """What an epoch found in one layer."""
    index = pd.MultiIndex.from_product([["fc1"], range(len(clusters))], names=["layer", "unit"])
    points = pd.DataFrame({"rq": 0.5, "cluster": clusters, "type": types}, index=index)
    layers = pd.DataFrame({"silhouette": [0.5]}, index=pd.Index(["fc1"], name="layer"))
    return Findings("clusters", {"points": points, "layers": layers})


def test_types_are_followed_from_epoch_to_epoch(tmp_path):
    types = ["critical", "critical", "redundant", "none"]
    first = after([0, 0, 1, -1], types)
    second = after([1, 1, 0, 0], [*types[:2], "critical", "redundant"])
    empty = Findings("clusters", {"points": pd.DataFrame(), "layers": pd.DataFrame()})
    found = ClustersAnalysis().over_epochs({4: second, 0: first, 7: empty})
    row = found["stability"].iloc[0]
    assert len(found["stability"]) == 1
    assert (row["layer"], row["epoch_a"], row["epoch_b"], row["units"]) == ("fc1", 0, 4, 3), "a unit without a value does not count"
    assert row["ari"] == pytest.approx(1), "clusters with other numbers are the same clusters"
    assert row["same_type"] == pytest.approx(2 / 3)
    shares = found["types"].pivot(index="epoch", columns="type", values="share")
    assert shares.loc[0].to_dict() == {"critical": 0.5, "redundant": 0.25, "none": 0.25}
    assert shares.loc[4].to_dict() == {"critical": 0.75, "redundant": 0.25, "none": 0}
    assert "between epochs 0 and 4 1.00" in found.summary()
    assert "67 % and 67 % of the units keep their type" in found.summary()
    plots = list(figures_of(load_findings(found.save(tmp_path))))
    assert [plot.name for plot in plots] == ["types", "stability", "units"]
    assert [trace.name for trace in plots[0].figure.data] == ["critical", "redundant", "none"]
    np.testing.assert_array_equal(plots[2].figure.data[0].z, [[0, 0], [0, 0], [1, 0], [2, 1]])


def test_clusters_without_types_have_shares_of_clusters():
    found = ClustersAnalysis().over_epochs({k: after([0, 1, 1, -1], ["none"] * 4) for k in range(2)})
    assert np.isnan(found["stability"]["same_type"]).all()
    assert set(found["types"]["type"]) == {"0", "1", "-1"}
    assert "type" not in found.summary()
    assert len(list(figures_of(found))) == 3


def test_a_training_without_any_clusters_has_no_figures():
    empty = Findings("clusters", {"points": pd.DataFrame(), "layers": pd.DataFrame()})
    assert list(figures_of(ClustersAnalysis().over_epochs({0: empty}))) == []


def test_no_two_large_modules_have_the_same_colour():
    table = pd.DataFrame({0: [0, 0, 0, 8, 3, -1], 1: [7, 7, 0, 8, 8, -1]})
    found = ranked(table, 3)
    assert found[1].tolist()[:5] == [1, 1, 2, 0, 0], "the modules of the last epoch come first, the largest of them in front"
    assert found.loc[4, 0] == 3, "those beyond have one colour"
    assert np.isnan(found.loc[5]).all()
