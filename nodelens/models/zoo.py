"""Networks of torchvision and timm by name, an extra: ``pip install nodelens[zoo]``."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from torch import nn

from nodelens.messages import first_line, nearest, setting


def torchvision_model(name: str, classes: int, channels: int = 3, pretrained: bool = False) -> nn.Module:
    """A classifier of torchvision by name, such as vgg16: (B, 3, size, size) -> (B, classes) logits.

    pretrained: the newest weights of torchvision, which are downloaded, with their own number of classes.
    Raises: ValueError without torchvision, for an unknown name, with the nearest one, for another number of
    channels than 3, and for another number of classes than that of the weights.
    """
    models = _imported("torchvision").models
    _check_name("torchvision", name, models.list_models(module=models))
    if channels != 3:
        raise ValueError(f"torchvision's {name} reads 3 channels, the data have {channels}: set {setting('dataset.channels', 3)}")
    if not pretrained:
        options: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return models.get_model(name, weights=None, num_classes=classes, **options)
    weights = models.get_model_weights(name).DEFAULT
    own = len(weights.meta["categories"])
    if own != classes:
        raise ValueError(
            f"the weights of torchvision's {name} are for {own} classes, the data have {classes}: set "
            f"{setting('model.net.pretrained', False)}"
        )
    return models.get_model(name, weights=weights)


def timm_model(name: str, classes: int, channels: int = 3, size: int | None = None, pretrained: bool = False) -> nn.Module:
    """A classifier of timm by name, such as convnext_tiny: (B, channels, size, size) -> (B, classes) logits.

    size: side of the images, for networks that are built for one size. pretrained: timm's weights, which are downloaded; the head
    is replaced if its number of classes differs.
    Raises: ValueError without timm, for an unknown name, with the nearest one, and for sizes that do not fit.
    """
    timm = _imported("timm")
    _check_name("timm", name, timm.list_models())
    options: dict[str, Any] = {"num_classes": classes, "in_chans": channels, "pretrained": pretrained}
    try:
        try:
            return timm.create_model(name, img_size=size, **options)
        except TypeError:  # most convolutional networks take images of any size, and no argument for it
            return timm.create_model(name, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"timm's {name} cannot be built for {channels} channels of size {size}: {first_line(error)}") from error


def _imported(package: str) -> Any:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ValueError(f"model={package} needs {package}: pip install nodelens[zoo]") from None


def _check_name(package: str, name: str, names: Iterable[str]) -> None:
    every = list(names)
    if name.partition(".")[0] not in every:  # timm names weights behind a dot
        raise ValueError(f"{package} has no model {name!r}.{nearest(name, every)} It has {len(every)} models")
