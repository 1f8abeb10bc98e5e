"""Associations against one forward and backward pass, and a Hessian against a loop: python benchmarks/associations.py [threads]

Images of MNIST are read from NODELENS_DATA where it is set, else drawn at random: the time is the same.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from timing import interleaved
from torch import nn
from torch.nn import functional

import nodelens as nl

ALL = ["forward_cov", "forward_jac", "backward_jac", "backward_ggn", "backward_hess"]


def mnist(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 784) in [0, 1] and digits."""
    home = os.environ.get("NODELENS_DATA")
    if home:
        with np.load(Path(home) / "images/mnist.npz") as file:
            names = {name: file[name] for name in file.files}
        x = next(v for k, v in names.items() if k.startswith("x") and len(v) >= count)[:count]
        y = next(v for k, v in names.items() if k.startswith("y") and len(v) >= count)[:count]
        return torch.from_numpy(x).float().flatten(1) / 255, torch.from_numpy(y).long()
    g = torch.Generator().manual_seed(0)
    return torch.rand(count, 784, generator=g), torch.randint(10, (count,), generator=g)


def of_an_mlp(samples: int = 10_000, size: int = 1_000) -> float:
    """All five associations of both hidden layers, over the time of one forward and backward pass of the same batches."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    data = list(zip(*(t.split(size) for t in mnist(samples)), strict=True))

    def bare() -> None:
        for x, y in data:
            net.zero_grad()
            functional.cross_entropy(net(x), y).backward()

    contestants = {"bare": bare, "associations": lambda: nl.analyze(net, data, ALL, layers=["1", "3"])}
    seconds = interleaved(contestants, rounds=5)
    ratio = seconds["associations"] / seconds["bare"]
    print(f"MLP 784-64-64-10, {samples:,} images in batches of {size:,}: ", end="")
    print(f"forward and backward {1e3 * seconds['bare']:.0f} ms, ", end="")
    print(f"all five associations of both layers {1e3 * seconds['associations']:.0f} ms: {ratio:.1f} times")
    return ratio


def of_a_convolution(batch: int = 32, rows: int = 12) -> float:
    """The exact Hessian of 16 channels at all positions, against a loop over units and positions, timed on some of them."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2704, 10),
    ]
    net = nn.Sequential(*layers)
    x, y = mnist(batch)
    x = x.reshape(batch, 1, 28, 28)
    metric = {"hess": nl.get_metric("backward_hess")}
    ours = interleaved({"ours": lambda: nl.analyze(net, [(x, y)], metric, layers="0")}, rounds=5)["ours"]
    h = net[0](x).detach().requires_grad_()
    start = time.perf_counter()
    (slope,) = torch.autograd.grad(functional.cross_entropy(net[1:](h), y, reduction="sum"), h, create_graph=True)
    flat = slope.flatten(2)
    blocks = []
    for row in range(rows):
        unit, place = row % 16, 40 * row
        (column,) = torch.autograd.grad(flat[:, unit, place].sum(), h, retain_graph=True)
        blocks.append(column.flatten(2)[:, :, place].sum(0))
    theirs = (time.perf_counter() - start) / rows * h[0].numel()
    print(
        f"convolution of 16 channels, batch {batch}, {h[0].numel():,} units x positions: exact Hessian {1e3 * ours:.0f} ms, ",
        end="",
    )
    print(f"a loop over units and positions {theirs:.1f} s (from {rows} timed): {theirs / ours:,.0f} times")
    return theirs / ours


if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    print(f"{torch.get_num_threads()} threads")
    for batch_size in (100, 250, 1_000):
        of_an_mlp(size=batch_size)
    of_a_convolution()
