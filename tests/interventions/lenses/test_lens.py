"""nl.lens: predictions after each block for prompts."""

import pytest
import torch
from lens_models import family, hooks, ids, llama, padded, stories
from torch import nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.data import ByteTokenizer

TOKENS = ids(1, 8)[0]


@pytest.fixture(scope="module")
def found():
    return nl.lens(llama(), TOKENS, k=3)


def test_the_last_layer_is_the_model(found):
    with torch.no_grad():
        p = llama()(TOKENS[None]).logits[0].softmax(1)
    last = found["predictions"].query("layer == 2 and rank == 1")
    assert last["predicted_id"].tolist() == p.argmax(1).tolist()
    assert_close(torch.tensor(last["probability"].to_numpy()), p.max(1).values, check_dtype=False, rtol=1e-5, atol=0)
    scores = found["positions"].query("layer == 2")
    assert scores["kl"].abs().max() < 1e-6
    assert scores["agreement"].all()
    wanted = -p[torch.arange(7), TOKENS[1:]].log()
    assert_close(torch.tensor(scores["surprisal"].to_numpy()[:-1]), wanted, check_dtype=False, rtol=1e-4, atol=1e-5)
    assert scores["surprisal"].isna().tolist() == [False] * 7 + [True]


def test_an_inner_layer_is_norm_and_head_of_its_hidden_state(found):
    model = llama()
    with torch.no_grad():
        states = model(TOKENS[None], output_hidden_states=True).hidden_states[1][0]
        p = model.lm_head(model.model.norm(states)).softmax(1)
    table = found["predictions"].query("layer == 0")
    assert table["predicted_id"].tolist() == p.topk(3).indices.flatten().tolist()
    assert_close(torch.tensor(table["probability"].to_numpy()), p.topk(3).values.flatten(), check_dtype=False, rtol=1e-5, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama 8/4"])
def test_padding_changes_nothing(name, side):
    rows = [TOKENS, TOKENS[:5]]
    batch = nl.lens(family(name), padded(rows, side))
    each = [nl.lens(family(name), row) for row in rows]
    for table in ("positions", "predictions"):
        parts = [batch[table][batch[table]["sample"] == k].drop(columns="sample").reset_index(drop=True) for k in (0, 1)]
        for part, alone in zip(parts, each, strict=True):
            assert part.equals(alone[table].drop(columns="sample"))


def test_texts_and_ids_of_them_are_the_same():
    tokenizer = ByteTokenizer()
    model = _bytes()
    text = nl.lens(model, "héllo", tokenizer)
    codes = [256, *"héllo".encode()]
    assert text["positions"]["position"].max() == len(codes) - 1
    same = nl.lens(model, codes, tokenizer)
    assert text["predictions"].equals(same["predictions"])
    assert nl.lens(model, codes)["positions"]["token"].iloc[1] == "#104"


def _bytes():
    from nodelens.models import tiny_lm

    return tiny_lm(width=32, layers=2, heads=2, mlp=16).eval()


def test_layers_and_modes_are_chosen_and_restored(found):
    before = hooks(llama())
    chosen = nl.lens(llama(), TOKENS, layers="n//2:")
    assert chosen["positions"]["layer"].unique().tolist() == [1, 2]
    assert not any(module.training for module in llama().modules())
    assert all(p.requires_grad for p in llama().parameters())
    assert hooks(llama()) == before


def test_a_trained_model_predicts_in_its_last_layers():
    model, tokenizer = stories()
    found = nl.lens(model, "Once upon a time, there was a little girl", tokenizer)
    agreement = found["positions"].groupby("layer")["agreement"].mean()
    assert agreement.iloc[-1] == 1
    assert agreement.is_monotonic_increasing
    last = found["predictions"].query("layer == 4 and rank == 1")["predicted"].tolist()
    assert last[1:4] == [" upon", " a", " time"]


class Classifier(nn.Module):
    def forward(self, input_ids):
        return torch.zeros(len(input_ids), 3)


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "no tokenizer": (
            lambda: nl.lens(llama(), "hello"),
            "'hello' is a text and there is no tokenizer: give tokenizer=",
        ),
        "no prompt": (lambda: nl.lens(llama(), []), "there are no prompts: give at least one text"),
        "an empty prompt": (lambda: nl.lens(llama(), [[]]), "there are no prompts"),
        "no tokens": (lambda: nl.lens(llama(), torch.empty(0, dtype=torch.int64)), "the prompt of no ids has no tokens"),
        "numbers that are no ids": (
            lambda: nl.lens(llama(), torch.ones(3)),
            r"a prompt is \(3,\) float32: give a text, or token ids",
        ),
        "a batch without ids": (lambda: nl.lens(llama(), {"x": TOKENS}), "a batch of prompts has x, and no input_ids"),
        "a layer out of range": (
            lambda: nl.lens(llama(), TOKENS, layers=3),
            r"layers=3 of LlamaForCausalLM with 3 blocks: .* out of",
        ),
        "no layers": (lambda: nl.lens(llama(), TOKENS, layers=[]), r"layers=\[\] .* it selects no block"),
        "no tokens to list": (lambda: nl.lens(llama(), TOKENS, k=0), "k is 0: it takes 1 or more"),
        "no transformer": (lambda: nl.lens(Classifier().eval(), TOKENS), "Classifier has no blocks: .* a lens needs a transformer"),
    }.values(),
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_training_mode_is_refused():
    model = _bytes().train()
    with pytest.raises(
        ValueError, match=r"nl.lens: LlamaForCausalLM is in training mode, where dropout .* call model.eval\(\) first"
    ):
        nl.lens(model, TOKENS)
    model.eval().model.layers[0].train()
    with pytest.raises(ValueError, match=r"nl.lens: module 'model.layers.0' of LlamaForCausalLM is in training mode"):
        nl.lens(model, TOKENS)
