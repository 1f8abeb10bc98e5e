"""A loss that is a mean over the batch is found and scaled to a sum; a contrastive one is used as it is."""

import copy

import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.testing import assert_close

import nodelens as nl
from nodelens.analysis.supernodes.hidden import HiddenPass, UnitSums
from nodelens.network.loss_scale import ScaledLoss, as_sum
from nodelens.network.objective import Objective
from nodelens.training.finetune import Finetune

WEIGHTS = torch.tensor([1.0, 2.0, 5.0])


def tokens(shift, reduction="mean"):
    def loss(z, y):
        z, y = (z[:, :-1], y[:, 1:]) if shift else (z, y)
        return cross_entropy(z.flatten(0, 1), y.flatten(), reduction=reduction)

    return loss


def contrastive(z, y):
    z = normalize(z, dim=1)
    near = z @ z.T / 0.5 - 1e9 * torch.eye(len(z))
    return cross_entropy(near, torch.arange(len(z)).roll(1))


def made(*shape, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, classes, generator=g), torch.randint(classes, shape, generator=g)


IMAGES, TEXTS = made(12), made(6, 9, seed=1)
SOME = IMAGES[0], IMAGES[1].where(torch.arange(12) % 3 > 0, -100)
PADDED = TEXTS[0], TEXTS[1].where(torch.arange(9) < torch.tensor([9, 7, 2, 8, 5, 3])[:, None], -100)
NUMBERS = IMAGES[0], torch.randn(12, 3, generator=torch.Generator().manual_seed(2))
PIXELS = made(6, 9, seed=3)[0].movedim(2, 1), made(6, 9, seed=3)[1]  # classes on the second axis
MEANS = {
    "classes": (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), IMAGES, "labels"),
    "some classes": (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), SOME, "labels"),
    "ignored class": (nn.CrossEntropyLoss(ignore_index=1), nn.CrossEntropyLoss(ignore_index=1, reduction="sum"), IMAGES, "labels"),
    "weighted": (nn.CrossEntropyLoss(WEIGHTS), nn.CrossEntropyLoss(WEIGHTS, reduction="sum"), IMAGES, "class weights"),
    "numbers": (nn.MSELoss(), nn.MSELoss(reduction="sum"), NUMBERS, "labels"),
    "unlabelled": (lambda z, y: z.square().sum(1).mean(), lambda z, y: z.square().sum(), (IMAGES[0], None), "samples"),
    "next token": (tokens(True), tokens(True, "sum"), PADDED, "predicted tokens"),
    "next token, full": (tokens(True), tokens(True, "sum"), TEXTS, "predicted tokens"),
    "tags": (tokens(False), tokens(False, "sum"), PADDED, "labels"),
    "pixels": (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), PIXELS, "labels"),
    "tags, full": (tokens(False), tokens(False, "sum"), TEXTS, "labels"),
}


@pytest.mark.parametrize("case", MEANS)
def test_a_mean_becomes_the_sum(case):
    mean, total, (z, y), over = MEANS[case]
    loss = ScaledLoss(mean)
    with pytest.warns(UserWarning, match=f"loss= is a mean over the {over} of a batch: it is multiplied by their number"):
        first = loss(z, y)
    assert loss.about["loss_scale"] == f"mean over {over}, multiplied by their number"
    assert_close(first, total(z, y))
    for part in (slice(1), slice(3, 8)):  # and of other batches, without another warning
        assert_close(loss(z[part], None if y is None else y[part]), total(z[part], None if y is None else y[part]))


@pytest.mark.parametrize("case", MEANS)
def test_a_sum_is_left_as_it_is(case):
    _, total, (z, y), _ = MEANS[case]
    loss = ScaledLoss(total)
    assert_close(loss(z, y), total(z, y), rtol=0, atol=0)
    assert loss.about["loss_scale"] == "sum"


def test_one_sample_tells_too():
    z, y = IMAGES[0][:1], IMAGES[1][:1]
    loss = ScaledLoss(nn.CrossEntropyLoss())
    with pytest.warns(UserWarning, match="is a mean over the labels"):
        loss(z, y)
    assert_close(loss(*IMAGES), nn.CrossEntropyLoss(reduction="sum")(*IMAGES))
    assert ScaledLoss(nn.CrossEntropyLoss(reduction="sum"))(z, y) > 0  # no warning


def test_a_batch_without_labels_has_no_mean():
    loss = ScaledLoss(nn.CrossEntropyLoss())
    with pytest.warns(UserWarning, match="is a mean over the labels"):
        loss(*IMAGES)
    z = IMAGES[0].clone().requires_grad_()
    loss(z, torch.full((12,), -100)).backward()
    assert z.grad is not None
    assert not z.grad.any()


def test_a_contrastive_loss_is_used_as_it_is():
    loss = ScaledLoss(contrastive)
    with pytest.warns(
        UserWarning, match=r"loss= neither adds up nor averages over samples \(.* for the first batch, .* for its parts\)"
    ):
        value = loss(*IMAGES)
    assert value == contrastive(*IMAGES)
    assert loss.about == {"loss": "contrastive", "loss_scale": "neither a sum nor a mean"}


def test_a_loss_of_whole_batches_only_is_used_as_it_is():
    def pairs(z, y):
        return (z.reshape(2, 6, 3)[0] - z.reshape(2, 6, 3)[1]).square().sum()

    with pytest.warns(UserWarning, match="it cannot be computed for a part of the batch: RuntimeError"):
        assert ScaledLoss(pairs)(*IMAGES) == pairs(*IMAGES)


def test_a_loss_of_zero_decides_nothing():
    loss = ScaledLoss(lambda z, y: z.square().mean())
    assert loss(torch.zeros(4, 3), None) == 0
    assert loss.about["loss_scale"] == "unknown"
    with pytest.warns(UserWarning, match="is a mean over the samples"):
        loss(torch.ones(4, 3), None)


def test_a_loss_of_several_numbers_is_refused():
    with pytest.raises(ValueError, match=r"loss= returns a tensor \(12,\) for a batch of 12 samples: return one number, their sum"):
        ScaledLoss(nn.CrossEntropyLoss(reduction="none"))(*IMAGES)
    with pytest.raises(ValueError, match="loss= returns float for a batch of 12 samples"):
        ScaledLoss(lambda z, y: 1.0)(*IMAGES)


def test_a_loss_is_examined_once(net):
    loss = as_sum(nn.MSELoss())
    assert as_sum(loss) is loss
    objective = Objective.of(net, loss=loss)
    assert objective.loss is loss
    assert objective.settled(net, batches(4)[0]).loss is loss


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def batches(size, n=60):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.mark.parametrize("size", [1, 7, 60])
def test_scores_do_not_depend_on_the_batch_size(net, size):
    names = ["taylor", "taylor_saliency", "scar_loss_proxy"]
    expected = nl.analyze(net, batches(13), names)
    with pytest.warns(UserWarning, match="is a mean over the labels"):
        found = nl.analyze(net, batches(size), names, loss=nn.CrossEntropyLoss())
    assert_frame_equal(found.units, expected.units, rtol=1e-9)
    about = {"task": "classification", "loss": "CrossEntropyLoss", "loss_scale": "mean over labels, multiplied by their number"}
    assert found.metadata["objective"] == about
    assert expected.metadata["objective"] == {"task": "classification"}


def test_pruning_does_not_depend_on_the_batch_size(net):
    expected = nl.prune(net, "taylor", 0.5, data=batches(13))
    for size in (7, 60):
        with pytest.warns(UserWarning, match="is a mean over the labels"):
            found = nl.prune(net, "taylor", 0.5, data=batches(size), loss=nn.CrossEntropyLoss())
        assert_frame_equal(found.table, expected.table, rtol=1e-9)


def test_supernode_sums_do_not_depend_on_the_batch_size(net):
    groups = nl.find_groups(net, torch.randn(2, 4, dtype=torch.float64))

    def sums(size, **loss):
        hidden, found = HiddenPass(net, list(groups), "token", "sum", 4, 0), UnitSums(groups, 4, torch.device("cpu"))
        hidden.run(batches(size), found, Objective.of(net, task="classification", **loss))
        return found.found

    expected = sums(13)
    for size in (7, 60):
        with pytest.warns(UserWarning, match="is a mean over the labels"):
            found = sums(size, loss=nn.CrossEntropyLoss())
        for key, value in found.items():
            assert_close(value, expected[key], rtol=1e-9, atol=1e-12)


def test_an_evaluation_takes_a_mean_for_a_mean(net):
    expected = nl.evaluate(net, batches(13))["loss"]
    for size in (7, 60):
        with pytest.warns(UserWarning, match="is a mean over the labels"):
            assert nl.evaluate(net, batches(size), loss=nn.CrossEntropyLoss())["loss"] == pytest.approx(expected, rel=1e-9)


def test_fine_tuning_takes_a_mean_for_a_mean(net):
    nets = copy.deepcopy(net), copy.deepcopy(net)
    Finetune(batches(20), batches(20), epochs=1)(nets[0], lambda model: None)
    with pytest.warns(UserWarning, match="is a mean over the labels"):
        Finetune(batches(20), batches(20), epochs=1, loss=nn.CrossEntropyLoss())(nets[1], lambda model: None)
    assert not torch.equal(nets[0][0].weight, net[0].weight)
    assert_close(nets[1][0].weight, nets[0][0].weight)
