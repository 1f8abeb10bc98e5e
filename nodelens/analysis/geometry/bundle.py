"""The result of a geometry analysis: its tables, and the folder that stores them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nodelens.messages import check_folder, shown
from nodelens.results.arrays import headers, read_arrays
from nodelens.results.files import checked, plain, read_json, write, write_json
from nodelens.results.findings import Plotted
from nodelens.results.left_out import many_left_out
from nodelens.results.spreadsheets import with_formulas, without_formulas

SCHEMA = 1  # of the folder
_SCHEMAS = (SCHEMA, "0.1")  # what is read; 0.1 is representation-geometry's
_TABLE = re.compile(r"(metrics|novelty|router|experts|diagnostics/[\w-]+)")
MODES = ("json", "csv", "bundle")  # bundle: tables as csv
_WORDS = dict.fromkeys(("model_key", "model_label", "hook_point", "transition", "variant", "module"), str)


@dataclass
class GeometryResult(Plotted):
    """The geometry of a language model.

    metrics: one row per layer; novelty: one row per pair of consecutive layers; router: one row per layer with experts; experts:
    one row per expert; diagnostics: tables by name; eigenvalues: {layer_00: (width,)}, largest first; metadata: model, data,
    options and versions; artifact_dir: the folder it was saved to.
    """

    metrics: pd.DataFrame
    novelty: pd.DataFrame
    router: pd.DataFrame = field(default_factory=pd.DataFrame)
    diagnostics: dict[str, pd.DataFrame] = field(default_factory=dict)
    eigenvalues: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    artifact_dir: Path | None = None
    experts: pd.DataFrame = field(default_factory=pd.DataFrame)

    def save(self, save_dir: str | Path | None = None, save_mode: str = "bundle") -> Path:
        """Writes the tables (json, or csv in modes csv and bundle), eigenvalues.npz, then metadata.json, which marks them complete.

        save_dir: None for the folder it was saved to before; save_mode: in lower or upper case. Raises ValueError for an unknown
        mode or without a folder.
        """
        folder, save_mode = folder_of(save_dir or self.artifact_dir, save_mode), save_mode.lower()
        (folder / "metadata.json").unlink(missing_ok=True)
        kind = "json" if save_mode == "json" else "csv"
        tables = {name: table for name, table in self.tables().items() if len(table) or name in ("metrics", "novelty")}
        for name, table in tables.items():
            if kind == "json":
                write_json(folder / f"{name}.json", table.to_dict(orient="records"))
            else:
                write(folder / f"{name}.csv", partial(without_formulas(table).to_csv, index=False))
        if self.eigenvalues:
            write(folder / "eigenvalues.npz", self._pack)
        self.artifact_dir = folder.resolve()
        about = {
            "artifact_schema_version": SCHEMA,
            "save_mode": save_mode,
            "tables": {k: list(t.columns) for k, t in tables.items()},
        }
        about |= {"arrays": sorted(self.eigenvalues)}
        self.metadata |= about | {"artifact_dir": str(self.artifact_dir)}
        write_json(folder / "metadata.json", self.metadata)
        return self.artifact_dir

    def __repr__(self) -> str:
        return f"GeometryResult: {self.summary()}"

    def summary(self) -> str:
        """One line per finding: dimensions from first to last layer, the largest step between layers, the load of the routers."""
        found = []
        steps_of = self.by_point(self.novelty)
        for point, table in self.by_point(self.metrics).items():
            first, last = table.iloc[0], table.iloc[-1]
            if "d_pr" in table:
                found.append(
                    f"{point}: participation ratio {first.d_pr:.1f} at layer {first.layer}, {last.d_pr:.1f} at layer {last.layer}, "
                    f"out of {first.hidden_dim} dimensions; {first.tokens_observed:,} tokens"
                )
            steps = steps_of.get(point, pd.DataFrame())
            if "linear_cka_debiased" in steps and steps.linear_cka_debiased.notna().any():
                least = steps.loc[steps.linear_cka_debiased.idxmin()]
                found.append(f"{point}: largest change from layer {least.transition}, debiased CKA {least.linear_cka_debiased:.3f}")
        if len(self.router):
            busy = self.router.loc[self.router.load_imbalance.idxmax()]
            found.append(
                f"routers: the load is least balanced in layer {busy.layer}, where the most used expert gets "
                f"{busy.load_imbalance:.2f} times the balanced share"
            )
        if line := many_left_out(self.metadata.get("left_out", [])):
            found.append(f"warning: {line}")
        return "\n".join(found)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, which JSON takes: tables as lists of rows, eigenvalues as lists, NaN as None."""
        rows = {name: table.to_dict(orient="records") for name, table in self.tables().items()}
        found = {name: rows[name] for name in ("metrics", "novelty", "router", "experts")}
        found["diagnostics"] = {name: rows[f"diagnostics/{name}"] for name in self.diagnostics}
        found["eigenvalues"] = {name: values.tolist() for name, values in self.eigenvalues.items()}
        return plain(found | {"metadata": self.metadata, "artifact_dir": self.artifact_dir})

    def by_point(self, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """The rows of a table by hook point. A table has a column ``hook_point`` only if there are several."""
        if "hook_point" in table:
            return {str(point): part for point, part in table.groupby("hook_point", sort=False)}
        return {str(self.metadata.get("hook_point", "")): table} if len(table) else {}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by name."""
        named = {"metrics": self.metrics, "novelty": self.novelty, "router": self.router, "experts": self.experts}
        return named | {f"diagnostics/{name}": table for name, table in self.diagnostics.items()}

    def _pack(self, path: Path) -> None:
        arrays: Any = self.eigenvalues
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)


def load_bundle(folder: str | Path) -> GeometryResult:
    """What ``GeometryResult.save`` wrote, in any mode, or a folder that representation-geometry 0.1 wrote.

    Raises FileNotFoundError where no folder is complete; ValueError, with file and field, for content that is damaged.
    """
    check_folder("nl.load_bundle", folder)
    folder = Path(folder)
    if not (folder / "metadata.json").is_file():
        raise FileNotFoundError(f"{folder} holds no finished geometry: metadata.json is missing")
    metadata = _metadata(folder / "metadata.json")
    kind = "json" if metadata["save_mode"].lower() == "json" or not (folder / "metrics.csv").is_file() else "csv"
    listed = metadata.get("tables") or dict.fromkeys(_files(folder, kind))  # representation-geometry lists none
    tables = {name: _read(folder / f"{name}.{kind}", columns) for name, columns in listed.items()}
    for name in ("metrics", "novelty"):
        if name not in tables:
            raise ValueError(f"{folder / 'metadata.json'}: tables has no {name!r}; a geometry has metrics and novelty")
    found = {name: tables.pop(name) for name in ("metrics", "novelty", "router", "experts") if name in tables}
    diagnostics = {name.removeprefix("diagnostics/"): table for name, table in tables.items()}
    eigenvalues = _eigenvalues(folder / "eigenvalues.npz", metadata.get("arrays"), found["metrics"])
    return GeometryResult(
        **found, diagnostics=diagnostics, eigenvalues=eigenvalues, metadata=metadata, artifact_dir=folder.resolve()
    )


def _metadata(file: Path) -> dict[str, Any]:
    """The metadata; fields that say what is read are checked."""
    found = read_json(checked(file))
    if not isinstance(found, dict):
        raise ValueError(f"{file} is {shown(found)}; it must be a dictionary")
    version, mode, tables = found.get("artifact_schema_version"), found.get("save_mode"), found.get("tables") or {}
    if version not in _SCHEMAS or isinstance(version, (bool, float)):
        raise ValueError(
            f"{file}: artifact_schema_version is {shown(version)}; this version reads {', '.join(map(repr, _SCHEMAS))}"
        )
    if not isinstance(mode, str) or mode.lower() not in MODES:
        raise ValueError(f"{file}: save_mode is {shown(mode)}; it must be {', '.join(MODES)}")
    if not isinstance(tables, dict):
        raise ValueError(f"{file}: tables is {shown(tables)}; it must be a dictionary of columns by table")
    for name, columns in tables.items():
        if not _TABLE.fullmatch(name):
            raise ValueError(
                f"{file}: tables names {shown(name)}; tables are metrics, novelty, router, experts, diagnostics/<name>"
            )
        if not _are_names(columns):
            raise ValueError(f"{file}: tables.{name} is {shown(columns)}; it must be a list of column names")
    if not _are_names(found.get("arrays", [])):
        raise ValueError(f"{file}: arrays is {shown(found['arrays'])}; it must be a list of names")
    return found


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


def _eigenvalues(file: Path, names: Sequence[str] | None, metrics: pd.DataFrame) -> dict[str, np.ndarray]:
    """One float array per name, no longer than the width in the table; names: None for those of the file, if there is one."""
    if not names and (names is not None or not file.is_file()):
        return {}
    if not file.is_file():
        raise ValueError(f"{file} is missing; metadata.json lists {shown(list(names or ()))} under arrays")
    declared = headers(checked(file))
    if names is not None and sorted(names) != sorted(declared):
        raise ValueError(
            f"{file} has the arrays {shown(sorted(declared))}, metadata.json lists {shown(sorted(names))} under arrays"
        )
    widest = metrics["hidden_dim"].max() if "hidden_dim" in metrics and len(metrics) else np.inf
    for name, (shape, dtype) in declared.items():
        if len(shape) != 1 or dtype.kind != "f" or not shape[0] <= widest:
            raise ValueError(f"{file}: {name} has the shape {shape} of {dtype}; eigenvalues are ({widest},) floats at most")
    return read_arrays(file)


def folder_of(save_dir: str | Path | None, save_mode: str) -> Path:
    """The folder to save to. Raises ValueError for an unknown mode, a missing folder, or a path to a file."""
    if not isinstance(save_mode, str) or save_mode.lower() not in MODES:
        raise ValueError(f"save_mode is {save_mode!r}; it must be {', '.join(MODES)}, or None")
    if save_dir is None:
        raise ValueError(f"save_mode is {save_mode!r}, but there is no folder: give save_dir=")
    if Path(save_dir).is_file():
        raise ValueError(f"save_dir {str(save_dir)!r} is a file: give a folder")
    return Path(save_dir)


def _files(folder: Path, kind: str) -> list[str]:
    """Names of the tables that lie in a folder."""
    return [str(path.relative_to(folder).with_suffix("")) for path in folder.rglob(f"*.{kind}") if path.stem != "metadata"]


def _read(file: Path, columns: list[str] | None) -> pd.DataFrame:
    """A table with these columns, in any order; None: whatever it has. An empty file is an empty table."""
    if not file.is_file():
        raise ValueError(f"{file} is missing; metadata.json lists the table")
    checked(file)
    try:
        table = _read_csv(file) if file.suffix == ".csv" else pd.DataFrame(_rows(file), columns=columns)
        if columns is not None and list(table.columns) != columns:
            raise ValueError(f"it has the columns {shown(list(table.columns))}, metadata.json lists {shown(columns)}")
        missing = [name for name in table if table[name].isna().all()]
        return table if file.suffix == ".csv" else table.astype(dict.fromkeys(missing, float))
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(text if str(file) in text else f"{file} is no table that can be read: {text}") from error


def _rows(file: Path) -> list[dict[str, Any]]:
    found = read_json(file)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"it is {shown(found)}; it must be a list of rows, each a dictionary")
    return found


def _read_csv(file: Path) -> pd.DataFrame:
    try:
        return with_formulas(pd.read_csv(file, dtype=_WORDS))
    except pd.errors.EmptyDataError:  # representation-geometry writes a table without routers so
        return pd.DataFrame()
