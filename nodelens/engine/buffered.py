"""Buffered rows: small batches are collected until there are enough for one large product, or until a paired site is known."""

from collections.abc import Mapping

from torch import Tensor

from nodelens.metrics.need import Other
from nodelens.network.hooks import Site
from nodelens.network.layers import ASSOCIATION

from .layout import PassLayout

CAPACITY = {"rows": 4096, "sums": 1024, "samples": 1024, "entries": 128}  # per kind and site, in positions or samples
MAX_BYTES = 32 << 20  # bytes per kind and site: rows of a wide site fill a product sooner


def buffer_rows(kind: str, nbytes: int, positions: int = 1) -> int:
    """How many samples a buffer holds, given the bytes and the positions of one sample."""
    return max(1, min(CAPACITY[kind] // positions, MAX_BYTES // max(1, nbytes)))


def bytes_of(tables: Mapping[str, Tensor]) -> int:
    """Bytes of one sample in a buffer."""
    return sum(t[:1].nbytes for t in tables.values())


def buffer_bytes(plan: PassLayout, site: Site) -> int:
    """Upper bound on the bytes of a site's buffers, unless a single batch is larger."""
    if site.port == "model" or site.port.startswith(ASSOCIATION):
        return 0
    width, number_bytes = plan.seen(*site).width, 8 if plan.precision == "float64" else 4
    here = [need for need in plan.needs(site.layer) if need.port == site.port]
    rows = [need.statistic for need in here if need.view == "positions" and not isinstance(need.target, Other)]
    sums = {statistic.by_sample for statistic in rows} - {None}
    has_patches = site.layer.geometry is not None and any(statistic.entries for statistic in rows)
    per_row = {
        "rows": number_bytes * width * bool(rows),
        "sums": 8 * width * (1 + len(sums)) * bool(sums),
        "samples": 8 * width * any(need.view == "samples" for need in here),
        "entries": MAX_BYTES * has_patches,  # a convolution's patches have one unit per kernel entry, so the byte limit binds
    }
    return sum(min(MAX_BYTES, CAPACITY[kind] * nbytes) for kind, nbytes in per_row.items())


def held(plan: PassLayout) -> list[Site]:
    """Sites whose rows are held within a batch, until the rows of the paired site or the logits are known."""
    sites = [Site(la, need.port) for la in plan.read for need in plan.needs(la) if plan.is_held(need)]
    return list(dict.fromkeys(sites))


def held_bytes(plan: PassLayout, site: Site) -> int:
    """Bytes of the rows that a site holds during one batch, at least those of float32."""
    seen, number_bytes = plan.seen(*site), 8 if plan.precision == "float64" else 4
    return plan.dry_run.samples * seen.calls * max(seen.nbytes, number_bytes * seen.width * seen.positions)
