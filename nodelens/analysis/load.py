"""Loads what a folder holds: the result of a run, or the geometry of a language model."""

from pathlib import Path

from nodelens.messages import check_folder
from nodelens.results.files import read_json
from nodelens.results.result import Result
from nodelens.results.result import load as load_result

from .geometry.bundle import GeometryResult, load_bundle


def load(folder: str | Path) -> Result | GeometryResult:
    """Loads the result in a run folder, or the geometry that ``nl.analyze_model`` saved to a folder.

    Raises FileNotFoundError if there is no complete one; ValueError, with the file, for content that is damaged.
    """
    check_folder("nl.load", folder)
    metadata = Path(folder) / "metadata.json"
    found = read_json(metadata) if metadata.is_file() else {}
    return load_bundle(folder) if isinstance(found, dict) and "artifact_schema_version" in found else load_result(folder)
