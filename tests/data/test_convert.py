"""Scaling, channels, size, normalisation and error messages."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from nodelens.data.convert import Convert


def images(channels: int = 3, size: int = 6) -> torch.Tensor:
    return torch.randint(0, 256, (2, channels, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_bytes_are_scaled_and_floats_are_not():
    assert_close(Convert()(images()), images().float() / 255)
    assert_close(Convert()(images().double()), images().float())


def test_channels_are_repeated_or_made_luma():
    x = images(1)
    assert_close(Convert(channels=3)(x), (x.float() / 255).repeat(1, 3, 1, 1))
    r, g, b = (images().float() / 255).unbind(1)
    assert_close(Convert(channels=1)(images())[:, 0], 0.299 * r + 0.587 * g + 0.114 * b)


def test_a_resize_is_bilinear_and_antialiased():
    x = images(size=8)
    assert_close(Convert(size=4)(x), functional.interpolate(x.float() / 255, size=(4, 4), mode="bilinear", antialias=True))
    assert_close(Convert(size=4)(torch.full((1, 1, 9, 7), 3.0)), torch.full((1, 1, 4, 4), 3.0))


def test_normalisation_is_per_channel():
    x = images()
    y = Convert(mean=[0.1, 0.2, 0.3], std=(1, 2, 4))(x)
    assert_close(y[:, 2], (x[:, 2].float() / 255 - 0.3) / 4)
    assert_close(Convert(mean=0.5, std=0.5)(x), (x.float() / 255 - 0.5) / 0.5)


def test_images_of_several_sizes_become_one_batch():
    one, two = images(3, 6)[0], images(1, 8)[0]
    convert = Convert(size=5, channels=3, mean=0.5)
    assert_close(convert.every([one, two]), torch.cat([convert(one[None]), convert(two[None])]))
    with pytest.raises(ValueError, match=r"images differ in size \(\(6, 6\), \(8, 8\)\); set size"):
        Convert(channels=3).every([one, two])
    with pytest.raises(ValueError, match=r"images differ in channels \(1, 3\); set channels to 1 or 3"):
        Convert(size=5).every([one, two])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 2}, "images have 3 channels, channels is 2; only 1 to 3 and 3 to 1 .*channels=3"),
        ({"mean": [0.1, 0.2]}, "mean has 2 values, the images have 3 channels"),
        ({"std": [1, 0, 1]}, r"std is \[1.0, 0.0, 1.0\]; every value must be above 0"),
    ],
    ids=["channels", "mean", "std"],
)
def test_impossible_conversions_raise(options, words):
    with pytest.raises(ValueError, match=words):
        Convert(**options)(images())
