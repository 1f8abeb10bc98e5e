"""Small networks written as one function, and the test that slicing a network gives the same output as masking it."""

import copy
import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from nodelens.network.outputs import answer_of
from nodelens.pruning.surgery.mask import masked
from nodelens.pruning.surgery.slice import slice_units

AMOUNTS = (0.1, 0.5, 0.9)


class Net(nn.Module):
    """Modules by name and a forward pass, written as one function of the net and its input."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.go = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.go(self, x)


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, biases, betas and running statistics that are nowhere 0 or 1, in float64."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, p in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not p.is_floating_point():
                continue
            positive = name == "running_var" or (name == "weight" and p.ndim == 1)
            wide = p.ndim > 1 and p.numel() > max(p.shape)
            value = torch.rand(p.shape, generator=g) + 0.5 if positive else torch.randn(p.shape, generator=g)
            p.data.copy_(value if positive else value * (math.sqrt(2 / p[0].numel()) if wide else 0.5))
    return model.double().eval()


def conv(i: int, o: int, k: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def images(size: int = 8, n: int = 3) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def space(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def removal(groups, shift: int) -> dict[str, list[int]]:
    """Random units, a different amount of each group."""
    g = torch.Generator().manual_seed(shift)
    gone = {a.name: min(a.n - 1, math.floor(AMOUNTS[(k + shift) % 3] * a.n + 0.5)) for k, a in enumerate(groups)}
    return {a.name: torch.randperm(a.n, generator=g)[: gone[a.name]].tolist() for a in groups}


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return answer_of(model(x))


def assert_same(a: Tensor, b: Tensor) -> None:
    assert float((a - b).abs().max()) <= 1e-10 * float(a.abs().max())


def assert_exact(model: nn.Module, groups, x: Tensor) -> None:
    dense = output(model, x)
    for shift in range(3):
        removed = removal(groups, shift)
        with masked(model, groups, removed):
            mask = output(model, x)
        assert_same(mask, output(slice_units(copy.deepcopy(model), groups, removed), x))
        assert not any(removed.values()) or float((mask - dense).abs().max()) > 1e-3 * float(dense.abs().max())


def between(inside, width: int = 8, **modules):
    """Two convolutions, the given operation, and a head of the given width."""
    modules = {"a": conv(3, 6), "b": conv(6, 8), "head": nn.Linear(width, 5), **modules}
    return lambda: Net(lambda m, x: m.head(inside(m, m.b(F.relu(m.a(x))))), **modules)
