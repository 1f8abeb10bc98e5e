"""Loads what a folder holds: the result of a run with its analyses, or the result of one analysis."""

from pathlib import Path
from typing import Any

from nodelens.messages import check_folder
from nodelens.results.files import read_json
from nodelens.results.result import Result
from nodelens.results.result import load as load_result

from .registry import load_analysis

_OF_ANALYSES = ("artifact_schema_version", "supernodes_schema_version", "findings_schema_version")


def load(folder: str | Path) -> Any:
    """Loads the result in a run folder, with its analyses, or what an analysis saved to a folder of its own.

    Returns a ``Result``, or the analysis' own result, such as ``Findings`` or ``GeometryResult``. Raises FileNotFoundError if there
    is no complete one; ValueError, with the file, for content that is damaged.
    """
    check_folder("nl.load", folder)
    folder = Path(folder)
    metadata = folder / "metadata.json"
    known = read_json(metadata) if metadata.is_file() else {}
    if isinstance(known, dict) and any(key in known for key in _OF_ANALYSES):
        return load_analysis(folder)
    result: Result = load_result(folder)
    names = result.metadata.get("analyses") or []
    result.analyses = {name: load_analysis(folder / name) for name in names}
    return result
