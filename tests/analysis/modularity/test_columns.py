"""Modules of all layers together and of drawn units: their columns, comparison, epochs and mistakes."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import nodelens as nl
from nodelens.analysis.modularity.columns import every_labels, labels_of
from nodelens.analysis.modularity.modularity_analysis import ModularityAnalysis
from nodelens.report import write_page

NAMES = ["forward_cov", "backward_ggn"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def batches():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 8, generator=g), torch.randint(4, (32,), generator=g)) for _ in range(2)]


def measured(layers=("1", "3"), net=None, **named):
    options = {"associations": NAMES, "shuffles": 2, "starts": 2, "alignments": 20, "stacked": True} | named.pop("options", {})
    return nl.analyze(net or network(), batches(), [], list(layers), analysis=ModularityAnalysis(**options), **named)


@pytest.fixture(scope="module")
def result():
    return measured()


def test_modules_of_all_layers_are_those_of_the_matrix_of_all_layers(result):
    for name in NAMES:
        matrix = result.matrices["all", name]
        assert matrix.shape == (28, 28)
        np.testing.assert_allclose(matrix[:16, :16], result.matrices["1", name], rtol=1e-5)
        modules = nl.find_modules(matrix, starts=5)
        row = result.analyses["modularity"]["modules"].query("layer == 'all' and association == @name").iloc[0]
        labels = result.units[f"stacked_module_{name}"]
        assert row["units"] == len(labels) == 28
        assert row["q"] == pytest.approx(nl.modularity(np.abs(matrix), labels), abs=1e-9)
        assert row["q"] == pytest.approx(modules.q, abs=1e-3)
        assert result.matrices["all", f"sorted_{name}"].shape == (28, 28)
        assert f"all, {name}: {row['modules']} modules of 28 units" in result.analyses["modularity"].summary()
        assert labels.groupby("layer").nunique().max() > 1
    assert list(result.units) == [f"{kind}module_{name}" for kind in ("", "stacked_") for name in NAMES]


def test_modules_of_all_layers_are_compared_saved_and_shown(result, tmp_path):
    inside = result.analyses["modularity"]["comparison"].query("layer == 'all'")
    assert inside[["association_a", "association_b"]].to_numpy().tolist() == [NAMES]
    result.save(tmp_path)
    again = nl.load(tmp_path)
    runs = nl.compare_modules([result, again], shuffles=5)
    assert (runs[["alignment", "adj_spearman"]].round(9) == 1).all(axis=None)
    assert runs["layer"].tolist().count("all") == 2
    assert "all, forward_cov" in write_page(tmp_path).read_text(encoding="utf-8")
    units = {"1": np.arange(16)[::-1], "3": np.arange(12)}  # says nothing about the order of all units
    assert "all" not in nl.compare_modules([result, result], units=units, shuffles=5)["layer"].tolist()
    units["all"] = np.arange(28)
    assert "all" in nl.compare_modules([result, result], units=units, shuffles=5)["layer"].tolist()


def test_modules_of_all_layers_are_followed_over_epochs(result):
    found = result.analyses["modularity"]
    over = ModularityAnalysis(NAMES, alignments=5).over_epochs({0: found, 1: found})
    assert (over["stability"]["ami"].round(9) == 1).all()
    labels = over["labels"].query("layer == 'all' and association == 'forward_cov' and epoch == 1")
    assert labels["unit"].tolist() == list(range(28))
    assert labels["module"].tolist() == result.units["stacked_module_forward_cov"].tolist()


def test_labels_are_read_back_from_their_columns(result):
    every = every_labels(result.units)
    assert set(every) == {(layer, name) for layer in ("1", "3", "all") for name in NAMES}
    assert len(every["all", "forward_cov"]) == 28
    assert labels_of(result.units, "1", "other") is None


@pytest.mark.parametrize("stacked", [False, True])
def test_modules_of_drawn_units_leave_the_others_in_none(stacked):
    found = measured(covariance="sample:10", width=15, options={"stacked": stacked, "associations": "forward_cov"})
    layer, width = ("all", 28) if stacked else ("1", 16)
    sites = {site["width"]: site["channels"] for site in found.metadata["covariance"]}
    labels = labels_of(found.units, layer, "forward_cov")
    assert np.flatnonzero(labels >= 0).tolist() == sites[width]
    assert f"{layer}, forward_cov: modules of the 10 units that were drawn; the others are in none" in found.summary()
    compared = nl.compare_modules([found, found], shuffles=5).query("layer == @layer")
    assert compared["alignment"].tolist() == [1]
    assert compared["transfer"].isna().all()


def test_a_layer_may_be_called_all_unless_layers_are_stacked():
    net = nn.Sequential()
    net.add_module("all", nn.Linear(8, 6))
    net.add_module("head", nn.Linear(6, 4))
    found = measured(["all"], net, options={"stacked": False})
    assert labels_of(found.units, "all", "forward_cov").tolist() == found.units["module_forward_cov"].tolist()
    with pytest.raises(ValueError, match="stacked: a layer is called 'all', the name of the matrix of all layers: leave"):
        measured(["all", "head"], net)


def test_stacked_needs_an_association_with_a_matrix_of_all_layers():
    with pytest.raises(ValueError, match="stacked: redundancy has no matrix of the units of all layers: add an association"):
        ModularityAnalysis(["redundancy"], stacked=True)
    both = ModularityAnalysis(["redundancy", "forward_cov"], stacked=True).required_metrics()
    assert [metric.options.get("stacked") for metric in both.values()] == [None, True]


def test_a_matrix_of_all_layers_that_does_not_exist_is_a_gap_with_its_reason():
    conv = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5), nn.ReLU(), nn.Linear(5, 4))
    images = [(torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(16, dtype=torch.long))]
    analysis = ModularityAnalysis(["backward_ggn"], stacked=True, shuffles=0, starts=1)
    found = nl.analyze(conv, images, [], ["0", "3"], analysis=analysis).analyses["modularity"]
    (gap,) = [row for row in found.metadata["missing"] if row["layer"] == "all"]
    assert gap["reason"].startswith(
        "stacked: layers have different numbers of rows per sample (0 16, 3 1): name layers of one size"
    )
    assert set(found["modules"]["layer"]) == {"0", "3"}


def test_a_reason_of_the_pass_is_that_of_the_analysis():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.b((self.a(x) > 0).float())

    found = measured(["a", "b"], Cut(), options={"stacked": False}).analyses["modularity"]
    (gap,) = [row for row in found.metadata["missing"] if row["layer"] == "a"]
    assert gap["what"] == "module_backward_ggn"
    assert "have no derivative there" in gap["reason"]
    assert gap["reason"].endswith("leave the layer out (layers=)")
    assert isinstance(found["modules"], pd.DataFrame)
