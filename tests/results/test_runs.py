"""Results are refused by name where they are damaged; many runs become one table."""

import json
import os

import numpy as np
import pandas as pd
import pytest

import nodelens as nl
from nodelens.results.findings import Findings
from nodelens.results.result import Result


def result(value=0.5, **config):
    units = pd.DataFrame({"rq": [value, 1.0]}, index=pd.MultiIndex.from_product([["fc"], [0, 1]], names=["layer", "unit"]))
    layers = pd.DataFrame({"units": [2], "rank": [value]}, index=pd.Index(["fc"], name="layer"))
    edges = pd.DataFrame({"cka": [value]}, index=pd.MultiIndex.from_tuples([("fc", "out")], names=["layer", "next"]))
    score = {"accuracy": value, "loss": 1.0, "split": "test"}
    metadata = {"schema_version": 1, "config": {"task": "analyze", **config}, "evaluation": score}
    return Result(units, layers, {("fc", "r"): np.full((2, 2), value)}, metadata, edges)


@pytest.mark.parametrize("name", ["units.parquet", "layers.parquet", "edges.parquet", "matrices.safetensors", "metadata.json"])
def test_a_damaged_file_of_a_result_is_refused_by_name(name, tmp_path):
    result().save(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged: its SHA-256"):
        nl.load(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name} (cannot be read|is not valid JSON)"):
        nl.load(tmp_path)


@pytest.mark.parametrize("name", ["units.parquet", "edges.parquet", "matrices.safetensors"])
def test_a_missing_file_of_a_result_is_named(name, tmp_path):
    result().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing"):
        nl.load(tmp_path)


def test_a_result_that_replaces_another_leaves_none_of_its_tables(tmp_path):
    result().save(tmp_path)
    plain = result()
    Result(plain.units, plain.layers, metadata=plain.metadata).save(tmp_path)
    found = nl.load(tmp_path)
    assert not len(found.edges)
    assert not found.matrices


@pytest.mark.parametrize("version", [2, "1", None])
def test_another_schema_version_is_refused(version, tmp_path):
    one = result()
    one.metadata["schema_version"] = version
    one.save(tmp_path)
    with pytest.raises(ValueError, match=rf"metadata\.json has schema_version {version!r}, and this version of nodelens reads 1"):
        nl.load(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    (tmp_path / "metadata.json").write_text("[]")
    with pytest.raises(ValueError, match="has schema_version None"):
        nl.load(tmp_path)


def test_an_older_folder_without_a_manifest_is_loaded(tmp_path):
    result().save(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    assert nl.load(tmp_path).units["rq"].tolist() == [0.5, 1.0]


def test_runs_come_with_their_scores_and_what_differs(tmp_path):
    for k in range(3):
        result(k / 4, seed=k, model={"width": 8}).save(tmp_path / f"run{k}")
    runs = nl.load_runs(f"{tmp_path}/*")
    assert runs["accuracy"].tolist() == [0, 0, 0.25, 0.25, 0.5, 0.5]
    assert runs["seed"].tolist() == [0, 0, 1, 1, 2, 2]
    assert list(runs) == ["layer", "unit", "rq", "run", "seed", "accuracy"]
    assert runs.attrs["constant"] == {"task": "analyze", "model.width": 8, "loss": 1.0}
    assert nl.load_runs(f"{tmp_path}/*", "layers")["rank"].tolist() == [0, 0.25, 0.5]
    assert nl.load_runs(f"{tmp_path}/*", rows="edges")["next"].tolist() == ["out"] * 3
    with pytest.raises(
        ValueError, match=r"rows is 'cells'; it is units, layers, edges, sweep, or a table of an analysis as in modularity\.modules"
    ):
        nl.load_runs(f"{tmp_path}/*", rows="cells")


def test_names_do_not_collide(tmp_path):
    for k in range(2):
        result(k / 4, rq=k, run=f"name{k}", unit=k, loss=k).save(tmp_path / f"run{k}")
        metadata = json.loads((tmp_path / f"run{k}/metadata.json").read_text())
        assert metadata["evaluation"]["loss"] == 1.0
    runs = nl.load_runs(f"{tmp_path}/*")
    assert runs["rq"].tolist() == [0, 1, 0.25, 1]
    assert runs["unit"].tolist() == [0, 1, 0, 1]
    assert runs["config.rq"].tolist() == [0, 0, 1, 1]
    assert runs["config.run"].tolist() == ["name0", "name0", "name1", "name1"]
    assert runs["loss"].tolist() == [0, 0, 1, 1], "of the configuration"
    assert runs.attrs["constant"]["evaluation.loss"] == 1.0
    assert runs.columns.is_unique


def test_epochs_analyses_and_links_are_no_further_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "out/a/run"
    result().save(home)
    result().save(home / "supernodes")
    result().save(tmp_path / "out/training/epochs")
    (home / "again").symlink_to(tmp_path / "out")
    (tmp_path / "out/latest").symlink_to(home)
    (tmp_path / "out/0").symlink_to(tmp_path / "out/a")
    (tmp_path / "out/loop").symlink_to(tmp_path / "out")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/metadata.json").write_text("{}")
    assert nl.load_runs("out/**")["run"].unique().tolist() == ["out/a/run"]
    for pattern in ("out/**", "./**", f"{tmp_path}/out/*/*", "out/?/run", "out/a/run"):
        found = nl.load_runs(pattern)["run"].unique().tolist()
        assert [os.path.realpath(run) for run in found] == [os.path.realpath(home)], pattern
    with pytest.raises(FileNotFoundError, match="no finished run matches 'nothing/"):
        nl.load_runs("nothing/**")


def test_a_run_that_cannot_be_read_is_reported_and_left_out(tmp_path):
    for k in range(3):
        result(k / 4, seed=k).save(tmp_path / f"run{k}")
    (tmp_path / "run1/units.parquet").write_bytes(b"PAR1")
    with pytest.warns(UserWarning, match=r"run1 is left out: .*units\.parquet is damaged"):
        runs = nl.load_runs(f"{tmp_path}/*")
    assert runs["seed"].unique().tolist() == [0, 2]
    for k in (0, 2):
        (tmp_path / f"run{k}/metadata.json").write_text("{")
    with pytest.warns(UserWarning, match="is left out"), pytest.raises(FileNotFoundError, match=r"no run of .* can be read"):
        nl.load_runs(f"{tmp_path}/*")


def test_the_cells_of_sweeps_come_as_one_table(tmp_path):
    for seed in (0, 1):
        result(seed=seed).save(tmp_path / str(seed))
        cells = pd.DataFrame({"criterion": ["rq", "random"], "amount": [0.5, 0.5], "accuracy": [0.9 - seed / 10, 0.4]})
        cells.to_parquet(tmp_path / str(seed) / "sweep.parquet")
    found = nl.load_runs(str(tmp_path / "*"), rows="sweep")
    assert found["seed"].tolist() == [0, 0, 1, 1]
    assert found["accuracy"].tolist() == [0.9, 0.4, 0.8, 0.4]
    result(seed=2).save(tmp_path / "2")  # a run of analyze.py
    with pytest.warns(UserWarning, match=r"2 is left out: .*sweep\.parquet is missing"):
        again = nl.load_runs(str(tmp_path / "*"), rows="sweep")
    assert len(again) == 4
    with pytest.raises(
        ValueError, match=r"rows is 'cells'; it is units, layers, edges, sweep, or a table of an analysis as in modularity\.modules"
    ):
        nl.load_runs(str(tmp_path / "*"), rows="cells")


def test_tables_of_analyses_and_settings_of_the_training(tmp_path):
    for k, dropout in enumerate([0.0, 0.5]):
        one = result(seed=0)
        one.metadata["weights"] = {"trained_by": {"model": {"net": {"dropout": dropout}}, "paths": {"output_dir": str(k)}}}
        one.analyses["modularity"] = Findings("modularity", {"modules": pd.DataFrame({"layer": ["a", "b"], "q": [k, 2.0]})})
        one.save(tmp_path / str(k))
    frame = nl.load_runs(f"{tmp_path}/*", rows="modularity.modules")
    assert frame["q"].tolist() == [0, 2, 1, 2]
    assert frame["trained_by.model.net.dropout"].tolist() == [0.0, 0.0, 0.5, 0.5]
    assert set(frame) == {"layer", "q", "run", "trained_by.model.net.dropout"}
    with (
        pytest.raises(FileNotFoundError, match=r"no run of .* can be read"),
        pytest.warns(UserWarning, match=r"nulls\.parquet is missing"),
    ):
        nl.load_runs(f"{tmp_path}/*", rows="modularity.nulls")


def test_a_folder_of_runs_gives_all_of_them_in_the_order_of_their_numbers(tmp_path):
    for k in (10, 2, 1):
        result().save(tmp_path / "multirun" / str(k))
    found = nl.load_runs(tmp_path / "multirun")
    assert [run.rpartition("/")[2] for run in found["run"].unique()] == ["1", "2", "10"]
    with pytest.raises(FileNotFoundError, match="no finished run matches"):
        nl.load_runs(tmp_path / "multirun" / "3")
