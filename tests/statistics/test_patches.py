"""Sums of the patches that convolutions read."""

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nodelens.statistics.convolution import ConvolutionGeometry
from nodelens.statistics.patches import MapSums, Patches
from nodelens.statistics.rows import Rows


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
