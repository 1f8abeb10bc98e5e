"""Numbers from sums: correlations, Gaussian information, spectra; and products that are what they say."""

from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor

MI_CEILING = 1 - 1e-6  # of rho^2: float32 products resolve no more; 6.908 nats
ROUNDING = 2 * torch.finfo(torch.float32).eps  # a spread below this share of the size is rounding


class _Exact(AbstractContextManager[None]):
    """Plain float32 products inside: no autocast, no TF32, no bfloat16 in the multiplication. Cheap when nested."""

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
                _Exact.stack.enter_context(torch.autocast(device, enabled=False))

    def __exit__(self, *exc: object) -> None:
        _Exact.depth -= 1
        if _Exact.depth == 0:
            _Exact.stack.close()

    stack: ClassVar[ExitStack]


def exact_products() -> AbstractContextManager[None]:
    """Plain float32 products inside: no autocast, no TF32, no bfloat16 in the multiplication."""
    return _Exact()


def constant(variance: Tensor, mean: Tensor) -> Tensor:
    """Which units do not vary: a spread at the rounding of the mean. Shapes: (units,), (units,) -> (units,) bool."""
    return ~(variance > (ROUNDING * mean).square())


def correlation(covariance: Tensor, silent: Tensor) -> Tensor:
    """Correlations of a covariance, (d, d); those of silent units, (d,) bool, are 0. No epsilon: it would give a scale."""
    spread = covariance.diagonal().where(~silent, 1.0).sqrt()
    live = ~silent
    return torch.where(live[:, None] & live, covariance / spread.outer(spread), 0.0)


def gaussian_information(rho2: Tensor) -> Tensor:
    """-0.5 ln(1 - rho^2) of squared correlations, in nats, [0, 6.908]. Cover & Thomas 2006, ch. 8."""
    return -0.5 * torch.log1p(-rho2.clamp_max(MI_CEILING))


def entropy_bias(n: Tensor, width: int) -> Tensor:
    """E[estimate] - truth of a Gaussian's entropy from the ddof-1 covariance of n rows, whatever the covariance.

    Shapes: n (...) -> (...); nats; NaN for n <= width. Misra, Singh & Demchuk 2005; Ince et al. 2017, doi 10.1002/hbm.23471, eq. 5
    """
    n = n.double()
    places = torch.arange(1, width + 1, dtype=torch.float64, device=n.device)
    digamma = torch.special.digamma((n[..., None] - places) / 2).sum(-1)
    bias = 0.5 * (digamma + width * (2 / (n - 1)).log())
    return bias.where(n > width, torch.nan)


def joint_bias(n: Tensor, *widths: int) -> Tensor:
    """E[estimate] - truth of the Gaussian information that parts of these widths share: sum of entropies less the joint one."""
    return sum((entropy_bias(n, w) for w in widths), torch.zeros(())) - entropy_bias(n, sum(widths))


def spectrum(covariance: Tensor) -> Tensor:
    """Eigenvalues of a covariance, (d,), largest first; NaN where it is not finite.

    Those below 2.4e-7 of the largest are 0: sums of float32 products do not resolve them, and their roots would show it.
    """
    if not covariance.isfinite().all():
        return torch.full_like(covariance.diagonal(), torch.nan)
    values = torch.linalg.eigvalsh(covariance).flip(0)
    return values.where(values > ROUNDING * values[:1], 0)


def entropy_count(weights: Tensor) -> Tensor:
    """Exp of the entropy of weights taken as shares, (d,) -> (): how many of them there are in effect. NaN: all zero."""
    share = weights / weights.sum()
    return torch.special.entr(share).sum().exp()


def components(eigenvalues: Tensor, share: float) -> Tensor:
    """The fewest leading eigenvalues that hold a share of their sum, to 1e-12: (d,), largest first -> () int64."""
    held = eigenvalues.cumsum(0) / eigenvalues.sum()
    return ((held < share - 1e-12).sum() + 1).clamp_max(len(eigenvalues))


def principal_axes(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, (d,), as ``spectrum`` has them, and their directions in columns, (d, d); NaN where it is not finite."""
    if not covariance.isfinite().all():
        return torch.full_like(covariance.diagonal(), torch.nan), torch.full_like(covariance, torch.nan)
    values, axes = torch.linalg.eigh(covariance)
    values, axes = values.flip(0), axes.flip(1)
    return values.where(values > ROUNDING * values[:1], 0), axes


def debiased_hsic(n: Tensor, cross: Tensor, trace_x: Tensor, trace_y: Tensor, mixed: Tensor) -> Tensor:
    """HSIC_1 of linear kernels: the U-statistic of ||cov(x, y)||_F^2 from sums about the means, -> (); NaN below four rows.

    cross ||S_xy||_F^2, traces those of S_xx and S_yy, mixed sum |x|^2 |y|^2. Song et al. 2012, JMLR 13, eq. 5
    """
    n = n.double()
    n = n.where(n > 3, torch.nan).squeeze()
    return (cross + trace_x * trace_y / ((n - 1) * (n - 2)) - n / (n - 2) * mixed) / (n * (n - 3))
