"""Globs choose layers with weights, and never containers."""

import pytest
import torch
from torch import nn

import nodelens as nl


class Block(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.fc, self.norm, self.act = nn.Linear(4, 4), nn.LayerNorm(4), act or nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(self.fc(x)))


class Net(nn.Sequential):
    def __init__(self):
        super().__init__()
        for k in (1, 2):
            self.add_module(f"layer{k}", nn.Sequential(Block(), Block()))
        self.head = nn.Linear(4, 3)


def names(pattern):
    return [layer.name for layer in nl.find_layers(Net(), pattern)]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("layer2.*", ["layer2.0.fc", "layer2.1.fc"]),
        ("layer?.0.*", ["layer1.0.fc", "layer2.0.fc"]),
        ("*.act", ["layer1.0.act", "layer1.1.act", "layer2.0.act", "layer2.1.act"]),
        ("*.norm", ["layer1.0.norm", "layer1.1.norm", "layer2.0.norm", "layer2.1.norm"]),
        ("layer1.*.input", ["layer1.0.fc.input", "layer1.1.fc.input"]),
        ("layer1", ["layer1"]),  # a name takes any module
        (["layer1.0", "h*"], ["layer1.0", "head"]),
        ("layer?", ["layer1", "layer2"]),  # all that match hold others
        ("layer*.0", ["layer1.0", "layer2.0"]),
        ("layer?.input", ["layer1.input", "layer2.input"]),
    ],
)
def test_a_glob_takes_what_has_weights_and_a_name_any_module(pattern, found):
    assert names(pattern) == found


def test_a_glob_measures_without_stopping_at_containers():
    data = [(torch.randn(12, 4), torch.randint(3, (12,)))]
    assert nl.analyze(Net(), data, layers="layer2.*").layers.index.tolist() == ["layer2.0.fc", "layer2.1.fc"]
