"""Buffered rows: held until a product is worth forming, or until another site's rows, or the logits, of their batch are there."""

from nodelens.metrics.need import Other
from nodelens.network.hooks import Site

from .layout import PassLayout

CAPACITY = {"rows": 4096, "sums": 1024, "samples": 1024, "entries": 128}  # of each kind, of a site: positions, samples
MOST = 32 << 20  # bytes of each kind, of a site: at a wide one fewer rows are company enough


def buffer_rows(kind: str, nbytes: int, positions: int = 1) -> int:
    """How many samples a buffer holds, of so many bytes and positions each."""
    return max(1, min(CAPACITY[kind] // positions, MOST // max(1, nbytes)))


def buffer_bytes(plan: PassLayout, site: Site) -> int:
    """Bytes of the buffers of a site, at most, unless a batch is larger itself."""
    if site.port == "model":
        return 0
    width, least = plan.seen(*site).width, 8 if plan.precision == "float64" else 4
    here = [need for need in plan.needs(site.layer) if need.port == site.port]
    rows = [need.statistic for need in here if need.view == "positions" and not isinstance(need.target, Other)]
    sums = {statistic.by_sample for statistic in rows} - {None}
    patchy = site.layer.geometry is not None and any(statistic.entries for statistic in rows)
    per_row = {
        "rows": least * width * bool(rows),
        "sums": 8 * width * (1 + len(sums)) * bool(sums),
        "samples": 8 * width * any(need.view == "samples" for need in here),
        "entries": MOST * patchy,  # a convolution's patches: as many units as their kernels have entries
    }
    return sum(min(MOST, CAPACITY[kind] * nbytes) for kind, nbytes in per_row.items())


def held(plan: PassLayout) -> list[Site]:
    """Sites whose rows are held, within a batch, until those of another site or the logits are there."""
    every = [Site(la, need.port) for la in plan.every_layer for need in plan.needs(la) if plan.meets(need)]
    return list(dict.fromkeys(every))


def held_bytes(plan: PassLayout, site: Site) -> int:
    """Bytes of the rows of a batch that are held there, in float32 at the least."""
    seen, least = plan.seen(*site), 8 if plan.precision == "float64" else 4
    return plan.dry_run.samples * seen.calls * max(seen.nbytes, least * seen.width * seen.positions)
