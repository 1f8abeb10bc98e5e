"""Files of a geometry analysis that are damaged, or of another version, are refused by name."""

import numpy as np
import pandas as pd
import pytest

from nodelens.analysis.geometry.bundle import GeometryResult, load_bundle
from nodelens.results.files import read_json, write_json


def saved(folder, mode="bundle"):
    table = pd.DataFrame({"layer": [0, 1], "d_pr": [1.5, 2.5]})
    GeometryResult(table, table[:1], eigenvalues={"layer_00": np.arange(3.0)}).save(folder, mode)


@pytest.mark.parametrize("mode", ["bundle", "json"])
def test_a_damaged_file_is_refused_by_name(mode, tmp_path):
    saved(tmp_path, mode)
    load_bundle(tmp_path)
    files = [file for file in tmp_path.iterdir() if file.name != "SHA256SUMS"]
    assert len(files) == 4
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=f"{file.name} is damaged"):
            load_bundle(tmp_path)
        file.write_bytes(content)


@pytest.mark.parametrize("version", [7, None])
def test_another_schema_version_is_refused(version, tmp_path):
    saved(tmp_path)
    metadata = read_json(tmp_path / "metadata.json")
    write_json(tmp_path / "metadata.json", metadata | {"artifact_schema_version": version})
    with pytest.raises(ValueError, match=rf"metadata\.json: artifact_schema_version is {version}; this version reads 1"):
        load_bundle(tmp_path)
