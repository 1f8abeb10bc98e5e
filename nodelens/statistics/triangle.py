"""Symmetric matrices held as bands of their upper triangle: 5/8 of the memory of all entries.

A band is a few rows from the diagonal to the right. The block on the diagonal is held whole, so that a band is a plain matrix.
"""

from functools import cache
from typing import NamedTuple

from torch import Tensor

BANDS = 4  # of a wide matrix: 5/8 of the entries are held, and adding takes few operations
LEAST = 64  # rows of a band: fewer save less memory than they cost time


class _Band(NamedTuple):
    """Rows first..end-1 of a matrix from column ``first`` on, at places begin..stop-1 of the numbers held."""

    first: int
    end: int
    begin: int
    stop: int


@cache
def _bands(width: int) -> tuple[_Band, ...]:
    step, found, begin = rows_of_a_band(width), list[_Band](), 0
    for first in range(0, width, step):
        end = min(first + step, width)
        stop = begin + (end - first) * (width - first)
        found.append(_Band(first, end, begin, stop))
        begin = stop
    return tuple(found)


def rows_of_a_band(width: int) -> int:
    """How many rows of a matrix (width, width) each band has, but for the last one."""
    return max(LEAST, -(-width // BANDS))


def size(width: int) -> int:
    """How many numbers are held of a symmetric matrix (width, width)."""
    return _bands(width)[-1].stop if width else 0


def pack(matrix: Tensor) -> Tensor:
    """The numbers that are held of a symmetric matrix (d, d), (size(d),). Entries below the bands are not read."""
    held = matrix.new_empty(size(len(matrix)))
    for band, part in _parts(held, len(matrix)):
        part.copy_(matrix[band.first : band.end, band.first :])
    return held


def unpack(held: Tensor, width: int) -> Tensor:
    """The matrix (width, width) of which ``pack`` holds these numbers, in newly allocated memory."""
    matrix = held.new_empty(width, width)
    for band, part in _parts(held, width):
        matrix[band.first : band.end, band.first :] = part
        matrix[band.end :, band.first : band.end] = part[:, band.end - band.first :].T
    return matrix


def add(held: Tensor, matrix: Tensor) -> None:
    """Adds a symmetric matrix (d, d) to the numbers that are held of another one, in place."""
    for band, part in _parts(held, len(matrix)):
        part.add_(matrix[band.first : band.end, band.first :])


def diagonal(held: Tensor, width: int) -> Tensor:
    """The diagonal, (width,), as a copy."""
    found = held.new_empty(width)
    for band, part in _parts(held, width):
        found[band.first : band.end] = part.diagonal()
    return found


def _parts(held: Tensor, width: int) -> list[tuple[_Band, Tensor]]:
    """Each band of a matrix, with its numbers as a view (rows, columns)."""
    return [(band, held[band.begin : band.stop].view(band.end - band.first, -1)) for band in _bands(width)]
