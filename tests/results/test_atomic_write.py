"""A file appears complete or not at all, and an error names it."""

import errno
import os
from pathlib import Path

import pytest

from nodelens.results.files import MANIFEST, checked, write


def test_a_full_disk_leaves_the_former_file_and_names_it(tmp_path):
    path = tmp_path / "table.parquet"
    write(path, lambda temporary: temporary.write_text("former"))

    def fill(temporary):
        temporary.write_text("half")
        Path("/dev/full").write_text("x" * 100_000)  # the error of a write has no file name

    with pytest.raises(OSError, match="No space left on device") as caught:
        write(path, fill)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert {p.name for p in tmp_path.iterdir()} == {"table.parquet", MANIFEST}
    assert checked(path).read_text() == "former"


def test_an_error_without_a_number_keeps_its_words(tmp_path):
    def fill(temporary):
        raise OSError("the writer failed")

    with pytest.raises(OSError, match=r"the writer failed: '.*table.parquet'"):
        write(tmp_path / "table.parquet", fill)


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    path, seen, sync = tmp_path / "table.parquet", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append((os.fstat(fd).st_size, path.exists())), sync(fd)))
    write(path, lambda temporary: temporary.write_text("content"))
    assert seen == [(7, False)]
