"""Redundancy with a direction, and followers."""

import pytest
import torch
from torch.testing import assert_close

from nodelens.metrics import get_metric

INFORMATION = -0.5 * torch.log1p(-torch.tensor(0.36, dtype=torch.float64))


def rows(n=4000):
    """Unit 1 follows unit 0 at a correlation of 0.6 and half the size; unit 2 is a smaller copy of unit 1; unit 3 stands alone."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, 3, generator=g, dtype=torch.float64)
    z = torch.linalg.qr(z - z.mean(0))[0] * n**0.5
    lead, other, alone = z.T
    follow = 0.6 * lead + 0.8 * other
    return torch.stack([2 * lead, follow, 0.1 * follow, 5 * alone], 1)


def test_only_the_weaker_of_two_units_repeats_the_other():
    pairs = get_metric("directed_redundancy", reduce="none").compute(outputs=rows())
    assert_close(pairs[1, 0], INFORMATION)
    assert_close(pairs[2, 0], INFORMATION)
    assert pairs[2, 1] > 6
    assert pairs[0].abs().max() < 1e-12
    assert pairs[1, 2] == 0
    assert pairs[3].max() < 1e-12
    both = get_metric("redundancy", reduce="none").compute(outputs=rows())
    assert_close(pairs + pairs.T, both)
    mean = get_metric("directed_redundancy").compute(outputs=rows())
    assert_close(mean, pairs.sum(1) / 3)


def test_units_of_equal_variance_share_their_redundancy():
    y = rows()[:, :1].repeat(1, 2)
    pairs = get_metric("directed_redundancy", reduce="none").compute(outputs=y)
    assert pairs[0, 1] == pairs[1, 0] > 3


def test_followers_vary_less_and_correlate():
    assert_close(get_metric("follower_fraction").compute(outputs=rows()), torch.tensor([2 / 3, 1 / 3, 0, 0]).double())
    assert_close(get_metric("follower_fraction", threshold=0.7).compute(outputs=rows()), torch.tensor([0, 1 / 3, 0, 0]).double())
    still = torch.cat([rows(), torch.ones(4000, 1).double()], 1)
    assert_close(get_metric("follower_fraction").compute(outputs=still), torch.tensor([2 / 4, 1 / 4, 0, 0, 0]).double())


def test_a_layer_of_one_unit_and_one_row_have_none():
    for name in ("directed_redundancy", "follower_fraction"):
        assert get_metric(name).compute(outputs=rows()[:, :1]).isnan().all()
        assert get_metric(name).compute(outputs=rows()[:1]).isnan().all()


def test_a_threshold_is_a_correlation():
    with pytest.raises(
        ValueError, match=r"follower_fraction: threshold is 1\.5; it is an absolute correlation, above 0 and at most 1"
    ):
        get_metric("follower_fraction", threshold=1.5)
