import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scipy.stats import spearmanr
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import nodelens as nl
from nodelens.analysis.ablation.draws import _pair, at_random, lowest_first, random_pairs
from nodelens.analysis.supernodes.agreement import MEAN, POOLED
from nodelens.analysis.validity import catalogue
from nodelens.analysis.validity.ranking import agreement, ranking
from nodelens.analysis.validity.validity_analysis import ValidityAnalysis
from nodelens.report.validity_figures import figures_of
from nodelens.results.findings import load_findings

QUICK = ValidityAnalysis(pairs=6, shares=(0.2, 0.4), curves=2, draws=3, resamples=100, predictions=None)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 24, 3), nn.ReLU(), nn.Conv2d(24, 30, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(30, 4)).eval()


def images(n=40, size=16):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 1, 7, 7, generator=generator), torch.randint(4, (n,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.fixture(scope="module")
def planted():
    """Damage as a metric, its negative, a monotone function of it, and random numbers."""
    model, data = net(), images()
    groups = list(nl.find_groups(model, data[0]))
    result = nl.analyze(model, data, ["taylor"], groups)
    damage = nl.ablate(model, data).units["damage"]
    noise = torch.randn(len(damage), generator=torch.Generator().manual_seed(3)).numpy()
    own = {"itself": damage, "reversed": -damage, "monotone": np.exp(damage * 10), "random_numbers": noise}
    result.units = result.units.assign(**own)
    return model, data, result


def test_a_metric_equal_to_the_damage_ranks_first_and_a_random_one_is_at_chance(planted):
    model, data, result = planted
    found = QUICK(model, data, result=result)
    ranked = found["ranking"]
    assert {*ranked.index[:2]} == {"itself", "monotone"}
    assert ranked.loc["itself", ["spearman", "low", "high", "recall", "worst_layer"]].tolist() == pytest.approx([1] * 5)
    assert ranked.index[-1] == "reversed"
    assert ranked.loc["reversed", "spearman"] == pytest.approx(-1)
    assert ranked.loc["reversed", "recall"] == 0
    row = ranked.loc["random_numbers"]
    assert row["low"] < 0 < row["high"]
    assert row["chance"] == pytest.approx(5 / 54)
    assert found.units["damage"].to_numpy() == pytest.approx(result.units["itself"].to_numpy(), abs=1e-7)
    agreed = found["agreement"].set_index(["metric", "layer"])
    assert agreed.loc[("itself", MEAN), "spearman"] == pytest.approx(1)
    assert agreed.loc[("itself", "0"), "n"] == 24


def test_the_order_of_the_damage_is_no_worse_than_another(planted):
    model, data, result = planted
    table = QUICK(model, data, result=result)["growing"]
    assert set(table["order"]) == {"damage", "itself", "monotone", "random"}
    assert len(table) == 2 * (3 + 3)
    by = table.groupby(["order", "share"])["damage"].mean().unstack("order")
    assert (by["damage"] <= by["random"]).all()
    groups = nl.find_groups(model, data[0])
    removed = lowest_first(result.units["itself"], 0.4)
    assert {name: len(ids) for name, ids in removed.items()} == {"0": 10, "2": 12}
    wanted = nl.ablate_sets(model, data, {"all": removed}, layers=list(groups)).loc["all", "damage"]
    assert by.loc[0.4, "damage"] == pytest.approx(wanted, abs=1e-6)


def test_pairs_interact_as_the_three_losses_say(planted):
    model, data, result = planted
    table = QUICK(model, data, result=result)["pairs"]
    assert len(table) == 6
    for row in table.itertuples():
        sets = {"a": {row.layer: [row.unit]}, "b": {row.layer: [row.other]}, "both": {row.layer: [row.unit, row.other]}}
        damage = nl.ablate_sets(model, data, sets)["damage"]
        assert row.damage == pytest.approx(damage["both"], abs=1e-6)
        assert row.interaction == pytest.approx(damage["both"] - damage["a"] - damage["b"], abs=1e-6)
        assert row.interaction_se > 0


def test_a_run_with_the_analysis_is_saved_and_drawn(tmp_path):
    model, data = net(), images()
    groups = list(nl.find_groups(model, data[0]))
    result = nl.analyze(model, data, ["taylor", "group_l2"], groups, analysis={"validity": QUICK}, evaluation=images(24))
    assert result.units[["damage", "damage_se"]].notna().all().all()
    assert result.analyses["validity"].metadata["ablation"]["samples"] == 24
    assert "54 units ablated one by one on 24 predictions" in result.analyses["validity"].summary()
    found = load_findings(result.analyses["validity"].save(tmp_path / "validity"))
    pd.testing.assert_frame_equal(found["ranking"], result.analyses["validity"]["ranking"])
    assert [plot.name for plot in figures_of(found)] == ["ranking", "growing", "interaction"]


@pytest.mark.slow
def test_every_metric_of_the_catalogue_on_a_language_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**size, initializer_range=0.3)).eval()
    ids = torch.randint(1, 24, (6, 9), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": part, "labels": part} for part in ids.split(3)]
    options = dataclasses.replace(QUICK, scores="all", pairs=0, draws=0, curves=0, resamples=10)
    found = nl.analyze(model, data, ["taylor"], list(nl.find_groups(model)), analysis=options).analyses["validity"]
    assert len(found["ranking"]) > 30
    assert "taylor" in found["ranking"].index
    assert all(row["reason"] for row in found.metadata["missing"])
    assert {row["what"] for row in found.metadata["missing"]}.isdisjoint(found["ranking"].index)


def test_layers_that_cannot_be_ablated_are_missing(planted):
    model, data, result = planted
    own = dataclasses.replace(result, units=pd.concat([result.units, result.units.loc[["0"]].rename({"0": "gone"}, level="layer")]))
    found = QUICK(model, data, result=own)
    assert [row["layer"] for row in found.metadata["missing"]] == ["gone"]
    assert len(found.units) == 54


def test_a_sample_of_units_and_a_constant_metric(planted):
    model, data, result = planted
    result = dataclasses.replace(result, units=result.units.assign(same=1.0))
    found = dataclasses.replace(QUICK, sample=5)(model, data, result=result)
    assert len(found.units) == 10
    assert "same" not in found["ranking"].index
    assert [row["what"] for row in found.metadata["missing"]] == ["same"]


def test_agreement_is_scipys_and_its_interval_covers():
    generator = np.random.default_rng(0)
    inside = 0
    for draw in range(60):
        a = generator.normal(size=80)
        b = 0.6 * a + 0.8 * generator.normal(size=80)
        index = pd.MultiIndex.from_product([["x"], range(80)], names=["layer", "unit"])
        row = agreement(pd.DataFrame({"score": a, "damage": b}, index=index), ["score"], seed=draw).iloc[0]
        assert row["spearman"] == pytest.approx(spearmanr(a, b).statistic)
        inside += row["low"] < 6 / np.pi * np.arcsin(0.3) < row["high"]  # Spearman of a normal pair with correlation 0.6
    assert inside >= 52


def test_missing_values_ties_and_few_units():
    index = pd.MultiIndex.from_tuples([("a", k) for k in range(5)] + [("b", 0), ("b", 1)], names=["layer", "unit"])
    table = pd.DataFrame({"m": [1, 2, np.nan, 3, 5, 7, 8], "damage": [1.0, 2, 9, 3, 4, 5, 6]}, index=index)
    found = agreement(table, ["m"], draws=20).set_index("layer")
    assert found.loc["a", ["n", "spearman"]].tolist() == [4, 1]
    assert np.isnan(found.loc["b", "spearman"])
    assert found.loc[POOLED, "n"] == 6
    ranked = ranking(table, found.reset_index(), ["m"], 0.1)
    assert ranked.loc["m", ["spearman", "mean_over_layers"]].tolist() == [1, 1]


def test_draws_of_units():
    index = pd.MultiIndex.from_tuples([("a", k) for k in range(6)] + [("b", k) for k in range(4)], names=["layer", "unit"])
    table = pd.DataFrame({"m": range(10)}, index=index)
    pairs = random_pairs(table, 100)
    assert len({(layer, *sorted(pair)) for layer, *pair in pairs}) == 15 + 6
    assert len(random_pairs(table, 5, 1)) == 5
    assert sorted(_pair(k) for k in range(10)) == [(i, j) for i in range(5) for j in range(i + 1, 5)]
    small, large = (at_random(table, share, 0, 1) for share in (0.25, 0.5))
    assert all({*small[layer]} <= {*large[layer]} for layer in small)
    assert lowest_first(table["m"], 0.5) == {"a": [0, 1, 2], "b": [0, 1]}
    assert len(lowest_first(table["m"], 0.99)["b"]) == 3


def test_what_does_not_fit_is_said(planted):
    model, data, result = planted
    for options, words in (
        ({"scores": "best"}, "scores is 'best'; it is measured or all"),
        ({"how": "mode"}, "how is 'mode'; it is zero, mean, resample"),
        ({"shares": [1.5]}, "shares has 1.5; a share of the units lies between 0 and 1"),
        ({"pairs": -1}, "pairs is -1; it is a number from 0 on"),
    ):
        with pytest.raises(ValueError, match=words):
            ValidityAnalysis(**options)
    with pytest.raises(ValueError, match="none is measured: give some"):
        QUICK(model, data, result=dataclasses.replace(result, units=result.units.iloc[:0]))
    with pytest.raises(ValueError, match="no layer of the table can be ablated: gone"):
        QUICK(model, data, result=dataclasses.replace(result, units=result.units.loc[["0"]].rename({"0": "gone"}, level="layer")))


def test_the_config_holds_the_defaults():
    from omegaconf import OmegaConf

    from nodelens.app.config import CONF

    options = dict(OmegaConf.load(CONF / "analysis/validity.yaml").validity)
    assert options.pop("_target_") == f"{ValidityAnalysis.__module__}.ValidityAnalysis"
    plain = {name: value if value is None or isinstance(value, (str, int)) else tuple(value) for name, value in options.items()}
    assert plain == vars(ValidityAnalysis())


def _share(rank, home):
    """The first process has no data."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{home}/meet", rank=rank, world_size=2)
    model, data = net(), images(30, 10)
    found = scored(model, data if rank else [], list(nl.find_groups(model, data[0])))
    if rank == 0:
        found.save(f"{home}/found")
    dist.destroy_process_group()


def scored(model, data, groups):
    validity = dataclasses.replace(QUICK, scores="all", sample=4, how="resample")
    return nl.analyze(model, data, ["taylor"], groups, analysis={"validity": validity})


def test_a_process_without_data_takes_part(tmp_path, monkeypatch):
    few = {name: nl.get_metric(name) for name in ("activation_variance", "delta_alignment", "rq")}
    monkeypatch.setattr(catalogue, "catalogue", lambda known: few)
    mp.start_processes(_share, (str(tmp_path),), 2, start_method="spawn" if torch.cuda.is_initialized() else "fork")
    found, (model, data) = nl.load(tmp_path / "found").analyses["validity"], (net(), images(30, 10))
    alone = scored(model, data, list(nl.find_groups(model, data[0]))).analyses["validity"]
    assert [row["what"] for row in found.metadata["missing"]] == [row["what"] for row in alone.metadata["missing"]]
    for name in ("ranking", "pairs", "growing"):
        pd.testing.assert_frame_equal(found[name], alone[name], rtol=1e-5, atol=1e-7, check_names=False)
