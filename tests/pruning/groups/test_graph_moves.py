"""Operations that move, split and merge channels, and attention: slicing equals masking, and the groups are those expected."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import Net, assert_exact, assert_same, between, conv, images, output, rows, seeded, space
from torch import Tensor, nn

import nodelens as nl
from nodelens.network.batch import Batch
from nodelens.pruning.groups.graph import graph_groups
from nodelens.pruning.surgery.mask import masked
from nodelens.pruning.surgery.slice import slice_units


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]


def shuffled(x: Tensor, groups: int = 2) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, -1, h, w)


def response(m: Net, x: Tensor) -> Tensor:
    """Global response normalization."""
    size = x.norm(dim=(2, 3), keepdim=True)
    return x + x * size / (size.mean(1, keepdim=True) + 1e-6)


def each(x: Tensor, n: int) -> list[Tensor]:
    return [x * k for k in range(1, n + 1)]


def image(m: Net, x: Tensor) -> Tensor:
    """Tokens and back."""
    n, c, h, w = x.shape
    return x.flatten(2).transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2)


def selected(m: Net, x: Tensor) -> Tensor:
    """Selective kernels: branches are weighted by a softmax over the branches."""
    branches = torch.stack([x, -x], 1)
    weights = m.up(space(branches.sum(1))).view(len(x), 2, -1, 1, 1).softmax(1)
    return space((branches * weights).sum(1))


TWO = {"one": nn.Linear(5, 5), "two": nn.Linear(3, 5)}
MOVES = {  # what happens between two convolutions of 6 and 8 channels and the head: the units of each group
    "concat": (between(lambda m, x: space(torch.concat([x, 2 * x], 1)), 16), "a 6, b 8"),
    "hstack": (between(lambda m, x: torch.hstack([space(x), space(x).relu()]), 16), "a 6, b 8"),
    "chunk": (between(lambda m, x: space(x.chunk(2, 1)[0]), 4), "a 6, b 4"),
    "split": (between(lambda m, x: space(torch.cat(x.split(x.shape[1] // 2, 1)[::-1], 1).relu())), "a 6, b 4"),
    "a split by attributes": (between(lambda m, x: space(x.split([m.narrow, m.wide], 1)[1]), 6, narrow=2, wide=6), "a 6, b 6"),
    "a split by attributes, all read": (
        between(lambda m, x: m.one(space(x.split([3, m.wide], 1)[1])) + m.two(space(x[:, :3])), 5, wide=5, **TWO),
        "a 6, b 5, one 5",
    ),
    "a split by constants": (between(lambda m, x: space(x.split([2, 6], 1)[1]), 6), "a 6"),
    "unfold": (between(lambda m, x: F.unfold(x, 2, stride=2).mean(2), 32), "a 6, b 8"),
    "unfold and fold": (between(lambda m, x: space(F.fold(F.unfold(x, 3, padding=1).relu(), 8, 3, padding=1))), "a 6, b 8"),
    "windows of positions": (between(lambda m, x: space(x.unfold(2, 4, 2).amax(-1))), "a 6, b 8"),
    "glu": (between(lambda m, x: space(F.glu(x, 1)), 4), "a 6, b 4"),
    "gated by hand": (between(lambda m, x: space(halves(x)[0] * halves(x)[1].sigmoid()), 4), "a 6, b 4"),
    "stack": (between(lambda m, x: space(torch.stack([x, 2 * x]).sum(0))), "a 6, b 8"),
    "stack along positions": (between(lambda m, x: torch.stack(each(space(x), 3), 2).flatten(1), 24), "a 6, b 8"),
    "flip": (between(lambda m, x: space(x.flip(1) + x), 8), "a 6, b 4"),
    "flip of positions": (between(lambda m, x: space(x.flip(2) * x), 8), "a 6, b 8"),
    "roll of positions": (between(lambda m, x: space(x.roll(1, 2) * x), 8), "a 6, b 8"),
    "repeat_interleave": (between(lambda m, x: space(x).repeat_interleave(2, 1), 16), "a 6, b 8"),
    "repeat": (between(lambda m, x: space(x).repeat(1, 2), 16), "a 6, b 8"),
    "channels after the first": (between(lambda m, x: space(x[:, 2:]), 6), "a 6, b 6"),
    "every second channel": (between(lambda m, x: space(x[:, ::2]), 4), "a 6, b 4"),
    "reshape_as": (between(lambda m, x: x.flatten(2).reshape_as(x).mean((2, 3))), "a 6, b 8"),
    "spatial split": (between(lambda m, x: space(torch.cat(x.split([3, 5], 3)[::-1], 3).relu())), "a 6, b 8"),
    "patches": (between(lambda m, x: space(torch.cat([x[:, :, ::2], x[:, :, 1::2]], 1)), 16), "a 6, b 8"),
    "tokens and back": (between(lambda m, x: space(image(m, x))), "a 6, b 8"),
    "pixel_shuffle": (between(lambda m, x: space(F.pixel_shuffle(x, 2).relu()), 2), "a 6, b 2"),
    "pixel_unshuffle": (between(lambda m, x: space(F.pixel_unshuffle(x, 2)), 32), "a 6, b 8"),
    "channel shuffle": (between(lambda m, x: space(shuffled(x).relu())), "a 6, b 4"),
    "torch's channel shuffle": (between(lambda m, x: space(nn.ChannelShuffle(2)(x))), "a 6, b 4"),
    "a norm per channel": (between(lambda m, x: space(m.n(x).relu()), n=nn.GroupNorm(8, 8)), "a 6, b 8"),
    "several filters per channel": (between(lambda m, x: space(m.c(x)), 16, c=conv(8, 16, groups=8)), "a 6, b 8"),
    "selective kernels": (between(selected, up=nn.Linear(8, 16)), "a 6, b 8"),
    "a sum over groups": (between(lambda m, x: space(x.view(len(x), 2, -1, 8, 8).sum(1)), 4), "a 6, b 4"),
}


@pytest.mark.parametrize("case", MOVES)
def test_channels_are_followed_through(case):
    build, expected = MOVES[case]
    model, x = seeded(build()), images()
    groups = graph_groups(model, Batch.of(x))
    assert ", ".join(f"{group.name} {group.n}" for group in groups) == expected
    assert_exact(model, groups.chosen(), x)


REDUCED = {
    "a softmax over channels": lambda m, x: space(x.softmax(1)),
    "a mean over channels": lambda m, x: space(x - x.mean(1, True)),
    "a global response norm": lambda m, x: space(response(m, x)),
    "groups of several channels": lambda m, x: space(F.group_norm(x, 2)),
}


@pytest.mark.parametrize("case", REDUCED)
def test_channels_that_an_operation_reduces_over_are_approximate(case):
    model, x = seeded(between(REDUCED[case])()), images()
    groups = graph_groups(model, Batch.of(x))
    assert {group.name: group.exact for group in groups} == {"a": True, "b": False}
    slice_units(model, groups, {"a": [0], "b": [1]})
    assert output(model, x).shape == (3, 5)


# --- attention


class Attention(nn.Module):
    """Attention with a fused projection; the number of heads is an attribute, which the reshape reads."""

    def __init__(self, width: int, heads: int, per_head: int, kind: str):
        super().__init__()
        self.num_heads, self.attn_dim, self.kind = heads, heads * per_head, kind
        self.qkv, self.proj = nn.Linear(width, 3 * heads * per_head), nn.Linear(heads * per_head, width)
        self.bias = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        if self.kind == "chunk":
            q, k, v = (part.view(n, t, self.num_heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        else:
            q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.kind == "sdpa":
            z = F.scaled_dot_product_attention(q, k, v)
        elif self.kind == "einsum":
            z = torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)
        elif self.kind == "bmm":
            flat = [part.reshape(n * self.num_heads, t, -1) for part in (q, k, v)]
            z = torch.bmm(torch.bmm(flat[0], flat[1].transpose(1, 2)).softmax(-1), flat[2]).view(n, self.num_heads, t, -1)
        else:
            z = (q @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        return self.proj(z.transpose(1, 2).reshape(n, t, self.attn_dim))


class Encoder(nn.Module):
    """Embedded tokens, positions, a class token, one attention block and a head."""

    def __init__(self, attention: nn.Module, width: int = 12):
        super().__init__()
        self.embed, self.attend, self.head = nn.Linear(6, width), attention, nn.Linear(width, 5)
        self.first, self.positions = nn.Parameter(torch.ones(1, 1, width)), nn.Parameter(torch.ones(1, 5, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(len(x), -1, -1), self.embed(x)], 1) + self.positions
        return self.head((x + self.attend(self.norm(x)))[:, 0])


@pytest.mark.parametrize("kind", ["matmul", "sdpa", "einsum", "bmm", "chunk"])
def test_heads_are_found_by_what_attention_computes(kind):
    model, x = seeded(Encoder(Attention(12, 4, 3, kind))), rows(3, 4, 6)
    groups = graph_groups(model, Batch.of(x))
    assert [(g.name, g.kind, g.n, g.exact) for g in groups] == [("embed", "channel", 12, False), ("attend.qkv", "head", 4, True)]
    heads = groups.named("attend.qkv")
    assert {(count.attribute, count.step) for count in heads.counts} == {("num_heads", 1), ("attn_dim", 3)}
    assert heads.by_role("producer")[0].index[1].tolist() == [3, 4, 5, 15, 16, 17, 27, 28, 29]
    assert_exact(model, groups.chosen(), x)


def test_heads_whose_number_is_a_constant_are_frozen_with_the_reason():
    class Constant(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(len(x), -1, 3, 4, 3).permute(2, 0, 3, 1, 4)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    groups = graph_groups(seeded(Encoder(Constant(12, 4, 3, ""))), Batch.of(rows(3, 4, 6)))
    assert [group.name for group in groups] == ["embed"]
    frozen = {f.what: f.reason for f in groups.frozen}
    assert frozen["attend.qkv"].startswith("4 units: without some of them the model does not run: shape '[2, -1, 3, 4, 3]' is")


def test_heads_that_share_the_width_of_the_input_lose_dimensions_with_it():
    """The code divides the width of the input by the number of heads, which is a constant."""

    class Divided(Attention):
        def forward(self, x: Tensor) -> Tensor:
            n, t, width = x.shape
            q, k, v = self.qkv(x).reshape(n, t, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width))

    model, x = seeded(Encoder(Divided(12, 4, 3, ""))), rows(3, 4, 6)
    (group,) = graph_groups(model, Batch.of(x))
    assert (group.name, group.kind, group.n, group.exact) == ("embed", "channel", 3, False)
    index = {(piece.module, piece.dim): piece.index[1].tolist() for piece in group.slices if piece.tensor == "weight"}
    assert index["embed", 0] == index["head", 1] == index["attend.proj", 0] == index["attend.proj", 1] == [1, 4, 7, 10]
    assert index["attend.qkv", 0] == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34]
    sliced = slice_units(copy.deepcopy(model), [group], {"embed": [1]})
    assert output(sliced, x).shape == (3, 5)


def test_weights_that_are_standardized_in_the_forward_pass_are_sliced():
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            rows = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
            weight = rows.reshape_as(self.weight)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    layers = {"b": Standardized(6, 8, 3, padding=1), "c": conv(8, 8, groups=8)}
    model, x = seeded(between(lambda m, x: space(m.c(x)), **layers)()), images()
    groups = graph_groups(model, Batch.of(x))
    assert {group.name: group.exact for group in groups} == {"a": False, "b": True}  # the statistics are over the inputs of b
    assert_exact(model, groups.chosen(), x)
    assert output(slice_units(model, groups, {"a": [0], "b": [1]}), x).shape == (3, 5)


def test_query_heads_that_share_keys_are_one_unit():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.kv_heads = 6, 2
            self.q, self.k, self.v, self.o = nn.Linear(12, 18), nn.Linear(12, 6), nn.Linear(12, 6), nn.Linear(18, 12)

        def forward(self, x: Tensor) -> Tensor:
            n, t, _ = x.shape
            q = self.q(x).view(n, t, self.heads, 3).transpose(1, 2)
            k, v = (f(x).view(n, t, self.kv_heads, 3).transpose(1, 2).repeat_interleave(3, 1) for f in (self.k, self.v))
            return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))

    model, x = seeded(Encoder(Grouped())), rows(3, 4, 6)
    groups = graph_groups(model, Batch.of(x))
    assert [(group.name, group.n) for group in groups] == [("embed", 12), ("attend.q", 2)]
    assert_exact(model, groups.chosen(), x)


def test_a_pruned_model_without_some_heads_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model, x = Encoder(Attention(12, 4, 3, "sdpa")).eval(), torch.randn(3, 4, 6)
    pruned = nl.prune(model, "magnitude", 0.5, example_inputs=x)
    assert (pruned.model.attend.num_heads, pruned.model.attend.attn_dim) == (2, 6)
    again = nl.load_pruned(pruned.save(tmp_path / "pruned"), Encoder(Attention(12, 4, 3, "sdpa")))
    assert_same(output(pruned.model, x), output(again, x))


def test_what_a_module_computed_from_its_weights_is_dropped():
    """Biases are looked up once in eval mode, as in LeViT."""

    class Cached(Attention):
        cache: Tensor | None = None

        def train(self, mode: bool = True):
            self.cache = None if mode else self.cache
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None:
                self.cache = self.bias.detach() * 2
            n, t, _ = x.shape
            q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            bias = self.bias if self.training else self.cache
            return self.proj(((q @ k.transpose(-2, -1) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))

    model, x = seeded(Encoder(Cached(12, 4, 3, ""))), rows(3, 4, 6)
    groups = graph_groups(seeded(Encoder(Attention(12, 4, 3, ""))), Batch.of(x)).chosen()
    with masked(model, groups, {"attend.qkv": [1]}):
        expected = output(model, x)
    sliced = slice_units(copy.deepcopy(model), groups, {"attend.qkv": [1]})
    assert not sliced.training
    assert_same(expected, output(sliced, x))
