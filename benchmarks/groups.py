"""What finding and removing groups costs, beside Torch-Pruning: python benchmarks/groups.py [--rounds 5] [--networks NAME ...]

Half of all channels by magnitude, one call of each in turn, processor time. Networks of torchvision, where it is installed, and a
CIFAR ResNet-56; random weights, two images. Torch-Pruning is given the layer of the output to leave out.
"""

import argparse
import copy
import warnings
from itertools import pairwise

import torch
from timing import cells, interleaved
from torch import Tensor, nn

import nodelens as nl

NETWORKS = [
    "resnet56",
    "resnet18",
    "resnet50",
    "vgg16_bn",
    "densenet121",
    "mobilenet_v2",
    "efficientnet_b0",
    "regnet_x_400mf",
    "googlenet",
    "fcn_resnet50",
]


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if inputs == outputs else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.shortcut(x)).relu()


class CifarResNet(nn.Sequential):
    """Three stages of blocks, of 16, 32 and 64 channels: 9 blocks each are ResNet-56 (He et al. 2016, section 4.2)."""

    def __init__(self, blocks: int = 9):
        widths = [16] * (blocks + 1) + [32] * blocks + [64] * blocks
        body = [Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths)]
        stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        super().__init__(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights in eval mode, and two images."""
    if name == "resnet56":
        return CifarResNet().eval(), torch.randn(2, 3, 32, 32)
    from torchvision.models import get_model

    options = {"weights_backbone": None} if name.startswith(("fcn", "deeplab")) else {}
    options |= {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    return get_model(name, weights=None, **options).eval(), torch.randn(2, 3, 64, 64)


def theirs(model: nn.Module, x: Tensor) -> None:
    """Half of all channels by Torch-Pruning, on a copy."""
    import torch_pruning

    model = copy.deepcopy(model)
    classes = next(iter(found.values())).shape[1] if isinstance(found := model(x), dict) else found.shape[1]
    last = [m for m in model.modules() if classes in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))]
    importance = torch_pruning.importance.MagnitudeImportance()
    torch_pruning.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=last).step()


def compared(name: str, rounds: int) -> dict[str, float]:
    """Seconds of processor time: of finding groups, of the whole call, and of Torch-Pruning's, if it is installed."""
    torch.manual_seed(0)
    model, x = network(name)
    contestants = {
        "find groups": lambda: nl.find_groups(model, x),
        "prune": lambda: nl.prune(model, "magnitude", 0.5, data=[x]),
        "Torch-Pruning": lambda: theirs(model, x),
    }
    try:
        import torch_pruning  # noqa: F401
    except ImportError:
        del contestants["Torch-Pruning"]
    return interleaved(contestants, rounds, processor=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; seconds of processor time, and over Torch-Pruning's")
    for k, name in enumerate(options.networks):
        try:
            found = compared(name, options.rounds)
        except ImportError:
            print(f"{name}: torchvision is not installed")
            continue
        peer = found.get("Torch-Pruning")
        ratios = {f"{what} / Torch-Pruning": seconds / peer for what, seconds in found.items()} if peer else {}
        ratios.pop("Torch-Pruning / Torch-Pruning", None)
        print(cells({"network": name, **found, **ratios}, head=k == 0), flush=True)


if __name__ == "__main__":
    main()
