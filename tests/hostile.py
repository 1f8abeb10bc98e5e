"""Results whose names try to be more than text, and pages of every kind."""

from pathlib import Path

import numpy as np
import pandas as pd

from nodelens.results.files import write_json
from nodelens.results.findings import Findings
from nodelens.results.result import Result

NAMES = ["<script>alert(1)</script>", "=cmd()", "'quotes\" & <b>bold</b>", "слой \u2028 层", "../../up"]
NAMES += ["</script><img src=x onerror=alert(2)>", "javascript:alert(1)", "C:\\new\\table`${x}`%{y}"]


def hostile_result(units: int = 40) -> Result:
    """Layers of hostile names with three metrics, errors, labels, pairs and an analysis."""
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([NAMES, range(units)], names=["layer", "unit"])
    size = len(index)
    columns = {"rq": rng.random(size), "synergy": rng.normal(size=size), "taylor": rng.exponential(size=size)}
    table = pd.DataFrame(columns, index=index)
    table["rq_se"] = 0.01
    table["unit_type"] = rng.choice(["=1+1", "<i>core</i>"], size)
    layers = pd.DataFrame({"type": "<b>", "units": units, "d_pr": rng.random(len(NAMES))}, index=pd.Index(NAMES, name="layer"))
    edges = pd.DataFrame({"linear_cka": rng.random(len(NAMES) - 1), "linear_cka_se": 0.01})
    edges.index = pd.MultiIndex.from_arrays([NAMES[:-1], NAMES[1:]], names=["layer", "next"])
    about = {"metric": "rq", "options": {}, "needs": {"x": "<x>"}, "source": "<script>alert(3)</script>", "kind": "unit"}
    missing = [{"layer": NAMES[0], "column": "rq", "count": 1, "reason": "<script>alert(4)</script>"}]
    metadata = {"schema_version": 1, "metrics": {"rq": about}, "missing": missing, "samples": 10, "seed": 0}
    metadata["config"] = {"task": "analyze", "dataset": {"_target_": "a.B", "path": "<script>alert(5)</script>"}}
    metadata["model"] = {"class": "<script>alert(6)</script>", "fingerprint": "a"}
    metadata["warnings"] = ["<script>alert(7)</script>"]
    result = Result(table, layers, {}, metadata, edges)
    result.analyses["lens"] = Findings("lens", {"predictions": predictions()}, ["<script>alert(8)</script>"])
    metadata["analyses"] = ["lens"]
    return result


def predictions() -> pd.DataFrame:
    """What a lens predicts: tokens that are tags and formulas."""
    rows = [
        {"sample": 0, "layer": layer, "position": k, "token": token, "rank": rank, "predicted": NAMES[(k + rank) % len(NAMES)]}
        for layer in range(3)
        for k, token in enumerate(NAMES)
        for rank in (1, 2)
    ]
    return pd.DataFrame(rows).assign(probability=lambda table: 0.5 / table["rank"])


def hostile_sweep(folder: Path) -> Path:
    """A pruning run: a sweep of three criteria, three amounts and two seeds, with fine-tuning."""
    rows = []
    for criterion in ("taylor", "=cmd()", "<script>alert(9)"):
        for amount in (0.25, 0.5, 0.75):
            for seed in (0, 1):
                name = f"{criterion}-uniform-none-low-{amount:g}-{seed}"
                share, score = 1 - amount, 0.9 - amount**2 / (2 if criterion == "taylor" else 1.5) + seed / 50
                row = {
                    "name": name,
                    "status": "done",
                    "criterion": criterion,
                    "allocation": "uniform",
                    "compensate": "none",
                    "mode": "low",
                }
                row |= {
                    "amount": amount,
                    "seed": seed,
                    "units": 20,
                    "units_removed": int(20 * amount),
                    "accuracy": score,
                    "loss": 1 - score,
                }
                row |= {
                    "macs": 100 * share,
                    "macs_share": share,
                    "params": 50 * share,
                    "params_share": share,
                    "carried_out_as": name,
                }
                row |= {"val_pruned_accuracy": score - 0.1, "val_accuracy": score, "val_pruned_loss": 1.0, "val_loss": 0.5}
                rows.append(row | {"dense_accuracy": 0.92, "dense_macs": 100.0, "dense_params": 50.0, "latency_batch1_ms": share})
                write_json(folder / "cells" / f"{name}.json", {"removed": {"fc1": list(range(int(10 * amount)))}})
    units = pd.DataFrame({"taylor": np.random.default_rng(0).random(20)})
    units.index = pd.MultiIndex.from_product([["fc1", NAMES[0]], range(10)], names=["layer", "unit"])
    layers = pd.DataFrame({"kind": "channel", "units": [10, 10]}, index=pd.Index(["fc1", NAMES[0]], name="layer"))
    about = {"metric": "taylor", "options": {}, "needs": {}, "source": ""}
    metadata = {"schema_version": 1, "metrics": {"taylor": about}, "config": {"task": "prune"}, "seed": 0}
    metadata["frozen"] = [{"what": NAMES[0], "reason": NAMES[5]}]
    Result(units, layers, {}, metadata).save(folder)
    pd.DataFrame(rows).to_parquet(folder / "sweep.parquet")
    return folder


def hostile_training(folder: Path) -> Path:
    """Three epochs of two layers, with a log and the clusters and modules of each epoch."""
    index = pd.MultiIndex.from_product([NAMES[:2], range(12)], names=["layer", "unit"])
    (folder / "epochs").mkdir(parents=True)
    for epoch in range(3):
        rng = np.random.default_rng(epoch)
        table = pd.DataFrame({"rq": rng.random(24), "taylor": rng.random(24) * epoch}, index=index)
        table.to_parquet(folder / f"epochs/units_{epoch:03d}.parquet")
    (folder / "csv/version_0").mkdir(parents=True)
    log = pd.DataFrame({"epoch": [0, 0, 1, 1, 2], "train/loss": [2, None, 1, None, 0.5], "val/loss": [None, 2.1, None, 1.2, 0.7]})
    log.to_csv(folder / "csv/version_0/metrics.csv", index=False)
    ended = {"accuracy": 0.9, "loss": 0.3, "samples": 100, "checkpoint": "<script>best.ckpt", "epochs": 3}
    write_json(folder / "result.json", ended)
    write_json(folder / "settings.json", {"model": {"net": {"_target_": "a.<script>alert(3)</script>"}}})
    _analyses_of_epochs(folder / "epochs")
    return folder


def _analyses_of_epochs(folder: Path) -> None:
    """Clusters and modules over epochs, and an analysis that says nothing about all of them."""
    rows = [
        {"layer": layer, "association": NAMES[6], "epoch": epoch, "unit": unit, "module": (unit + epoch) % 9 - 1}
        for layer in NAMES[:2]
        for epoch in range(3)
        for unit in range(12)
    ]
    labels = pd.DataFrame(rows)
    modules = labels.drop_duplicates(["layer", "epoch"]).assign(q=0.3, q_null=0.1, modules=3)
    stability = modules[modules["epoch"] > 0].assign(epoch_a=0, ami=0.5).rename(columns={"epoch": "epoch_b"})
    frames = {"modules": modules, "stability": stability, "labels": labels}
    Findings("modularity_epochs", frames, [f"{NAMES[0]}: stable"]).save(folder / "modularity")
    own = labels[["layer", "epoch", "unit"]].assign(cluster=0, type=NAMES[5])
    shares = own.drop_duplicates(["layer", "epoch"]).assign(share=1.0)
    agreement = pd.DataFrame({"layer": NAMES[:2], "epoch_a": 0, "epoch_b": 1, "units": 12, "ari": 0.5, "same_type": 1.0})
    frames = {"types": shares, "stability": agreement, "labels": own, "layers": shares}
    Findings("clusters_epochs", frames, [NAMES[5]], metadata={"typed": True}).save(folder / "clusters")
    gaps = {"missing": [{"layer": NAMES[5], "reason": NAMES[0]}]}
    Findings("lens", {"predictions": predictions()}, [NAMES[0]], metadata=gaps).save(folder / "lens" / "002")
