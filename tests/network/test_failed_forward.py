"""What is said where a model cannot take a batch: the advice follows from the cause, in the words of the interface."""

import pytest
import torch
from torch import nn

from nodelens.messages import config_words
from nodelens.network.batch import Batch
from nodelens.network.failed_forward import check_forward


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error, self.fc = error, nn.Linear(3, 2)

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return self.fc(x)


BATCH = Batch.of(torch.ones(4, 3))


@pytest.mark.parametrize(
    ("error", "advice", "of_config"),
    [
        (KeyError("mask"), "KeyError 'mask'; the forward pass itself fails: call the model", "HYDRA_FULL_ERROR=1 shows where"),
        (RuntimeError("shapes cannot be multiplied."), "multiplied; give inputs of the shape that the model", "dataset.channels="),
        (torch.OutOfMemoryError("no memory"), "two samples do not fit into the memory", "take a smaller model"),
        (
            RuntimeError("found tensors on another device"),
            "its weights are on cpu: let forward make its tensors",
            "on the device of",
        ),
        (RuntimeError(), "RuntimeError; the forward pass itself fails", "RuntimeError; the forward pass itself fails"),
    ],
)
def test_the_advice_follows_from_the_cause(error, advice, of_config):
    with pytest.raises(ValueError, match=r"Failing cannot take the data, input 0 \(2, 3\) float32: ") as raised:
        check_forward(Failing(error), BATCH)
    assert advice in str(raised.value)
    assert "\n" not in str(raised.value)
    with config_words(), pytest.raises(ValueError) as raised:
        check_forward(Failing(error), BATCH)
    assert of_config in str(raised.value)


def test_weights_on_several_devices_are_named():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="its weights are on the meta device, without values: load them first"):
        check_forward(model, BATCH)


def test_a_model_that_runs_raises_nothing_and_keeps_its_mode():
    model = Failing(None).train()
    check_forward(model, BATCH)
    assert model.training
