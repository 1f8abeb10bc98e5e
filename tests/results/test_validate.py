"""Edits of a result's files that mend the checksums, too: each is refused by the file's name, or changes nothing that is read."""

import hashlib
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

import nodelens as nl
from nodelens.results.files import tidy, write_json


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(40, 8), torch.arange(40) % 3
    result = nl.analyze(net, [(x, y)], ["rq", "linear_cka"])
    result.matrices["0", "correlation"] = np.eye(6)
    return result.save(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def mended(folder):
    """The folder, with checksums of what is there now."""
    files = [path for path in folder.iterdir() if path.name != "SHA256SUMS"]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))
    return folder


def by_index(*levels):
    return lambda t: t.set_index(pd.MultiIndex.from_arrays([level(t) for level in levels], names=["layer", "unit"]))


LAYER, UNIT = (lambda t: t.index.get_level_values(0)), (lambda t: t.index.get_level_values(1))
TABLES = {  # a change of units.parquet, and what the error says
    "texts": (lambda t: t.assign(rq="a"), "column 'rq' has 'a'; it has numbers"),
    "lists": (lambda t: t.assign(rq=[[1.0]] * len(t)), "column 'rq' has array([1.]); it has numbers"),
    "dictionaries": (lambda t: t.assign(more=[{"a": 1}] * len(t)), "column 'more' has {'a': 1}; it has numbers or texts"),
    "bytes": (lambda t: t.assign(more=[b"x"] * len(t)), "column 'more' has b'x'; it has numbers or texts"),
    "dates": (lambda t: t.assign(rq=pd.Timestamp("2020")), "column 'rq' has Timestamp("),
    "categories": (lambda t: t.assign(rq=pd.Categorical(["a"] * len(t))), "column 'rq' has 'a'; it has numbers"),
    "errors of texts": (lambda t: t.assign(rq_se="a"), "column 'rq_se' has 'a'; it has numbers"),
    "an error alone": (lambda t: t.drop(columns="rq"), "has the column 'rq_se' without 'rq'"),
    "no index": (lambda t: t.reset_index(drop=True), "has the index (None); it is (layer, unit), one row each"),
    "another index": (lambda t: t.rename_axis(index=["a", "b"]), "has the index (a, b)"),
    "rows twice": (lambda t: pd.concat([t, t]), "has the index (layer, unit), with rows that occur twice"),
    "units of texts": (by_index(LAYER, lambda t: UNIT(t).astype(str)), "unit has '0'; it has counts from 0"),
    "negative units": (by_index(LAYER, lambda t: -1 - UNIT(t)), "unit has -1; it has counts from 0"),
    "layers of numbers": (by_index(lambda t: [0] * len(t), lambda t: range(len(t))), "layer has 0; it has texts"),
    "a row less": (lambda t: t.iloc[1:], "has 5 units of '0', and layers.parquet 6"),
    "no row": (lambda t: t.iloc[:0], "has 0 units of '0', and layers.parquet 6"),
    "no row of a layer": (lambda t: t.drop(index="2", level="layer"), "has 0 units of '2', and layers.parquet 3"),
    "a layer that is not there": (lambda t: t.rename(index={"2": "zz"}), "has 0 units of '2', and layers.parquet 3"),
}
LAYERS = {  # changes of the table of layers, and what the error says
    "units": (lambda t: t.assign(units=[6, 4]), "units.parquet has 3 units of '2', and layers.parquet 4"),
    "units of texts": (lambda t: t.assign(units="6"), "layers.parquet: units has '6'; it has counts from 0"),
    "units with fractions": (lambda t: t.assign(units=[6.5, 3]), "layers.parquet: units has 6.5; it has counts from 0"),
    "negative units": (lambda t: t.assign(units=-t["units"]), "layers.parquet: units has -6; it has counts from 0"),
    "lost units": (lambda t: t.assign(units=pd.array([None, 3], "Int64")), "layers.parquet: units has <NA>; it has counts from 0"),
    "types of numbers": (lambda t: t.assign(type=3), "layers.parquet: type has 3; it has texts"),
    "a layer less": (lambda t: t.iloc[1:], "units.parquet has 6 units of '0', and layers.parquet none"),
}
METADATA = {  # a key, its new value, and what the error says
    "metrics": ([1], "metrics is [1]; it is a dictionary"),
    "metrics of numbers": ({"metrics": {"rq": 3}}, "metrics.rq is 3; it is a dictionary with the metric's name"),
    "config": ("x", "config is 'x'; it is a dictionary"),
    "filled_groups": ("8", "filled_groups is '8'; it is a count"),
    "samples": (-1, "samples is -1; it is a count"),
    "warnings": ([3], "warnings is [3]; it is a list of texts"),
    "missing": ("x", "missing is 'x'; it is a list"),
    "missing entries": (
        {"missing": [{"layer": "0"}]},
        "missing.0 is {'layer': '0'}; it is a dictionary with layer, column, reason",
    ),
    "counts": ([3], "counts.0 is 3; it is a dictionary with rule, metric"),
    "left_out": ([{"rows": "many"}], "left_out.0 is {'rows': 'many'}; it is a dictionary with rows, site"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_changed_table_is_refused_by_name(name, run):
    change, says = TABLES[name]
    change(pd.read_parquet(run / "units.parquet")).to_parquet(run / "units.parquet")
    with pytest.raises(ValueError, match=r"units\.parquet") as raised:
        nl.load(mended(run))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", LAYERS)
def test_a_changed_table_of_layers_is_refused_by_name(name, run):
    change, says = LAYERS[name]
    change(pd.read_parquet(run / "layers.parquet")).to_parquet(run / "layers.parquet")
    with pytest.raises(ValueError, match=r"layers\.parquet") as raised:
        nl.load(mended(run))
    assert says in str(raised.value)
    assert str(raised.value).endswith("restore it from a copy, or run the analysis again")


@pytest.mark.parametrize("name", METADATA)
def test_changed_metadata_are_refused_by_name(name, run):
    value, says = METADATA[name]
    metadata = json.loads((run / "metadata.json").read_text())
    (run / "metadata.json").write_text(json.dumps(metadata | (value if isinstance(value, dict) else {name: value})))
    with pytest.raises(ValueError, match=r"metadata\.json: ") as raised:
        nl.load(mended(run))
    assert says in str(raised.value)
    assert str(raised.value).endswith("restore it from a copy, or run the analysis again")


@pytest.mark.parametrize("arrays", [{"no layer": np.eye(2)}, {"0::correlation": np.ones((1, 1, 2))}], ids=["name", "axes"])
def test_changed_matrices_are_refused_by_name(arrays, run):
    save_file(arrays, str(run / "matrices.safetensors"))
    with pytest.raises(ValueError, match=r"matrices.safetensors: .* is float64 .*; an entry is a matrix or vector named"):
        nl.load(mended(run))


def test_what_was_written_is_loaded_and_more_columns_are_welcome(run):
    assert nl.load(run).summary()
    units = pd.read_parquet(run / "units.parquet").assign(cluster=1, unit_type="none", seen=True)
    units.to_parquet(run / "units.parquet")
    assert {"cluster", "unit_type", "seen"} <= set(nl.load(mended(run)).units)


def test_a_result_that_does_not_count_its_groups_has_no_interval(run):
    metadata = json.loads((run / "metadata.json").read_text())
    del metadata["filled_groups"]
    (run / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"how many groups of samples are filled .filled_groups.: there is no interval"):
        nl.load(mended(run)).interval("rq")


def test_manifests_of_a_finished_run_list_what_is_there(tmp_path):
    for number in range(3):
        write_json(tmp_path / "a.json", number)
    write_json(tmp_path / "deep" / "gone.json", 1)
    write_json(tmp_path / "deep" / "b.json", 1)
    (tmp_path / "deep" / "gone.json").unlink()
    for number in range(2):
        write_json(tmp_path / "damaged.json", number)
    (tmp_path / "damaged.json").write_text("3")
    before = (tmp_path / "SHA256SUMS").read_text().splitlines()
    tidy(tmp_path)
    assert (tmp_path / "SHA256SUMS").read_text().splitlines() == before[2:]
    written = (tmp_path / "SHA256SUMS").stat().st_mtime_ns
    tidy(tmp_path)
    assert (tmp_path / "SHA256SUMS").stat().st_mtime_ns == written, "nothing to change"
    assert [line.split()[1] for line in (tmp_path / "deep" / "SHA256SUMS").read_text().splitlines()] == ["b.json"]


def test_a_result_without_units_is_one(tmp_path):
    net, x = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), torch.randn(40, 8)
    result = nl.analyze(net, [x], ["linear_cka"])
    result.units, result.layers = result.units.iloc[:0], result.layers.iloc[:0]
    assert len(nl.load(result.save(tmp_path / "run")).units) == 0
    result.units = pd.DataFrame(index=pd.MultiIndex.from_arrays([[], []], names=["layer", "unit"]))
    assert len(nl.load(result.save(tmp_path / "run")).units) == 0
