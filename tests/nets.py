"""Small networks that show what real ones do: every kind of layer, in-place operations, shared and unused modules."""

import torch
from torch import Tensor, nn


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Mixed(nn.Module):
    """Strides, groups, dilation, padding modes, a transposed convolution, in-place ReLUs, batch norm, a residual add."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4)
        self.dilated = nn.Conv2d(12, 12, (3, 2), padding="same", dilation=2)
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.point = nn.Conv2d(6, 5, 1, bias=False)
        self.head = nn.Linear(5, classes)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.bn(self.stem(x)))
        x = torch.relu_(self.grouped(x))
        x = x + torch.relu(self.dilated(x))
        x = torch.relu(self.up(x))
        return self.head(self.point(x).mean((2, 3)))


class Tokens(nn.Module):
    """Embeddings, a layer read at every token, a masked mean."""

    def __init__(self, vocabulary: int = 11, width: int = 6, classes: int = 3):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.ffn = nn.Linear(width, 7)
        self.head = nn.Linear(7, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = torch.tanh(self.ffn(self.embed(input_ids)))
        mask = attention_mask[..., None].to(h.dtype)
        return self.head((h * mask).sum(1) / mask.sum(1))


def build(kind: type[nn.Module], seed: int = 0, **options: int) -> nn.Module:
    """A network with reproducible weights, in eval mode, that leaves the global generator alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = kind(**options)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return net.eval()


def images(n: int = 96, size: int = 9, classes: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 3, size, size, generator=generator(1), dtype=torch.float64) + 0.5
    return x.to(dtype), torch.randint(classes, (n,), generator=generator(2))


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))
