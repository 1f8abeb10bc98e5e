"""Reads an offline run of Weights & Biases back: LevelDB's log framing around protobuf records, no service, no network."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEAD = 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def frames(path: Path) -> Iterator[bytes]:
    """The records' bytes; a record longer than a block comes in parts."""
    data, part = path.read_bytes(), b""
    assert data[:4] == b":W&B", "no offline run"
    at = _HEAD
    while at + _HEAD <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEAD:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + _HEAD])
        part = data[at + _HEAD : at + _HEAD + size] if kind in (_FULL, _FIRST) else part + data[at + _HEAD : at + _HEAD + size]
        at += _HEAD + size if kind else left
        if kind in (_FULL, _LAST):
            yield part


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged, a dictionary a call."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for frame in frames(path):
        record = Record.FromString(frame)
        found = record.request.partial_history if record.HasField("request") else record.history
        rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in found.item})
    return [row for row in rows if row]


def about(path: Path) -> dict[str, Any]:
    """What the run is filed under, and its config."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = (Record.FromString(frame) for frame in frames(path))
    run = next(record.run for record in records if record.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    filed = {"id": run.run_id, "project": run.project, "group": run.run_group, "job_type": run.job_type, "name": run.display_name}
    return filed | {"tags": list(run.tags), "config": config}


def artifacts(path: Path) -> dict[str, dict[str, Any]]:
    """{name: kind, aliases, paths of its files} of what the run declared as its output, without tables."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = [record.artifact for record in map(Record.FromString, frames(path)) if record.HasField("artifact")]
    found += [
        record.request.log_artifact.artifact
        for record in map(Record.FromString, frames(path))
        if record.HasField("request") and record.request.HasField("log_artifact")
    ]
    return {
        each.name: {
            "type": each.type,
            "aliases": sorted(each.aliases),
            "files": sorted(entry.path for entry in each.manifest.contents),
        }
        for each in found
        if each.type != "run_table"
    }


def later(path: Path, field: str) -> dict[str, Any]:
    """What was set in the run's summary, or in its config after it had begun."""
    from wandb.proto.wandb_internal_pb2 import Record

    parts = [getattr(record, field) for record in map(Record.FromString, frames(path)) if record.HasField(field)]
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for part in parts for item in part.update}


def steps(path: Path) -> dict[str, str]:
    """{pattern of curves: the value that is their horizontal axis}."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = [record.metric for record in map(Record.FromString, frames(path)) if record.HasField("metric")]
    return {metric.glob_name: metric.step_metric for metric in found if metric.glob_name}


def ended(path: Path) -> bool:
    """Whether the run's last record has been written: the service that writes it is a process of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    return any(Record.FromString(frame).HasField("exit") for frame in frames(path))
