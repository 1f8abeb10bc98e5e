import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nodelens as nl
from nodelens.analysis.supernodes.supernode_lesions import CORE, HALO, OUTSIDE, SIZE, SupernodeLesions, _nearest, _order
from nodelens.analysis.supernodes.supernodes import Supernodes
from nodelens.evaluation.evaluate import evaluate
from nodelens.report.supernode_lesions_figures import figures_of
from nodelens.results.findings import load_findings

QUICK = SupernodeLesions(draws=5, predictions=None)


@pytest.fixture(scope="module")
def run():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**size, initializer_range=0.3)).eval()
        with torch.no_grad():  # three loud channels in the first layer
            model.model.layers[0].mlp.down_proj.weight[:, :3] *= 8
    ids = torch.randint(1, 32, (8, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": part, "labels": part} for part in ids.split(4)]
    supernodes = Supernodes(supernode_fraction=0.125, connectivity_topk=4, resamples=2, draws=2)
    result = nl.analyze(model, data, ["taylor"], list(nl.find_groups(model)), analysis={"supernodes": supernodes, "sets": QUICK})
    return model, data, result


def test_supernodes_against_random_sets(run, tmp_path):
    model, data, result = run
    found = load_findings(result.analyses["sets"].save(tmp_path / "sets"))
    units = result.analyses["supernodes"].units
    first = "model.layers.0.mlp"
    core = units.loc[first].index[units.loc[first, "supernode"]].tolist()
    table = found["sets"].set_index(["layer", "set", "control", "given"])
    wanted = nl.ablate_sets(model, data, {"core": {first: core}})["damage"].iloc[0]
    row = table.loc[(first, CORE, SIZE, "")]
    assert row["damage"] == pytest.approx(wanted, abs=1e-6)
    assert row["low"] <= row["control_damage"] <= row["high"]
    assert 1 / 6 <= row["p"] <= 1
    halo = units.loc[first].index[units.loc[first, "halo"]].tolist()
    both = nl.ablate_sets(model, data, {"both": {first: [*core, *halo]}})["damage"].iloc[0]
    assert table.loc[(first, HALO, OUTSIDE, CORE), "damage"] == pytest.approx(both - wanted, abs=1e-6)
    assert {row["what"] for row in found.metadata["missing"]} == {"readers"}, "the last layer has no next one"
    assert "p is 0.17 or more with so few draws" in found.summary()
    assert (first, "readers", "random readers", "") in table.index


def test_the_bus_is_removed_where_the_next_layer_reads_it(run):
    model, data, result = run
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    units = result.analyses["supernodes"].units.loc["model.layers.0.mlp"]
    core = units.index[units["supernode"]]
    support = first.down_proj.weight.detach().abs()[:, core].sum(1).topk(4).indices
    row = result.analyses["sets"]["sets"].query("layer == 'model.layers.0.mlp' and set == 'bus'")
    assert row[["control", "draws"]].to_numpy().tolist() == [["random outputs", 5]]
    dense, damaged = evaluate(model, data)["loss"], []
    others = [unit for unit in range(16) if unit not in support.tolist()]
    for outputs in [support, *(torch.tensor(_order(others, 0, "bus", "model.layers.0.mlp", draw)[:4]) for draw in range(5))]:
        zeroed = [
            module.register_forward_pre_hook(lambda _, x, at=outputs: x[0].index_fill(-1, at, 0)) for module in readers(second)
        ]
        damaged.append(evaluate(model, data)["loss"] - dense)
        for handle in zeroed:
            handle.remove()
    assert row["damage"].iloc[0] == pytest.approx(damaged[0], abs=1e-6)
    assert row["control_damage"].iloc[0] == pytest.approx(np.mean(damaged[1:]), abs=1e-6)
    assert row["damage"].iloc[0] != 0


def readers(mlp):
    return mlp.gate_proj, mlp.up_proj


def test_a_bus_as_wide_as_the_layer_has_no_control(run):
    model, data, _ = run
    wide = nl.get_analysis("supernodes", supernode_fraction=0.125, connectivity_topk=10, resamples=2, draws=2)
    few = dataclasses.replace(QUICK, draws=2, dose=())
    found = nl.analyze(model, data, ["taylor"], list(nl.find_groups(model)), analysis={"supernodes": wide, "sets": few})
    missing = {row["what"]: row["reason"] for row in found.analyses["sets"].metadata["missing"]}
    assert missing["bus"] == "the supernodes write to 10 of 16 outputs: too few others; set connectivity_topk"


def test_the_dose_runs_from_none_to_all_supernodes(run):
    _, _, result = run
    dose = result.analyses["sets"]["dose"]
    whole = dose[(dose["layer"] == "model.layers.0.mlp") & (dose["hit_rate"] == 1)]
    assert whole["damage"].nunique() == 1, "there is one set of all supernodes"
    assert sorted(dose["hit_rate"].unique()) == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-9)
    assert (dose["units"] == 3).all()
    slope = result.analyses["sets"]["dose_summary"].loc["model.layers.0.mlp"]
    assert slope["low"] <= slope["slope"] <= slope["high"]


def test_the_nearest_units_are_taken_once():
    values = pd.Series([1.0, 2, 2.1, 5, 1.9])
    assert _nearest(values, [1, 2], [0, 3, 4]) == [4, 0]


def test_the_mean_is_a_control(run):
    model, data, result = run
    found = dataclasses.replace(QUICK, how="mean", draws=2, dose=())(model, data, result=result)
    assert np.isfinite(found["sets"]["damage"]).all()
    assert not len(found["dose_summary"])


def test_what_does_not_fit_is_said(run):
    model, data, result = run
    with pytest.raises(ValueError, match="how is 'mode'"):
        SupernodeLesions(how="mode")
    with pytest.raises(ValueError, match=r"draws is 1 and dose"):
        SupernodeLesions(draws=1)
    with pytest.raises(ValueError, match="reads what supernodes found: run it first"):
        QUICK(model, data, result=dataclasses.replace(result, analyses={}))
    units = result.analyses["supernodes"].units
    few = dataclasses.replace(result.analyses["supernodes"], units=units.assign(supernode=True, halo=False))
    found = QUICK(model, data, result=dataclasses.replace(result, analyses={"supernodes": few}))
    assert "too few to draw from" in found.metadata["missing"][0]["reason"]


def test_the_config_holds_the_defaults():
    from omegaconf import OmegaConf

    from nodelens.app.config import CONF

    options = dict(OmegaConf.load(CONF / "analysis/supernode_lesions.yaml").supernode_lesions)
    assert options.pop("_target_") == f"{SupernodeLesions.__module__}.SupernodeLesions"
    assert {**options, "dose": tuple(options["dose"])} == vars(SupernodeLesions())


def test_figures_are_drawn(run):
    found = run[2].analyses["sets"]
    first, second = figures_of(found)
    assert [first.name, second.name] == ["sets", "dose"]
    removed = [value for trace in first.figure.data if trace.name == "removed" for value in trace.x]
    assert sorted(removed) == sorted(found["sets"]["damage"])
    assert len(second.figure.data) == found["dose"]["layer"].nunique()
