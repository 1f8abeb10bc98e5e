"""Correlations, Gaussian information and spectra from sums; and a context for exact float32 products."""

from contextlib import AbstractContextManager, ExitStack
from functools import cache
from threading import Lock
from typing import Any, ClassVar

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

MI_CEILING = 1 - 1e-6  # largest rho^2 that float32 products resolve; 6.908 nats
ROUNDING = 2 * torch.finfo(torch.float32).eps  # a standard deviation below this share of the mean is rounding
FEW_POSITIONS = 16  # smallest number of positions of a sample of which a product is formed
FEW = 32  # positions of a sample that are few for a loop over them
BAND = 32, 256  # smallest and largest number of units of a band of a product that is formed at once
SMALL = 1 << 23  # multiplications of a product of which bands take longer to slice and copy than they save
CACHED = 1 << 18  # numbers of rows that are converted to float64 at once
SOLVER = 1e-14  # of the largest eigenvalue: error of a float64 eigensolver


class _Exact(AbstractContextManager[None]):
    """Context for IEEE float32 products: no autocast, no TF32, no bfloat16. Cheap when nested."""

    depth = 0

    def __enter__(self) -> None:
        _Exact.depth += 1
        if _Exact.depth == 1:
            backends: Any = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
            _Exact.stack = ExitStack()
            for backend in backends:
                _Exact.stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = "ieee"
            for device in ("cuda", "cpu"):
                if torch.is_autocast_enabled(device):
                    _Exact.stack.enter_context(torch.autocast(device, enabled=False))

    def __exit__(self, *exc: object) -> None:
        _Exact.depth -= 1
        if _Exact.depth == 0:
            _Exact.stack.close()

    stack: ClassVar[ExitStack]


def exact_products() -> AbstractContextManager[None]:
    """Context for IEEE float32 products: no autocast, no TF32, no bfloat16."""
    return _Exact()


def side_by_side(x: Tensor) -> bool:
    """Whether rows, (samples, width, positions), are a matrix of units and rows without a copy."""
    samples, _, positions = x.shape
    return positions == 1 or x.stride(1) == 1 or samples == 1 or x.stride(0) == positions * x.stride(2)


def maps_by_sample(x: Tensor, z: Tensor) -> bool:
    """Whether products of units are formed sample by sample, (samples, width, positions) each.

    Otherwise rows are copied as a matrix, for few positions, of which the product of a sample would cost less than adding it.
    """
    positions, narrower = x.shape[2], min(x.shape[1], z.shape[1])
    fewest = max(FEW_POSITIONS, narrower // 16) if x.device.type == "cpu" else narrower
    return positions >= fewest and not (side_by_side(x) and side_by_side(z))


def by_unit(x: Tensor) -> Tensor:
    """The same values as a matrix (width, samples x positions), a view if they lie side by side."""
    width = x.shape[1]
    if x.shape[2] <= FEW or x.stride(1) == 1:  # short runs of positions are copied faster in this order
        return x.transpose(1, 2).reshape(-1, width).T
    return x.transpose(0, 1).reshape(width, -1)


def gram_of_rows(a: Tensor) -> Tensor:
    """A a' of a matrix (width, rows), (width, width), on a CPU in 5/8 of the operations of the whole product, or less.

    Bands of rows are formed from the diagonal to the right, and copied to the left of it.
    """
    width = len(a)
    step = min(max(-(-width // 64) * 16, BAND[0]), BAND[1])  # a quarter of the width
    if a.device.type != "cpu" or width < 2 * step or width * a.numel() < SMALL:
        return a @ a.T
    out = a.new_empty(width, width)
    for first in range(0, width, step):
        end = min(first + step, width)
        torch.mm(a[first:end], a[first:].T, out=out[first:end, first:])
        out[end:, first:end] = out[first:end, end:].T
    return out


def sum_of_products(x: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over samples of x z', (samples, width, positions) each -> (width, other width) float64, formed in a dtype.

    Rows of another dtype are narrow: a few samples at a time are converted, and their products formed while they are in the cache.
    """
    if x.dtype == z.dtype == dtype or x.device.type != "cpu":
        out = torch.empty(x.shape[1], z.shape[1], dtype=dtype, device=x.device)
        return out.addbmm_(x.to(dtype), z.to(dtype).mT, beta=0).double()
    out = torch.zeros(x.shape[1], z.shape[1], dtype=dtype)
    step = max(1, CACHED // max(1, x[:1].numel() + z[:1].numel()))
    for a, b in zip(x.split(step), (x if z is x else z).split(step), strict=True):
        a = a.to(dtype)
        out += (a @ (a if z is x else b.to(dtype)).mT).sum(0)
    return out.double()


def constant(variance: Tensor, mean: Tensor) -> Tensor:
    """Units whose standard deviation is within the rounding of the mean. Shapes: (units,), (units,) -> (units,) bool."""
    return ~(variance > (ROUNDING * mean).square())


def correlation(covariance: Tensor, is_constant: Tensor) -> Tensor:
    """Correlation matrix, (d, d); 0 for constant units, (d,) bool. There is no epsilon, which would depend on the scale."""
    std = covariance.diagonal().where(~is_constant, 1.0).sqrt()
    found, varies = covariance / std.outer(std), ~is_constant
    return found if bool(varies.all()) else found.where(varies[:, None] & varies, 0.0)


def gaussian_information(rho2: Tensor) -> Tensor:
    """-0.5 ln(1 - rho^2) of squared correlations, in nats, in [0, 6.908]. Cover & Thomas 2006, ch. 8."""
    return rho2.clamp_max(MI_CEILING).neg_().log1p_().mul_(-0.5)


def entropy_bias(n: Tensor, width: int) -> Tensor:
    """Bias (estimate minus truth) of the Gaussian entropy computed from the unbiased covariance of n rows.

    Shapes: n (...) -> (...); nats; NaN for n <= width. Misra, Singh & Demchuk 2005; Ince et al. 2017, doi 10.1002/hbm.23471, eq. 5
    """
    n = n.double()
    places = torch.arange(1, width + 1, dtype=torch.float64, device=n.device)
    digamma = torch.special.digamma((n[..., None] - places) / 2).sum(-1)
    bias = 0.5 * (digamma + width * (2 / (n - 1)).log())
    return bias.where(n > width, torch.nan)


def joint_bias(n: Tensor, *widths: int) -> Tensor:
    """Bias (estimate minus truth) of the Gaussian information among parts of these widths: sum of entropies minus joint."""
    return sum((entropy_bias(n, w) for w in widths), torch.zeros(())) - entropy_bias(n, sum(widths))


def resolution(dtype: torch.dtype, width: int) -> float:
    """Share of the variance of the units below which an eigenvalue cannot be resolved from sums of products in a dtype.

    In float32 the errors of the entries add up like those of a random matrix, with sqrt(width). Of collinear units of 34 to 1,024
    channels with means up to one standard deviation, all were below 8 eps + sqrt(width)/2 eps. In float64, 1e-12 covers float32
    rounding of the rows as well, unless their mean exceeds 30 standard deviations.
    """
    return 1e-12 if dtype == torch.float64 else (8 + width**0.5 / 2) * torch.finfo(torch.float32).eps


def spectrum(covariance: Tensor, rounding: Tensor) -> Tensor:
    """Eigenvalues of a covariance, (d,), largest first, with 0 for those that rounding hides; all NaN if it is not finite.

    rounding (d,) is the error of each variance, and entry (i, j) has an error of up to sqrt(rounding_i rounding_j). An eigenvalue
    with eigenvector v is resolved if it exceeds sum_i v_i^2 rounding_i, so that a unit of large variance does not hide the others.
    """
    found = eigenvalues(covariance, rounding)
    return principal_axes(covariance, rounding)[0] if found is None else found


def eigenvalues(covariance: Tensor, rounding: Tensor) -> Tensor | None:
    """The same where no eigenvector is needed, otherwise None: none is needed for eigenvalues outside the range of ``rounding``.

    A unit whose variance is exactly 0 has no part in the other eigenvectors, so that its rounding does not count.
    """
    if not covariance.isfinite().all():
        return torch.full_like(covariance.diagonal(), torch.nan)
    if not len(covariance):
        return None
    values, varies = symmetric_eigenvalues(covariance).flip(0), covariance.diagonal() != 0
    floor = SOLVER * values[0]
    resolved = values > torch.maximum(rounding.where(varies, 0).amax(), floor)
    hidden = values <= torch.maximum(rounding.where(varies, torch.inf).amin(), floor)
    return values.where(resolved, 0) if bool((resolved | hidden).all()) else None


def symmetric_eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues of a symmetric matrix, (d,), smallest first. Raises LinAlgError where the solver fails.

    numpy's LAPACK takes 30 to 50 % less time than torch's at widths from 256 on, where that is MKL on a CPU of another maker.
    """
    if matrix.device.type != "cpu" or matrix.requires_grad:
        return torch.linalg.eigvalsh(matrix)
    with one_blas_thread():
        return torch.from_numpy(np.linalg.eigvalsh(matrix.numpy()))


class _OneBlasThread(AbstractContextManager[None]):
    """One thread for OpenBLAS. The limit is that of the process: of several threads inside, the last one out lifts it."""

    lock, depth = Lock(), 0
    limit: ClassVar[Any]

    def __enter__(self) -> None:
        with self.lock:
            if _OneBlasThread.depth == 0:
                _OneBlasThread.limit = _openblas().limit(limits=1)
            _OneBlasThread.depth += 1

    def __exit__(self, *exc: object) -> None:
        with self.lock:
            _OneBlasThread.depth -= 1
            if _OneBlasThread.depth == 0:
                _OneBlasThread.limit.restore_original_limits()


def one_blas_thread() -> AbstractContextManager[None]:
    """Context in which numpy's and scipy's LAPACK take one thread: between calls theirs would take the cores of torch's."""
    return _OneBlasThread()


@cache
def _openblas() -> ThreadpoolController:
    import scipy.linalg  # noqa: F401  # it brings an OpenBLAS of its own, which is found once it is loaded

    return ThreadpoolController().select(internal_api="openblas")


def entropy_count(weights: Tensor) -> Tensor:
    """Effective number of weights: exp of the entropy of their shares, (d,) -> (); NaN if all are zero."""
    share = weights / weights.sum()
    return torch.special.entr(share).sum().exp()


def components(eigenvalues: Tensor, share: float) -> Tensor:
    """Smallest number of leading eigenvalues with at least this share of their sum, to 1e-12: (d,) descending -> () int64."""
    held = eigenvalues.cumsum(0) / eigenvalues.sum()
    return ((held < share - 1e-12).sum() + 1).clamp_max(len(eigenvalues))


def principal_axes(covariance: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, (d,), as in ``spectrum``, and eigenvectors as columns, (d, d); all NaN if it is not finite."""
    if not covariance.isfinite().all():
        return torch.full_like(covariance.diagonal(), torch.nan), torch.full_like(covariance, torch.nan)
    values, axes = torch.linalg.eigh(covariance)
    floor = torch.maximum(rounding @ axes.square(), SOLVER * values[-1:])
    resolved = values.where(values > floor, 0)
    order = resolved.argsort(descending=True, stable=True)  # a large eigenvalue that is not resolved comes last
    return resolved[order], axes[:, order]


def debiased_hsic(n: Tensor, cross: Tensor, trace_x: Tensor, trace_y: Tensor, mixed: Tensor) -> Tensor:
    """HSIC_1 of linear kernels: the U-statistic of ||cov(x, y)||_F^2 from sums about the means, -> (); NaN below four rows.

    cross: ||S_xy||_F^2; trace_x, trace_y: tr S_xx, tr S_yy; mixed: sum of |x|^2 |y|^2. Song et al. 2012, JMLR 13, eq. 5
    """
    n = n.double()
    n = n.where(n > 3, torch.nan).squeeze()
    return (cross + trace_x * trace_y / ((n - 1) * (n - 2)) - n / (n - 2) * mixed) / (n * (n - 3))
