"""Arrays of npz files: what their headers declare is checked before one is read."""

import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

_FREE = 1 << 28  # bytes that an array may take, however well it is compressed
_RATIO = 100  # of a larger array to its compressed size; images reach 20, zeros 1,000
_DAMAGED = (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OverflowError)
Header = tuple[tuple[int, ...], np.dtype]


def headers(file: Path) -> dict[str, Header]:
    """{name: (shape, dtype)} of the arrays in an npz file, from their headers.

    Raises ValueError for a file that is no npz file of plain arrays, for a header that contradicts the size of its entry, and for
    an array of more than 256 MB that takes less than a hundredth of it in the file.
    """
    found: dict[str, Header] = {}
    try:
        with zipfile.ZipFile(file) as zipped:
            entries = zipped.infolist()
            if sum(entry.compress_size for entry in entries) > file.stat().st_size:
                raise ValueError("its entries declare more bytes than the file has")
            for entry in entries:
                name = entry.filename.removesuffix(".npy")
                if name in found:
                    raise ValueError(f"it has two arrays named {name!r}")
                with zipped.open(entry) as part:
                    found[name] = _header(part)
                    _check_bytes(name, found[name], entry, part.tell())
    except _DAMAGED as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{file} is not an npz file of plain arrays that can be read: {why}") from error
    return found


def read_arrays(file: Path, wanted: Callable[[str], bool] = bool) -> dict[str, np.ndarray]:
    """The arrays whose names are wanted; pickled objects are never read. Raises ValueError as ``headers``."""
    names = [name for name in headers(file) if wanted(name)]
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in names}
    except (*_DAMAGED, KeyError) as error:
        raise ValueError(f"{file} is damaged: {' '.join(str(error).split())[:200]}") from error


def _header(part: IO[bytes]) -> Header:
    version = npy.read_magic(part)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array has the version {version} of the npy format, which is for structured arrays")
    shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(part)
    if dtype.hasobject:
        raise ValueError("an array holds pickled objects, which are never read")
    return shape, dtype


def _check_bytes(name: str, header: Header, entry: zipfile.ZipInfo, offset: int) -> None:
    shape, dtype = header
    size = math.prod(shape) * dtype.itemsize
    if size != entry.file_size - offset:
        raise ValueError(
            f"{name} has the shape {shape} of {dtype}, {size} bytes, and the file has {entry.file_size - offset} for it"
        )
    if size > _FREE and size > _RATIO * entry.compress_size:
        raise ValueError(
            f"{name} takes {size} bytes in memory and {entry.compress_size} in the file: write it uncompressed, with numpy.savez"
        )
