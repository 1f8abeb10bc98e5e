"""Pruning groups of convolutional networks and perceptrons: slicing equals masking, and what is not understood is frozen."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import Net, assert_exact, assert_same, between, conv, images, output, removal, rows, seeded, space
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
)

import nodelens as nl
from nodelens.models.hf import resnet
from nodelens.network.batch import Batch
from nodelens.pruning.groups.graph import graph_groups
from nodelens.pruning.groups.graph_ids import joined
from nodelens.pruning.surgery.mask import masked, zero
from nodelens.pruning.surgery.slice import slice_units


def classes(n: int = 5) -> dict:
    return {"num_labels": n}


FAMILIES = {
    "resnet18": (lambda: resnet(18, classes=5, channels=3, size=32, width=8), 12, 12),
    "resnet50": (lambda: resnet(50, classes=5, channels=3, size=32, width=8), 37, 37),
    "mobilenet_v2": (lambda: MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, **classes())), 25, 25),
    "regnet_y": (
        lambda: RegNetForImageClassification(
            RegNetConfig(embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[1, 2, 1, 1], groups_width=8, **classes())
        ),
        20,
        20,
    ),
    "efficientnet": (
        lambda: EfficientNetForImageClassification(
            EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320, **classes())
        ),
        28,
        28,
    ),
    "convnext": (
        lambda: ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], **classes())),
        9,
        5,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_of_a_family_is_its_mask(family):
    build, groups, exact = FAMILIES[family]
    model, x = seeded(build()), images(32, 2)
    found = graph_groups(model, Batch.of(x))
    kept = [group for group in found if group.exact]
    assert (len(found), len(kept)) == (groups, exact)
    assert all("reads the model's input" in f.reason or "the model's output" in f.reason for f in found.frozen)
    assert_exact(model, kept, x)


@pytest.mark.parametrize(("depth", "groups", "dense", "half"), [(18, 12, 11_181_642, 2_801_450), (50, 37, 23_528_522, 5_902_890)])
def test_the_numbers_of_full_resnets(depth, groups, dense, half):
    model = resnet(depth, classes=10, channels=3, size=224)
    found = graph_groups(model, Batch.of(images(32).float()))
    assert len(found) == groups
    assert found.coverage(model) == pytest.approx(1, abs=1e-3)
    assert sum(p.numel() for p in model.parameters()) == dense
    slice_units(model, found, {group.name: range(group.n // 2) for group in found})
    assert sum(p.numel() for p in model.parameters()) == half


# --- small versions of published architectures


class Block(nn.Module):
    """A residual block whose shortcut is padded with zero channels."""

    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(i, o, stride=stride, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = conv(o, o, bias=False), nn.BatchNorm2d(o)
        self.pad, self.stride = (o - i) // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


def cifar() -> nn.Module:
    """ResNet-20, narrow."""
    stem = [conv(3, 4, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    blocks = [Block(w // 2 if w > 4 and not k else w, w, 2 if w > 4 and not k else 1) for w in (4, 8, 16) for k in range(3)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def mnist() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(m.conv1(x)), 2)
        x = F.max_pool2d(F.relu(m.conv2(x)), 2)
        return m.fc2(F.relu(m.fc1(x.flatten(1))))

    return Net(forward, conv1=conv(3, 6), conv2=conv(6, 10), fc1=nn.Linear(40, 12), fc2=nn.Linear(12, 5))


def grouped() -> nn.Module:
    middle = [nn.ReLU(), conv(12, 8, groups=4), nn.BatchNorm2d(8), conv(8, 6)]
    return nn.Sequential(conv(3, 12), *middle, nn.Flatten(), nn.Linear(384, 5))


def spatial(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(conv(i, i, groups=i), nn.BatchNorm2d(i), nn.ReLU6(), conv(i, o, 1), nn.BatchNorm2d(o))


def separable() -> nn.Module:
    return nn.Sequential(conv(3, 8), spatial(8, 10), spatial(10, 6), nn.Flatten(), nn.Linear(384, 5))


def concatenated() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        for layer, norm in ((m.a, m.na), (m.b, m.nb)):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        return m.head(F.avg_pool2d(m.last(x), 4).flatten(1))

    norms = {"na": nn.BatchNorm2d(4), "nb": nn.BatchNorm2d(10)}
    return Net(forward, stem=conv(3, 4), a=conv(4, 6), b=conv(10, 5), last=conv(15, 7), head=nn.Linear(28, 5), **norms)


def squeezed() -> nn.Module:
    """Published squeeze-and-excite code reads its widths from the tensor; in the exported graph they are constants."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.bn(m.stem(x))
        b, c, _, _ = x.size()
        gate = m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1).view(b, c))))
        return m.head((x * gate.sigmoid().view(b, c, 1, 1).expand_as(x)).amax((2, 3)))

    gate = {"down": nn.Linear(8, 4), "up": nn.Linear(4, 8)}
    return Net(forward, stem=conv(3, 8), bn=nn.BatchNorm2d(8, affine=False), head=nn.Linear(8, 5), **gate)


def twice() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        for _ in range(2):
            x = F.gelu(m.bn(m.again(x)))
        return m.head(space(x))

    return Net(forward, stem=conv(3, 8), again=conv(8, 8), bn=nn.BatchNorm2d(8), head=nn.Linear(8, 5))


def tokens() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.silu(m.embed(x.flatten(2).transpose(1, 2)))
        x = x + m.b(F.elu(m.a(x)))
        return m.head(x.transpose(1, 2).softmax(-1).max(-1)[0])

    return Net(forward, embed=nn.Linear(3, 8), a=nn.Linear(8, 11), b=nn.Linear(11, 8), head=nn.Linear(8, 5))


def scaled() -> nn.Module:
    """Bare parameters with one entry per channel, PReLU, a transposed convolution, a norm without parameters, spatial padding."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.interpolate(m.prelu(m.stem(x)), scale_factor=2) * m.gamma.view(1, -1, 1, 1)
        x = F.pad(x, (1, 1, 0, 2)) + m.spread
        x = F.dropout(F.hardtanh_(m.norm(m.up(x))), 0.5, m.training)
        return m.head(torch.maximum(x, -x)[:, :, 1:, ::2].sum((2, 3)).reshape(len(x), -1))

    scales = {"gamma": nn.Parameter(torch.ones(8)), "spread": nn.Parameter(torch.ones(1, 8, 1, 1)), "prelu": nn.PReLU(8)}
    later = {"up": nn.ConvTranspose2d(8, 10, 2, 2), "norm": nn.InstanceNorm2d(10), "head": nn.Linear(10, 5)}
    return Net(forward, stem=conv(3, 8), **scales, **later)


def residual() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.bn(m.a(x.flatten(1))))
        x = x + m.c(torch.tanh(m.b(x)))
        x += m.d(x).sigmoid()
        return m.head(x)

    rest = {"b": nn.Linear(9, 7), "c": nn.Linear(7, 9), "d": nn.Linear(9, 9), "head": nn.Linear(9, 5)}
    return Net(forward, a=nn.Linear(192, 9), bn=nn.BatchNorm1d(9), **rest)


def sides() -> nn.Module:
    """A small U-Net, which also concatenates the image."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a = F.relu(m.a(x))
        b = m.up(F.relu(m.b(F.max_pool2d(a, 2))))
        return m.head(space(m.c(torch.cat([a, b, x], 1))))

    up = nn.ConvTranspose2d(9, 4, 2, 2)
    return Net(forward, a=conv(3, 6), b=conv(6, 9), up=up, c=conv(13, 7), head=nn.Linear(7, 5))


def halves() -> nn.Module:
    """The channels of one layer are tied to those of two others."""
    return Net(
        lambda m, x: m.head(space(m.a(x) * torch.cat([m.b(x), m.c(x)], 1))),
        **{"a": conv(3, 8), "b": conv(3, 3), "c": conv(3, 5), "head": nn.Linear(8, 5)},
    )


PLAIN = {
    mnist: "conv1 conv2 fc1",
    cifar: "3.conv1 4.conv1 5.conv1 6.conv1 7.conv1 8.conv1 9.conv1 10.conv1 11.conv1",
    grouped: "0 2 4",
    separable: "0 1.3 2.3",
    concatenated: "stem a b last",
    squeezed: "stem down",
    twice: "stem",
    tokens: "embed a",
    scaled: "stem up",
    residual: "a b",
    sides: "a b up c",
    halves: "a a:1",
}


@pytest.mark.parametrize("build", PLAIN, ids=lambda build: build.__name__)
def test_a_slice_of_a_small_network_is_its_mask(build):
    model, x = seeded(build()), images()
    groups = graph_groups(model, Batch.of(x))
    assert " ".join(group.name for group in groups) == PLAIN[build]
    assert all(group.exact for group in groups)
    assert_exact(model, groups, x)


def test_zeros_in_the_tensors_are_a_mask_too():
    for build in (grouped, separable, concatenated, squeezed):
        model, x = seeded(build()), images()
        groups = graph_groups(model, Batch.of(x))
        removed = removal(groups, 1)
        with masked(model, groups, removed):
            mask = output(model, x)
        zero(model, groups, removed)
        assert_same(mask, output(model, x))


# --- norms over the channels: slicing differs from masking, but the positions are the same


def widened() -> nn.Module:
    """A channels-last block as in ConvNeXt, followed by a group norm."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.wide(m.ln(m.filter(x).permute(0, 2, 3, 1)))
        x = x + (m.scale * m.narrow(F.gelu(y))).permute(0, 3, 1, 2)
        return m.head(space(F.relu(m.gn(m.last(x)))))

    block = {"filter": conv(8, 8, groups=8), "ln": nn.LayerNorm(8), "wide": nn.Linear(8, 20), "narrow": nn.Linear(20, 8)}
    later = {"last": conv(8, 12), "gn": nn.GroupNorm(3, 12), "head": nn.Linear(12, 5)}
    return Net(forward, stem=conv(3, 8), scale=nn.Parameter(torch.ones(8)), **block, **later)


def test_a_group_that_a_norm_reduces_over_is_approximate():
    groups = graph_groups(seeded(widened()), Batch.of(images()))
    assert {group.name: (group.n, group.exact) for group in groups} == {"stem": (8, False), "wide": (20, True), "last": (4, False)}
    mlp = seeded(nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 7), nn.BatchNorm1d(7), nn.Linear(7, 5)))
    groups = graph_groups(mlp, Batch.of(rows(4, 6)))
    assert [(group.name, group.exact) for group in groups] == [("0", False), ("3", True)]
    assert_exact(mlp, groups.chosen(), rows(4, 6))


@pytest.mark.parametrize("build", [widened, FAMILIES["convnext"][0]], ids=["widened", "convnext"])
def test_the_positions_of_approximate_groups_are_right(build, monkeypatch):
    """Without statistics over the channels every group is exact: only the norm's parameters remain."""
    model, x = seeded(build()), images(32, 2)
    groups = graph_groups(model, Batch.of(x))
    assert not all(group.exact for group in groups)
    monkeypatch.setattr(F, "layer_norm", lambda x, shape, w, b, eps: x * w + b)
    monkeypatch.setattr(F, "group_norm", lambda x, groups, w, b, eps: x * w[:, None, None] + b[:, None, None])
    assert_exact(model, groups, x)


# --- what is frozen


def shared() -> nn.Module:
    net = Net(lambda m, x: m.head(space(m.b(m.a(x)))), a=conv(3, 3), b=conv(3, 3), head=nn.Linear(3, 5))
    net.b.weight = net.a.weight
    return net


@torch.library.custom_op("nodelens_test::relu", mutates_args=())
def namesake(x: Tensor) -> Tensor:
    """An operation of another library with the name of a known one."""
    return x.flip(1).clone()


namesake.register_fake(torch.empty_like)
weight_norm, spectral_norm = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm
fixed = nn.LayerNorm(8, elementwise_affine=False)
STAY = {  # the operation in between: groups that remain, the layer reported as frozen, the reason
    "an unknown operation": (between(lambda m, x: space(x.cumsum(1))), "a", "b", "cumsum in the model is not understood"),
    "another library's": (between(lambda m, x: space(namesake(x))), "a", "b", "relu in the model is not understood"),
    "a rotation": (between(lambda m, x: space(x.roll(1, 1))), "a", "b", "roll in the model moves entries along them"),
    "blocks of two sizes": (
        between(lambda m, x: space(x.split([3, 5], 1)[1]), 5), "a", "b", "split_with_sizes in the model takes blocks of 3, 5 units",
    ),
    "padded channels": (between(lambda m, x: space(F.pad(x, (0, 0, 0, 0, 2, 2))), 12), "a", "b", "pad in .* changes the number"),
    "a constant map": (between(lambda m, x: space(x * torch.arange(8.0)[:, None, None])), "a", "b", "mul in .* combines them with"),
    "a weight norm": (between(lambda m, x: space(x), b=weight_norm(conv(6, 8))), "", "b", "weights that are computed from others"),
    "a spectral norm": (between(lambda m, x: space(x), b=spectral_norm(conv(6, 8))), "", "a", "are computed from others"),
    "a bare parameter": (
        between(lambda m, x: F.linear(space(x), m.w), 6, w=nn.Parameter(torch.ones(6, 8))), "a", "b", "the parameter w outside",
    ),
    "computed weights": (
        between(lambda m, x: F.linear(F.linear(space(x), m.w * 2)[:, :4], m.w[:6, :4] * 2), 6, w=nn.Parameter(torch.ones(9, 8))),
        "a", "b", "linear in the model has weights that are computed from others",
    ),
    "a weight without its module": (
        between(lambda m, x: F.linear(space(x), m.c.weight), 6, c=nn.Linear(8, 6)), "a", "c", "weight of c without calling",
    ),
    "a weight as data": (between(lambda m, x: space(x) * m.b.weight.std()), "", "b", "weight of b is also read outside its layer"),
    "a shared weight": (shared, "", "a", "has a weight that several modules share"),
    "a width in a reshape": (
        between(lambda m, x: m.c(x).reshape(-1, 384), 384, c=conv(8, 6)), "a b", "c", "the model does not run: ",
    ),
    "a width in a product": (between(lambda m, x: space(x) / x.shape[1]), "a", "b", "slicing and masking differ by "),
    "a width in a norm": (between(lambda m, x: m.norm(space(x)), norm=fixed), "a", "b", "the model does not run: "),
}  # fmt: skip


@pytest.mark.parametrize("case", STAY)
def test_what_is_not_understood_is_frozen_and_named(case):
    build, names, what, reason = STAY[case]
    model, x = seeded(build()), images()
    groups = graph_groups(model, Batch.of(x))
    assert " ".join(group.name for group in groups) == names
    found = {f.what: f.reason for f in groups.frozen}
    assert re.match(rf"\d+ units: .*{reason}", found[what])
    if names:
        assert_exact(model, groups, x)


def test_channels_of_the_output_are_frozen():
    model = seeded(Net(lambda m, x: (m.head(torch.cat([m.a(x), m.b(x)], 1)), m.b(x)), a=conv(3, 4), b=conv(3, 6), head=conv(10, 5)))
    groups = graph_groups(model, Batch.of(images()))
    assert [group.describe() for group in groups] == ["a > head"]
    assert [(f.what, f.reason) for f in groups.frozen] == [
        ("the input of a", "3 units: reads the model's input"),
        ("the input of b", "3 units: reads the model's input"),
        ("b", "6 units: the model's output"),
        ("head", "5 units: the model's output"),
    ]


def test_places_of_a_unit():
    groups = graph_groups(seeded(grouped()), Batch.of(images()))
    first, middle, last = groups
    (reads,) = first.by_role("consumer")
    assert [group.n for group in groups] == [3, 2, 6]
    assert reads.index.tolist() == [[0], [1], [2]]  # one column in each of the 4 groups
    assert reads.reads.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert [piece.index[1].tolist() for piece in middle.slices[:2]] == [[1, 3, 5, 7]] * 2
    assert last.by_role("consumer")[0].index.equal(torch.arange(384).reshape(6, 64))
    assert {piece.index.dtype for group in groups for piece in group.slices} == {torch.int64}
    (patch,) = graph_groups(seeded(separable()), Batch.of(images()))[0].counts
    assert (patch.module, patch.attribute, patch.step) == ("1.0", "groups", 1)


# --- the model, the batch, the ties


def test_the_model_is_left_as_it_was():
    model = resnet(18, classes=5, channels=3, size=32, width=8).train()
    model.classifier[1].eval()
    model.classifier[1].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = graph_groups(model, Batch.of({"pixel_values": images(32, 1).float(), "labels": torch.tensor([1])}))  # a single sample
    assert len(groups) == 12
    assert model.training
    assert not model.classifier[1].training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["classifier.1.bias"]
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_forward_that_does_not_export_is_named():
    model = Net(lambda m, x: m.a(x) if x.sum() > 0 else x, a=conv(3, 3))
    with pytest.raises(ValueError, match=r"cannot trace the forward pass of Net: .*custom_groups=.*can be exported"):
        graph_groups(model, Batch.of(images().float()))


def test_ties_give_the_same_classes_as_merging_one_by_one():
    g = torch.Generator().manual_seed(0)
    ties = [(torch.randint(200, (40,), generator=g), torch.randint(200, (40,), generator=g)) for _ in range(3)]
    ties.append((torch.arange(500, 599), torch.arange(501, 600)))  # a long chain
    label = list(range(600))
    for a, b in zip(*(torch.cat(side).tolist() for side in zip(*ties, strict=True)), strict=True):
        low, high = sorted((label[a], label[b]))
        label = [low if k == high else k for k in label]
    assert joined(600, ties).tolist() == label
    assert joined(3, []).tolist() == [0, 1, 2]


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


@pytest.mark.filterwarnings("ignore")  # the oracle's own, on what torch deprecates
@pytest.mark.parametrize("family", FAMILIES)
def test_an_oracle_finds_the_same_groups(family):
    """The groups of torch-pruning, and its parameter count after removing half of each."""
    oracle = pytest.importorskip("torch_pruning")
    model, x = seeded(FAMILIES[family][0]()).float(), images(32, 2).float()
    groups, other = graph_groups(model, Batch.of(x)), Logits(copy.deepcopy(model))
    slice_units(model, groups, {group.name: range(group.n // 2) for group in groups})
    classifier = [m for m in other.modules() if isinstance(m, nn.Linear)][-1]
    scales = [(p, 0) for name, p in other.named_parameters() if "layer_scale" in name]  # it has to be told of bare parameters
    pruner = oracle.pruner.BasePruner(
        other, x, oracle.importance.RandomImportance(), pruning_ratio=0.5, ignored_layers=[classifier], unwrapped_parameters=scales
    )
    assert len(list(pruner.DG.get_all_groups(ignored_layers=[classifier]))) == len(groups)
    pruner.step()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in other.parameters())


def test_groups_are_found_with_a_plain_batch():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    for batch in (torch.ones(2, 4), (torch.ones(2, 4), torch.zeros(2, dtype=torch.long))):
        assert [(group.name, group.n) for group in nl.find_groups(net, batch)] == [("0", 8)]
