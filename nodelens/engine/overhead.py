"""The time of a pass beyond that of the bare model, estimated from shapes.

Everything is counted in floating-point operations, so that the estimate is relative to those of the model. The constants were
fitted to passes over ResNet-18, a ViT, a Llama and an MLP on one core of a CPU; ``benchmarks/cost_estimate.py`` prints what is
estimated and what is measured. On a GPU, where reading is cheaper and a call is dearer, they are a rough guide.
"""

from nodelens.metrics import Need
from nodelens.metrics.need import Other
from nodelens.network.layers import Layer
from nodelens.statistics.costs import PAIRS

from .buffered import buffer_rows
from .layout import PassLayout

READ = 13.0  # operations in the time in which a statistic reads one byte of rows
ADDED = 11.0  # operations in the time in which one byte of sums is added to
CALLED = 2e7  # operations in the time that adding the rows of one group takes, whatever their number


def extra_operations(plan: PassLayout) -> float:
    """Operations per sample beyond those of the model: products, reading rows, and adding to the sums."""
    return sum(_operations(plan, layer, need) for layer in plan.read for need in plan.needs(layer) if need.port != "model")


def _operations(plan: PassLayout, layer: Layer, need: Need) -> float:
    """Operations per sample that the sums of a need take, including its share of the emptying of a buffer."""
    seen, rows = plan.seen(layer, need.port), plan.rows_per_sample(layer, need)
    width, columns = plan.widths(layer, need)
    columns = columns if isinstance(need.target, Other) else width
    products = 2.0 * width * columns * rows if need.statistic in PAIRS else 0.0
    read = READ * seen.nbytes * rows / seen.positions
    kind, positions = ("samples", 1) if need.view == "samples" else ("rows", seen.positions)
    buffered = max(plan.dry_run.samples, buffer_rows(kind, seen.nbytes * positions // seen.positions, positions))
    adding = CALLED * plan.groups_of(layer, need) + ADDED * plan.nbytes(layer, need)
    return products + read + adding / buffered
