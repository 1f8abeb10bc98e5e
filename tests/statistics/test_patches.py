"""Sums of the patches that convolutions read."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nodelens.statistics.convolution import ConvolutionGeometry
from nodelens.statistics.patches import SMALL, MapSums, Patches, patch_sums
from nodelens.statistics.rows import Rows

pytestmark = pytest.mark.usefixtures("back_end")


def read(maps: Tensor, group: Tensor) -> dict[int, Patches]:
    rows = Rows(maps.flatten(2), grid=tuple(maps.shape[2:]), shift=torch.zeros(maps.shape[1], dtype=torch.float64), shifted=False)
    sums = MapSums(4, rows, ConvolutionGeometry.of(nn.Conv2d(2, 3, 3)))
    sums.add(rows, group)
    return sums.read()


def test_a_sample_whose_squares_overflow_changes_its_own_group_only():
    """The square of 1e20 is no float32. The other groups, from which errors come, keep their moments."""
    x, group = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    wide = x.clone()
    wide[0, 0, 2, 2] = 1e20
    clean, spoilt = read(x, group), read(wide, group)
    for g in (1, 2, 3):
        for name, value in clean[g].tensors().items():
            assert_close(spoilt[g].tensors()[name], value)
    assert any(bool(value.isinf().any()) for value in spoilt[0].tensors().values())


@pytest.mark.parametrize("size", [6, 31])
@pytest.mark.parametrize("convolution", [{"padding": 1}, {"stride": 2, "padding": 1}, {"dilation": 2}], ids=str)
def test_sums_of_patches_are_those_of_unfolded_maps(size, convolution):
    """Of maps with few positions, whose offsets are summed together, and with many."""
    conv = nn.Conv2d(3, 4, 3, **convolution)
    maps = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = Rows(maps.flatten(2), grid=(size, size), shift=torch.zeros(3, dtype=torch.float64), shifted=False)
    found, patches = patch_sums(rows, ConvolutionGeometry.of(conv)), nn.functional.unfold(maps, 3, **convolution)
    assert (size**2 <= SMALL) == (size == 6)
    assert_close(found.sums, patches.sum(2), rtol=1e-10, atol=1e-10)
    assert_close(found.squares, patches.square().sum(2), rtol=1e-10, atol=1e-10)
