"""Results whose names try to be more than text, and pages of every kind."""

import numpy as np
import pandas as pd

from nodelens.results.findings import Findings
from nodelens.results.result import Result

NAMES = ["<script>alert(1)</script>", "=cmd()", "'quotes\" & <b>bold</b>", "слой \u2028 层", "../../up"]
NAMES += ["</script><img src=x onerror=alert(2)>"]


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
        {"sample": 0, "layer": layer, "position": k, "token": token, "rank": rank, "predicted": NAMES[(k + rank) % 6]}
        for layer in range(3)
        for k, token in enumerate(NAMES)
        for rank in (1, 2)
    ]
    return pd.DataFrame(rows).assign(probability=lambda table: 0.5 / table["rank"])
