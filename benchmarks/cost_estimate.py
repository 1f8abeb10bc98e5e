"""The estimated overhead of a pass beside the measured one: python benchmarks/cost_estimate.py [--rounds 16]

Five networks, the default set's forward metrics and all that exist there. Both are printed as the time of the pass over that of the
bare model; the constants of nodelens/engine/overhead.py were fitted to such a table.
"""

import argparse
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from bench import LANGUAGE
from overhead import EVERY, FORWARD, SIZES, overhead, plan_of
from timing import cells
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from nodelens.models import resnet

OF_ROWS = ["activation_mean", "activation_variance", "redundancy", "effective_rank"]  # which exist at any site


class Case(NamedTuple):
    """A network, a batch, and the sets of metrics to be measured at some layers."""

    name: str
    model: nn.Module
    batch: Any
    sets: dict[str, list[str]]  # of metrics, by name
    layers: str = "*"


class Mlp(nn.Module):
    """An MLP that answers as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layers(x))


def cases() -> Iterator[Case]:
    """Networks with random weights, and a batch of random data each."""
    torch.manual_seed(0)
    both = {"default": FORWARD, "all": EVERY}
    for size in (32, 64):
        stem, count = SIZES[size]
        images = torch.randn(count, 3, size, size), torch.randint(10, (count,))
        yield Case(f"ResNet-18, {size} px", resnet(depth=18, classes=10, channels=3, size=size, stem=stem), images, both)
    shape = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    vit = ViTForImageClassification(ViTConfig(**shape, image_size=64, patch_size=8, num_labels=10))
    yield Case("ViT, 6 x 192", vit, (torch.randn(32, 3, 64, 64), torch.randint(10, (32,))), {"default": FORWARD, "all": LANGUAGE})
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    llama = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=20_480))
    ids = torch.randint(20_480, (8, 256))
    texts = {"input_ids": ids, "labels": ids}
    yield Case("Llama, 30M, blocks", llama, texts, {"four": OF_ROWS, "all": LANGUAGE}, "blocks")
    yield Case("Llama, 30M, MLP hidden", llama, texts, {"four": OF_ROWS, "all": LANGUAGE}, "blocks.mlp.hidden")
    yield Case("MLP, 256-256", Mlp(), (torch.randn(256, 784), torch.randint(10, (256,))), both)


def main() -> None:
    parser = argparse.ArgumentParser(description="The estimated overhead of a pass beside the measured one.")
    parser.add_argument("--rounds", type=int, default=16)
    options = parser.parse_args()
    head = True
    for case in cases():
        model = case.model.eval()
        for name, metrics in case.sets.items():
            estimated = 1 + plan_of(model, case.batch, metrics, layers=case.layers)[0].overhead()
            _, measured = overhead(model, case.batch, metrics, options.rounds, layers=case.layers)
            row = {"model": f"{case.name:24}", "metrics": name, "measured": measured, "estimated": estimated}
            print(cells(row | {"estimated/measured": estimated / measured}, head=head), flush=True)
            head = False


if __name__ == "__main__":
    main()
