"""Npz files of strangers: what they declare is checked before anything is read."""

import io
import resource
import struct
import zipfile

import numpy as np
import pytest

from nodelens.data import Npz
from nodelens.results.arrays import headers, read_arrays


@pytest.fixture
def file(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(12.0).reshape(3, 4), y=np.arange(3))
    return tmp_path / "a.npz"


def npy(shape="(3, 4)", dtype="'<f8'", data=b"\0" * 96, version=1):
    """A file of one array whose header says what is given."""
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def zipped(path, **entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in entries.items():
            out.writestr(f"{name}.npy", data)
    return path


def test_arrays_and_their_headers_are_read(file):
    assert headers(file) == {"x": ((3, 4), np.dtype("f8")), "y": ((3,), np.dtype("i8"))}
    assert read_arrays(file, lambda name: name == "y")["y"].tolist() == [0, 1, 2]
    assert read_arrays(file)["x"].shape == (3, 4)


HOSTILE = {  # the array, and what is said of the file
    "shape": (
        npy("(1000000, 1000000)"),
        r"x has the shape \(1000000, 1000000\) of float64, 8000000000000 bytes, and the file has 96",
    ),
    "overflow": (npy(f"({10**30},)"), "x has the shape"),
    "negative": (npy("(-3, 4)"), "x has the shape"),
    "text": (npy("('a',)"), "shape is not valid"),
    "code": (npy("(__import__('os').getpid(),)"), "malformed node or string"),
    "objects": (npy(dtype="'|O'"), "an array holds pickled objects, which are never read"),
    "dtype": (npy(dtype="'<q9'"), "not a valid dtype"),
    "structured": (npy(version=3), r"an array has the version \(3, 0\) of the npy format"),
    "short": (npy(data=b"\0" * 95), "96 bytes, and the file has 95 for it"),
    "no array": (b"hello", "magic string"),
    "empty": (b"", "reading magic string"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_header_that_does_not_fit_is_refused(what, tmp_path):
    data, words = HOSTILE[what]
    with pytest.raises(ValueError, match=rf"a\.npz is not an npz file of plain arrays that can be read: .*{words}") as refused:
        read_arrays(zipped(tmp_path / "a.npz", x=data))
    assert len(str(refused.value).splitlines()) == 1


def test_two_megabytes_do_not_become_two_gigabytes(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = (1 << 29) + 128
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as out, out.open("x.npy", "w", force_zip64=True) as part:
        part.write(npy(f"({1 << 29},)", "'|u1'", b""))
        for _ in range(1 << 9):
            part.write(bytes(1 << 20))
    assert (tmp_path / "a.npz").stat().st_size < 1_000_000
    words = r"x takes 536870912 bytes in memory and \d+ in the file: write it uncompressed, with numpy.savez"
    for read in (read_arrays, lambda path: Npz(str(path)).setup()):
        with pytest.raises(ValueError, match=words):
            read(tmp_path / "a.npz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < size / 1024 / 4, "kB"


def test_entries_that_lie_about_their_size_or_occur_twice_are_refused(file, tmp_path):
    whole = bytearray(file.read_bytes())
    directory = whole.index(b"PK\x01\x02")
    whole[directory + 20 : directory + 24] = struct.pack("<I", 1 << 30)  # the compressed size
    (tmp_path / "b.npz").write_bytes(whole)
    with pytest.raises(ValueError, match="its entries declare more bytes than the file has"):
        read_arrays(tmp_path / "b.npz")
    buffer = io.BytesIO()
    np.save(buffer, np.ones(2))
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as out:
        out.writestr("x.npy", buffer.getvalue())
        with pytest.warns(UserWarning, match="Duplicate name"):
            out.writestr("x.npy", buffer.getvalue())
    with pytest.raises(ValueError, match="it has two arrays named 'x'"):
        read_arrays(tmp_path / "c.npz")


def test_bytes_that_were_damaged_are_refused(file, tmp_path):
    whole = bytearray(file.read_bytes())
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (tmp_path / "b.npz").write_bytes(damaged)
        try:
            found = read_arrays(tmp_path / "b.npz")
        except ValueError as refused:
            text = str(refused)
            found = None
        assert found is not None or ("b.npz" in text and len(text.splitlines()) == 1)
    for size in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        (tmp_path / "b.npz").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"b\.npz is not an npz file"):
            read_arrays(tmp_path / "b.npz")
