"""The analyses clusters and halo, through nl.analyze: tables, columns, gaps, the data flow, and figures."""

import numpy as np
import pandas as pd
import pytest
import torch
from planted_types import planted
from torch import nn

import nodelens as nl
from nodelens.analysis.clusters.clusters_analysis import ClustersAnalysis
from nodelens.analysis.clusters.halo_analysis import HaloAnalysis
from nodelens.analysis.clusters.next_layers import deviations, next_layers
from nodelens.metrics.fanout import input_sizes
from nodelens.report import clusters_figures, halo_figures
from nodelens.results.findings import load_findings
from nodelens.results.result import Result, values_of

NO_FLOW = {"permutations": 20}


class Registered(nn.Module):
    """A small network whose layers are registered in another order than they run: conv1, conv2 (two groups), fc, head."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(9, 5)
        self.conv2 = nn.Conv2d(8, 6, 3, groups=2)
        self.fc = nn.Linear(6 * 4, 9)
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv1(x)))
        x = torch.relu(self.conv2(x))
        return self.head(torch.relu(self.fc(x.flatten(1))))


class Residual(nn.Module):
    """A stem and two blocks on one stream, and a reader behind each."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.a(torch.relu(x))
        x = x + self.b(torch.relu(x))
        return self.out(x)


def batches(*shape, classes=5, n=3, size=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, *shape, generator=g), torch.randint(classes, (size,), generator=g)) for _ in range(n)]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Registered().eval()


@pytest.fixture(scope="module")
def data():
    return batches(1, 4, 4)


@pytest.fixture(scope="module")
def result(net, data):
    return nl.analyze(net, data, metrics=["rq"], analysis=["clusters", HaloAnalysis(**NO_FLOW)])


def table_of(layers, noise=0.05):
    """A result with planted units, as if it had been measured."""
    values, kinds = planted(noise=noise)
    index = pd.MultiIndex.from_product([layers, range(len(kinds))], names=["layer", "unit"])
    columns = dict(zip(("rq", "redundancy", "synergy"), np.tile(values, len(layers)), strict=True))
    return Result(pd.DataFrame(columns, index=index), pd.DataFrame(index=pd.Index(layers, name="layer"))), kinds


def clusters_of(result, **options):
    return ClustersAnalysis(**options)(nn.Identity(), [], result=result)


def test_planted_types_are_recovered_and_stable():
    result, kinds = table_of(["a", "b"])
    found = clusters_of(result, draws=20)
    for layer in "ab":
        assert list(found.units.loc[layer, "unit_type"]) == list(kinds)
        row = found["layers"].loc[layer]
        assert (row["stability"], row["stability_low"], row["units"], row["critical"]) == (1, 1, 48, 12)
    assert (found["ablations"].query("features == 'rq+redundancy+synergy'")["ari"] == 1).all()
    clusters = found["clusters"].query("layer == 'a'").set_index("type")
    assert list(clusters["units"]) == [12] * 4
    own = result.units.loc["a"][kinds == "redundant"]
    assert clusters.loc["redundant", "redundancy"] == pytest.approx(own["redundancy"].mean())
    assert clusters.loc["redundant", "rq"] == pytest.approx(np.log(own["rq"]).mean())
    assert "96 units in 2 layers: 24 critical, 24 redundant, 24 synergistic, 24 background" in found.summary()


def test_the_number_of_clusters_is_chosen_by_the_silhouette():
    result, kinds = table_of(["a"])
    found = clusters_of(result, n_clusters="auto", draws=0)
    assert found["layers"].loc["a", "n_clusters"] == 4
    assert found["numbers"].set_index("n_clusters")["silhouette"].idxmax() == 4
    assert list(found.units["unit_type"]) == list(kinds)
    two = clusters_of(result, n_clusters="auto", columns=["rq", "kind"], draws=0)
    assert two.metadata["missing"][0]["reason"].startswith(
        "layer 'a' has no column kind: measure it, or name others; the table has"
    )
    result.units["kind"] = np.where(kinds == "critical", 5.0, np.arange(48) / 1000)
    two = clusters_of(result, n_clusters="auto", columns=["kind"], draws=0)
    assert two["layers"].loc["a", "n_clusters"] == 2
    assert set(two.units["unit_type"]) == {"none"}
    assert not len(two["ablations"])


def test_a_mode_with_a_score_reads_its_column():
    result, kinds = table_of(["a"])
    result.units["score"] = np.where(kinds == "background", 4.0, np.where(kinds == "critical", 3.0, 1.0)) + np.arange(48) / 1e3
    found = clusters_of(result, clustering_mode="importance_reassign", score="score", draws=2)
    assert set(found.units["unit_type"][kinds == "background"]) == {"critical"}
    assert set(found.units["unit_type"][kinds == "critical"]) == {"synergistic"}


def test_layers_that_cannot_be_divided_are_named_and_the_others_go_on():
    result, kinds = table_of(["a", "few", "equal", "gone"])
    result.units.loc["few", "rq"] = np.where(np.arange(48) < 3, 1.0, np.nan)
    result.units.loc["equal", ["rq", "redundancy", "synergy"]] = 0.5
    result.units.loc["gone", "synergy"] = np.nan
    found = clusters_of(result, draws=2)
    reasons = {each["layer"]: each["reason"] for each in found.metadata["missing"]}
    assert set(reasons) == {"few", "equal", "gone"}
    assert "layer 'few' cannot be divided into 4 clusters: it has 3 units with a value of rq" in reasons["few"]
    assert "only 1 of its 48 units differ in rq, redundancy, synergy; leave the layer out" in reasons["equal"]
    assert list(found.units.loc["a", "unit_type"]) == list(kinds)
    assert set(found.units.loc["few", "unit_type"]) == {"none"}
    assert set(found.units.loc["few", "cluster"]) == {-1}
    assert list(found["layers"].index) == ["a"]
    assert "few is left out: layer 'few' cannot be divided" in found.summary()


def test_a_result_without_any_layer_that_can_be_divided_has_no_figures(tmp_path):
    result, _ = table_of(["a"])
    result.units["rq"] = np.nan
    found = clusters_of(result)
    found.save(tmp_path)
    assert list(clusters_figures.figures_of(load_findings(tmp_path))) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_clusters": 1}, "n_clusters is 1; it is a whole number, 2 or more"),
        ({"clustering_mode": "kmeans"}, "clusters: clustering_mode is 'kmeans'; it is one of geometric"),
        ({"clustering_mode": "quantile"}, "clusters: clustering_mode 'quantile' with score None: name a column, as score=taylor"),
        ({"score": "taylor"}, "clusters: clustering_mode 'geometric' with score 'taylor': leave score out, or choose another"),
        ({"draws": -1}, "clusters: draws is -1 and most 8; they are 0 or more, and 2 or more"),
    ],
)
def test_wrong_options_of_clusters_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ClustersAnalysis(**options)


def test_the_next_layer_is_the_one_that_reads_the_units(net, data):
    pairs, reasons = next_layers(net, data, ["head", "conv2", "fc", "conv1", "norm", "fc.input"])
    assert {(pair.layer, pair.next) for pair in pairs} == {
        ("conv1", "conv2"),
        ("norm", "conv2"),
        ("conv2", "fc"),
        ("fc", "head"),
        ("fc.input", "fc"),
    }
    assert reasons == {"head": "no layer is known that reads its units: 5 units: the model's output"}


class Unexportable(nn.Module):
    """A forward pass that depends on values, which torch.export cannot trace."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x.relu() if float(x.detach().sum()) > 1e9 else x.tanh())


def test_a_model_that_cannot_be_followed_has_a_reason_and_layers_named_by_their_input_go_on():
    torch.manual_seed(0)
    net, data = Unexportable().eval(), batches(4, classes=3)
    result = nl.analyze(net, data, metrics=["taylor"], layers=["first", "last.input"])
    found = HaloAnalysis(column="taylor", top=0.3, **NO_FLOW)(net, data, result=result)
    assert set(found["pairs"]["layer"]) == {"last.input"}
    (missing,) = found.metadata["missing"]
    assert missing["layer"] == "first"
    assert "the layers that read its units are not known: torch.export cannot trace the forward pass" in missing["reason"]


def test_readers_of_a_stream_that_run_earlier_do_not_count():
    torch.manual_seed(0)
    pairs, _ = next_layers(Residual().eval(), batches(4, classes=3), ["stem", "a", "b", "out"])
    assert {(pair.layer, pair.next) for pair in pairs} == {
        ("stem", "a"),
        ("stem", "b"),
        ("stem", "out"),
        ("a", "b"),
        ("a", "out"),
        ("b", "out"),
    }


def test_influence_of_a_grouped_convolution_and_of_flattened_maps_is_the_slow_sum(net, data):
    rows = torch.cat([x for x, _ in data])
    with torch.no_grad():
        before = torch.relu(net.norm(net.conv1(rows)))
        flat = torch.relu(net.conv2(before)).flatten(1)
    pairs = {pair.layer: pair for pair in next_layers(net, data, ["conv1", "conv2"])[0]}
    spread = deviations(net, data, ["conv2", "fc"])
    sd = before.double().transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(spread["conv2"], sd, rtol=1e-5, atol=1e-9)
    found, weight = pairs["conv1"].influence(net, 8, spread["conv2"]), net.conv2.weight.detach().double()
    for j in range(6):
        for i in range(8):
            inside = i // 4 == j // 3
            slow = weight[j, i % 4].abs().sum() * sd[i] if inside else 0.0
            assert float(found[j, i]) == pytest.approx(float(slow), rel=1e-5)
    found, sd = pairs["conv2"].influence(net, 6, spread["fc"]), flat.double().std(0, correction=0)
    slow = (net.fc.weight.detach().double().abs() * sd).reshape(9, 6, 4).sum(2)
    torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-9)
    plain = pairs["conv2"].influence(net, 6, None)
    torch.testing.assert_close(plain, net.fc.weight.detach().double().abs().reshape(9, 6, 4).sum(2))


def test_sizes_of_transposed_convolutions_are_by_receiver():
    torch.manual_seed(0)
    module = nn.ConvTranspose2d(4, 6, 3, groups=2).double()
    found = input_sizes(module)
    assert found.shape == (6, 4)
    x = torch.zeros(1, 4, 1, 1, dtype=torch.float64)
    for i in range(4):
        x[:] = 0
        x[0, i] = 1
        with torch.no_grad():
            sent = (module(x) - module(torch.zeros_like(x))).abs().sum((0, 2, 3))
        torch.testing.assert_close(found[:, i], sent)


def test_clusters_and_halos_join_the_table_of_units(result, net):
    assert {"cluster", "unit_type", "in_halo", "halo_share"} <= set(result.units)
    pairs = result.analyses["halo"]["pairs"].set_index(["layer", "next"])
    assert set(pairs.index) == {("conv1", "conv2"), ("conv2", "fc"), ("fc", "head")}
    receivers = result.analyses["halo"]["receivers"].query("layer == 'conv2'").set_index("unit")
    assert result.units.loc["fc", "halo_share"].to_numpy() == pytest.approx(receivers["share"].to_numpy())
    assert list(result.units.loc["fc", "in_halo"]) == list(receivers["halo"])
    assert not result.units.loc["conv1", "in_halo"].any()
    flow = result.analyses["halo"]["flow"]
    assert flow.groupby(["layer", "source"])["flow"].sum(min_count=1).dropna().to_numpy() == pytest.approx(1)
    assert result.analyses["halo"].metadata["missing"] == []


def test_halo_finds_the_types_by_itself(result, net, data):
    alone = nl.analyze(net, data, metrics=[], analysis=HaloAnalysis(**NO_FLOW))
    assert "unit_type" not in alone.units
    pd.testing.assert_frame_equal(alone.analyses["halo"]["pairs"], result.analyses["halo"]["pairs"])


def test_a_saved_result_keeps_clusters_as_labels(result, tmp_path):
    result.save(tmp_path)
    again = nl.load(tmp_path)
    assert "cluster" not in values_of(again.units)
    assert again.units["cluster"].astype(int).tolist() == result.units["cluster"].astype(int).tolist()
    for module, name in ((clusters_figures, "clusters"), (halo_figures, "halo")):
        figures = list(module.figures_of(again.analyses[name]))
        assert len(figures) >= 3
        assert all(plot.figure.data and plot.caption.endswith(".") for plot in figures)


def test_any_column_has_a_halo(net, data):
    result = nl.analyze(net, data, metrics=["taylor"], analysis=HaloAnalysis(column="taylor", top=0.25, **NO_FLOW))
    pairs = result.analyses["halo"]["pairs"].set_index("layer")
    assert pairs.loc["conv1", "units"] == 2
    assert set(pairs["cluster"]) == {"top 25 %"}
    largest = set(result.units.loc["conv1", "taylor"].nlargest(2).index)
    found = result.analyses["halo"]["receivers"].query("layer == 'conv1'")["share"].to_numpy()
    spread = deviations(net, data, ["conv2"])["conv2"]
    influence = next_layers(net, data, ["conv1"])[0][0].influence(net, 8, spread).numpy()
    assert found == pytest.approx(influence[:, sorted(largest)].sum(1) / influence.sum(1))


def test_two_variants_have_columns_of_their_own(net, data):
    every = {name: HaloAnalysis(value=name, suffix=f"_{name}", **NO_FLOW) for name in ("critical", "redundant")}
    every = {"clusters": ClustersAnalysis(draws=0), "two": ClustersAnalysis(5, draws=0, suffix="_5")} | every
    result = nl.analyze(net, data, metrics=[], analysis=every, layers=["conv1", "conv2", "fc"])
    assert {"unit_type", "unit_type_5", "cluster_5", "in_halo_critical", "halo_share_redundant"} <= set(result.units)


def test_a_layer_without_units_of_the_cluster_is_named(net, data):
    result = nl.analyze(net, data, metrics=["rq"])
    result.units["kind"] = np.where(result.units.index.get_level_values("layer") == "conv1", "a", "b")
    found = HaloAnalysis(column="kind", value="a", **NO_FLOW)(net, data, result=result)
    assert set(found["pairs"]["layer"]) == {"conv1"}
    told = {each["layer"]: each["reason"] for each in found.metadata["missing"]}
    assert told["conv2"] == "layer 'conv2' has no unit with kind 'a'; it has b: choose another value"


def test_a_convolution_without_spread_has_no_halo(net, data):
    still = [(torch.zeros_like(x), y) for x, y in data]
    result = nl.analyze(net, still, metrics=["taylor"], layers=["conv1"])
    found = HaloAnalysis(column="taylor", top=0.25, **NO_FLOW)(net, still, result=result)
    assert not found["receivers"]["halo"].any()
    assert found["pairs"]["p"].isna().all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda **_: HaloAnalysis(top=1.0), "halo: top is 1.0; it is a share of the units of a layer, between 0 and 1"),
        (lambda **_: HaloAnalysis(permutations=0), "halo: permutations is 0; it is 1 or more"),
        (lambda **_: HaloAnalysis(percentile=-1), "percentile is -1; it is a number from 0 to 100"),
        (
            lambda **k: HaloAnalysis(column="rqq")(**k),
            r"halo reads the column 'rqq', and the table of units has none. Did you mean 'rq'\? It has rq.*measure it, or run its",
        ),
        (lambda **k: HaloAnalysis(column="rq")(**k), "halo: 'rq' has numbers, not clusters: give top=, a share such as top=0.1"),
    ],
)
def test_wrong_options_of_halo_are_refused(call, words, net, data):
    result = nl.analyze(net, data, metrics=["rq"])
    with pytest.raises(ValueError, match=words):
        call(model=net, data=data, result=result)
