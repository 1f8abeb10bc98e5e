import numpy as np
import pytest

from nodelens.results.histograms import histogram

CLOSE = {
    "equal": [2.0, 2.0, 2.0],
    "equal up to rounding": [0.3, 0.3 + 5e-17, 0.1 + 0.2],
    "a large constant": [1e20] * 3,
    "large and equal up to rounding": [1e300, np.nextafter(1e300, 2e300)],
    "the largest numbers": [1.7e308, -1.7e308, 0.0],
    "tiny": [5e-324, 0.0],
}


@pytest.mark.parametrize("values", CLOSE.values(), ids=CLOSE)
@pytest.mark.parametrize("bins", [1, 5, 32])
def test_every_value_is_counted_once(values, bins):
    counts, edges = histogram(values, bins)
    assert counts.shape == (bins,)
    assert edges.shape == (bins + 1,)
    assert counts.sum() == len(values)
    assert np.isfinite(edges).all()
    assert (edges[:-1] <= edges[1:]).all()
    assert edges[0] <= min(values)
    assert max(values) <= edges[-1]


def test_other_values_are_counted_as_numpy_does():
    values = np.random.default_rng(0).normal(size=200)
    counts, edges = histogram(np.concatenate([values, [np.nan, np.inf, -np.inf]]), 32)
    expected, where = np.histogram(values, 32)
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_allclose(edges, where)


def test_without_a_finite_value_nothing_is_counted():
    counts, edges = histogram([np.nan, np.inf], 4)
    assert counts.tolist() == [0, 0, 0, 0]
    assert edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
