"""nl.ablate against a loop with one forward pass per unit: python benchmarks/ablation_speed.py --data DIR

Every unit of the pruning groups of a trained ResNet-20 is removed once. The loop masks a unit and runs the whole network on every
batch. Both take turns, processor time is counted, and the ratio of each round is printed, with the largest difference of a damage.
DIR has nets.py with the class CifarResNet, its weights, and CIFAR-10 test images.
"""

import argparse
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

import nodelens as nl
from nodelens.pruning.surgery.mask import masked

MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def resnet(home: Path, depth: int) -> nn.Module:
    spec = spec_from_file_location("nets", home / "nets.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.CifarResNet(depth)
    net.load_state_dict(load_file(home / f"models/cifar_resnet{depth}/model.safetensors"))
    return net.eval()


def batches(home: Path, images: int, size: int, layout: torch.memory_format) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with np.load(home / "images/cifar10_test_first500.npz") as file:
        x, y = torch.from_numpy(file["x"][:images]).permute(0, 3, 1, 2) / 255, torch.from_numpy(file["y"][:images]).long()
    x = ((x - MEAN) / STD).contiguous(memory_format=layout)
    return list(zip(x.split(size), y.split(size), strict=True))


@torch.no_grad()
def loop(net: nn.Module, data: list, groups: list) -> np.ndarray:
    """The damage of every unit from a forward pass of the whole network for each."""

    def loss() -> float:
        total = sum(float(cross_entropy(net(x).double(), y, reduction="sum")) for x, y in data)
        return total / sum(len(y) for _, y in data)

    dense, found = loss(), []
    for group in groups:
        for unit in range(group.n):
            with masked(net, [group], {group.name: [unit]}):
                found.append(loss() - dense)
    return np.array(found)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--channels-last", action="store_true", help="images in this memory layout, which is faster for the loop")
    options = parser.parse_args()
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    net, data = resnet(options.data, options.depth), batches(options.data, options.images, options.batch, layout)
    groups = list(nl.find_groups(net, data[0]))
    nl.ablate(net, data, sample=1, layers=groups, predictions=16)  # imports
    print(f"{sum(group.n for group in groups)} units, {options.images} images in batches of {options.batch}, {layout}")
    ratios = []
    for _ in range(options.rounds):
        slow, wanted = timed(lambda: loop(net, data, groups))
        fast, result = timed(lambda: nl.ablate(net, data, layers=groups))
        ratios.append(slow / fast)
        apart = np.abs(result.units["damage"].to_numpy() - wanted).max()
        print(f"loop {slow:.1f} s, nl.ablate {fast:.1f} s: {slow / fast:.2f} times faster; largest difference {apart:.1e} nats")
    print(f"median ratio {np.median(ratios):.2f}")


if __name__ == "__main__":
    main()
