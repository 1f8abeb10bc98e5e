import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

import nodelens.evaluation.evaluate as module
from nodelens.evaluation.evaluate import evaluate


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
    assert set(found) == {"accuracy", "loss", "ece", "samples"}


def test_data_that_cannot_be_scored_are_refused():
    with pytest.raises(ValueError, match="accuracy needs labels"):
        evaluate(nn.Identity(), [data()[0]])
    with pytest.raises(ValueError, match="the data are empty"):
        evaluate(nn.Identity(), [])


class Bigrams(nn.Module):
    """Logits of the next token by a table."""

    def __init__(self, classes=11):
        super().__init__()
        weight = torch.randn(classes, classes, generator=torch.Generator().manual_seed(0)) * 2
        self.table = nn.Embedding.from_pretrained(weight)

    def forward(self, input_ids, attention_mask=None):
        return self.table(input_ids)


def texts():
    g = torch.Generator().manual_seed(1)
    return [torch.randint(11, (int(n),), generator=g) for n in torch.randint(2, 9, (20,), generator=g)]


def padded(texts, size, side="right"):
    for a in range(0, len(texts), size):
        some = texts[a : a + size]
        ids = nn.utils.rnn.pad_sequence(some, batch_first=True, padding_side=side)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in some], batch_first=True, padding_side=side)
        yield {"input_ids": ids, "labels": ids, "attention_mask": mask, "bytes": torch.tensor([2 * len(t) - 2 for t in some])}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 7, 20])
def test_every_prediction_of_a_token_counts_alike(size, side, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 44)  # four predictions at once
    net, every = Bigrams(), texts()
    x, y = net(torch.cat([t[:-1] for t in every])), torch.cat([t[1:] for t in every])
    found = evaluate(net, padded(every, size, side))
    loss = float(nn.functional.cross_entropy(x, y))
    assert found["accuracy"] == pytest.approx(float((x.argmax(1) == y).float().mean()))
    assert found["loss"] == pytest.approx(loss)
    assert found["ece"] == pytest.approx(float(MulticlassCalibrationError(11, n_bins=15)(x, y)), rel=1e-5)
    assert found["perplexity"] == pytest.approx(float(torch.tensor(loss).exp()), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(loss / 2 / float(torch.tensor(2.0).log()), rel=1e-5)
    assert (found["samples"], found["tokens"]) == (20, len(y))


def test_the_errors_are_those_of_ratios_over_samples():
    net, every = Bigrams(), texts()
    found = evaluate(net, padded(every, 6))
    alone = [evaluate(net, padded([t], 1)) for t in every]
    for name in ("accuracy", "loss"):
        gap = torch.tensor([one["tokens"] * (one[name] - found[name]) for one in alone], dtype=torch.float64)
        assert found[f"{name}_se"] == pytest.approx(float(gap.square().sum().sqrt()) / found["tokens"])


def test_bits_per_byte_need_the_bytes_of_every_batch():
    batches = list(padded(texts(), 7))
    del batches[1]["bytes"]
    assert "bits_per_byte" not in evaluate(Bigrams(), batches)


def test_labels_that_do_not_count_and_labels_that_there_are_not():
    x, y = data()
    some = y.where(torch.arange(101) % 3 > 0, -100)
    assert evaluate(nn.Identity(), [(x, some)])["loss"] == pytest.approx(float(nn.functional.cross_entropy(x, some)))
    with pytest.raises(ValueError, match="the model has 4 classes, but labels run from 0 to 7"):
        evaluate(nn.Identity(), [(x, y + (y == 3) * 4)])
    assert evaluate(nn.Identity(), [(x, y[:, None])]) == evaluate(nn.Identity(), [(x, y)])
    with pytest.raises(ValueError, match=r"one class label per prediction, but Identity predicts \(101, 4\) for labels \(101, 2\)"):
        evaluate(nn.Identity(), [(x, y[:, None].expand(-1, 2))])


def test_a_label_behind_padding_does_not_count():
    from nodelens.network.batch import Batch

    ids, mask = torch.arange(10).reshape(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 1]])
    batch = Batch.of({"input_ids": ids, "labels": ids, "attention_mask": mask, "bytes": torch.tensor([3, 4])}, task="causal_lm")
    assert batch.labels.tolist() == [[-100, -100, -100, 3, 4], [5, 6, -100, -100, 9]]
    assert batch.predicted.tolist() == [2, 2]
    assert set(batch.kwargs) == {"input_ids", "attention_mask"}
    assert batch.head(1).bytes.tolist() == [3]
