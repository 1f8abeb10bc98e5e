"""Cost estimates: memory, operations and time of a pass from shapes alone, for models and machines that need not be present."""

from .estimate import CostEstimate, Machine
from .meta_device import image_batch, meta_lm, meta_model, model_from_config, token_batch
from .placement import Placement
from .planning import estimate_cost, estimate_geometry_cost

__all__ = [
    "CostEstimate",
    "Machine",
    "Placement",
    "estimate_cost",
    "estimate_geometry_cost",
    "image_batch",
    "meta_lm",
    "meta_model",
    "model_from_config",
    "token_batch",
]
