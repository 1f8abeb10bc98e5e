"""Compiled loops give the table of plain torch, whatever is measured."""

import math
from functools import cache

import pytest
import torch
from compare import close
from torch import nn

import nodelens as nl
from nodelens.app.config import load_config


class Convolutional(nn.Module):
    """Maps of 24 by 24, 5 by 5 and 4 by 4 pixels, of 3 to 40 channels, and two layers of features."""

    def __init__(self):
        super().__init__()
        convolutions = nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 6, 5, stride=5), nn.BatchNorm2d(6), nn.GELU()
        self.maps = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x):
        return self.head(self.maps(x))


class Tokens(nn.Module):
    """An embedding and a feed-forward block of 70 units."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(30, 20), nn.Linear(20, 70), nn.Linear(70, 20)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def every_forward_metric():
    return list(load_config("analyze", ["metrics=forward"]).metrics)


def images(batch):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 3, 24, 24, generator=generator) + 0.5, torch.randint(3, (48,), generator=generator)
    x[4, 1, 3, 4] = math.nan
    return list(zip(x.split(batch), y.split(batch), strict=True))


@pytest.fixture(scope="module")
def of_maps(every_forward_metric):
    """A function of the back end and the size of a batch that measures every forward metric of maps."""
    torch.manual_seed(0)
    model = Convolutional().eval()

    @cache
    def measured(kernels, batch):
        return nl.analyze(model, images(batch), every_forward_metric, kernels=kernels)

    return measured


@pytest.mark.filterwarnings("ignore:.*not finite.*")
@pytest.mark.parametrize("batch", [48, 7])
def test_every_forward_metric_of_maps_has_the_value_of_plain_torch(back_end, batch, of_maps):
    found, expected = of_maps(back_end, batch), of_maps("torch", 16)
    assert found.metadata["kernels"] == back_end
    assert found.metadata["left_out"] == expected.metadata["left_out"]
    close(found.units, expected.units, 1e-4)
    close(found.layers, expected.layers, 1e-4)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_tokens_and_their_padding_have_the_values_of_plain_torch(back_end, precision):
    torch.manual_seed(0)
    model, ids = Tokens().eval(), torch.randint(30, (24, 50), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(50) < torch.arange(24)[:, None] * 2 + 3).long()
    data = [{"input_ids": a, "attention_mask": b} for a, b in zip(ids.split(8), mask.split(8), strict=True)]
    of_units = ["activation_kurtosis", "activation_mean_abs", "activation_zero_fraction", "activation_max_ratio", "redundancy"]
    metrics = [*of_units, "rq", "n_eff", "cos_sim_mean", "effective_rank", "participation_ratio"]
    found, expected = (
        nl.analyze(model, data, metrics, layers=["up", "down"], task="none", precision=precision, kernels=each)
        for each in (back_end, "torch")
    )
    close(found.units, expected.units, 1e-4 if precision == "float32" else 1e-9)
    close(found.layers, expected.layers, 1e-4 if precision == "float32" else 1e-9)
