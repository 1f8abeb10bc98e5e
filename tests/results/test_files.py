"""Files appear whole or not at all, are checked when they are read, and errors name them."""

import ast
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file

import nodelens
from nodelens.results.files import checked, read_json, reading, sweep_parts, write, write_json

WRITERS = {
    "a.json": lambda path: path.write_text("{}", encoding="utf-8"),
    "a.parquet": lambda path: pd.DataFrame({"x": np.arange(100_000.0)}).to_parquet(path),
    "a.safetensors": lambda path: save_file({"x": np.arange(100_000.0)}, str(path)),
    "a.pt": lambda path: torch.save(torch.arange(100_000.0), path),
}


def test_files_are_listed_as_sha256sum_lists_them(tmp_path):
    for name, fill in WRITERS.items():
        write(tmp_path / name, fill)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["SHA256SUMS", *sorted(WRITERS)]
    tool = shutil.which("sha256sum")
    if tool:
        said = subprocess.run([tool, "--check", "SHA256SUMS"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert said.splitlines() == [f"{name}: OK" for name in WRITERS]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_file_is_refused_by_name(name, damage, tmp_path):
    write(tmp_path / name, WRITERS[name])
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    changed = {"flipped": bytes(content), "truncated": bytes(content[: len(content) // 2]), "empty": b""}[damage]
    (tmp_path / name).write_bytes(changed)
    with pytest.raises(ValueError, match=rf"{name} is damaged: its SHA-256 is not the one that .*SHA256SUMS lists: restore"):
        checked(tmp_path / name)


def test_older_folders_without_a_manifest_are_read(tmp_path):
    (tmp_path / "old.json").write_text('{"a": 1}')
    assert read_json(checked(tmp_path / "old.json")) == {"a": 1}
    write_json(tmp_path / "new.json", {"a": 2})
    assert read_json(checked(tmp_path / "old.json")) == {"a": 1}
    assert read_json(checked(tmp_path / "new.json")) == {"a": 2}


def test_a_file_that_is_written_again_is_the_listed_one_at_every_moment(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, 1)

    def killed(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, 2)
    assert read_json(checked(path)) == 1, "listed already, but not renamed"
    write_json(path, 3)
    assert read_json(checked(path)) == 3


def test_a_line_that_was_cut_off_hides_no_other(tmp_path):
    write_json(tmp_path / "a.json", 1)
    manifest = tmp_path / "SHA256SUMS"
    manifest.write_text(manifest.read_text() + "0123456789abc")
    write_json(tmp_path / "b.json", 2)
    assert [read_json(checked(tmp_path / f"{name}.json")) for name in "ab"] == [1, 2]
    (tmp_path / "b.json").write_text("3")
    with pytest.raises(ValueError, match=r"b\.json is damaged"):
        checked(tmp_path / "b.json")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "old.parquet").write_bytes(b"PAR1 and no more")
    words = r"old\.parquet cannot be read \(ArrowInvalid: .*restore it from a copy, or delete it"
    with pytest.raises(ValueError, match=words), reading(tmp_path / "old.parquet") as path:
        pd.read_parquet(path)
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet is missing: restore it"), reading(tmp_path / "gone.parquet"):
        pass
    (tmp_path / "old.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match=r"old\.json is not valid JSON"):
        read_json(tmp_path / "old.json")


@contextmanager
def room_for(size):
    """As on a full disk, no file can be larger than some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_an_error_that_names_the_file_and_loses_nothing(name, tmp_path):
    path = tmp_path / name
    write(path, WRITERS[name])
    before = path.read_bytes()

    with room_for(1 if name == "a.json" else 1000), pytest.raises(OSError, match=re.escape(str(path))):
        write(path, WRITERS[name])
    assert path.read_bytes() == before
    assert checked(path) == path
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


def test_other_errors_of_a_writer_stay_what_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "a.json", lambda path: 1 / 0)
    with pytest.raises(ValueError, match="Out of range float values"):
        write(tmp_path / "a.json", lambda path: path.write_text(__import__("json").dumps(float("nan"), allow_nan=False)))
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_dead_processes_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = re.sub(r"[^\w-]", "_", socket.gethostname())
    (tmp_path / "cells").mkdir()
    names = {
        f".units.parquet.{dead.pid}@{host}.part": False,
        f".units.parquet.{dead.pid}.part": False,  # of an earlier version
        f"cells/.a.json.{dead.pid}@{host}.part": False,
        f".units.parquet.{os.getpid()}@{host}.part": True,
        f".units.parquet.{dead.pid}@elsewhere.part": True,
        ".notes.part": True,
        "units.parquet": True,
    }
    for name in names:
        (tmp_path / name).touch()
    old = f".old.parquet.{dead.pid}@elsewhere.part"
    (tmp_path / old).touch()
    os.utime(tmp_path / old, (0, 0))
    sweep_parts(tmp_path)
    assert {name: (tmp_path / name).exists() for name in names} == names
    assert not (tmp_path / old).exists()


def test_json_is_utf8_in_any_locale(tmp_path):
    code = "from pathlib import Path; from nodelens.results.files import write_json; "
    code += f"write_json(Path({str(tmp_path)!r}) / 'a.json', '\\xe9\\u2026')"
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert read_json(tmp_path / "a.json") == "é…"


def test_text_files_have_an_encoding_everywhere():
    found = []
    for file in sorted(Path(nodelens.__file__).parent.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        if "_text" not in source:  # parsing takes a while
            continue
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        texts = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr in ("read_text", "write_text")]
        found += [f"{file}:{call.lineno}" for call in texts if "encoding" not in [keyword.arg for keyword in call.keywords]]
    assert found == []
