"""Sites too wide for products of all units: each choice against the same numbers by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import nodelens as nl
from nodelens.engine.covariance import CovariancePolicy
from nodelens.metrics import Metric, Need, get_metric
from nodelens.statistics import Gram
from nodelens.statistics.rows import Rows

WIDTH, LIMIT, COUNT = 40, 24, 10


class Hidden(nn.Module):
    """Two wide layers of one width between narrow ones."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, WIDTH)
        self.mid = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.down(torch.relu(self.mid(torch.relu(self.up(x)))))


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Hidden().double().eval()


@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(300, 6, generator=g, dtype=torch.float64), torch.randint(5, (300,), generator=g)
    return list(zip(x.split(50), y.split(50), strict=True))


@pytest.fixture(scope="module")
def rows(net, data):
    """What each layer reads and puts out."""
    x = torch.cat([x for x, _ in data])
    with torch.no_grad():
        up = net.up(x)
        mid = net.mid(up.relu())
        return {"up": (x, up), "mid": (up.relu(), mid), "down": (mid.relu(), net.down(mid.relu()))}


def measured(net, data, metrics, covariance="sample:10", layers="*", width=LIMIT, **options):
    return nl.analyze(net, data, metrics, layers, covariance=covariance, width=width, **options)


def test_a_site_too_wide_is_refused_with_every_choice_and_its_bytes(net, data):
    with pytest.raises(ValueError, match="full covariance") as error:
        measured(net, data, ["redundancy", "participation_ratio", "rq"], None)
    size = 8 * (WIDTH * WIDTH + 2 * WIDTH) * 8 / 2**20
    small = 8 * (LIMIT * LIMIT + 3 * LIMIT + 1) * 8 / 2**10
    for words in (
        "site 'up' is 40 wide (and 1 more site), width is 24: redundancy, participation_ratio need products",
        f"{size:,.1f} MiB there",
        "covariance=diagonal (no products; these metrics are NaN there; 0 MiB)",
        f"covariance=sample:24 (24 channels; {small:,.1f} KiB)",
        f"covariance=sketch:24 (for participation_ratio; {small:,.1f} KiB)",
        "max_passes=2 or more, if only memory is short",
        "or width=40",
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="full covariance") as error:
        measured(net, data, ["redundancy"], None)
    assert "sketch" not in str(error.value)  # which has no units


def test_what_reads_no_products_and_a_limit_that_is_kept_are_as_ever(net, data):
    assert measured(net, data, ["rq", "activation_variance"], None).metadata["covariance"] == []
    whole = nl.analyze(net, data, ["redundancy"])
    pd.testing.assert_frame_equal(measured(net, data, ["redundancy"], None, width=WIDTH).units, whole.units)
    for wide in ("diagonal", "sample:10", None):  # several passes allow it: memory is the only limit
        found = measured(net, data, ["redundancy"], wide, max_passes=2)
        assert found.units["redundancy"].isna().any() == (wide is not None)


@pytest.mark.parametrize("words", ["sample", "sample:1", "sketch:x", "diagonal:3", "half"])
def test_other_words_are_refused(net, data, words):
    with pytest.raises(ValueError, match=f"covariance is '{words}'; it takes diagonal, sample:1024 or sketch:1024"):
        measured(net, data, ["rq"], words)


def test_a_width_below_one_is_refused(net, data):
    with pytest.raises(ValueError, match=r"width is 0"):
        measured(net, data, ["rq"], None, width=0)


# diagonal


def test_diagonal_leaves_products_out_and_every_other_column_as_it_is(net, data):
    plain = ["rq", "activation_variance", "class_mi", "taylor", "mi", "layer_cosine_sim"]
    products = ["redundancy", "synergy", "participation_ratio", "linear_cka"]
    found, alone = measured(net, data, plain + products, "diagonal", bias=True), nl.analyze(net, data, plain, bias=True)
    same = found.units[alone.units.columns]
    pd.testing.assert_frame_equal(same.loc[["up", "mid"]], alone.units.loc[["up", "mid"]], check_exact=True)
    pd.testing.assert_frame_equal(same, alone.units, rtol=1e-12)  # moments of down are read off its Gram
    for table, columns in ((found.units, products[:2]), (found.layers, products[2:3])):
        for column in columns:
            assert table.loc[["up", "mid"], column].isna().all(), column
            assert table.loc[["down"], column].notna().all(), column
    assert found.edges["linear_cka"].isna().all()
    assert found.edges["layer_cosine_sim"].notna().tolist() == [True, False]  # mid and down differ in width
    told = {(m["layer"], m["column"]): m for m in found.metadata["missing"]}
    assert told["up", "redundancy"]["count"] == WIDTH
    reason = "up is 40 wide, beyond width=24: products of its units are left out (covariance=diagonal)"
    assert told["up", "redundancy"]["reason"] == reason
    assert told["up", "participation_ratio"]["count"] == 1
    assert told["up -> mid", "linear_cka"]["count"] == 1
    assert [(w["site"], w["width"], w["channels"]) for w in found.metadata["covariance"]] == [
        ("up", 40, None),
        ("mid", 40, None),
    ]


def test_diagonal_forms_no_matrix_of_pairs(net, data):
    found = measured(net, data, {"pairs": get_metric("redundancy", reduce="none")}, "diagonal")
    assert set(found.matrices) == {("down", "pairs")}
    assert {m["layer"] for m in found.metadata["missing"]} == {"up", "mid"}


# sample


def channels():
    return CovariancePolicy("sample", COUNT, LIMIT).channels(WIDTH)


def test_channels_are_drawn_once_and_a_larger_count_holds_a_smaller_ones():
    ids = channels()
    assert len(ids.unique()) == COUNT
    assert bool((ids.diff() > 0).all())
    assert set(ids.tolist()) < set(CovariancePolicy("sample", 20, LIMIT).channels(WIDTH).tolist())
    assert not torch.equal(ids, CovariancePolicy("sample", COUNT, LIMIT, seed=1).channels(WIDTH))


@pytest.mark.parametrize("name", ["redundancy", "activation_cosine_similarity", "synergy_gaussian_mmi", "multi_redundancy"])
def test_units_of_a_sample_are_those_of_the_chosen_columns(net, data, rows, name):
    found, ids = measured(net, data, [name], groups=1), channels()
    labels = torch.cat([y for _, y in data])
    for layer in ("up", "mid"):
        truth = get_metric(name).compute(outputs=rows[layer][1][:, ids], labels=labels)
        column = found.units.loc[layer, name]
        np.testing.assert_allclose(column.iloc[ids], truth, rtol=1e-9)
        assert column.drop(index=ids.tolist()).isna().all()
    truth = get_metric(name).compute(outputs=rows["down"][1], labels=labels)
    np.testing.assert_allclose(found.units.loc["down", name], truth, rtol=1e-9)
    told = {(m["layer"], m["column"]): m for m in found.metadata["missing"]}
    assert told["mid", name] == {
        "layer": "mid",
        "column": name,
        "count": WIDTH - COUNT,
        "reason": "not among the 10 channels of covariance=sample:10",
    }


def test_layers_and_edges_of_a_sample_are_those_of_the_subset(net, data, rows):
    found, ids = (
        measured(net, data, ["participation_ratio", "total_correlation", "linear_cka", "feature_subspace_novelty"]),
        channels(),
    )
    up, mid, down = rows["up"][1][:, ids], rows["mid"][1][:, ids], rows["down"][1]
    for name in ("participation_ratio", "total_correlation"):
        assert found.layers.loc["mid", name] == pytest.approx(float(get_metric(name).compute(outputs=mid)), rel=1e-9)
    for name, pair in (("linear_cka", (up, mid)), ("feature_subspace_novelty", (up, mid))):
        truth = float(get_metric(name).compute(outputs=pair[0], next_outputs=pair[1]))
        assert found.edges.loc[("up", "mid"), name] == pytest.approx(truth, rel=1e-8)
    truth = float(get_metric("linear_cka").compute(outputs=mid, next_outputs=down))
    assert found.edges.loc[("mid", "down"), "linear_cka"] == pytest.approx(truth, rel=1e-9)


def test_a_matrix_of_pairs_has_a_row_a_channel_whose_ids_stand_in_the_metadata(net, data, rows):
    found = measured(net, data, {"pairs": get_metric("redundancy", reduce="none")})
    site = next(w for w in found.metadata["covariance"] if w["site"] == "mid")
    ids = site["channels"]
    assert ids == channels().tolist()
    assert site["covariance"] == "sample:10"
    assert site["metrics"] == ["pairs"]
    whole = get_metric("redundancy", reduce="none").compute(outputs=rows["mid"][1]).numpy()
    np.testing.assert_allclose(found.matrices["mid", "pairs"], whole[np.ix_(ids, ids)], rtol=1e-9)


def test_what_is_known_of_each_input_is_spread_over_all(net, data, rows):
    found, ids = measured(net, data, ["node_redundancy"], layers=["mid"]), channels()
    value = found.matrices["mid", "node_redundancy"]
    assert len(value) == WIDTH
    truth = get_metric("node_redundancy").compute(inputs=rows["mid"][0][:, ids])
    np.testing.assert_allclose(value[ids], truth, rtol=1e-9)
    assert np.isnan(value).sum() == WIDTH - COUNT


class Quadratic(Metric):
    """w'Cw of each unit, C the covariance of the inputs, over the variance of the output."""

    names = ("quadratic",)
    weighted = True

    def needs(self):
        return {"x": Need(Gram, "input"), "y": Need(Gram, "output")}

    def __call__(self, weight, x, y):
        w = weight.double()
        return ((w @ x.covariance) * w).sum(1) / y.covariance.diagonal()


def test_a_weight_goes_with_the_chosen_units_and_inputs(net, data, rows):
    found, ids = measured(net, data, [Quadratic()], layers=["up", "mid", "down"]).units["quadratic"], channels()
    np.testing.assert_allclose(found["up"].iloc[ids], 1, rtol=1e-9)  # all inputs are there
    assert found["up"].isna().sum() == WIDTH - COUNT
    x, y = rows["down"]
    w = net.down.weight.detach()[:, ids]
    np.testing.assert_allclose(found["down"], ((x[:, ids] @ w.T).var(0) / y.var(0)).numpy(), rtol=1e-9)


def test_a_composite_is_of_the_chosen_units_in_all_its_parts(net, data, rows):
    weights = {"rayleigh_quotient": 1.0, "pairwise_redundancy_gaussian": -0.3}
    metric, ids = get_metric("composite", weights=weights, log=()), channels()
    found = measured(net, data, {"both": metric}).units.loc["mid", "both"]
    x, y = rows["mid"]
    inputs = {"inputs": x, "weights": net.mid.weight.detach()[ids]}
    truth = metric.compute(outputs=y[:, ids], **inputs)
    np.testing.assert_allclose(found.iloc[ids], truth, rtol=1e-8)
    assert found.isna().sum() == WIDTH - COUNT


def test_the_next_layers_units_are_drawn_where_they_are_too_many(net, data, rows):
    found, ids = (
        measured(net, data, ["downstream_importance"], layers=["up", "mid", "down"]).units["downstream_importance"],
        channels(),
    )
    metric = get_metric("downstream_importance")
    truth = metric.compute(outputs=rows["mid"][1][:, ids], next_outputs=rows["down"][1])
    np.testing.assert_allclose(found["mid"].iloc[ids], truth, rtol=1e-9)
    truth = metric.compute(outputs=rows["up"][1][:, ids], next_outputs=rows["mid"][1][:, ids])
    np.testing.assert_allclose(found["up"].iloc[ids], truth, rtol=1e-9)


def test_synergy_of_a_sample_has_the_target_of_all(net, data, rows):
    found, ids = measured(net, data, ["synergy"]).units["synergy"], channels()
    labels = torch.cat([y for _, y in data])
    truth = get_metric("synergy").compute(outputs=rows["mid"][1][:, ids], labels=labels, logits=rows["down"][1])
    np.testing.assert_allclose(found["mid"].iloc[ids], truth, rtol=1e-8, atol=1e-12)


def test_neither_batches_nor_their_order_change_a_sample(net, data):
    metrics = ["redundancy", "participation_ratio", "linear_cka"]
    x, y = (torch.cat(t) for t in zip(*data, strict=True))
    small = list(zip(x.flip(0).split(7), y.flip(0).split(7), strict=True))
    one, two = measured(net, data, metrics), measured(net, small, metrics)
    for a, b in ((one.units, two.units), (one.layers, two.layers), (one.edges, two.edges)):
        pd.testing.assert_frame_equal(a, b, rtol=1e-9)


def test_maps_of_many_channels_are_drawn_from_as_rows_are():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, WIDTH, 3), nn.ReLU(), nn.Flatten(), nn.Linear(WIDTH * 4, 3)).double().eval()
        x = torch.randn(60, 2, 4, 4, dtype=torch.float64)
    found, ids = measured(net, x.split(20), ["redundancy"], layers=["0"]).units["redundancy"], channels()
    y = net[0](x).detach().movedim(1, -1).flatten(0, 2)
    np.testing.assert_allclose(found["0"].iloc[ids], get_metric("redundancy").compute(outputs=y[:, ids]), rtol=1e-9)


def test_what_reads_weights_as_a_whole_has_no_sample(net, data):
    weights = {"gradient_alignment": 1.0, "pairwise_redundancy_gaussian": -0.3}
    metric = get_metric("composite", weights=weights, log=())
    with pytest.raises(ValueError, match="'both' reads all weights of up, but"):
        measured(net, data, {"both": metric})


# sketch


def test_a_sketch_is_of_the_projected_rows(net, data, rows):
    found = measured(net, data, ["participation_ratio", "effective_rank", "linear_cka"], "sketch:10", layers=["up", "mid", "down"])
    s = CovariancePolicy("sketch", COUNT, LIMIT).projection(WIDTH).double()
    up, mid = rows["up"][1] @ s, rows["mid"][1] @ s
    for name in ("participation_ratio", "effective_rank"):
        assert found.layers.loc["mid", name] == pytest.approx(float(get_metric(name).compute(outputs=mid)), rel=1e-9)
        truth = float(get_metric(name).compute(outputs=rows["down"][1]))
        assert found.layers.loc["down", name] == pytest.approx(truth, rel=1e-9)
    truth = float(get_metric("linear_cka").compute(outputs=up, next_outputs=mid))
    assert found.edges.loc[("up", "mid"), "linear_cka"] == pytest.approx(truth, rel=1e-9)
    assert [w["channels"] for w in found.metadata["covariance"]] == [None, None]


def test_a_sketch_of_units_is_refused_by_name(net, data):
    for name in ("redundancy", "layer_redundancy", "total_correlation"):
        with pytest.raises(
            ValueError, match=f"metric '{name}' describes single units, but covariance=sketch:10 mixes those of up, 40 wide"
        ):
            measured(net, data, [name], "sketch:10")
    standardized = get_metric("participation_ratio", rows="feature_standardized")
    with pytest.raises(ValueError, match="covariance=sample:10 or covariance=diagonal"):
        measured(net, data, {"pr": standardized}, "sketch:10")


def moment(values, truth):
    """How many standard errors the mean of simulated values lies from a truth."""
    values = torch.stack(values)
    return abs(float(values.mean()) - float(truth)) / float(values.std() / math.sqrt(len(values)))


def test_what_a_sketch_has_on_average_is_what_the_text_says():
    width, k, draws = 30, 8, 2000
    g = torch.Generator().manual_seed(0)
    a = torch.randn(width, 50, generator=g, dtype=torch.float64) * torch.linspace(2, 0.1, width)[:, None]
    c, b = a @ a.T, torch.randn(width, width, generator=g, dtype=torch.float64)
    sketches = [CovariancePolicy("sketch", k, 10, seed).projection(width).double() for seed in range(draws)]
    square, trace = c.square().sum(), c.trace()
    expected = (1 + 1 / k) * square + trace**2 / k
    assert moment([(s.T @ c @ s).trace() for s in sketches], trace) < 4
    assert moment([(s.T @ c @ s).square().sum() for s in sketches], expected) < 4
    assert moment([(s.T @ c @ s).square().sum() for s in sketches], square) > 20  # what it is not
    expected = b.square().sum() + (b.trace() ** 2 + (b @ b).trace()) / k
    assert moment([(s.T @ b @ s).square().sum() for s in sketches], expected) < 4
    others = [CovariancePolicy("sketch", k, 10, seed + draws).projection(width).double() for seed in range(draws)]
    assert moment([(s.T @ b @ t).square().sum() for s, t in zip(sketches, others, strict=True)], b.square().sum()) < 4


@pytest.mark.parametrize("true", [4, 40])
def test_a_participation_ratio_reads_low_by_the_inverse_of_the_sketch(true):
    width, k = 400, 50
    c = torch.zeros(width, dtype=torch.float64)
    c[:true] = 1
    found = []
    for seed in range(100):
        s = CovariancePolicy("sketch", k, 10, seed).projection(width).double()
        gram = s.T @ (c[:, None] * s)
        found.append(gram.square().sum() / gram.trace().square())  # 1/PR
    expected = (1 + 1 / k) / true + 1 / k
    assert float(torch.stack(found).mean()) == pytest.approx(expected, rel=2 / (k * true) + 0.02)


def test_a_sample_is_the_same_wherever_the_rows_lie_and_bfloat16_is_taken():
    wide = CovariancePolicy("sample", COUNT, LIMIT)
    x = torch.randn(3, WIDTH, 5, generator=torch.Generator().manual_seed(0))
    last = x.transpose(1, 2).contiguous().transpose(1, 2)
    for port in ("output/sample", "output/sketch", "output"):
        one, two = (CovariancePolicy(port[7:] or "full", COUNT, LIMIT).rows(Rows(t), port).raw for t in (x, last))
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert torch.equal(wide.rows(Rows(x), "grad/sample").raw, x[:, wide.channels(WIDTH)])


# the geometry of a language model


class Blocks(nn.Module):
    """Two residual blocks on tokens."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"num_hidden_layers": 2})()
        self.embed = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, input_ids):
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(torch.relu(h))
        return h


@pytest.fixture(scope="module")
def blocks():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Blocks().double().eval()
    tokens = torch.randint(20, (12, 15), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        h = net.embed(tokens)
        seen = []
        for layer in net.layers:
            h = layer(torch.relu(h))
            seen.append(h.flatten(0, 1))
    return net, tokens, seen


def geometry(blocks, wide, metrics=("spectrum", "novelty")):
    net, tokens, _ = blocks
    data = [{"input_ids": part} for part in tokens.split(5)]
    point = "module_output:layers.*"
    return nl.analyze_model(
        "tiny", data, model=net, metrics=list(metrics), hook_point=point, covariance=wide, width=LIMIT, novelty_k=4
    )


def test_the_geometry_of_a_wide_stream_is_refused_with_the_choices(blocks):
    with pytest.raises(ValueError, match=r"layers\.0' is 40 wide \(and 1 more site\), width is 24: .*covariance=sketch:24"):
        geometry(blocks, None)


@pytest.mark.parametrize("wide", ["sample:10", "sketch:10"])
def test_the_geometry_of_narrower_rows(blocks, wide):
    found, seen = geometry(blocks, wide), blocks[2]
    cut = [
        y[:, channels()] if wide[1] == "a" else y @ CovariancePolicy("sketch", COUNT, LIMIT).projection(WIDTH).double()
        for y in seen
    ]
    for name in ("d_pr", "rankme", "k90", "d_pr_debiased"):
        truth = [float(get_metric(name).compute(outputs=y)) for y in cut]
        np.testing.assert_allclose(found.metrics[name], truth, rtol=1e-8, err_msg=name)
    metric = get_metric("feature_subspace_novelty", novelty_k=4)
    truth = float(metric.compute(outputs=cut[0], next_outputs=cut[1]))
    np.testing.assert_allclose(found.novelty["feature_subspace_novelty"], [truth], rtol=1e-7)
    assert found.metrics["hidden_dim"].tolist() == [WIDTH, WIDTH]
    assert {len(v) for v in found.eigenvalues.values()} == {COUNT}
    assert [w["covariance"] for w in found.metadata["covariance"]] == [wide, wide]


def test_the_geometry_without_products_has_what_the_sample_of_rows_tells(blocks):
    found = geometry(blocks, "diagonal", ["spectrum", "sample", "novelty"])
    assert found.metrics[["d_pr", "rankme", "k90"]].isna().all().all()
    assert found.metrics["cos_sim_mean"].notna().all()
    assert found.novelty["feature_subspace_novelty"].isna().all()
    assert found.novelty["linear_cka"].notna().all()
    assert found.eigenvalues == {}


def test_a_sketch_has_no_standardized_units(blocks):
    net, tokens, _ = blocks
    with pytest.raises(ValueError, match="feature_standardized' describes single units"):
        nl.analyze_model(
            "tiny",
            [tokens],
            model=net,
            hook_point="module_output:layers.*",
            diagnostics="normalization_ablation",
            covariance="sketch:10",
            width=LIMIT,
        )
