"""Every metric of the catalogue by name, and the networks and rows that a pass over all of them takes."""

import torch
from published import OF_LAYERS
from torch import nn

from nodelens.metrics import get_metric

NAMES = OF_LAYERS
OF_NORMS = {name for name in NAMES if get_metric(name).parameter == "norm"}
NAMES_PLAIN = [name for name in NAMES if name not in OF_NORMS]


def plain(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype).eval()


def convolutional(dtype=torch.float64):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
    return net.to(dtype).eval()


def start_of(net):
    g = torch.Generator().manual_seed(2)
    state = {k: v for k, v in net.state_dict().items() if v.is_floating_point()}
    return {k: v + 0.3 * torch.randn(v.shape, generator=g, dtype=v.dtype) for k, v in state.items()}


def rows(n=90, shape=(6,), dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(n, *shape, generator=g, dtype=torch.float64) + 0.5
    targets = torch.randn(n, generator=g, dtype=torch.float64) + x.flatten(1)[:, 0]
    return {"x": x.to(dtype), "labels": torch.randint(3, (n,), generator=g), "targets": targets}


def batches(data, size):
    return [{k: t[a : a + size] for k, t in data.items()} for a in range(0, len(data["x"]), size)]
