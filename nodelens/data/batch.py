"""The batch that every image loader yields."""

from typing import NamedTuple

from torch import Tensor


class ImageBatch(NamedTuple):
    """Images with their labels and sample numbers."""

    x: Tensor  # (B, C, H, W)  float32  normalised
    y: Tensor  # (B,)          int64    class, 0 .. classes - 1
    ids: Tensor  # (B,)          int64    the sample's number in its source; test samples follow the training samples
