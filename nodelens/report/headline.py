"""The head of a page: what ran, on what, how well, and the command that did it."""

import html
import math
import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from nodelens.metrics import get_metric
from nodelens.metrics.base import section_of
from nodelens.results.notices import notices
from nodelens.results.result import Result

from .elements import cards, command, table


def head(folder: Path, result: Result) -> list[str]:
    """Title, headlines, warnings and the command."""
    m = result.metadata
    task = str((m.get("config") or {}).get("task", ""))
    lead = [str((m.get("model") or {}).get("class", "model")), *_data_words(m)]
    if m.get("config") and not _has_weights(m):
        lead.append("no checkpoint was given")
    parts = [f"<h1>nodelens {html.escape(task)}</h1><p class='lead'>{html.escape('; '.join(lead))}</p>"]
    parts += [f"<p class='warning'>Warning: {html.escape(line)}</p>" for line in notices(m)]
    parts.append(cards(_cards(result)))
    words = command_of(folder, task)
    return [*parts, command(words)] if words else parts


def command_of(folder: Path, task: str, without: Collection[str] = ()) -> str:
    """The command line of a run, from the overrides that Hydra stored in its folder; empty for other results.

    without: keys that are left out
    """
    file = folder / ".hydra" / "overrides.yaml"
    if not task or not file.is_file():
        return ""
    try:
        overrides = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    words = [str(word) for word in overrides] if isinstance(overrides, list) else []
    return shlex.join(["python", f"{task}.py", *(word for word in words if word.split("=")[0].lstrip("+~") not in without)])


def _cards(result: Result) -> dict[str, str]:
    m = result.metadata
    found: dict[str, str] = {}
    if len(result.layers):
        found |= {"layers": f"{len(result.layers):,}", "units": f"{len(result.units):,}"}
    if m.get("samples"):
        found["samples measured"] = f"{m['samples']:,}"
    rows = [entry["rows"] for entry in m.get("rows") or [] if isinstance(entry, Mapping) and entry.get("rows")]
    if rows:
        found["rows per layer"] = f"{min(rows):,}" if min(rows) == max(rows) else f"{min(rows):,} to {max(rows):,}"
    found |= scores(m.get("evaluation") or {})
    seconds = [value for value in (m.get("seconds") or {}).values() if isinstance(value, (int, float))]
    if seconds:
        found["time"] = f"{sum(seconds):.1f} s"
    if m.get("seed") is not None:
        found["seed"] = str(m["seed"])
    warned = len(notices(m))
    return found | {"warnings": str(warned)}


def scores(found: Mapping[str, Any]) -> dict[str, str]:
    """An evaluation as headlines: accuracy or, of a task without classes, the loss, and for texts the perplexity. None is NaN."""
    if not found:
        return {}
    values = {name: math.nan if value is None else value for name, value in found.items()}
    on = f"{values.get('samples', 0):,} samples of the split {values.get('split', '?')}"
    scores = {}
    if "accuracy" in values:
        what = "next-token accuracy" if "perplexity" in values else "accuracy"
        scores[f"{what}, {on}"] = f"{100 * values['accuracy']:.2f} %"
    if "perplexity" in values:
        scores[f"perplexity, {on}"] = f"{values['perplexity']:.3f}"
    return scores or {f"loss, {on}": f"{values['loss']:.4f}"}


def _data_words(m: Mapping[str, Any]) -> list[str]:
    data = (m.get("config") or {}).get("dataset") or {}
    target = str(data.get("_target_", "")).rpartition(".")[2]
    path = data.get("path")
    named = f"data {target}{f' of {path}' if isinstance(path, str) else ''}" if target else ""
    split = (m.get("data") or {}).get("split")
    return [word for word in (named, f"measured on the split {split}" if split else "") if word]


def _has_weights(m: Mapping[str, Any]) -> bool:
    model = (m.get("config") or {}).get("model") or {}
    stored = [model.get("weights"), *((model.get("net") or {}).get(key) for key in ("path", "pretrained"))]
    return bool((m.get("weights") or {}).get("ckpt_path") or any(stored))


def definitions_of(result: Result) -> dict[str, str]:
    """{column: what it is}: the first words of the metric's description, its unit, options and source."""
    return {column: _definition(about) for column, about in (result.metadata.get("metrics") or {}).items()}


def _definition(about: Mapping[str, Any]) -> str:
    try:
        described = type(get_metric(about["metric"])).__doc__ or ""
    except (ValueError, TypeError):  # a metric of one's own, or one with required options
        described = ""
    first = " ".join(re.split(r"\n\s*\n|\n\s*\w+:", described)[0].split()).replace("``", "")
    options = ", ".join(f"{k}={v}" for k, v in about["options"].items())
    unit, source = section_of(described, "Unit").replace("``", "").rstrip("."), about.get("source", "")
    words = [
        first,
        f"Unit: {unit}." if unit else "",
        f"Options: {options}." if options else "",
        f"Source: {source}." if source else "",
    ]
    return " ".join(word for word in words if word)


def definitions(result: Result) -> str:
    """A table of the columns: metric, options, what it reads, source."""
    rows = {
        column: {
            "metric": m["metric"],
            "options": ", ".join(f"{k}={v}" for k, v in m["options"].items()) or "none",
            "reads": (", ".join(m["needs"].values()) or "weights") + _without_activation(m),
            "source": m.get("source", ""),
        }
        for column, m in result.metadata["metrics"].items()
    }
    return table(pd.DataFrame(rows).T.rename_axis("column"), words=True)


def _without_activation(metric: dict[str, Any]) -> str:
    """At which layers a metric that reads behind the activation read the layer's own output."""
    layers = [layer for layer, behind in metric.get("read_behind", {}).items() if not behind]
    return f"; no activation follows {', '.join(layers)}: read at the output" if layers else ""


def missing(result: Result) -> str:
    """Which values are missing, and why."""
    entries = result.metadata.get("missing", [])
    if not entries:
        return "<p>None: every unit and layer has a value for every metric.</p>"
    return table(pd.DataFrame(entries).set_index("layer"), words=True)
