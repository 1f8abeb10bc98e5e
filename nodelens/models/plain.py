"""Two small networks: a multilayer perceptron and a convolutional network."""

from collections.abc import Sequence

from torch import Tensor, nn

from nodelens.messages import setting


class MLP(nn.Sequential):
    """Linear layers with a ReLU between them, on the flattened input: (B, ...) -> (B, classes) logits.

    `features`: number of values per sample (channels * height * width). `dropout`: probability with which a hidden unit is set to
    zero in training; 0: no dropout modules.

    Raises: ValueError for a dropout that is not in [0, 1).
    """

    def __init__(self, features: int, classes: int, hidden: Sequence[int] = (64, 64), dropout: float = 0.0):
        super().__init__(nn.Flatten())
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it is a probability from 0 to below 1")
        for i, width in enumerate(hidden, start=1):
            self.add_module(f"fc{i}", nn.Linear(features, width))
            self.add_module(f"relu{i}", nn.ReLU())
            if dropout:
                self.add_module(f"dropout{i}", nn.Dropout(dropout))
            features = width
        self.add_module("head", nn.Linear(features, classes))


class CNN(nn.Module):
    """Blocks of 3x3 convolution, batch norm, ReLU and 2x2 pooling; then the mean over positions and a linear head.

    (B, channels, H, W) -> (B, classes) logits, for any H and W of at least 2 ** (len(widths) - 1) pixels. The last
    block has no pooling, because the mean follows it. Three blocks by default.
    """

    def __init__(self, channels: int, classes: int, widths: Sequence[int] = (16, 32, 64)):
        super().__init__()
        self.blocks = nn.Sequential()
        for i, width in enumerate(widths, start=1):
            last = i == len(widths)
            self.blocks.add_module(f"block{i}", _block(channels, width, pool=not last))
            channels = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(x)).flatten(1))


def mlp(classes: int, channels: int, size: int, hidden: Sequence[int] = (64, 64), dropout: float = 0.0) -> MLP:
    """An MLP for images of `channels` x `size` x `size`, with the arguments of every image model here."""
    if any(width < 1 for width in hidden):
        raise ValueError(f"{setting('model.net.hidden')} is {list(hidden)}; every width is 1 or more")
    return MLP(channels * size * size, classes, hidden, dropout)


def cnn(classes: int, channels: int, size: int, widths: Sequence[int] = (16, 32, 64)) -> CNN:
    """A CNN for images of `channels` x `size` x `size`.

    Raises: ValueError if the pooling of `widths` blocks leaves no pixel of an image of `size`.
    """
    least = 2 ** (len(widths) - 1)
    if size < least:
        raise ValueError(
            f"cnn: {len(widths)} widths need images of at least {least} pixels, size is {size}; "
            f"give fewer {setting('model.net.widths')} or set a larger {setting('dataset.size')}"
        )
    return CNN(channels, classes, widths)


def _block(channels: int, width: int, pool: bool) -> nn.Sequential:
    block = nn.Sequential()
    block.add_module("conv", nn.Conv2d(channels, width, 3, padding=1, bias=False))
    block.add_module("bn", nn.BatchNorm2d(width))
    block.add_module("relu", nn.ReLU())
    if pool:
        block.add_module("pool", nn.MaxPool2d(2))
    return block
