"""What a pass will take, before anything is loaded: of a config alone, for models and machines that are not here."""

from .estimate import Forecast, Machine
from .hollow import hollow, hollow_lm, image_batch, of_config, token_batch
from .placement import Placement
from .planning import forecast, forecast_geometry

__all__ = [
    "Forecast",
    "Machine",
    "Placement",
    "forecast",
    "forecast_geometry",
    "hollow",
    "hollow_lm",
    "image_batch",
    "of_config",
    "token_batch",
]
