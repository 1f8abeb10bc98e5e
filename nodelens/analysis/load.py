"""Loads what a folder holds: the result of a run with its analyses, or the result of one analysis."""

from pathlib import Path
from typing import Any

import pandas as pd

from nodelens.messages import check_folder, shown
from nodelens.results.files import checked, is_there, read_json
from nodelens.results.result import Result, read_table
from nodelens.results.result import load as load_result
from nodelens.results.training_history import HISTORY
from nodelens.results.trends import epoch_files
from nodelens.results.validate import check_metadata

from .registry import load_analysis

_OF_ANALYSES = ("artifact_schema_version", "supernodes_schema_version", "findings_schema_version")


def load(folder: str | Path) -> Any:
    """Loads the result in a run folder, with its analyses, or what an analysis saved to a folder of its own.

    Returns a ``Result``, or the analysis' own result, such as ``Findings`` or ``GeometryResult``. The result of a training has the
    units of the last epoch that ``callbacks=measure`` measured, none without it; its scores are in ``metadata["evaluation"]``.
    Raises FileNotFoundError if there is no complete one; ValueError, with the file, for content that is damaged.
    """
    check_folder("nl.load", folder)
    folder = Path(folder)
    metadata = folder / "metadata.json"
    known = read_json(metadata) if metadata.is_file() else {}
    if isinstance(known, dict) and any(key in known for key in _OF_ANALYSES):
        return load_analysis(folder)
    if not known and (folder / "result.json").is_file():
        return _training(folder)
    if not known and (folder / HISTORY).is_file():
        raise FileNotFoundError(f"{folder} has no finished training: result.json is missing; run its command again to continue it")
    result: Result = load_result(folder)
    names = result.metadata.get("analyses") or []
    result.analyses = {name: load_analysis(folder / name) for name in names}
    return result


def _training(folder: Path) -> Result:
    """What a training left: the units of the last epoch that was measured, and what analyses found in its epochs."""
    place, files = folder / "epochs", epoch_files(folder)
    about, score, config = (_read(file) for file in (place / "metadata.json", folder / "result.json", folder / "settings.json"))
    check_metadata(place / "metadata.json", about)
    units = pd.DataFrame(index=pd.MultiIndex.from_arrays([[], []], names=["layer", "unit"]))
    layers = pd.DataFrame(index=pd.Index([], name="layer"))
    if files:
        tail = list(files.values())[-1].stem.removeprefix("units")
        units = read_table(place, "units", about, tail)
        layers = pd.DataFrame(index=units.index.unique("layer"))
        if is_there(place / f"layers{tail}.parquet"):
            layers = read_table(place, "layers", about, tail)
    metadata = about | {"evaluation": {"split": "test"} | score, "config": config, "epochs_measured": list(files)}
    analyses = {name: load_analysis(found) for name, found in epoch_analyses(folder).items()}
    return Result(units, layers, {}, metadata, analyses=analyses, folder=folder.resolve())


def _read(file: Path) -> dict[str, Any]:
    """What a JSON file of a training says; nothing where there is no such file. Raises ValueError for a damaged file."""
    found = read_json(checked(file)) if is_there(file) else {}
    if not isinstance(found, dict):
        raise ValueError(f"{file} is {shown(found)}; it is a dictionary: restore it from a copy, or run the training again")
    return found


def epoch_analyses(folder: Path) -> dict[str, Path]:
    """{name: folder} of the analyses of a training's epochs: over all of them or, of an analysis without that, of the last one."""
    over = {path.parent.name: path.parent for path in sorted(folder.glob("epochs/*/metadata.json"))}
    each = (path.parent for path in folder.glob("epochs/*/*/metadata.json") if path.parent.name.isdecimal())
    last = {place.parent.name: place for place in sorted(each, key=lambda place: int(place.name))}
    return over | {name: place for name, place in sorted(last.items()) if name not in over}
