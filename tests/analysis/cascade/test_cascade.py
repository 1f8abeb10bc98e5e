import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import nodelens as nl
from nodelens.analysis.cascade.cascade_analysis import CascadeAnalysis
from nodelens.analysis.cascade.kinds import QUARTERS, drawn_sets, kinds_of, strongest_pairs
from nodelens.report.cascade_figures import figures_of
from nodelens.results.findings import load_findings

QUICK = CascadeAnalysis(counts=(1, 3), draws=6, pairs=4, predictions=None, resamples=20)


class Planted(nn.Module):
    """Units 0 to 3 carry the answer, 4 and 5 only together, and the others nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 2)
        with torch.no_grad():
            self.first.weight.zero_()
            self.first.bias.zero_()
            self.last.weight.zero_()
            self.last.bias.zero_()
            for unit in range(4):
                self.first.weight[unit, 0] = 1 if unit % 2 else -1
                self.last.weight[unit % 2, unit] = 2.0
            self.first.weight[4:6, 1] = 1.0
            self.last.weight[0, 4:6] = 1.0
            self.first.weight[6:, 2] = 1.0

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


@pytest.fixture(scope="module")
def planted():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    data = [(x[k : k + 20], (x[k : k + 20, 0] > 0).long()) for k in (0, 20, 40)]
    model = Planted().eval()
    result = nl.analyze(model, data, ["taylor", "activation_rms"], list(nl.find_groups(model, data[0])))
    kind = ["critical"] * 4 + ["synergistic"] * 2 + ["background"] * 10
    result.units = result.units.assign(unit_type=kind)
    return model, data, result


def test_critical_units_do_more_damage_than_random_ones_and_background_units_none(planted):
    model, data, result = planted
    found = QUICK(model, data, result=result)
    table = found["types"].set_index(["type", "count"])
    assert table.loc[("critical", 3), "damage"] > table.loc[("critical", 3), "random"] > 0
    assert table.loc[("background", 3), "damage"] == 0
    assert np.isnan(table.get("damage").get(("synergistic", 3), np.nan)), "there are only two"
    sets = found["curves"]
    assert sets.groupby(["type", "count"]).size().to_dict() == {
        **{(kind, count): 6 for kind in ("any", "background", "critical") for count in (1, 3)},
        ("synergistic", 1): 6,
    }
    assert 1 / 7 <= table["p"].min() <= table["p"].max() <= 1
    assert found["prediction"].index[0] == "taylor"
    assert "3 critical units: damage" in found.summary()


def test_the_damage_of_a_set_is_that_of_nl_ablate_sets(planted):
    model, data, result = planted
    damage = nl.ablate_sets(model, data, {"two": {"first": [0, 1, 2, 3]}})["damage"].iloc[0]
    found = dataclasses.replace(QUICK, counts=(4,))(model, data, result=result)["curves"]
    own = found[found["type"] == "critical"]
    assert len(own) == 1, "there is one set of all four"
    assert own["damage"].iloc[0] == pytest.approx(damage, abs=1e-6)


def test_pairs_of_a_type_and_of_a_matrix(planted):
    model, data, result = planted
    pairs = QUICK(model, data, result=result)["pairs"]
    assert pairs[["unit", "other", "pair"]].iloc[0].tolist() == [4, 5, "synergistic"]
    assert pairs["pair"].tolist() == ["synergistic", "random"]
    assert pairs["interaction"].iloc[0] == pytest.approx(pairs["damage"].iloc[0] - pairs["alone"].iloc[0])
    assert pairs["interaction"].iloc[0] != 0
    matrix = np.zeros((16, 16))
    matrix[1, 3] = matrix[3, 1] = 2.0
    own = dataclasses.replace(result, matrices={("first", "own"): matrix})
    found = dataclasses.replace(QUICK, pair="own", pairs=1)(model, data, result=own)
    assert found["pairs"][["unit", "other", "pair"]].iloc[0].tolist() == [1, 3, "own"]
    assert found["pair_summary"].loc["own", "pairs"] == 1


def test_the_damage_of_a_run_is_not_measured_again(planted):
    model, data, result = planted
    own = dataclasses.replace(result, units=result.units.assign(damage=np.arange(16.0)))
    ranked = QUICK(model, data, result=own)["prediction"]
    assert ranked.loc["taylor", "spearman"] == pytest.approx(
        pd.Series(result.units["taylor"].to_numpy()).corr(pd.Series(np.arange(16.0)), method="spearman")
    )


def test_with_clusters_in_one_call(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    data = [(part, part[:, :3].argmax(1)) for part in x.split(32)]
    groups = list(nl.find_groups(model, data[0]))
    result = nl.analyze(model, data, ["taylor"], groups, analysis={"clusters": nl.get_analysis("clusters"), "cascade": QUICK})
    found = load_findings(result.analyses["cascade"].save(tmp_path / "cascade"))
    assert set(found["types"]["type"]) <= {"critical", "redundant", "synergistic", "background"}
    assert all(plot.figure.data and plot.caption for plot in figures_of(found))


def test_kinds_of_a_column():
    index = pd.MultiIndex.from_product([["a"], range(8)], names=["layer", "unit"])
    numbers = pd.Series([1.0, 2, 3, 4, 5, 6, 7, np.nan], index=index)
    assert kinds_of(numbers).tolist() == [QUARTERS[k] for k in (0, 1, 1, 2, 2, 3, 3)] + ["none"]
    assert kinds_of(pd.Series([True, False] * 4, index=index, name="supernode")).iloc[:2].tolist() == ["supernode", "not supernode"]
    assert kinds_of(pd.Series([2, 0] * 4, index=index)).iloc[0] == "2"


def test_draws_and_pairs():
    assert drawn_sets([3, 5], 3, 4, 0, "a") == []
    assert [sorted(found) for found in drawn_sets([3, 5], 2, 4, 0, "a")] == [[3, 5]]
    small, large = (drawn_sets(range(10), count, 4, 0, "a") for count in (2, 4))
    assert all({*a} < {*b} for a, b in zip(small, large, strict=True))
    matrix = np.array([[9, 1, np.nan], [3, 9, 1], [np.nan, 0, 9]])
    assert strongest_pairs(matrix, [0, 1, 2], 5) == [(0, 1), (1, 2)]


def test_what_does_not_fit_is_said(planted):
    model, data, result = planted
    with pytest.raises(ValueError, match="how is 'mode'"):
        CascadeAnalysis(how="mode")
    with pytest.raises(ValueError, match=r"counts is \[0\], draws 8 and pairs 10"):
        CascadeAnalysis(counts=[0])
    with pytest.raises(ValueError, match="reads types in the column 'kind'"):
        dataclasses.replace(QUICK, by="kind")(model, data, result=result)
    with pytest.raises(ValueError, match="pair is 'synergy'; the matrices of the run are none"):
        dataclasses.replace(QUICK, pair="synergy")(model, data, result=result)
    own = dataclasses.replace(result, units=result.units.rename({"first": "gone"}, level="layer"))
    with pytest.raises(ValueError, match="no layer of the table can be ablated: gone"):
        QUICK(model, data, result=own)


def test_the_config_holds_the_defaults():
    from omegaconf import OmegaConf

    from nodelens.app.config import CONF

    options = dict(OmegaConf.load(CONF / "analysis/cascade.yaml").cascade)
    assert options.pop("_target_") == f"{CascadeAnalysis.__module__}.CascadeAnalysis"
    plain = {name: value if value is None or isinstance(value, (str, int)) else tuple(value) for name, value in options.items()}
    assert plain == vars(CascadeAnalysis())
