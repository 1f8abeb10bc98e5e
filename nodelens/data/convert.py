"""Converts stored pixels to network inputs: scale, channels, size, normalisation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nodelens.messages import setting

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow for RGB to L


@dataclass(frozen=True)
class Convert:
    """(B, C, H, W) uint8 in [0, 255], or float (not rescaled), to float32 (B, channels, size, size).

    size:      side after a bilinear, antialiased resize that ignores the aspect ratio; None: as stored
    channels:  1 -> 3 by repetition, 3 -> 1 by luma; None: as stored
    mean, std: one number, or one per channel, in units of the image after uint8 is scaled to [0, 1]
    """

    size: int | None = None
    channels: int | None = None
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        x = self._resized(self._coloured(x))
        if self.mean is not None:
            x = x - self._per_channel("mean", self.mean, x)
        if self.std is not None:
            x = x / self._per_channel("std", self.std, x)
        return x

    def every(self, images: Sequence[Tensor]) -> Tensor:
        """A batch of images (C, H, W) whose sizes may differ.

        Raises: ValueError if they differ and `size` or `channels` is None.
        """
        shapes = sorted({tuple(image.shape) for image in images})
        if len(shapes) == 1:
            return self(torch.stack(list(images)))
        channels, sizes = {shape[0] for shape in shapes}, {shape[1:] for shape in shapes}
        if len(sizes) > 1 and self.size is None:
            raise ValueError(f"images differ in size ({_few(sizes)}); set {setting('dataset.size')} to resize all")
        if len(channels) > 1 and self.channels is None:
            raise ValueError(f"images differ in channels ({_few(channels)}); set {setting('dataset.channels')} to 1 or 3")
        return torch.cat([self(image[None]) for image in images])

    def _coloured(self, x: Tensor) -> Tensor:
        have, want = x.shape[1], self.channels
        if want is None or want == have:
            return x
        if (have, want) == (1, 3):
            return x.expand(-1, 3, -1, -1)
        if (have, want) == (3, 1):
            return (x * x.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
        raise ValueError(
            f"images have {have} channels, {setting('dataset.channels')} is {want}; only 1 to 3 and 3 to 1 are "
            f"converted: set {setting('dataset.channels', have)}"
        )

    def _resized(self, x: Tensor) -> Tensor:
        if self.size is None or x.shape[2:] == (self.size, self.size):
            return x
        return functional.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=True)

    def _per_channel(self, name: str, value: float | Sequence[float], x: Tensor) -> Tensor:
        values = x.new_tensor([value] if isinstance(value, (int, float)) else list(value))
        if len(values) not in (1, x.shape[1]):
            fix = "give one, or one per channel"
            raise ValueError(f"{setting(f'dataset.{name}')} has {len(values)} values, the images have {x.shape[1]} channels; {fix}")
        if name == "std" and not (values > 0).all():
            raise ValueError(f"{setting('dataset.std')} is {values.tolist()}; every value must be above 0")
        return values.view(1, -1, 1, 1)


def _few(values: set) -> str:
    shown = [str(value) for value in sorted(values)]
    return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")
