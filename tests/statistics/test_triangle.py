import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nodelens.statistics import Gram, triangle


def symmetric(width: int, seed: int = 0) -> Tensor:
    x = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x + x.T


@pytest.mark.parametrize("width", [0, 1, 63, 64, 65, 100, 512, 515])
def test_a_matrix_is_the_same_after_packing_and_unpacking(width):
    matrix = symmetric(width)
    held = triangle.pack(matrix)
    assert held.shape == (triangle.size(width),)
    assert_close(triangle.unpack(held, width), matrix, rtol=0, atol=0)
    assert_close(triangle.diagonal(held, width), matrix.diagonal(), rtol=0, atol=0)


@pytest.mark.parametrize("width", [5, 100])
def test_matrices_add_in_their_packed_form(width):
    first, second = symmetric(width), symmetric(width, seed=1)
    held = triangle.pack(first)
    triangle.add(held, second)
    assert_close(triangle.unpack(held, width), first + second, rtol=0, atol=0)
    assert_close(triangle.pack(first) + triangle.pack(second), held, rtol=0, atol=0)


def test_packing_reads_the_upper_triangle_and_copies_it():
    matrix = symmetric(128)
    held = triangle.pack(matrix)
    below = torch.zeros(128, 128, dtype=torch.bool)
    below[64:, :64] = True
    assert_close(triangle.pack(matrix.masked_fill(below, torch.nan)), held, rtol=0, atol=0)
    triangle.unpack(held, 128).zero_()
    assert_close(triangle.unpack(held, 128), matrix, rtol=0, atol=0)


def test_wide_sums_take_five_eighths_of_the_matrix():
    assert triangle.size(512) == 512 * 512 * 5 // 8
    rows = torch.randn(20, 512, generator=torch.Generator().manual_seed(0))
    gram = Gram.of(rows)
    assert gram.nbytes < 0.65 * gram.outer.nbytes
    centred = rows.double() - rows.double().mean(0)
    assert_close(gram.outer, centred.T @ centred, rtol=0, atol=1e-4)
    assert_close(gram.squares, gram.outer.diagonal(), rtol=0, atol=0)
