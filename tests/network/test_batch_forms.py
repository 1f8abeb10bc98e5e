"""Batches as loaders give them: every form that holds the same samples has the same numbers, and others say what is wrong."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import nodelens as nl
from nodelens.network.batch_forms import read

X, B = (torch.randn(24, width, generator=torch.Generator().manual_seed(width)) for width in (4, 2))
Y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(0))
METRICS = ["activation_mean", "rq", "taylor", "class_mi"]


def built(kind, *args):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(*args)


def mlp():
    return built(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))


@pytest.fixture(scope="module")
def expected():
    return numbers(mlp(), [(X, Y)])


def numbers(net, data, metrics=METRICS):
    return (
        nl.analyze(net, data, metrics).units[metrics].to_numpy(),
        nl.evaluate(net, data),
        {name: list(map(int, gone)) for name, gone in nl.prune(net, "taylor", 0.5, data=data).plan.removed.items()},
    )


def check(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert found[1] == pytest.approx(expected[1])
    assert found[2] == expected[2]


SAME = {
    "int32": [(X, Y.int())],
    "uint8": [(X, Y.byte())],
    "int16": [(X, Y.short())],
    "a column": [(X, Y[:, None])],
    "a list": [(X, Y.tolist())],
    "arrays": [(X.numpy(), Y.numpy())],
    "a flipped array": [(X.numpy()[:, ::-1][:, ::-1], Y.numpy())],
    "a dict of arrays": [{"x": X.numpy(), "y": Y.numpy()}],
    "no rows first": [(X[:0], Y[:0]), (X, Y)],
    "no rows between": [(X[:9], Y[:9]), (X[:0], Y[:0]), (X[9:], Y[9:])],
    "no rows last": [(X, Y), (X[:0], Y[:0])],
}


@pytest.mark.parametrize("form", SAME)
def test_forms_of_the_same_samples_have_the_same_numbers(form, expected):
    check(numbers(mlp(), SAME[form]), expected)


def test_labels_that_are_booleans_are_two_classes():
    net = built(nn.Linear, 4, 2)
    found, same = (nl.analyze(net, [(X, labels)], METRICS).units for labels in (Y > 0, (Y > 0).long()))
    assert found.equals(same)


@pytest.mark.parametrize("labels", [torch.eye(3)[Y], torch.eye(3)[Y].long(), torch.eye(3)[Y].bool(), Y.float(), Y.float()[:, None]])
def test_labels_that_are_no_classes_name_the_ways_out(labels):
    net = mlp()
    for call in (
        lambda: nl.evaluate(net, [(X, labels)]),
        lambda: nl.prune(net, "taylor", 0.5, data=[(X, labels)]),
        lambda: nl.analyze(net, [(X, labels)], ["taylor"]),
    ):
        with pytest.raises(ValueError, match=r"no classes: give task=regression or task=multilabel.*argmax\(1\) of one-hot"):
            call()
    with pytest.raises(ValueError, match=r"class_mi needs one class per sample, but the labels are .* numbers: give integers"):
        nl.analyze(net, [(X, labels)], ["class_mi"])
    if labels.ndim > 1 and labels.shape[1] == 3:
        assert nl.evaluate(net, [(X, labels)], task="multilabel")["samples"] == 24


def test_labels_that_are_no_numbers_are_named():
    with pytest.raises(ValueError, match=r"the labels of a batch are a list of 24: \(str, .*: give a tensor of numbers"):
        nl.evaluate(mlp(), [(X, ["cat"] * 24)])


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(2, 5), nn.Linear(5, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(a) + self.b(b)))


@pytest.mark.parametrize("form", [((X, B), Y), ([X, B], Y), ({"a": X, "b": B}, Y), ((X.numpy(), B.numpy()), Y.numpy())], ids=str)
def test_a_pair_may_have_several_inputs(form):
    net = built(Two)
    check(numbers(net, [form]), numbers(net, [{"a": X, "b": B, "labels": Y}]))


def test_three_tensors_are_not_guessed():
    with pytest.raises(
        ValueError, match=r"not a tuple of 3: \(Tensor, Tensor, Tensor\); with several inputs, give \(\(a, b\), y\)"
    ):
        nl.evaluate(built(Two), [(X, B, Y)])


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(4, 5), nn.Linear(5, 3)

    def run(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x)))


class TakesY(Named):
    def forward(self, y):
        return self.run(y)


class TakesLabels(Named):
    def forward(self, labels):
        return self.run(labels)


class TakesIds(Named):
    def forward(self, ids):
        return self.run(ids)


@pytest.mark.parametrize(
    ("kind", "batch"),
    [
        (TakesY, {"y": X, "labels": Y}),
        (TakesLabels, {"labels": X, "y": Y}),
        (TakesIds, {"ids": X, "labels": Y}),
        (TakesIds, {"ids": X, "labels": Y, "sample_ids": torch.arange(24)}),
    ],
)
def test_an_input_may_be_named_y_labels_or_ids(kind, batch):
    net = built(kind)
    check(numbers(net, [batch], ["activation_mean", "taylor"]), numbers(built(TakesY), [(X, Y)], ["activation_mean", "taylor"]))


def test_ids_that_the_model_does_not_need_identify_samples():
    assert read({"x": X, "ids": torch.arange(24)}).ids is not None
    assert read({"ids": X, "sample_ids": torch.arange(24)}, {"ids"}).kwargs.keys() == {"ids"}


def test_images_of_bytes_and_wide_inputs_say_what_to_convert():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    data = [(torch.randint(255, (24, 3, 8, 8), dtype=torch.uint8), Y)]
    words = (
        r"input 0 \(\d+, 3, 8, 8\) is uint8, the weights of Sequential are float32: convert the input to what .* x.float\(\) / 255"
    )
    for call in (nl.evaluate, nl.analyze, lambda net, data: nl.prune(net, data=data)):
        with pytest.raises(ValueError, match=words):
            call(net, data)
    with pytest.raises(ValueError, match="is float64, the weights of Sequential are float32: convert the input to float32"):
        nl.evaluate(mlp(), [(X.double().numpy(), Y)])


class Corrupt(Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, k):
        if k == 5:
            raise OSError("image file is truncated")
        return torch.randn(4), 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_names_its_batch(workers):
    with pytest.raises(ValueError, match=r"^batch 2 of the data \(counted from 0\) cannot be read: .*image file is truncated$"):
        nl.evaluate(mlp(), DataLoader(Corrupt(), batch_size=2, num_workers=workers))
    if not workers:
        with pytest.raises(ValueError, match=r"^batch 0 of the data \(counted from 0\) cannot be read: image file is truncated$"):
            nl.analyze(mlp(), DataLoader(Corrupt(), batch_size=6))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ((X[:, :3], Y), "mat1 and mat2 shapes cannot be multiplied"),
        ((X, Y[:5]), "a batch has 24 samples and 5 labels"),
        ((X, Y + 7), "the model has 3 classes, but labels run from 7"),
        ("text", "a batch is a tensor, an .* not a str"),
    ],
)
def test_a_bad_batch_is_named_with_its_number(bad, words):
    for call in (
        nl.evaluate,
        lambda net, data: nl.analyze(net, data, ["taylor"]),
        lambda net, data: nl.Supernodes(scope="channel", draws=2)(net, data),
    ):
        with pytest.raises(ValueError, match=rf"^batch 1 of the data \(counted from 0\): .*{words}"):
            call(mlp(), [(X, Y), bad])


class Counting(nn.Linear):
    """A layer with a state that is no tensor."""

    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        assert state == {"seen": 3}


@pytest.mark.filterwarnings("ignore:`isinstance")
def test_a_state_that_is_no_tensor_is_left_alone(tmp_path, expected):
    net = nn.Sequential(Counting(4, 8), nn.ReLU(), nn.Linear(8, 3))
    net[0].load_state_dict(mlp()[0].state_dict() | {"_extra_state": {"seen": 3}})
    net[2].load_state_dict(mlp()[2].state_dict())
    check(numbers(net, [(X, Y)]), expected)
    pruned = nl.prune(net, "magnitude", 0.3, data=[(X, Y)], finetune=nl.Finetune([(X, Y)], [(X, Y)], epochs=1))
    with pytest.raises(ValueError, match=r"stores more than tensors .0._extra_state., which safetensors cannot hold: keep it with"):
        pruned.save(tmp_path)
