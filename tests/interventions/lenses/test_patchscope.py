"""Patchscopes: hidden states in another prompt."""

import pytest
import torch
from lens_models import family, hooks, ids, llama, stories
from torch.testing import assert_close

import nodelens as nl
from nodelens.analysis.lenses.patchscope import Patchscope
from nodelens.network.hooks import edit
from nodelens.report.lens_figures import figures_of

SOURCE, TARGET = ids(1, 6)[0], ids(1, 5, seed=4)[0]


def loop(net, blocks, module, target, place, into=None):
    """The target's last logits with the state of each (block, position) of the source put in, one plain run for each."""
    found = []
    with torch.no_grad():
        for block in blocks:
            kept = []
            handle = module(net, block).register_forward_hook(lambda m, a, o, kept=kept: kept.append(whole(o).clone()))
            net(SOURCE[None])
            handle.remove()
            for position in range(len(SOURCE)):

                def change(state, position=position, kept=kept):
                    state = state.clone()
                    state[0, place] = kept[0][0, position]
                    return state

                with edit({module(net, block if into is None else into): change}):
                    found.append(net(target[None]).logits[0, -1])
    return torch.stack(found)


def whole(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("place", [-1, 2])
@pytest.mark.parametrize(
    ("net", "module"),
    [(llama, lambda net, k: net.model.layers[k]), (lambda: family("falcon"), lambda net, k: net.transformer.h[k])],
    ids=["llama", "falcon"],
)
def test_the_grid_is_the_loop_of_single_runs(net, module, place):
    net = net()
    blocks = range(net.config.num_hidden_layers)
    found = Patchscope(prompts=SOURCE, target=TARGET, target_position=place, k=64)(net)["predictions"]
    p = torch.tensor(found.sort_values(["layer", "position", "predicted_id"])["probability"].to_numpy()).reshape(-1, 64)
    assert_close(p, loop(net, blocks, module, TARGET, place).softmax(1), check_dtype=False, rtol=1e-4, atol=1e-6)


def test_states_can_go_to_one_block():
    found = Patchscope(prompts=SOURCE, target=TARGET, target_layers=0, k=64)(llama())["predictions"]
    p = torch.tensor(found.sort_values(["layer", "position", "predicted_id"])["probability"].to_numpy()).reshape(-1, 64)
    wanted = loop(llama(), range(3), lambda net, k: net.model.layers[k], TARGET, -1, into=0).softmax(1)
    assert_close(p, wanted, check_dtype=False, rtol=1e-4, atol=1e-6)


def test_the_last_layer_at_the_last_token_is_the_lens():
    found = Patchscope(prompts=SOURCE, target=TARGET)(llama())
    last = found["positions"].query("layer == 2")
    assert last["agreement_at_1"].all()
    assert last["kl"].abs().max() < 1e-6
    lens = nl.lens(llama(), SOURCE)["predictions"].query("layer == 2")
    assert found["predictions"].query("layer == 2")["predicted_id"].tolist() == lens["predicted_id"].tolist()


def test_a_trained_network_names_its_next_tokens():
    model, tokenizer = stories()
    before = hooks(model)
    source = "Once upon a time, there was a little girl named Lily. She loved to play with her mom"
    found = Patchscope(prompts=source, tokenizer=tokenizer)(model)
    agreement = found["positions"].groupby("layer")["agreement_at_1"].mean()
    assert agreement.is_monotonic_increasing
    assert agreement.iloc[-1] == 1
    assert agreement.iloc[-2] > 0.8
    assert "layer 4 tells best what the model predicts: its first choice at 100%" in found.summary()
    assert hooks(model) == before
    assert [plot.name for plot in figures_of(found)] == ["tokens-0"]


def test_continuations_are_those_of_single_runs():
    found = Patchscope(prompts=SOURCE, target=TARGET, layers=1, positions=[2, 4], generate=3, target_position=1)(llama())
    states = []
    handle = llama().model.layers[1].register_forward_hook(lambda m, a, o: states.append(o.clone()))
    with torch.no_grad():
        llama()(SOURCE[None])
    handle.remove()
    for row, position in zip(found["positions"].itertuples(), (2, 4), strict=True):

        def change(state, position=position):
            state = state.clone()
            state[0, 1] = states[0][0, position]
            return state

        text = TARGET.clone()
        with torch.no_grad(), edit({llama().model.layers[1]: change}):
            for _ in range(3):
                text = torch.cat([text, llama()(text[None]).logits[0, -1].argmax()[None]])
        assert row.continuation == "".join(f"#{i}" for i in text[len(TARGET) :].tolist())


def test_positions_by_phrase():
    model, tokenizer = stories()
    found = Patchscope(prompts="a girl named Lily.", positions="phrase: Lily", tokenizer=tokenizer, layers=3)(model)
    assert found["positions"]["token"].tolist() == [" Lily"]


@pytest.mark.parametrize(
    ("options", "message"),
    {
        "no tokenizer": ({"prompts": SOURCE}, "the prompt 'cat->cat; .*' is a text and there is no tokenizer: give tokenizer="),
        "two places": (
            {"target": TARGET, "target_position": [0, 1]},
            r"target_position=\[0, 1\] selects 2 tokens of the target: give",
        ),
        "a place out of range": ({"target": TARGET, "target_position": 5}, "positions: .*5 is out of range"),
        "a position out of range": ({"target": TARGET, "positions": [6]}, "positions: 6 selects nothing among n = 6"),
        "several blocks": (
            {"target": TARGET, "target_layers": "0,1"},
            "target_layers='0,1' selects 2 blocks: give same, or one block",
        ),
        "a phrase of ids": (
            {"target": TARGET, "positions": "phrase:a"},
            "give tokenizer=",
        ),
    }.values(),
)
def test_bad_input_is_named(options, message):
    before = hooks(llama())
    with pytest.raises(ValueError, match=message) as error:
        Patchscope(**{"prompts": SOURCE} | options)(llama())
    assert "\n" not in str(error.value)
    assert hooks(llama()) == before


def test_numbers_of_tokens_are_checked():
    with pytest.raises(ValueError, match=r"patchscope: k is 0 and generate is 0; k is 1 or more, generate 0 or more"):
        Patchscope(k=0)
    with pytest.raises(ValueError, match=r"patchscope: k is 5 and generate is -1; k is 1 or more, generate 0 or more"):
        Patchscope(generate=-1)
