"""The model card of a pruned model: what was removed, how to open the folder, and the table of the sweep."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from nodelens.messages import listed

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COLUMNS = ("criterion", "allocation", "compensate", "mode", "amount", "seed", "params_share", "macs_share")
_MEASURES = ("accuracy", "accuracy_se", "perplexity", "loss")
_ROWS = 200  # of the table; the rest is left to sweep.parquet
_OPEN = {
    "plain": """It opens with plain transformers:

```python
from transformers import {auto}

model = {auto}.from_pretrained("{folder}")
```""",
    "file": """The config of this class cannot say the shapes that are left, for example because layers kept different
widths. So the folder has a modelling file of its own, `modeling_pruned.py`, which transformers runs only where it is trusted:

```python
from transformers import {auto}

model = {auto}.from_pretrained("{folder}", trust_remote_code=True)
```

`allocation=uniform` keeps the same width in every layer. Most configs can say the width of feed-forward
layers, and many the number of heads; then no such file is needed.""",
}
_STRICT = """nodelens opens it without running any code of the folder:

```python
import nodelens as nl

model = nl.load_pruned("{folder}")
```"""


def model_card(pruned: Any, own_file: bool, of_transformers: bool, sweep: pd.DataFrame | None = None) -> str:
    """The text of ``README.md``. own_file: whether the folder has a modelling file; sweep: as in sweep.parquet."""
    name = type(pruned.model).__name__
    ways = [_STRICT]
    if of_transformers:
        ways = [_OPEN["file" if own_file else "plain"].replace("{auto}", _auto(pruned.model)), _STRICT]
    parts = [_head(pruned, of_transformers), f"# {name}, pruned", pruned.summary().replace("\n", "  \n"), *ways, _kept(pruned)]
    if sweep is not None and len(sweep):
        parts.append("## Sweep\n\nShares are what is left of the dense model.\n\n" + _table(sweep))
    return "\n\n".join(part.replace("{folder}", "path/to/this/folder") for part in parts if part) + "\n"


def as_text(value: Any) -> str:
    r"""A value as Markdown that shows it as it is: no markup, no link, no cell of a table ends in it.

    >>> print(as_text("a|b <b>*x*</b> [y](z)"))
    a\|b \<b\>\*x\*\</b\> \[y\]\(z\)
    """
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~$&@:])", r"\\\1", text)


def _head(pruned: Any, of_transformers: bool) -> str:
    """The YAML header that the hub reads. JSON strings are YAML strings."""
    base = getattr(getattr(pruned.model, "config", None), "_name_or_path", "") or ""
    lines = ["---", f"library_name: {'transformers' if of_transformers else 'nodelens'}"]
    if _HUB_ID.fullmatch(base) and not Path(base).exists():
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join([*lines, "tags:", "- nodelens", "- pruned", "---"])


def _auto(model: Any) -> str:
    from .modelling_file import auto_classes

    return next(iter(auto_classes(model)), type(model).__name__)


def _kept(pruned: Any) -> str:
    """Kept units of the groups that lost some, one row per number of kept units of a kind."""
    rows: dict[tuple[str, int, int], list[str]] = {}
    for group in (*pruned.groups, *pruned.groups.opt_in):
        if gone := len(pruned.plan.removed.get(group.name, ())):
            rows.setdefault((group.kind, group.n, group.n - gone), []).append(group.name)
    if not rows:
        return ""
    lines = ["| kind | units | kept | groups |", "|---|---:|---:|---|"]
    for (kind, n, left), names in rows.items():
        lines.append(f"| {as_text(kind)} | {n} | {left} | {as_text(listed(names, 4))} |")
    return "## Kept units\n\n" + "\n".join(lines)


def _table(sweep: pd.DataFrame) -> str:
    done = sweep[sweep["status"] == "done"] if "status" in sweep else sweep
    columns = [name for name in (*_COLUMNS, *_MEASURES) if name in done and done[name].notna().any()]
    columns = [c for c in columns if c not in ("compensate", "mode", "seed") or done[c].nunique() > 1]
    lines = ["| " + " | ".join(map(as_text, columns)) + " |", "|" + "---|" * len(columns)]
    for _, row in done[columns].head(_ROWS).iterrows():
        lines.append("| " + " | ".join("" if pd.isna(v) else as_text(v) for v in row) + " |")
    dense = [f"{m} {done[f'dense_{m}'].iloc[0]:.4f}" for m in _MEASURES if f"dense_{m}" in done and len(done)]
    rest = [f"{len(done) - _ROWS} more rows are in sweep.parquet of the run."] if len(done) > _ROWS else []
    return "\n\n".join(["\n".join(lines), *([f"The dense model: {', '.join(dense)}."] if dense else []), *rest])
