"""Second moments of feature maps by group, of samples in any order, against those of the sorted rows of each group."""

import pytest
import torch
from torch.testing import assert_close

from nodelens.statistics.gram import TERMS, Gram, MapGrams
from nodelens.statistics.rows import Rows
from nodelens.statistics.sample_sums import SampleParts

pytestmark = pytest.mark.usefixtures("back_end")
GROUP = torch.tensor([2, 0, 2, 2, 5, 0, 2, 5, 2, 2])


def maps(width, positions, dtype=torch.float32, masked=False):
    generator, samples = torch.Generator().manual_seed(0), len(GROUP)
    raw = torch.randn(samples, width, positions, generator=generator, dtype=torch.float64) + 3
    keep = torch.rand(samples, positions, generator=generator) < 0.7 if masked else None
    shift = torch.linspace(2, 4, width, dtype=torch.float64)
    return Rows(raw.to(dtype), keep, shift)


def added(rows, group, step):
    """Added in chunks, as a pass does."""
    grams, sums = MapGrams(), []
    for first in range(0, len(rows), step):
        part = rows.take(first, first + step)
        grams.add(part, group[first : first + step].tolist())
        sums.append(part.by_sample())
    joined = SampleParts(len(rows))
    for part in sums:
        joined.append(part)
    return grams.read(joined.joined(), group, rows)


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
@pytest.mark.parametrize(
    ("width", "positions", "dtype"),
    [(40, 50, torch.float32), (7, 50, torch.float32), (40, 50, torch.float64), (40, TERMS // 2 + 9, torch.float32)],
    ids=["maps", "narrow", "float64", "more rows than one sum holds"],
)
def test_each_group_has_the_second_moments_of_its_rows(width, positions, dtype, masked):
    rows = maps(width, positions, dtype, masked)
    found = added(rows, GROUP, step=3)
    assert sorted(found) == [0, 2, 5]
    for g, gram in found.items():
        expected = Gram.of(rows.index(g == GROUP))
        assert int(gram.n) == int(expected.n)
        exact = rows.double().index(g == GROUP)
        error = 2e-6 * (exact.outer.diagonal().max()).item() if dtype == torch.float32 else 1e-9
        assert_close(gram.outer, exact.outer, rtol=0, atol=error)
        assert_close(gram.total, expected.total, rtol=1e-5, atol=1e-2)
        assert_close(gram.rounding, expected.rounding, rtol=1e-4, atol=0)
        assert gram.shift is rows.shift


def test_a_product_is_formed_for_each_sample_where_it_has_enough_positions():
    assert MapGrams.fits(maps(40, 16))
    assert not MapGrams.fits(maps(40, 15))  # rows are copied as one matrix
    assert not MapGrams.fits(maps(512, 31))
    tokens = Rows(torch.zeros(4, 30, 40).transpose(1, 2))
    assert not MapGrams.fits(tokens)  # units lie side by side: already a matrix
