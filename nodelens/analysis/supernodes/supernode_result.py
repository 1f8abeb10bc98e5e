"""What an analysis of loss-critical channels found: tables, the folder they are kept in, and a few lines in words."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from nodelens.results.files import read_json, write, write_json

from .agreement import MEAN, POOLED

SCHEMA = 1  # of the folder
TABLES = ("units", "layers", "concentration", "controls", "ablation", "agreement", "hits", "robustness")


@dataclass
class SupernodesResult:
    """Loss-critical channels of a model, as tables; layer is a group of units.

    units: a row a unit, index (layer, unit): its scores, whether it is a supernode or in the halo. layers: a row a layer.
    concentration: share of the units against the share of the loss proxy that the largest of them hold. controls: redundancy
    and connectivity of the halo beside random cores and matched units. ablation: a row an ablated unit, the true change of the
    loss in nats a prediction; agreement: how scores correlate with it; hits: how many of the most harmful they find.
    robustness: a row a layer and draw of texts. metadata: options, data, versions.
    """

    units: pd.DataFrame
    layers: pd.DataFrame
    concentration: pd.DataFrame
    controls: pd.DataFrame
    ablation: pd.DataFrame
    agreement: pd.DataFrame
    hits: pd.DataFrame
    robustness: pd.DataFrame
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Writes a parquet file a table, and last metadata.json: a folder that has it is complete. Raises ValueError for a file."""
        folder = Path(folder)
        if folder.is_file():
            raise ValueError(f"{str(folder)!r} is a file: give a folder")
        (folder / "metadata.json").unlink(missing_ok=True)
        for name, table in self.tables().items():
            write(folder / f"{name}.parquet", partial(table.to_parquet))
        write_json(folder / "metadata.json", self.metadata | {"supernodes_schema_version": SCHEMA})
        return folder.resolve()

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by name."""
        return {name: getattr(self, name) for name in TABLES}

    def lines(self) -> list[str]:
        """What was found, in a few lines."""
        m, layers = self.metadata, self.layers
        one, ten = (f"{100 * layers[f'concentration_{k}'].median():.0f} %" for k in (1, 10))
        activations, weights = (layers[f"jaccard_{name}"].mean() for name in ("largest", "magnitude"))
        found = [
            f"{len(self.units):,} units in {len(layers)} layers; {m['rows']:,} {m['unit']}s of {m['samples']:,} samples",
            f"supernodes: {int(layers['supernodes'].sum()):,} units; the top 1 % of a layer hold {one} of its loss proxy, the top "
            f"10 % {ten} (median over layers), Gini {layers['gini'].median():.2f}; they overlap with the largest activations by "
            f"{activations:.2f}, with the largest weights by {weights:.2f} (Jaccard, mean)",
        ]
        flat = layers[layers["support"] == layers["width"]]
        if len(flat):
            found.append(
                f"connectivity says nothing in {len(flat)} layers: its support is the whole width ({int(flat['width'].min())}), "
                "every unit has 1, and the halo are the first units; set connectivity_topk below it"
            )
        return found + [line for line in (self._controls(), self._ablation(), self._robustness()) if line]

    def _controls(self) -> str:
        rows = self.controls[self.controls["quantity"] == "redundancy"]
        if rows["difference"].notna().sum() == 0:
            return ""
        said = []
        for control, part in rows.groupby("control", sort=False):
            words = "random cores" if control == "random core" else control
            clear = int((part["p"] <= 0.05).sum())
            said.append(f"{words} {part['other'].mean():.3g} (p <= 0.05 in {clear} of {len(part)} layers)")
        halo = f"redundancy of {int(self.layers['halo'].sum()):,} halo units to the core"
        return f"{halo} {rows['halo'].mean():.3g} nats; {', '.join(said)}"

    def _ablation(self) -> str:
        if not len(self.agreement):
            return ""
        places = set(self.agreement["layer"])
        place = MEAN if MEAN in places else str(self.agreement["layer"].iloc[0])
        rows = self.agreement[self.agreement["layer"] == place].dropna(subset="spearman").sort_values("spearman", ascending=False)
        shown = pd.concat([rows[rows["score"] == "loss_proxy"], rows[rows["score"] != "loss_proxy"].head(3)])
        errors = shown["spearman_se"].map(lambda se: f" +- {se:.2f}" if se == se else "")  # too few units have none
        best = ", ".join(f"{r.score} {r.spearman:.2f}{se}" for r, se in zip(shown.itertuples(), errors, strict=True))
        about = self.metadata["ablation"]
        where = "mean over layers" if place == MEAN else f"in {place}"
        return (
            f"{len(self.ablation):,} units ablated one by one on {about['predictions']:,} predictions (loss {about['loss']:.4f}); "
            f"rank correlation with the true change, {where}: {best}"
        )

    def _robustness(self) -> str:
        if not len(self.robustness):
            return ""
        r = self.robustness
        how = "two halves of the texts" if self.metadata["options"]["resample"] == "halves" else "resampled texts"
        chance = self.layers["jaccard_by_chance"].mean()
        return (
            f"{how}: supernodes overlap by {r['jaccard'].mean():.2f} (Jaccard; chance {chance:.2f}), loss proxies correlate by "
            f"{r['spearman'].mean():.3f} (Spearman)"
        )

    def pooled(self, table: str = "agreement") -> pd.DataFrame:
        """The rows of ``agreement`` or ``hits`` over all units together."""
        found = getattr(self, table)
        places = list(dict.fromkeys(found["layer"]))
        return found[found["layer"] == (POOLED if POOLED in places else places[0])] if places else found


def load_supernodes(folder: str | Path) -> SupernodesResult:
    """What ``SupernodesResult.save`` wrote. Raises FileNotFoundError where no folder is complete, ValueError for a later schema."""
    folder = Path(folder)
    if not (folder / "metadata.json").is_file():
        raise FileNotFoundError(f"{folder} holds no finished analysis of supernodes: metadata.json is missing")
    metadata = read_json(folder / "metadata.json")
    version = metadata.get("supernodes_schema_version")
    if version != SCHEMA:
        raise ValueError(f"{folder} has the schema {version}, this version reads {SCHEMA}: run the analysis again")
    return SupernodesResult(**{name: pd.read_parquet(folder / f"{name}.parquet") for name in TABLES}, metadata=metadata)
