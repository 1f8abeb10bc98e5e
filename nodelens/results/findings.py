"""What an analysis found, as tables: the folder that stores them, and a summary."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

from .files import checked, is_name, read_json, reading, remove, write, write_json

SCHEMA = 1  # of the folder


class Plotted:
    """What an analysis found and the page draws."""

    def plot(self, name: str | None = None) -> Any:
        """One of its figures, interactive, by plotly; None: the first. Raises ValueError for another name, which lists them."""
        found: Any = import_module("nodelens.report.notebook").chosen(self, name)  # a room that may import this one
        return found


@dataclass
class Findings(Plotted):
    """What an analysis found.

    kind:     the name of the analysis, such as modularity
    frames:   its tables by name; ``findings["modules"]`` returns one
    lines:    the main findings, one line each
    units:    columns for the unit table of the result, index (layer, unit). Floats are taken for metrics; labels, such as the
              number of a module, are integers (Int64 where some are missing), words or booleans
    matrices: {(layer, name): matrix} for the matrices of the result
    metadata: options, data, and under ``missing`` what could not be computed: layer, what, reason
    """

    kind: str
    frames: dict[str, pd.DataFrame]
    lines: list[str] = field(default_factory=list)
    units: pd.DataFrame | None = None
    matrices: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in self.frames:
            raise KeyError(f"{self.kind} has no table {name!r}; it has {', '.join(self.frames) or 'none'}")
        return self.frames[name]

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by name."""
        return dict(self.frames)

    def summary(self) -> str:
        """The main findings, one line each."""
        return "\n".join(self.lines)

    def __repr__(self) -> str:
        return f"Findings of {self.kind}: {self.summary()}"

    def save(self, folder: str | Path) -> Path:
        """Writes the tables and matrices, then ``metadata.json``, which marks the folder complete. Raises ValueError for a file."""
        tables = self.frames if self.units is None else {**self.frames, "unit_columns": self.units}
        folder = write_tables(folder, tables)
        keys = [list(key) for key in self.matrices]
        remove(folder / "matrices.safetensors")  # of findings that were here before
        if keys:
            arrays = {f"{k}": np.ascontiguousarray(matrix) for k, matrix in enumerate(self.matrices.values())}
            write(folder / "matrices.safetensors", lambda path: save_file(arrays, str(path)))
        about = {
            "findings_schema_version": SCHEMA,
            "kind": self.kind,
            "lines": self.lines,
            "tables": list(tables),
            "matrices": keys,
        }
        write_json(folder / "metadata.json", {**about, "about": self.metadata})
        return folder


def write_tables(folder: str | Path, tables: Mapping[str, pd.DataFrame]) -> Path:
    """Removes ``metadata.json`` and writes one parquet file per table; returns the folder. Raises ValueError for a file."""
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file: give a folder")
    (folder / "metadata.json").unlink(missing_ok=True)
    for name, table in tables.items():
        write(folder / f"{name}.parquet", table.to_parquet)
    return folder.resolve()


def load_findings(folder: str | Path) -> Findings:
    """Loads saved findings.

    Raises FileNotFoundError for an incomplete folder, and ValueError for a damaged file or what another version wrote.
    """
    folder = Path(folder)
    if not (folder / "metadata.json").is_file():
        raise FileNotFoundError(f"{folder} has no finished analysis: metadata.json is missing")
    known = read_json(checked(folder / "metadata.json"))
    version = known.get("findings_schema_version") if isinstance(known, dict) else None
    if version != SCHEMA:
        raise ValueError(f"{folder} has schema version {version!r}, but this version reads {SCHEMA}: run the analysis again")
    _check(folder, known)
    frames = {name: _read(folder / f"{name}.parquet", pd.read_parquet) for name in known["tables"]}
    arrays = _read(folder / "matrices.safetensors", lambda path: load_file(str(path))) if known["matrices"] else {}
    units = frames.pop("unit_columns", None)
    matrices = {(layer, name): arrays[f"{k}"] for k, (layer, name) in enumerate(known["matrices"])}
    return Findings(known["kind"], frames, known["lines"], units, matrices, known["about"])


def _check(folder: Path, known: dict[str, Any]) -> None:
    """Raises ValueError for metadata of another form, and for a table whose name is a path."""
    kinds = {"kind": str, "lines": list, "tables": list, "matrices": list, "about": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(known.get(name), kind)]
    wrong += ["tables" for name in known.get("tables") or [] if not is_name(name)]
    wrong += ["matrices" for key in known.get("matrices") or [] if not isinstance(key, list) or len(key) != 2]
    if wrong:
        raise ValueError(f"{folder / 'metadata.json'} is damaged at {wrong[0]!r}: run the analysis again")


def _read(file: Path, read: Callable[[Path], Any]) -> Any:
    with reading(file) as path:
        return read(path)
