"""What an analysis found: saved, loaded, and refused where the folder is damaged."""

import json

import numpy as np
import pandas as pd
import pytest

from nodelens.results.findings import Findings, load_findings


@pytest.fixture
def found():
    index = pd.MultiIndex.from_product([["fc1"], [0, 1]], names=["layer", "unit"])
    missing = [{"layer": "fc2", "what": "q", "reason": "2 units"}]
    return Findings(
        kind="modularity",
        frames={"modules": pd.DataFrame({"layer": ["fc1"], "q": [0.5]})},
        lines=["Q 0.5"],
        units=pd.DataFrame({"module": [1, 2]}, index=index),
        matrices={("a::b", "cov"): np.eye(2)},
        metadata={"missing": missing},
    )


def test_findings_load_as_they_were_saved(found, tmp_path):
    found.save(tmp_path / "modularity")
    again = load_findings(tmp_path / "modularity")
    pd.testing.assert_frame_equal(again["modules"], found["modules"])
    pd.testing.assert_frame_equal(again.units, found.units)
    np.testing.assert_array_equal(again.matrices["a::b", "cov"], np.eye(2))
    assert (again.kind, again.summary(), again.metadata) == (found.kind, "Q 0.5", found.metadata)
    assert list(again.tables()) == ["modules"]
    assert "modularity: Q 0.5" in repr(again)


def test_findings_replace_those_that_were_there(found, tmp_path):
    found.save(tmp_path)
    Findings("modularity", {"other": pd.DataFrame({"x": [1]})}).save(tmp_path)
    again = load_findings(tmp_path)
    assert list(again.frames) == ["other"]
    assert not again.matrices


def test_a_table_that_is_not_there_is_named(found):
    with pytest.raises(KeyError, match="modularity has no table 'nulls'; it has modules"):
        found["nulls"]


def test_a_file_is_no_folder(found, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        found.save(tmp_path / "file")


def test_an_unfinished_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no finished analysis: metadata\.json is missing"):
        load_findings(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("findings_schema_version", 2, "schema version 2, but this version reads 1"),
        ("lines", 3, "damaged at 'lines'"),
        ("tables", ["../units"], "damaged at 'tables'"),
        ("tables", [".."], "damaged at 'tables'"),
        ("tables", [""], "damaged at 'tables'"),
        ("matrices", [["fc1"]], "damaged at 'matrices'"),
    ],
)
def test_damaged_metadata_are_refused(found, tmp_path, key, value, words):
    found.save(tmp_path)
    file = tmp_path / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=words):
        load_findings(tmp_path)


def test_a_damaged_table_is_named(found, tmp_path):
    found.save(tmp_path)
    (tmp_path / "modules.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"modules\.parquet is damaged"):
        load_findings(tmp_path)
