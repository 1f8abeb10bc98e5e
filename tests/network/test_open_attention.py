"""Attention modules that show their heads compute what they compute by themselves, with all masks and options."""

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.network.objective import Objective
from nodelens.network.open_attention import OpenAttention, keep_open, opened
from nodelens.pruning.cost import Cost
from nodelens.pruning.groups.families import family_groups

PADDING = torch.tensor([[0] * 7, [0] * 5 + [1] * 2, [0] * 3 + [1] * 4]).bool()
OPTIONS = [dict(zip(("bias", "add_bias_kv", "add_zero_attn"), flags, strict=True)) for flags in product((False, True), repeat=3)]


def disturbed(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("widths", [{}, {"kdim": 12, "vdim": 8}], ids=["one width", "three widths"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_mask_and_option_gives_what_torch_gives(options, widths):
    rows = torch.Generator().manual_seed(1)
    for first in (False, True):
        module = disturbed(nn.MultiheadAttention(16, 4, batch_first=first, **options, **widths))
        q, k, v = (
            torch.randn(3, n, width, generator=rows)
            for n, width in ((5, 16), (7, widths.get("kdim", 16)), (7, widths.get("vdim", 16)))
        )
        inputs = (q, k, v) if first else tuple(x.transpose(0, 1) for x in (q, k, v))
        masks = (None, torch.rand(5, 7, generator=rows) > 0.7, torch.randn(12, 5, 7, generator=rows))
        for mask, padding, weights, mean in product(masks, (None, PADDING), (False, True), (False, True)):
            given = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": weights, "average_attn_weights": mean}
            with torch.no_grad():
                expected = module(*inputs, **given)
                with opened(module):
                    found = module(*inputs, **given)
            assert_close(found, expected, equal_nan=True)


def test_a_single_sample_and_a_causal_mask():
    module, x = disturbed(nn.MultiheadAttention(16, 4, batch_first=True)), torch.randn(5, 16)
    causal = {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5), "is_causal": True, "need_weights": False}
    with torch.no_grad():
        expected = module(x, x, x), module(x[None], x[None], x[None], **causal)
        with opened(module):
            assert_close((module(x, x, x), module(x[None], x[None], x[None], **causal)), expected)


def test_the_class_is_open_only_inside():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with opened(model), opened(model):
        assert type(model[0]) is OpenAttention
    assert type(model[0]) is nn.MultiheadAttention


class Encoder(nn.Module):
    """Two layers over tokens, of which the last two are padding."""

    def __init__(self, pad: bool = True, **options: object):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options)  # type: ignore[arg-type]
        self.encoder, self.head, self.pad = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3), pad

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]).expand(x.shape[:2]) >= 5 if self.pad else None
        return self.head(self.encoder(x, src_key_padding_mask=mask)[:, :5].mean(1))


class Cross(nn.Module):
    """Queries read keys and values of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.keys, self.head = nn.Linear(16, 16), nn.Linear(16, 12), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 4, kdim=12, vdim=12, add_bias_kv=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.first(x) + self.attention(self.first(x), self.keys(x), self.keys(x))[0]).mean(1))


NETWORKS = {
    "encoder": lambda: Encoder(False),
    "padding": Encoder,
    "norms first": lambda: Encoder(norm_first=True),
    "cross": Cross,
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_heads_are_removed_masked_and_saved(name, criterion, tmp_path):
    model, x = disturbed(NETWORKS[name]()), torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(0))
    given = {"data": [(x, torch.tensor([0, 1, 2, 0]))], "amount": 0.5, "scope": "head"}
    sliced, masked = (nl.prune(model, criterion, apply=how, **given) for how in ("slice", "mask"))
    assert all(type(m) is not OpenAttention for m in model.modules())
    heads = [m.num_heads for m in sliced.model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert heads == [2] * len(heads)
    assert sliced.plan.about["params"] == sum(p.numel() for p in sliced.model.parameters())
    with torch.no_grad():
        found, expected = sliced.model.eval()(x), masked.model.eval()(x)
        assert_close(found, expected)
        assert float((found - model(x)).abs().max()) > 1e-3
        loaded = nl.load_pruned(sliced.save(tmp_path), disturbed(NETWORKS[name](), 1))
        assert torch.equal(loaded(x), found)
    sliced.model.train()(x).sum().backward()
    assert all(p.grad is not None for p in sliced.model.parameters())


def test_the_cost_of_heads_is_that_of_their_projections_and_products():
    model, x = Cross(), torch.randn(2, 7, 16)
    groups = nl.find_groups(model, x)
    cost, attention = Cost.of(model, groups, Objective.of(model).batch(x)), groups.named("attention")

    def by_hand(heads: int) -> float:
        width = 4 * heads  # queries, keys and values, the output projection, and two products of 7 x 7 positions
        return 7 * width * (16 + 12 + 12 + 16) + 2 * 7 * 7 * width

    assert cost.macs() - cost.macs({attention.name: 2}) == by_hand(4) - by_hand(2)


def test_a_mask_of_removed_heads_is_refused_by_name():
    module, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    with (
        opened(module),
        pytest.raises(ValueError, match=r"attn_mask has 12 matrices for 3 samples and 2 heads: give \(queries, keys\), or 6"),
    ):
        module(x, x, x, attn_mask=torch.zeros(12, 5, 5))


def test_weights_that_are_computed_keep_their_heads():
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3))
    nn.utils.parametrize.register_parametrization(model[0].out_proj, "weight", nn.Identity())
    assert [group.kind for group in family_groups(model)] == []


def test_a_model_keeps_its_other_modules_closed():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2))
    keep_open(copy.deepcopy(model), ["1.out_proj"])
    keep_open(model, ["1.out_proj"])
    assert [type(m) for m in model] == [nn.MultiheadAttention, OpenAttention]
