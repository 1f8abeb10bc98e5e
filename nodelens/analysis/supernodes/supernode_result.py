"""The result of a supernode analysis: its tables, the folder that stores them, and a summary."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from nodelens.results.files import checked, read_json, reading, write_json
from nodelens.results.findings import Plotted, write_tables

from .agreement import MEAN, POOLED
from .controls import RANDOM
from .cores import COLUMNS

SCHEMA = 1  # of the folder
TABLES = ("units", "layers", "concentration", "controls", "ablation", "agreement", "hits", "robustness", "cores")
LATER = ("cores",)  # tables that results of earlier versions lack


@dataclass
class SupernodesResult(Plotted):
    """Supernodes of a model, as tables. A layer is a pruning group.

    units: one row per unit, index (layer, unit): its scores, whether it is a supernode or in the halo. layers: one row per layer;
    overlaps and rank correlations of the loss proxy with other scores have 95 % bootstrap intervals over groups of samples
    (``_low``, ``_high``). concentration: share of the units, largest first, against their share of the loss proxy. controls:
    redundancy and connectivity of the halo compared with random sets and matched units. ablation: one row per ablated unit, the
    change of the loss in nats per prediction; agreement: correlations of the scores with it; hits: share of the most harmful
    units that a score finds. robustness: one row per layer and resample of texts. cores: with several cores per layer, one row per
    core, see ``core_rows``. metadata: options, data, versions.
    """

    units: pd.DataFrame
    layers: pd.DataFrame
    concentration: pd.DataFrame
    controls: pd.DataFrame
    ablation: pd.DataFrame
    agreement: pd.DataFrame
    hits: pd.DataFrame
    robustness: pd.DataFrame
    cores: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(COLUMNS)))
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Writes one parquet file per table, then metadata.json, which marks the folder complete. Raises ValueError for a file."""
        folder = write_tables(folder, self.tables())
        write_json(folder / "metadata.json", self.metadata | {"supernodes_schema_version": SCHEMA})
        return folder

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by name."""
        return {name: getattr(self, name) for name in TABLES}

    def __repr__(self) -> str:
        return f"SupernodesResult: {self.summary()}"

    def summary(self) -> str:
        """The main findings, one line each."""
        m, layers = self.metadata, self.layers
        one, ten = (f"{100 * layers[f'concentration_{k}'].median():.0f} %" for k in (1, 10))
        activations, weights = (layers[f"jaccard_{name}"].mean() for name in ("largest", "magnitude"))
        found = [
            f"{len(self.units):,} units in {len(layers)} layers; {m['rows']:,} {m['unit']}s of {m['samples']:,} samples",
            f"supernodes: {int(layers['supernodes'].sum()):,} units; the top 1 % of a layer have {one} of its loss proxy, the top "
            f"10 % {ten} (median over layers), Gini {layers['gini'].median():.2f}; overlap with the units of largest activation "
            f"{activations:.2f}, of largest weight {weights:.2f} (mean Jaccard index)",
        ]
        flat = layers[layers["support"] == layers["width"]]
        if len(flat):
            found.append(
                f"connectivity is 1 for every unit in {len(flat)} layers, because its support is the whole width "
                f"({int(flat['width'].min())}), so their halo is arbitrary; set connectivity_topk below the width"
            )
        return "\n".join([*found, *filter(None, (self._controls(), self._cores(), self._ablation(), self._robustness()))])

    def _controls(self) -> str:
        rows = self.controls[self.controls["quantity"] == "redundancy"]
        if rows["difference"].notna().sum() == 0:
            return ""
        parts = []
        for control, part in rows.groupby("control", sort=False):
            name = "to random sets" if control == RANDOM else f"of {control} units"
            significant = int((part["p"] <= 0.05).sum())
            parts.append(f"{name} {part['other'].mean():.3g} (p <= 0.05 in {significant} of {len(part)} layers)")
        halo = f"redundancy of {int(self.layers['halo'].sum()):,} halo units to the supernodes"
        return f"{halo} {rows['halo'].mean():.3g} nats; {', '.join(parts)}"

    def _cores(self) -> str:
        if not len(self.cores):
            return ""
        mean = self.cores[["within", "between", "halo_redundancy"]].mean()
        return (
            f"{len(self.cores)} cores in {self.cores['layer'].nunique()} layers: redundancy of two units of one halo "
            f"{mean['within']:.3g} nats, of different halos {mean['between']:.3g} (mean ratio {mean['halo_redundancy']:.2f})"
        )

    def _ablation(self) -> str:
        if not len(self.agreement):
            return ""
        places = set(self.agreement["layer"])
        place = MEAN if MEAN in places else str(self.agreement["layer"].iloc[0])
        rows = self.agreement[self.agreement["layer"] == place].dropna(subset="spearman").sort_values("spearman", ascending=False)
        shown = pd.concat([rows[rows["score"] == "loss_proxy"], rows[rows["score"] != "loss_proxy"].head(3)])
        errors = shown["spearman_se"].map(lambda se: f" +- {se:.2f}" if se == se else "")  # NaN for too few units
        best = ", ".join(f"{r.score} {r.spearman:.2f}{se}" for r, se in zip(shown.itertuples(), errors, strict=True))
        about = self.metadata["ablation"]
        where = "mean over layers" if place == MEAN else f"in {place}"
        return (
            f"{len(self.ablation):,} units ablated one by one on {about['predictions']:,} predictions (loss {about['loss']:.4f}); "
            f"rank correlation with the measured change, {where}: {best}"
        )

    def _robustness(self) -> str:
        if not len(self.robustness):
            return ""
        r = self.robustness
        how = "two halves of the texts" if self.metadata["options"]["resample"] == "halves" else "resampled texts"
        chance = self.layers["jaccard_by_chance"].mean()
        return (
            f"{how}: Jaccard index of supernodes {r['jaccard'].mean():.2f} (chance {chance:.2f}), Spearman correlation of loss "
            f"proxies {r['spearman'].mean():.3f}"
        )

    def pooled(self, table: str = "agreement") -> pd.DataFrame:
        """The rows of ``agreement`` or ``hits`` for all units pooled."""
        found = getattr(self, table)
        places = list(dict.fromkeys(found["layer"]))
        return found[found["layer"] == (POOLED if POOLED in places else places[0])] if places else found


def load_supernodes(folder: str | Path) -> SupernodesResult:
    """Loads a saved ``SupernodesResult``. Raises FileNotFoundError for an incomplete folder, ValueError for another schema."""
    folder = Path(folder)
    if not (folder / "metadata.json").is_file():
        raise FileNotFoundError(f"{folder} has no finished analysis of supernodes: metadata.json is missing")
    metadata = read_json(checked(folder / "metadata.json"))
    version = metadata.get("supernodes_schema_version")
    if version != SCHEMA:
        raise ValueError(f"{folder} has schema version {version}, but this version reads {SCHEMA}: run the analysis again")
    tables = {}
    for name in TABLES:
        if name in LATER and not (folder / f"{name}.parquet").is_file():
            continue
        with reading(folder / f"{name}.parquet") as path:
            tables[name] = pd.read_parquet(path)
    return SupernodesResult(**tables, metadata=metadata)
