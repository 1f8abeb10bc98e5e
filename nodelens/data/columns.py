"""Finds and reads the image and label columns of a Hugging Face dataset."""

from typing import Any

import datasets
import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from nodelens.messages import setting

_IMAGE_NAMES = ("image", "img", "pixel_values", "x")
_LABEL_NAMES = ("label", "labels", "target", "class", "y")
_GREY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")


def image_column(features: datasets.Features, key: str | None, what: str) -> str:
    """The image column: `key`, otherwise the only one. Raises: ValueError for none or several."""
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found = found or [name for name in _IMAGE_NAMES if _is_encoded(features.get(name))]
    return _chosen(found, key, features, "image", what)


def label_column(features: datasets.Features, key: str | None, what: str) -> str:
    """The label column: `key`, otherwise the only one. Raises: ValueError for none or several."""
    found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    found = found or [name for name in _LABEL_NAMES if name in features]
    name = _chosen(found, key, features, "label", what)
    feature = features[name]
    if not isinstance(feature, datasets.ClassLabel) and "int" not in str(getattr(feature, "dtype", "")):
        raise ValueError(
            f"{what}: column '{name}' is {getattr(feature, 'dtype', feature)}; labels are integers: store "
            f"it as a ClassLabel (Dataset.class_encode_column), or set {setting('dataset.label_key')}"
        )
    return name


def declared_classes(features: datasets.Features, key: str) -> int | None:
    """How many classes a ClassLabel column declares; None for plain integers."""
    feature = features[key]
    return len(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def decoded(value: Any) -> Tensor:
    """The pixels, (C, H, W) uint8, of a Pillow image or of its stored bytes or path.

    Raises: ValueError for a mode with more than eight bits per channel.
    """
    image: Image = value if isinstance(value, Image) else datasets.Image().decode_example(value)
    if image.mode not in _GREY + _COLOUR:
        raise ValueError(f"an image has mode {image.mode}; only eight bits per channel are supported: store it as L or RGB")
    pixels = np.array(image.convert("L" if image.mode in _GREY else "RGB"))
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def _is_encoded(feature: Any) -> bool:
    return isinstance(feature, dict) and "bytes" in feature


def _chosen(found: list[str], key: str | None, features: datasets.Features, kind: str, what: str) -> str:
    if key is not None and key not in features:
        raise ValueError(f"{what} has no column '{key}', it has {', '.join(features)}; set {setting(f'dataset.{kind}_key')}")
    if key is None and len(found) != 1:
        which = f"several {kind} columns ({', '.join(found)})" if found else f"no {kind} column"
        raise ValueError(f"{what} has {which}, its columns are {', '.join(features)}; set {setting(f'dataset.{kind}_key')}")
    return key or found[0]
