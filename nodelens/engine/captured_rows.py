"""Rows of what a site shows: behind the activation, without padded tokens, sampled or sketched, as its port says."""

from torch import Tensor

from nodelens.network.batch import Batch
from nodelens.network.group_layer import GroupLayer
from nodelens.network.hooks import Site
from nodelens.network.streams import side_of
from nodelens.statistics.rows import Rows

from .firing import BEHIND
from .plan import Plan


def captured_rows(site: Site, plan: Plan, tensor: Tensor, batch: Batch) -> Rows:
    """The rows of a captured tensor.

    Rows of gradients are those of samples with a label: the others have no loss, and would only lower the means.
    """
    layer, samples = site.layer, len(batch)
    if site.port == BEHIND:
        tensor = plan.dry_run.firing[layer.name](tensor, layer.module.training)
    maps = isinstance(layer, GroupLayer) and site.port == "maps"
    member = getattr(tensor, "member", None)
    mask = batch.mask_at(side_of(layer if member is None else member.layer, site.port))
    rows = layer.maps(tensor, samples) if maps else layer.rows(tensor, samples, mask)  # type: ignore[attr-defined]
    rows = rows.double() if plan.precision == "float64" else rows
    if "grad" in site.port and batch.labelled is not None:
        rows = rows.only(batch.labelled)
    if "/tokens" in site.port:
        share = 1 / batch.predicted.clamp_min(1).to(rows.raw)
        rows = Rows(rows.raw * share[:, None, None], rows.keep, rows.shift, rows.grid)
    rows = plan.covariance.rows(rows, site.port)
    return rows.about(rows.raw.new_zeros(rows.raw.shape[1]).double(), shifted=False)
