"""The head of a page: what ran, on what, how well, and the command that did it."""

import html
import math
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from nodelens.results.notices import notices
from nodelens.results.result import Result

from .elements import cards, command


def head(folder: Path, result: Result, more: Mapping[str, str] | None = None) -> list[str]:
    """Title, headlines, warnings and the command. more: headlines that come first."""
    m = result.metadata
    task = str((m.get("config") or {}).get("task", ""))
    lead = [str((m.get("model") or {}).get("class", "model")), *data_words(m)]
    parts = [f"<h1>nodelens {html.escape(task)}</h1><p class='lead'>{html.escape('; '.join(lead))}</p>"]
    parts += [f"<p class='warning'>Warning: {html.escape(line)}</p>" for line in _warnings(m)]
    parts.append(cards({**(more or {}), **_cards(result)}))
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
    return found | {"warnings": str(len(_warnings(m)))}


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


def data_words(m: Mapping[str, Any]) -> list[str]:
    """The data set and the split of a run, from its metadata."""
    data = (m.get("config") or {}).get("dataset") or {}
    target = str(data.get("_target_", "")).rpartition(".")[2]
    path = data.get("path")
    named = f"data {target}{f' of {path}' if isinstance(path, str) else ''}" if target else ""
    split = (m.get("data") or {}).get("split")
    return [word for word in (named, f"measured on the split {split}" if split else "") if word]


def _warnings(m: Mapping[str, Any]) -> list[str]:
    random = "no checkpoint was given: the weights are random, unless the model reads its own"
    return [*([random] if m.get("config") and not _has_weights(m) else []), *notices(m)]


def _has_weights(m: Mapping[str, Any]) -> bool:
    model = (m.get("config") or {}).get("model") or {}
    stored = [model.get("weights"), *((model.get("net") or {}).get(key) for key in ("path", "pretrained"))]
    return bool((m.get("weights") or {}).get("ckpt_path") or any(stored))
