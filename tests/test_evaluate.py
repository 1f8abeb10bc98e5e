import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from nodelens.evaluate import evaluate


def data(n=101, classes=4):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, classes, generator=g) * 2, torch.randint(classes, (n,), generator=g)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_scores_agree_with_torchmetrics_for_any_batch_size(size):
    x, y = data()
    found = evaluate(nn.Identity(), zip(x.split(size), y.split(size), strict=True))
    assert found["accuracy"] == pytest.approx(float(MulticlassAccuracy(4, average="micro")(x, y)))
    assert found["ece"] == pytest.approx(float(MulticlassCalibrationError(4, n_bins=15)(x, y)), rel=1e-5)
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(x, y)))
    assert found["samples"] == 101


def test_data_that_cannot_be_scored_are_refused():
    with pytest.raises(ValueError, match="accuracy needs labels"):
        evaluate(nn.Identity(), [data()[0]])
    with pytest.raises(ValueError, match="the data are empty"):
        evaluate(nn.Identity(), [])
