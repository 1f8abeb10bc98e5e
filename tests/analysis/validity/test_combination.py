import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from transformers import LlamaConfig, LlamaForCausalLM

import nodelens as nl
from nodelens.analysis.validity.combination import PRODUCT, _grid, _half, check_components, combination
from nodelens.analysis.validity.validity_analysis import ValidityAnalysis
from nodelens.report.validity_figures import figures_of
from nodelens.results.findings import load_findings

SCAR = ("scar_activation_power", "scar_taylor", "scar_curvature", "scar_loss_proxy")


def scores(n=200, names="abcd", seed=0):
    """Two layers of units with log-normal scores."""
    generator = np.random.default_rng(seed)
    units = [(layer, k) for layer, size in (("x", n // 2), ("y", n - n // 2)) for k in range(size)]
    index = pd.MultiIndex.from_tuples(units, names=["layer", "unit"])
    return pd.DataFrame(np.exp(generator.normal(size=(n, len(names)))), index=index, columns=list(names))


def test_planted_powers_are_found():
    table = scores().assign(damage=lambda t: 3 * t["a"] ** 0.3 * t["c"] ** 0.7 - 1)
    found, exponents = combination(table, ["a", "b", "c", "d"])
    assert exponents == {"a": 0.3, "c": 0.7}
    assert found.loc[PRODUCT, ["fit", "spearman", "low", "high", "n"]].tolist() == pytest.approx([1, 1, 1, 1, 100])
    assert list(found.index[:2]) == [PRODUCT, "c"]
    assert found.loc["c", "gain"] == pytest.approx(1 - found.loc["c", "spearman"])
    assert 0 < found.loc["c", "gain_low"] < found.loc["c", "gain"] < found.loc["c", "gain_high"]
    scaled, again = combination(table.assign(a=table["a"] * 1e-9), ["a", "b", "c", "d"])
    assert again == exponents
    pd.testing.assert_frame_equal(scaled, found)


def test_the_search_is_that_of_the_obvious_loop():
    table = scores(40, "abc", 1).assign(damage=lambda t: np.log(t["a"]) + t["b"] + np.random.default_rng(2).normal(size=40))
    found, exponents = combination(table, ["a", "b", "c"], draws=20, seed=5)
    own = table[table.index.isin(_half(table, 5))]
    tenths = [e for e in itertools.product(range(11), repeat=3) if sum(e) == 10]
    assert sorted(map(tuple, (_grid(3) * 10).round().astype(int))) == sorted(tenths)
    logs = np.log(own[["a", "b", "c"]].to_numpy())
    best = max(spearmanr(logs @ np.array(e), own["damage"]).statistic for e in tenths)
    assert found.loc[PRODUCT, "fit"] == pytest.approx(best)
    other = table.drop(own.index)
    powers = np.prod([other[name] ** exponent for name, exponent in exponents.items()], 0)
    assert found.loc[PRODUCT, "spearman"] == pytest.approx(spearmanr(powers, other["damage"]).statistic)
    assert found.loc["b", "spearman"] == pytest.approx(spearmanr(other["b"], other["damage"]).statistic)
    assert {layer: len(rows) for layer, rows in own.groupby(level="layer")} == {"x": 10, "y": 10}


def test_a_metric_that_is_the_damage_needs_no_other():
    table = scores(names="ab")
    found, exponents = combination(table.assign(damage=table["b"]), ["a", "b"])
    assert exponents == {"b": 1.0}
    assert found.loc["b", ["gain", "gain_low", "gain_high"]].tolist() == [0, 0, 0]


def test_noise_fits_its_own_half_only():
    fits, others = [], []
    for seed in range(20):
        table = scores(60, "abcd", seed).assign(damage=np.random.default_rng(100 + seed).normal(size=60))
        row = combination(table, list("abcd"), draws=0, seed=seed)[0].loc[PRODUCT]
        fits.append(row["fit"])
        others.append(row["spearman"])
    assert np.mean(fits) > 0.15
    assert abs(np.mean(others)) < 0.1


def test_units_with_a_zero_are_last_and_those_without_a_number_left_out():
    table = scores(60, "ab").assign(damage=lambda t: t["a"] ** 0.5 * t["b"] ** 0.5)
    table.loc[("x", 3), ["a", "damage"]] = 0, -1
    table.loc[("y", 4), "b"] = np.nan
    found, exponents = combination(table, ["a", "b"])
    assert exponents == {"a": 0.5, "b": 0.5}
    assert found.loc[PRODUCT, "spearman"] == pytest.approx(1)
    assert found["n"].eq(29).all()
    few, _ = combination(table.iloc[:3], ["a", "b"])
    assert few[["fit", "spearman", "low"]].isna().all().all()


def test_components_are_checked():
    table = scores(10, "ab").assign(c=-1.0)
    for names, words in (
        (["a"], r"combine has \['a'\]; it is 2 to 6 different metrics"),
        (["a", "a"], "it is 2 to 6 different metrics"),
        (["a", "taylor"], "combine names 'taylor'. The metrics of the run are a, b, c"),
        (["a", "c"], "combine takes powers, and c has values below 0: leave it out"),
    ):
        with pytest.raises(ValueError, match=words):
            check_components(table, names)


@pytest.fixture(scope="module")
def run():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**size, initializer_range=0.3)).eval()
    ids = torch.randint(1, 32, (8, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": part, "labels": part} for part in ids.split(4)]
    groups = list(nl.find_groups(model).chosen("ffn"))
    validity = ValidityAnalysis(combine=SCAR, pairs=0, curves=0, draws=0, resamples=50, predictions=None)
    return model, data, nl.analyze(model, data, list(SCAR), groups, analysis={"validity": validity})


def test_the_criterion_of_a_run_prunes(run, tmp_path):
    model, data, result = run
    found = load_findings(result.analyses["validity"].save(tmp_path / "validity"))
    assert set(found["combination"].index) == {PRODUCT, *SCAR}
    assert found["combination"]["n"].eq(24).all()
    assert "searched on half of the units, orders the others with Spearman" in found.summary()
    criterion = found.metadata["criterion"]
    figure = next(plot for plot in figures_of(found) if plot.name == "combination").figure
    drawn = {trace.name: list(trace.x) for trace in figure.data}
    assert drawn["other half, 95 %"] == pytest.approx(found["combination"]["spearman"].tolist())
    assert drawn["half of the search"] == pytest.approx(found["combination"]["fit"].tolist())
    assert sum(criterion["terms"].values()) == pytest.approx(1)
    pruned = nl.prune(model, criterion, 0.25, data=data, scope="ffn")
    product = np.exp(sum(np.log(result.units[name]) * exponent for name, exponent in criterion["terms"].items()))
    for name in product.index.unique("layer"):
        assert sorted(pruned.plan.removed[name]) == sorted(product[name].nsmallest(len(pruned.plan.removed[name])).index)


def test_the_preset_is_the_geometric_mean(run):
    from omegaconf import OmegaConf

    from nodelens.app.config import CONF

    spec = OmegaConf.to_container(OmegaConf.load(CONF / "criterion/generalized_importance.yaml"))["generalized_importance"]
    assert set(spec["terms"]) == set(SCAR)
    table = run[2].units.rename_axis(["group", "unit"])
    mean = np.exp(np.log(table[list(SCAR)]).mean(axis=1))
    from nodelens.pruning.criteria.criterion import Criterion

    pd.testing.assert_series_equal(Criterion.of(spec, "own").score(table), mean.rename("own"))
