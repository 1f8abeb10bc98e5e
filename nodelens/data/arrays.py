"""Images in memory: the digits of scikit-learn, and .npz files."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nodelens.messages import setting
from nodelens.results.arrays import headers, read_arrays

from .images import ImageData
from .source import ArraySource, Source

_Arrays = dict[str, np.ndarray]


class Digits(ImageData):
    """scikit-learn's 1,797 handwritten digits, 8x8, one channel in [0, 1]; bundled, no download."""

    def read(self) -> Source:
        images, labels = _digits()
        x = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
        return ArraySource(x, torch.from_numpy(labels).to(torch.long, copy=True))


@cache  # a text file, compressed
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # imported here, because it takes a second that no other source needs

    return load_digits(return_X_y=True)


class Npz(ImageData):
    """An .npz file with arrays x, y, or x_train, y_train, x_test, y_test.

    x:         (n, H, W) or (n, H, W, C), uint8 in [0, 255], or float, which is not rescaled; y: (n,) integers
    test_path: a second file with x and y, used as the test set
    Raises: FileNotFoundError; ValueError for any other file or arrays. Pickled objects are never loaded.
    """

    def __init__(self, path: str, test_path: str | None = None, **options: Any):
        super().__init__(**options)
        self.path, self.test_path = path, test_path

    def read(self) -> Source:
        file = _file(self.path)
        arrays = _arrays(file)
        train = _pair(arrays, "_train" if "x_train" in arrays else "", file)
        test = None
        if self.test_path is not None:
            other = _file(self.test_path)
            test = _pair(_arrays(other), "", other)
        elif "x_train" in arrays:
            test = _pair(arrays, "_test", file)
        self.unsplit = test is None
        if test is None:
            return ArraySource(*train)
        return ArraySource(*_joined(train, test), own_test=len(test[1]))


def _file(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file at {file.resolve()}; set {setting('dataset.path')} to an .npz file with arrays x and y")
    return file


def _arrays(file: Path) -> _Arrays:
    try:
        arrays = read_arrays(file, lambda name: name.split("_")[0] in ("x", "y"))
        return arrays or dict.fromkeys(headers(file), np.empty(0))
    except ValueError as error:
        unfit = f"{file} is not an .npz file of plain arrays (pickled objects are never read); write it with numpy.savez"
        raise ValueError(f"{unfit} ({str(error).removeprefix(f'{file} ')})") from error


def _pair(arrays: _Arrays, suffix: str, file: Path) -> tuple[Tensor, Tensor]:
    """Images (n, C, H, W) and labels (n,) from the arrays x<suffix> and y<suffix>."""
    names = f"x{suffix}", f"y{suffix}"
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ValueError(
            f"{file} has no array {' and '.join(missing)}, it has {', '.join(arrays) or 'none'}; "
            f"name the arrays x, y, or x_train, y_train, x_test, y_test"
        )
    x, y = (arrays[name] for name in names)
    if len(x) != len(y):
        raise ValueError(f"{file}: {names[0]} has {len(x)} samples and {names[1]} has {len(y)}; the numbers must be equal")
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise ValueError(f"{file}: {names[1]} is {y.dtype} {y.shape}; labels are integers of shape (n,)")
    return _images(x, f"{file}: {names[0]}"), torch.from_numpy(y.astype(np.int64))


def _images(x: np.ndarray, name: str) -> Tensor:
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise ValueError(f"{name} is {x.dtype}; images are uint8 (0 to 255) or float")
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[1] <= 4 < x.shape[3]):
        hint = "; put the channels last: numpy.moveaxis(x, 1, -1)" if x.ndim == 4 else ""
        raise ValueError(f"{name} has shape {x.shape}; images are (n, H, W) or (n, H, W, C){hint}")
    x = x[:, None] if x.ndim == 3 else np.moveaxis(x, -1, 1)
    return torch.from_numpy(np.ascontiguousarray(x if x.dtype == np.uint8 else x.astype(np.float32)))


def _joined(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (x, y), (x_test, y_test) = train, test
    if x.shape[1:] != x_test.shape[1:] or x.dtype != x_test.dtype:
        raise ValueError(
            f"training images are {x.dtype} {tuple(x.shape[1:])}, test images {x_test.dtype} "
            f"{tuple(x_test.shape[1:])} (channels, height, width); store both alike"
        )
    return torch.cat([x, x_test]), torch.cat([y, y_test])
