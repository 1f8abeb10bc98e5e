"""Analyses beside the metrics of a pass: nl.analyze(analysis=...), their columns, matrices and tables."""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn

import nodelens as nl
from nodelens.analysis.registry import as_analyses, with_metrics
from nodelens.metrics import get_metric
from nodelens.report import write_page
from nodelens.results.findings import Findings

CONF = Path(__file__).parents[2] / "conf"


@dataclass(frozen=True)
class Largest:
    """An analysis of a user: which unit of each layer varies most."""

    column: str = "spread"

    def required_metrics(self):
        return {"spread": get_metric("activation_variance")}

    def __call__(self, model, data, *, result, evaluation=None, seed=0, progress=iter, **objective):
        largest = result.units["spread"].groupby(level="layer").transform("max") == result.units["spread"]
        columns = pd.DataFrame({"rank": largest.astype(int)})
        frame = pd.DataFrame({"batches": [len(list(data))], "objective": [str(objective)]})
        matrices = {(layer, "ones"): np.ones((2, 2)) for layer in result.layers.index}
        return Findings("largest", {"batches": frame}, ["one unit per layer"], columns, matrices)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 5, generator=g), torch.randint(3, (16,), generator=g)) for _ in range(3)]


@pytest.fixture(scope="module")
def result(net, data):
    return nl.analyze(net, data, metrics=["rq"], analysis=Largest(), task="classification")


def test_what_an_analysis_needs_is_measured_in_the_same_pass(result, net, data):
    alone = nl.analyze(net, data, metrics={"spread": get_metric("activation_variance")})
    pd.testing.assert_series_equal(result.units["spread"], alone.units["spread"])
    assert "rq" in result.units


def test_columns_matrices_and_tables_join_the_result(result):
    assert result.analyses["largest"]["batches"].to_dict("records") == [{"batches": 3, "objective": "{'task': 'classification'}"}]
    assert result.units["rank"].astype(int).groupby(level="layer").sum().tolist() == [1, 1]
    assert ("0", "ones") in result.matrices
    assert "largest: one unit per layer" in result.summary()
    assert "rank" not in result.summary()  # a label is no metric


def test_a_saved_result_loads_with_its_analyses(result, tmp_path):
    result.save(tmp_path)
    again = nl.load(tmp_path)
    pd.testing.assert_frame_equal(again.analyses["largest"]["batches"], result.analyses["largest"]["batches"])
    assert again.units["rank"].astype(int).tolist() == result.units["rank"].astype(int).tolist()
    assert nl.load(tmp_path / "largest").kind == "largest"


def test_a_result_with_analyses_is_one_run(result, tmp_path):
    result.save(tmp_path / "run")
    assert set(nl.load_runs(f"{tmp_path}/**").run) == {str(tmp_path / "run")}


@pytest.mark.parametrize("name", nl.list_analyses())
def test_the_config_of_an_analysis_builds_what_the_name_does(name):
    target = yaml.safe_load((CONF / "analysis" / f"{name}.yaml").read_text())[name]["_target_"]
    module, kind = target.rsplit(".", 1)
    assert type(nl.get_analysis(name)) is getattr(import_module(module), kind)


def test_unknown_analyses_name_the_nearest():
    with pytest.raises(ValueError, match=r"no analysis is called 'geometri'. Did you mean 'geometry'\? There are"):
        as_analyses("geometri")


def test_an_analysis_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"analysis takes names \(.*\) and analysis objects, not 3"):
        as_analyses([3])


def test_a_class_in_place_of_an_object_is_named():
    with pytest.raises(ValueError, match=r"analysis takes analysis objects, and Supernodes is a class: give Supernodes\(\)"):
        as_analyses([nl.Supernodes])


@pytest.mark.parametrize("names", [["../run"], "largest", [3], [".."], [""]])
def test_names_of_analyses_are_no_paths(result, tmp_path, names):
    result.save(tmp_path)
    file = tmp_path / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"analyses": names}))
    (tmp_path / "SHA256SUMS").unlink()
    for read in (nl.load, write_page):
        with pytest.raises(ValueError, match=r"metadata\.json: analyses is .*; it is a list of names of subfolders"):
            read(tmp_path)


def test_an_analysis_twice_is_refused():
    with pytest.raises(ValueError, match=r"'supernodes' is given twice; give a dict \{name: analysis\}"):
        as_analyses(["supernodes", nl.Supernodes()])


def test_two_variants_have_names(net, data):
    result = nl.analyze(net, data, metrics=[], analysis={"a": Largest(), "b": _Other()})
    assert list(result.analyses) == ["a", "b"]
    assert result.metadata["analyses"] == ["a", "b"]


class _Other(Largest):
    def __call__(self, *args, **kwargs):
        found = super().__call__(*args, **kwargs)
        found.units = found.units.rename(columns={"rank": "other"})
        return found


def test_a_column_with_two_meanings_is_refused():
    with pytest.raises(ValueError, match=r"analysis 'a' needs .* in the column 'spread', but metrics= has .* there"):
        with_metrics({"spread": get_metric("rq")}, {"a": Largest()})


def test_a_column_that_is_there_already_is_refused(net, data):
    with pytest.raises(ValueError, match="analysis 'b' has the column 'rank', which the table of units has already"):
        nl.analyze(net, data, metrics=[], analysis={"a": Largest(), "b": Largest()})


def test_an_iterator_cannot_be_read_again(net, data):
    with pytest.raises(ValueError, match="largest may read the data again, but they are an iterator: give a loader or a list"):
        nl.analyze(net, iter(data), metrics=["rq"], analysis=Largest())
