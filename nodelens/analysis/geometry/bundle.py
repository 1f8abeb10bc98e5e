"""The result of a geometry analysis: its tables, and the folder that stores them."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nodelens.results.files import checked, read_json, reading, write, write_json
from nodelens.results.left_out import many_left_out

SCHEMA = 1  # of the folder
READABLE = (SCHEMA, "0.1")  # the second: representation-geometry's
MODES = ("json", "csv", "bundle")  # bundle: tables as csv
_WORDS = dict.fromkeys(("model_key", "model_label", "hook_point", "transition", "variant", "module"), str)


@dataclass
class GeometryResult:
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

        save_dir: None for the folder it was saved to before. Raises ValueError for an unknown mode or without a folder.
        """
        folder = folder_of(save_dir or self.artifact_dir, save_mode)
        (folder / "metadata.json").unlink(missing_ok=True)
        kind = "json" if save_mode == "json" else "csv"
        tables = {name: table for name, table in self.tables().items() if len(table) or name in ("metrics", "novelty")}
        for name, table in tables.items():
            if kind == "json":
                write_json(folder / f"{name}.json", table.to_dict(orient="records"))
            else:
                write(folder / f"{name}.csv", partial(table.to_csv, index=False))
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
                    f"out of {first.hidden_dim} dimensions; {first.tokens_observed} tokens"
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

    Raises FileNotFoundError where no folder is complete.
    """
    folder = Path(folder)
    if not (folder / "metadata.json").is_file():
        raise FileNotFoundError(f"{folder} holds no finished geometry: metadata.json is missing")
    metadata = read_json(checked(folder / "metadata.json"))
    _check_schema(folder, metadata)
    kind = "json" if metadata["save_mode"] == "json" or not (folder / "metrics.csv").is_file() else "csv"
    listed = metadata.get("tables") or dict.fromkeys(_files(folder, kind))  # representation-geometry lists none
    tables = {name: _read(folder / f"{name}.{kind}", columns) for name, columns in listed.items()}
    found = {name: tables.pop(name) for name in ("metrics", "novelty", "router", "experts") if name in tables}
    diagnostics = {name.removeprefix("diagnostics/"): table for name, table in tables.items()}
    eigenvalues: dict[str, np.ndarray] = {}
    if metadata.get("arrays", (folder / "eigenvalues.npz").is_file()):
        with reading(folder / "eigenvalues.npz") as path, np.load(path) as arrays:
            eigenvalues = dict(arrays)
    return GeometryResult(
        **found, diagnostics=diagnostics, eigenvalues=eigenvalues, metadata=metadata, artifact_dir=folder.resolve()
    )


def _check_schema(folder: Path, metadata: Any) -> None:
    """Raises ValueError for metadata of another kind or version."""
    version = metadata.get("artifact_schema_version") if isinstance(metadata, dict) else None
    if version not in READABLE or "save_mode" not in metadata:
        raise ValueError(
            f"{folder / 'metadata.json'} has artifact_schema_version {version!r}, and this version of nodelens reads "
            f"{', '.join(map(repr, READABLE))}: read it with the version that wrote it, or run the analysis again"
        )


def folder_of(save_dir: str | Path | None, save_mode: str) -> Path:
    """The folder to save to. Raises ValueError for an unknown mode, a missing folder, or a path to a file."""
    if save_mode not in MODES:
        raise ValueError(f"save_mode is {save_mode!r}; it must be {', '.join(MODES)}, or None")
    if save_dir is None:
        raise ValueError(f"save_mode is {save_mode!r}, but there is no folder: give save_dir=")
    if Path(save_dir).is_file():
        raise ValueError(f"save_dir {str(save_dir)!r} is a file: give a folder")
    return Path(save_dir)


def _files(folder: Path, kind: str) -> list[str]:
    """Names of the tables that lie in a folder."""
    return [str(path.relative_to(folder).with_suffix("")) for path in folder.rglob(f"*.{kind}") if path.stem != "metadata"]


def _read(path: Path, columns: list[str] | None) -> pd.DataFrame:
    with reading(path):
        table = pd.read_csv(path, dtype=_WORDS) if path.suffix == ".csv" else pd.DataFrame(read_json(path), columns=columns)
    if path.suffix == ".csv":
        return table
    missing = [name for name in table if table[name].isna().all()]
    return table.astype(dict.fromkeys(missing, float))
