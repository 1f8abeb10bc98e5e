"""ResNet and ViT of transformers: random weights without a download, or weights from a folder or the hub."""

from typing import Any, Literal

from torch import nn
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.resnet.modeling_resnet import ResNetConvLayer

from nodelens.messages import setting

from .stored import load_stored, stored_config

_RESNETS = {18: ("basic", [2, 2, 2, 2]), 34: ("basic", [3, 4, 6, 3]), 50: ("bottleneck", [3, 4, 6, 3])}


class ResNet(ResNetForImageClassification):
    """transformers' ResNet, with a stem for small images if its config has `stem: small`.

    The small stem is a 3x3 convolution with stride 1 and no pooling: with the usual 7x7 convolution of stride 2 and
    pooling, the last stage of a 32-pixel image would be a single pixel.
    """

    def __init__(self, config: ResNetConfig):
        super().__init__(config)
        if getattr(config, "stem", "imagenet") == "small":
            stem = ResNetConvLayer(config.num_channels, config.embedding_size, 3, activation=config.hidden_act)
            nn.init.kaiming_normal_(stem.convolution.weight, mode="fan_out", nonlinearity="relu")  # like all others
            self.resnet.embedder.add_module("embedder", stem)
            self.resnet.embedder.add_module("pooler", nn.Identity())


def resnet(
    depth: int,
    classes: int,
    channels: int,
    size: int,
    stem: Literal["auto", "small", "imagenet"] = "auto",
    path: str | None = None,
    width: int = 64,
) -> PreTrainedModel:
    """ResNet-18, -34 or -50: (B, channels, size, size) -> an output with `.logits` (B, classes).

    stem: "auto" means "small" up to 32 pixels, or the stored stem with `path`. width: channels of the first stage.
    path: a local folder or a hub id with trained weights; the head is replaced if its number of classes differs.
    Raises: ValueError for another depth or stem, or stored weights of another shape; OSError if `path` is not available.
    """
    if depth not in _RESNETS:
        raise ValueError(f"resnet: depth {depth} is not available; choose from {', '.join(map(str, _RESNETS))}")
    if stem not in ("auto", "small", "imagenet"):
        raise ValueError(f"resnet: stem '{stem}' is not available; choose from auto, small, imagenet")
    kind, blocks = _RESNETS[depth]
    if path is not None:
        config = stored_config(path, ResNetConfig)
        wanted: dict[str, Any] = {"depths": blocks, "layer_type": kind, "num_channels": channels}
        if stem != "auto":
            wanted["stem"] = stem
        return load_stored(ResNet, path, config, classes, wanted)
    stem = ("small" if size <= 32 else "imagenet") if stem == "auto" else stem
    widths = [width * (1 if kind == "basic" else 4) * 2**i for i in range(4)]
    more: dict[str, Any] = {"num_labels": classes, "stem": stem}  # not fields of the class, but stored in config.json
    return ResNet(
        ResNetConfig(num_channels=channels, embedding_size=width, hidden_sizes=widths, depths=blocks, layer_type=kind, **more)
    )


def vit(
    classes: int,
    channels: int,
    size: int,
    patch: int | None = None,
    path: str | None = None,
    hidden: int = 192,
    heads: int = 3,
    depth: int = 12,
    mlp: int = 768,
) -> PreTrainedModel:
    """A vision transformer, ViT-Tiny by default: (B, channels, size, size) -> an output with `.logits` (B, classes).

    patch: the side of a patch in pixels; None: the divisor of `size` nearest to size / 8.
    path: as for `resnet`; hidden, heads, depth and mlp are then ignored in favour of the stored values.
    Raises: ValueError for a patch that does not divide `size`, heads that do not divide `hidden`, or stored weights
    of another shape; OSError if `path` is not available.
    """
    if path is not None:
        config = stored_config(path, ViTConfig)
        wanted = {"num_channels": channels, "image_size": size} | ({"patch_size": patch} if patch else {})
        return load_stored(ViTForImageClassification, path, config, classes, wanted)
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    patch = patch or min(divisors, key=lambda d: (abs(d - size / 8), d))
    if patch not in divisors:
        raise ValueError(
            f"vit: patch {patch} does not divide size {size}; set {setting('model.net.patch')} to one of "
            f"{', '.join(map(str, divisors))}"
        )
    if hidden % heads:
        raise ValueError(
            f"vit: {heads} heads do not divide hidden {hidden}; change {setting('model.net.heads')} or "
            f"{setting('model.net.hidden')}"
        )
    more: dict[str, Any] = {"num_labels": classes}
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=hidden,
            num_attention_heads=heads,
            num_hidden_layers=depth,
            intermediate_size=mlp,
            image_size=size,
            patch_size=patch,
            num_channels=channels,
            **more,
        )
    )
