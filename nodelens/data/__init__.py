"""Data modules for images and texts with fixed, disjoint splits, independent of the rest of the package."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .batch import ImageBatch

if TYPE_CHECKING:
    from .arrays import Digits, Npz
    from .hub import Hub
    from .images import ImageData
    from .selectors import select_tokens
    from .text import Text
    from .tokens import ByteTokenizer

__all__ = ["ByteTokenizer", "Digits", "Hub", "ImageBatch", "ImageData", "Npz", "Text", "select_tokens"]

_HOME = {"Digits": "arrays", "Hub": "hub", "ImageData": "images", "Npz": "arrays", "Text": "text", "ByteTokenizer": "tokens"}
_HOME["select_tokens"] = "selectors"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
