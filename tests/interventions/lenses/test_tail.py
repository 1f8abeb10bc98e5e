"""The tail of a model gives the model's own logits."""

import pytest
import torch
from lens_models import CAUSAL, ODD_TAILS, family, ids, llama, odd
from torch import nn
from torch.testing import assert_close

from nodelens.interventions.lenses.tail import last_block, tail_of
from nodelens.interventions.token_model import TokenModel

FAST = ["gpt2", "falcon", "bloom", "neox", "phi", "qwen3 moe", "olmo2", "mpt"]


def states_and_logits(model, tokens):
    last = last_block(model)
    with torch.no_grad():
        shown, logits = TokenModel(model).read(tokens, [last])
    return shown[last.name].flatten(0, 1), logits.flatten(0, 1)


def check(model):
    states, logits = states_and_logits(model, ids(2, 9))
    with torch.no_grad():
        assert_close(tail_of(model, states, logits)(states), logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize("name", ODD_TAILS)
def test_scales_caps_and_projections_belong_to_the_tail(name):
    model = odd(name)
    check(model)
    states, logits = states_and_logits(model, ids(2, 9))
    tail = tail_of(model, states, logits)
    assert (tail.scale, tail.cap, len(tail.between)) == {
        "cohere": (0.25, None, 0),
        "granite": (1 / 3, None, 0),
        "gemma2": (1.0, 2.0, 0),
        "opt": (1.0, None, 1),
    }[name]


@pytest.mark.parametrize("name", FAST)
def test_the_last_block_gives_the_logits(name):
    check(family(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in FAST])
def test_the_last_block_gives_the_logits_in_every_family(name):
    check(family(name))


def test_the_norm_is_applied_once():
    model = llama()
    states, logits = states_and_logits(model, ids(1, 5))
    tail = tail_of(model, states, logits)
    with torch.no_grad():
        assert (tail(tail.normed(states)) - logits).abs().max() > 0.1  # twice would not go unnoticed


def test_rows_are_read_in_parts_of_bounded_size(monkeypatch):
    monkeypatch.setattr("nodelens.interventions.lenses.tail._CELLS", 200)
    tail = tail_of(llama(), *states_and_logits(llama(), ids(1, 5)))
    assert [(part.start, part.stop) for part in tail.parts(8)] == [(0, 3), (3, 6), (6, 9)]  # 64 logits a row


class Doubled(nn.Module):
    """A language model whose logits are not those of its head."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, input_ids, use_cache=False):
        return self.inner(input_ids, use_cache=use_cache).logits.square()


def test_other_logits_are_refused():
    model = Doubled(llama()).eval()
    states, logits = states_and_logits(model, ids(1, 5))
    with pytest.raises(
        ValueError, match=r"Doubled: the final norm and the head, .* give other logits than the model \(the largest"
    ):
        tail_of(model, states, logits)
