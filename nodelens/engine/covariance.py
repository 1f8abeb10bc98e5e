"""What is kept of covariances at sites that are too wide for all of them: full, diagonal, of a sample of units, or a sketch."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nodelens.statistics.linalg import exact_products
from nodelens.statistics.rows import Rows
from nodelens.statistics.sample_hash import generator

LIMIT = 4096  # a full covariance of this width takes 134 MB in float64, one of 14,336 1.6 GB
KINDS = ("sample", "sketch")  # what makes narrower rows, at a port of that suffix


@dataclass(frozen=True)
class CovariancePolicy:
    """What becomes of products of units with units (a covariance) at a site wider than ``limit``.

    kind: ``refuse``: an error before the pass, with the choices and their bytes; ``full``: formed all the same; ``diagonal``: no
    metric that wants them is taken there, its values are NaN; all others are as ever.

    ``sample``: ``count`` channels drawn without replacement, the same at every site of that width, in every process, batch and
    pass. A metric that wants products there reads these channels alone, with their weights: values of units are known for them
    and NaN for the others, exact but that their partners are the drawn ones (a mean over partners is unbiased for that over
    all); a layer's or an edge's value is the subset's (a count of directions is at most ``count``), no estimate of the whole; a
    matrix of pairs has a row a drawn channel. A row counts where the drawn channels are finite.

    ``sketch``: rows times S (width, k), k = ``count``, of independent Gaussians of variance 1/k, one S for all sites of a width.
    For metrics that depend on no basis: spectra, cosines of rows, CKA, subspaces. With C the covariance of the rows, and B that
    of two sites, one S at both:

        E tr S'CS = tr C        E ||S'CS||_F^2 = (1 + 1/k) ||C||_F^2 + (tr C)^2 / k
        E ||S'BS||_F^2 = ||B||_F^2 + ((tr B)^2 + tr B^2) / k;    two independent S: ||B||_F^2

    for rows i, j of S: (s_i'B s_j)^2 has the mean ||B||_F^2/k^2, and where i = j (the k on the diagonal) (tr B)^2 + tr B^2 more.
    So 1/PR of the sketch is about (1 + 1/k)/PR + 1/k: a participation ratio reads low, at most k, by less than 10 % only
    where k > 10 PR; nothing is corrected. CKA and what reads single eigenvalues or directions have a bias of that order,
    PR/k, without a closed form. Values divided by the width are divided by k.
    """

    kind: str = "refuse"
    count: int = 0
    limit: int = LIMIT
    seed: int = 0

    @classmethod
    def of(cls, words: str | None, width: int = LIMIT, seed: int = 0, max_passes: int = 1) -> "CovariancePolicy":
        """From the words of a call: diagonal, sample:<count>, sketch:<count>; None is an error at such a site.

        But not where several passes are allowed: then all is formed, as far as the memory goes.
        Raises ValueError for other words and for a width below 1.
        """
        if width < 1:
            raise ValueError(f"budget.width is {width}; it is a number of units, 1 or more")
        if words is None:
            return cls("full" if max_passes > 1 else "refuse", 0, width, seed)
        kind, colon, count = str(words).partition(":")
        if (kind == "diagonal" and not colon) or (kind in KINDS and count.isdecimal() and int(count) > 1):
            return cls(kind, int(count or 0), width, seed)
        raise ValueError(
            f"covariance is {words!r}; it takes diagonal, sample:1024 or sketch:1024 (any count of 2 or more), or null"
        )

    def __str__(self) -> str:
        return f"{self.kind}:{self.count}" if self.kind in KINDS else self.kind

    def beyond(self, width: int) -> bool:
        """Whether products are not formed of all units of a site."""
        return width > max(self.limit, self.count) and self.kind != "full"

    def channels(self, width: int) -> Tensor:
        """The drawn units of a site, (count,) int64, ascending; a larger count holds those of a smaller one."""
        drawn = torch.randperm(width, generator=generator(self.seed, "wide", str(width)))
        return drawn[: self.count].sort().values

    def projection(self, width: int) -> Tensor:
        """The sketch's S, (width, count) float32."""
        return _projection(self.seed, width, self.count)

    def rows(self, rows: Rows, port: str) -> Rows:
        """The rows of a port: narrower ones where its suffix says so."""
        if not port.endswith(KINDS):
            return rows
        raw, last = rows.raw, rows.raw.stride(1) == 1  # the layout that products will read
        if port.endswith("sample"):
            ids = self.channels(raw.shape[1]).to(raw.device)
            raw = raw.mT.index_select(2, ids).mT if last else raw.index_select(1, ids)
        else:
            s = self.projection(raw.shape[1]).to(raw.device, raw.dtype)
            with exact_products():
                raw = (raw.mT @ s).mT if last else s.T @ raw
        return Rows(raw, rows.keep, rows.shift, rows.grid, rows.shifted)


@lru_cache(maxsize=4)  # one for all sites of a width
def _projection(seed: int, width: int, count: int) -> Tensor:
    return torch.randn(width, count, generator=generator(seed, "sketch", str(width))) / math.sqrt(count)


def whole(port: str) -> str:
    """A port without the suffix of narrower rows."""
    return port.removesuffix("/sample").removesuffix("/sketch")
