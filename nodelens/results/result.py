"""Results: tables, matrices and provenance, saved to a folder and loaded again."""

import hashlib
import html
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from nodelens.messages import listed
from nodelens.network.sharded import full

from .files import checked, is_there, read_json, reading, remove, write, write_json
from .notices import notices
from .validate import check_matrices, check_metadata, check_sizes, check_table

SCHEMA = 1
BESIDE = ("_se", "_bias", "_null", "_p")  # suffixes of columns that accompany a metric
_INDEX = {"units": ("layer", "unit"), "layers": ("layer",), "edges": ("layer", "next")}
_PACKAGES = ("nodelens", "torch", "lightning", "hydra-core", "transformers", "datasets", "numpy", "pandas")


@dataclass
class Result:
    """The result of a run.

    units: index (layer, unit), one column per metric and its standard error ``<metric>_se``; layers: one row per layer; matrices:
    {(layer, name): (units, units)}, or (inputs,) for one value per input feature; metadata: definitions, rows seen, reasons for
    NaN, versions, config; edges: index (layer, next), one row per layer pair; analyses: the results of further analyses by name;
    folder: of the run that it was loaded from, where ``plot`` finds the sweep or the epochs.
    """

    units: pd.DataFrame
    layers: pd.DataFrame
    matrices: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    edges: pd.DataFrame = field(default_factory=pd.DataFrame)
    analyses: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def save(self, folder: str | Path) -> Path:
        """Writes the tables, each analysis to a subfolder of its name, then the metadata, which marks the folder complete.

        Raises OSError if writing fails.
        """
        folder = Path(folder)
        for name, there in (("edges.parquet", len(self.edges)), ("matrices.safetensors", len(self.matrices))):
            if not there:
                remove(folder / name)  # of a result that was here before
        write(folder / "units.parquet", self.units.to_parquet)
        write(folder / "layers.parquet", self.layers.to_parquet)
        if len(self.edges):
            write(folder / "edges.parquet", self.edges.to_parquet)
        if self.matrices:
            arrays = {f"{layer}::{name}": np.ascontiguousarray(a) for (layer, name), a in self.matrices.items()}
            write(folder / "matrices.safetensors", lambda path: save_file(arrays, str(path)))
        for name, found in self.analyses.items():
            found.save(folder / name)
        write_json(folder / "metadata.json", self.metadata)
        return folder

    def interval(self, name: str, level: float = 0.95) -> pd.DataFrame:
        """The confidence interval of a metric: columns ``low`` and ``high``, indexed like the table that has the metric.

        Value -+ t SE, t the quantile of Student's distribution with one degree of freedom less than there are groups of samples
        that are not empty (``filled_groups`` in the metadata). Metrics with skewed errors, such as the kurtosis, take that step on
        the logarithm: value exp(-+ t SE / value). NaN where there is no standard error. The catalogue of metrics says where 95 %
        intervals cover less or more than that.

        Raises ValueError for a name without a standard error, and a level that is not between 0 and 1.
        """
        from scipy.stats import t

        if not 0 < level < 1:
            raise ValueError(f"level is {level}; it is the share of intervals that hold the truth, between 0 and 1, such as 0.95")
        table = next((each for each in (self.units, self.layers, self.edges) if f"{name}_se" in each), None)
        if table is None:
            known = [c for each in (self.units, self.layers, self.edges) for c in values_of(each) if f"{c}_se" in each]
            raise ValueError(f"{name!r} has no standard error in this result; those that have one: {', '.join(known) or 'none'}")
        groups = self.metadata.get("filled_groups")
        if groups is None:
            raise ValueError("the metadata do not say how many groups of samples are filled (filled_groups): there is no interval")
        value, reach = table[name], float(t.ppf(0.5 + level / 2, max(1, groups - 1))) * table[f"{name}_se"]
        if (self.metadata.get("metrics") or {}).get(name, {}).get("log_interval"):
            factor = np.exp(reach / value.where(value > 0))
            return pd.DataFrame({"low": value / factor, "high": value * factor})
        return pd.DataFrame({"low": value - reach, "high": value + reach})

    def plot(self, kind: str | None = None, **options: Any) -> Any:
        """An interactive plotly figure, as on the page of a run; ``nl.export`` writes it as PNG, SVG or PDF with its data.

        kind: ``overview``, ``units``, ``agreement``, ``layers``, ``pairs``, ``network``, ``scatter``; of a sweep also ``curves``,
        ``pareto``, ``ranking``, ``recovery``, ``kept``; of a training also ``loss``, ``epochs``, ``units_over_epochs``,
        ``stability``; or an analysis and one of its figures, such as ``clusters.composition``. None: the first one on the page.
        options: x, y and layer of scatter; metric of units, layers, pairs and epochs; metric and layer of units_over_epochs; cell
        of kept. Raises ValueError for what this result does not have, and says what it has; ``summary`` lists the kinds as well.
        """
        found: Any = _notebook().plot(self, kind, **options)
        return found

    def summary(self) -> str:
        """What is there, in a few lines: layers, units, samples, metrics, matrices, values without an answer, and plots."""
        samples, missing = self.metadata.get("samples"), self.metadata.get("missing") or []
        counts = [(len(self.layers), "layer"), (len(self.units), "unit"), *([(samples, "sample")] if samples else [])]
        tables = {"units": self.units, "layers": self.layers, "pairs of layers": self.edges}
        lines = [", ".join(f"{n:,} {word}{'s' * (n != 1)}" for n, word in counts)]
        lines += [f"metrics of {kind}: {', '.join(names)}" for kind, table in tables.items() if (names := values_of(table))]
        if self.matrices:
            lines.append(f"matrices: {', '.join(sorted({name for _, name in self.matrices}))}")
        lines += [f"{name}: {line}" for name, found in self.analyses.items() for line in found.summary().splitlines()]
        lines += [f"warning: {line}" for line in notices(self.metadata)]
        if missing:
            places = sorted({f"{m['column']} of {m['layer']}" for m in missing})
            lines.append(f"missing: {listed(places, 4)}")
        return "\n".join([*lines, *_notebook().lines_of(self)])

    def __repr__(self) -> str:
        return f"Result: {self.summary()}"

    def _repr_html_(self) -> str:
        """The summary, and the first units, for a notebook."""
        return f"<pre>{html.escape(repr(self))}</pre>{self.units.head().to_html() if len(self.units) else ''}"


def _notebook() -> Any:
    return import_module("nodelens.report.notebook")  # a room that may import this one


def values_of(frame: pd.DataFrame) -> list[str]:
    """The columns that are metrics, without errors, biases, nulls and p-values. Integers are counts and labels, no metrics."""
    numeric = [str(c) for c in frame.select_dtypes("floating")]
    return [c for c in numeric if not any(c.endswith(s) and c.removesuffix(s) in numeric for s in BESIDE)]


def load(folder: str | Path) -> Result:
    """Loads the result in a run folder.

    Raises FileNotFoundError if there is no complete one, and ValueError, with the name of the file, for a file that is damaged or
    that another version wrote.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    matrices: dict[tuple[str, str], np.ndarray] = {}
    if is_there(folder / "matrices.safetensors"):
        with reading(folder / "matrices.safetensors") as path:
            arrays = load_file(str(path))
        check_matrices(folder / "matrices.safetensors", arrays)
        for key, array in arrays.items():
            layer, name = key.rsplit("::", 1)
            matrices[layer, name] = array
    units, layers, edges = (read_table(folder, kind, metadata) for kind in _INDEX)
    check_sizes(folder, units, layers)
    return Result(units, layers, matrices, metadata, edges, folder=folder.resolve())


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a finished run. Raises as ``load``."""
    if not (folder / "metadata.json").is_file():
        absent = "is no folder; that of a run holds metadata.json"
        lacks = "has no finished run: metadata.json is missing" if folder.is_dir() else absent
        raise FileNotFoundError(f"{folder.resolve()} {lacks}")
    metadata = read_json(checked(folder / "metadata.json"))
    version = metadata.get("schema_version", SCHEMA) if isinstance(metadata, dict) else None
    if version != SCHEMA:
        raise ValueError(
            f"{folder / 'metadata.json'} has schema_version {version!r}, and this version of nodelens reads {SCHEMA}: load it with "
            "the version that wrote it, or run the analysis again"
        )
    check_metadata(folder / "metadata.json", metadata)
    return metadata


def read_table(folder: Path, kind: str, metadata: Mapping[str, Any], tail: str = "") -> pd.DataFrame:
    """One table of a finished run: units, layers, or edges, which is empty where there are none. Raises as ``load``.

    tail: of the name of the file, such as ``_002`` in the epochs of a training
    """
    if kind == "edges" and not is_there(folder / "edges.parquet"):
        return pd.DataFrame()
    return _table(folder / f"{kind}{tail}.parquet", _INDEX[kind], metadata.get("metrics") or {})


def _table(file: Path, index: Sequence[str], metrics: Mapping[str, Any]) -> pd.DataFrame:
    with reading(file) as path:
        table = pd.read_parquet(path)
    check_table(file, table, index, metrics)
    return table


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as one level: keys joined by dots, lists as strings."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value) if isinstance(value, list) else value
    return flat


def provenance() -> dict[str, Any]:
    """Versions of the packages, and the commit of the code if it is in a checkout."""
    return {"schema_version": SCHEMA, "versions": dict(_versions()), "commit": commit()}


@cache
def _versions() -> dict[str, str]:
    return {name: packages.version(name) for name in _PACKAGES if _installed(name)}


def fingerprint(model: nn.Module) -> str:
    """A hash of all that is in the state of a model; equal weights have equal hashes. Collective for a sharded model."""
    return fingerprint_of(model.state_dict())


def fingerprint_of(state: Mapping[str, Any]) -> str:
    """A hash of tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):  # what a module stores with get_extra_state
            digest.update(f"{name}{tensor!r}".encode())
            continue
        flat = full(tensor.detach()).cpu().contiguous().reshape(-1)
        digest.update(name.encode() + str((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(flat.view(dtype=_bytes()).numpy().data if flat.numel() else b"")
    return digest.hexdigest()[:16]


def _bytes() -> Any:
    import torch

    return torch.uint8


def _installed(name: str) -> bool:
    try:
        packages.version(name)
    except packages.PackageNotFoundError:
        return False
    return True


@cache
def commit() -> str | None:
    """The commit of the code, if it is in a checkout; asked once, since a process keeps the code with which it began."""
    home = Path(__file__).parents[2]
    if not (home / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=home,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except OSError:  # no git on this machine
        return None
    return run.stdout.strip() or None
