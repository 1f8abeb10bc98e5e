"""Where real data lie, and the trained network that several tests read."""

import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn


def folder(variable: str) -> Path:
    """The folder an environment variable names; the test is skipped, with the reason, where it is not set."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set: it names a folder of real data")
    return Path(os.environ[variable])


def resnet20() -> nn.Module:
    """The trained ResNet-20 of CIFAR-10, in evaluation mode."""
    home = folder("NODELENS_DATA")
    spec = spec_from_file_location("trained_nets", home / "nets.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.CifarResNet(20)
    net.load_state_dict(load_file(home / "models/cifar_resnet20/model.safetensors"))
    return net.eval()


def cifar_images(count: int) -> torch.Tensor:
    """The first test images of CIFAR-10, normalized, (count, 3, 32, 32) float32."""
    with np.load(folder("NODELENS_DATA") / "images/cifar10_test_first500.npz") as file:
        images = torch.from_numpy(file["x"][:count])
    images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
    images = images.float() / (255 if images.dtype == torch.uint8 else 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images - mean) / std
