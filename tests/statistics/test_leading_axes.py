"""The leading eigenvectors of a covariance against all of them."""

import pytest
import scipy.linalg  # noqa: F401  # its OpenBLAS is one of those whose threads are limited
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch.testing import assert_close

from nodelens.statistics import leading_axes as module
from nodelens.statistics.leading_axes import leading_axes
from nodelens.statistics.linalg import one_blas_thread, principal_axes


def covariance(width, rank=None, seed=0):
    x = torch.randn(3 * width, rank or width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * torch.logspace(0, -2, rank or width, dtype=torch.float64)
    mixed = torch.randn(rank or width, width, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return torch.cov((x @ mixed).T)


@pytest.mark.parametrize("rank", [None, 40], ids=["full rank", "rank 40"])
@pytest.mark.parametrize("width", [32, 256, 300])
def test_they_are_the_first_of_all_axes(width, rank):
    c = covariance(width, rank)
    rounding = 1e-12 * c.diagonal().mean() * torch.ones(width, dtype=torch.float64)
    values, axes = leading_axes(c, rounding, 20)
    every, wanted = principal_axes(c, rounding)
    assert int((values > 0).sum()) == min(width, rank or width)
    assert_close(values, every, rtol=1e-9, atol=1e-13)
    assert axes.shape == (width, 20)
    assert_close(axes.T @ axes, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close((axes * wanted[:, :20]).sum(0).abs(), torch.ones(20, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("count", "rounding", "all_axes"), [(20, 1e-12, False), (100, 1e-12, True), (20, 1e3, True)])
def test_few_axes_of_a_wide_matrix_take_one_tridiagonal_form(count, rounding, all_axes, monkeypatch):
    taken = []
    original = module.principal_axes
    monkeypatch.setattr(module, "principal_axes", lambda *given: taken.append(1) or original(*given))
    c = covariance(256)
    errors = torch.full((256,), 1e-12, dtype=torch.float64)
    errors[3] = rounding
    assert leading_axes(c, errors, count)[1].shape == (256, count)
    assert len(taken) == all_axes


@pytest.mark.parametrize("count", [0, 5, 30])
@pytest.mark.parametrize("largest", [-5, -3, 1])
@pytest.mark.parametrize("rank", [3, 40, 200])
def test_rounding_that_differs_between_units_hides_the_same_eigenvalues(rank, largest, count):
    c = covariance(256, rank) + torch.logspace(-7, -6, 256, dtype=torch.float64).diag()  # no two eigenvalues are equal
    c[:40, :40] += torch.logspace(-3, -2, 40, dtype=torch.float64).diag()
    rounding = torch.full((256,), 1e-9, dtype=torch.float64)
    rounding[:128] = torch.logspace(-9, largest, 128, dtype=torch.float64)  # hides eigenvalues of some axes only
    (values, axes), (every, wanted) = leading_axes(c, rounding, count), principal_axes(c, rounding)
    assert 0 < int((every == 0).sum()) < 256
    assert_close(values, every, rtol=1e-9, atol=1e-12)
    known = every[:count] > 1e-5  # those of smaller eigenvalues, which are closer to each other, are less exact
    cosines = (axes * wanted[:, :count]).sum(0).abs()
    assert_close(cosines[known], torch.ones_like(cosines[known]), rtol=0, atol=1e-7)


def test_a_matrix_that_is_not_finite_has_none():
    c = torch.full((256, 256), torch.nan, dtype=torch.float64)
    values, axes = leading_axes(c, torch.zeros(256, dtype=torch.float64), 3)
    assert values.shape == (256,)
    assert axes.shape == (256, 3)
    assert values.isnan().all()
    assert axes.isnan().all()


def test_the_threads_of_openblas_are_as_before_once_the_last_of_several_has_ended():
    def threads():
        return {library["num_threads"] for library in threadpool_info() if library["internal_api"] == "openblas"}

    with threadpool_limits(2, user_api="blas"):
        one, other = one_blas_thread(), one_blas_thread()  # of two threads whose work overlaps
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        assert threads() == {1}
        other.__exit__(None, None, None)
        assert threads() == {2}
