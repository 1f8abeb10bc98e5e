"""What is computed instead of a full covariance at sites that are too wide: a diagonal, a sample of units, or a sketch."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nodelens.messages import option
from nodelens.statistics.linalg import exact_products
from nodelens.statistics.rows import Rows
from nodelens.statistics.sample_hash import generator

LIMIT = 4096  # the sums of a full covariance take 84 MB at this width and 1.0 GB at 14,336
KINDS = ("sample", "sketch")  # kinds that reduce the rows of a port with that suffix


@dataclass(frozen=True)
class CovariancePolicy:
    """How products of units (a covariance) are computed at a site wider than ``limit``.

    ``refuse`` is an error before the pass, which lists the choices and their bytes. ``full`` computes them all the same.
    ``diagonal`` omits metrics that need products there (their values are NaN); all others are unaffected.

    ``sample`` draws ``count`` channels without replacement, the same at every site of that width, in every process, batch and pass.
    A metric that needs products reads only these channels and their weights. Values of the drawn units are exact for the subset,
    all others are NaN; a mean over drawn partners is unbiased for the mean over all. A value of a layer or a layer pair is that of
    the subset, not an estimate of the whole (a count of directions is at most ``count``). A matrix of pairs has one row per drawn
    channel. Only rows that are finite in the drawn channels count.

    ``sketch`` multiplies rows by S (width, k), k = ``count``, of independent Gaussians of variance 1/k, one S per width. It serves
    metrics that depend on no basis: spectra, cosines of rows, CKA, subspaces. With C the covariance of the rows, and B that of two
    sites which share S:

        E tr S'CS = tr C        E ||S'CS||_F^2 = (1 + 1/k) ||C||_F^2 + (tr C)^2 / k
        E ||S'BS||_F^2 = ||B||_F^2 + ((tr B)^2 + tr B^2) / k;    two independent S: ||B||_F^2

    This follows from columns i, j of S: (s_i'B s_j)^2 has the mean ||B||_F^2/k^2, plus ((tr B)^2 + tr B^2)/k^2 where i = j. So 1/PR
    of the sketch is about (1 + 1/k)/PR + 1/k: a participation ratio is biased low, at most k, by less than 10 % only if k > 10 PR.
    Nothing is corrected. CKA, single eigenvalues and directions have a bias of order PR/k, without a closed form. Values divided by
    the width are divided by k.
    """

    kind: str = "refuse"
    count: int = 0
    limit: int = LIMIT
    seed: int = 0

    @classmethod
    def of(cls, text: str | None, width: int = LIMIT, seed: int = 0, max_passes: int = 1) -> "CovariancePolicy":
        """Parses an option: diagonal, sample:<count> or sketch:<count>.

        None means ``full`` if several passes are allowed, because they bound the memory, and ``refuse`` otherwise. Raises
        ValueError for other text and for a width below 1.
        """
        if width < 1:
            raise ValueError(f"{option('width')} is {width}; it is a number of units, 1 or more")
        if text is None:
            return cls("full" if max_passes > 1 else "refuse", 0, width, seed)
        kind, colon, count = str(text).partition(":")
        if (kind == "diagonal" and not colon) or (kind in KINDS and count.isdecimal() and int(count) > 1):
            return cls(kind, int(count or 0), width, seed)
        raise ValueError(f"covariance is {text!r}; it takes diagonal, sample:1024 or sketch:1024 (any count of 2 or more), or null")

    def __str__(self) -> str:
        return f"{self.kind}:{self.count}" if self.kind in KINDS else self.kind

    def restricts(self, width: int) -> bool:
        """Whether products at a site of this width are not computed for all units."""
        return width > max(self.limit, self.count) and self.kind != "full"

    def channels(self, width: int) -> Tensor:
        """Ids of the drawn units, (count,) int64, ascending; those of a larger count contain those of a smaller one."""
        drawn = torch.randperm(width, generator=generator(self.seed, "wide", str(width)))
        return drawn[: self.count].sort().values

    def projection(self, width: int) -> Tensor:
        """The matrix S of the sketch, (width, count) float32."""
        return _projection(self.seed, width, self.count)

    def rows(self, rows: Rows, port: str) -> Rows:
        """The rows of a port, sampled or sketched if its suffix says so."""
        if not port.endswith(KINDS):
            return rows
        raw, channels_last = rows.raw, rows.raw.stride(1) == 1  # keep the memory layout that products read
        if port.endswith("sample"):
            ids = self.channels(raw.shape[1]).to(raw.device)
            raw = raw.mT.index_select(2, ids).mT if channels_last else raw.index_select(1, ids)
        else:
            s = self.projection(raw.shape[1]).to(raw.device, raw.dtype)
            with exact_products():
                raw = (raw.mT @ s).mT if channels_last else s.T @ raw
        return Rows(raw, rows.keep, rows.shift, rows.grid, rows.shifted)


@lru_cache(maxsize=4)  # one entry per width
def _projection(seed: int, width: int, count: int) -> Tensor:
    return torch.randn(width, count, generator=generator(seed, "sketch", str(width))) / math.sqrt(count)


def base_port(port: str) -> str:
    """A port without the suffix of a sample or a sketch."""
    return port.removesuffix("/sample").removesuffix("/sketch")
