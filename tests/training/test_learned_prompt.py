"""The learned prompt: known answers without training, training that helps, files, and decoded states."""

import pandas as pd
import pytest
import torch
from lens_models import family, hooks, ids, llama, padded, stories
from safetensors.torch import save_file
from torch import nn

import nodelens as nl
from nodelens.analysis.lenses.future_lens import FutureLens
from nodelens.interventions.lenses.inserted import FollowedRows, inserted_logits
from nodelens.interventions.lenses.lens_pass import blocks_to_read, run_lens
from nodelens.interventions.lenses.soft_prompts import SoftPrompts
from nodelens.interventions.token_model import TokenModel
from nodelens.report.lens_figures import figures_of
from nodelens.training.learned_prompt import LearnedPrompt

ROWS = [*ids(6, 9), *ids(2, 6, seed=1)]
DATA = [padded(ROWS[:4], "right"), padded(ROWS[4:], "right")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = str(tmp_path_factory.mktemp("lens") / "prompts.safetensors")
    before, state = hooks(llama()), {name: tensor.clone() for name, tensor in llama().state_dict().items()}
    learned = LearnedPrompt(layers=[0, 1], length=3, ahead=[0, 2], epochs=30, lr=0.05, save_to=file)(llama(), DATA)
    assert hooks(llama()) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in llama().state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in llama().parameters())
    return learned, file


def test_training_lowers_the_kl_and_the_state_matters(found):
    untrained = LearnedPrompt(layers=[0, 1], length=3, ahead=[0, 2], epochs=1, lr=1e-9)(llama(), DATA)
    kl = {name: each["layers"].set_index(["ahead", "layer"])["kl"] for name, each in (("after", found[0]), ("before", untrained))}
    assert (kl["after"] < kl["before"]).all()
    control = found[0]["control"].set_index(["ahead", "layer"])["kl"]
    assert (kl["after"][0] < control[0]).all()
    assert "nats, mean over layers" in found[0].summary()
    assert [plot.name for plot in figures_of(found[0])] == ["lens"]


def test_the_last_blocks_state_gives_the_next_token_behind_any_prompt():
    table = LearnedPrompt(layers=-1, length=2, ahead=[0], epochs=1, states=None)(llama(), DATA)["layers"]
    assert table["agreement_at_1"].tolist() == [1.0]
    assert table["kl"].iloc[0] < 1e-6
    assert table["tokens"].iloc[0] == sum(len(row) - 1 for row in ROWS)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_the_context_itself_as_a_prompt_gives_the_models_own_predictions(name):
    model = TokenModel(llama() if name == "llama" else family(name))
    row = ids(1, 8)[0]
    with model.running():
        for block in range(len(model.roles.blocks)):
            layer = model.part(block, "output")
            shown, logits = model.read(row[None], [layer])
            prompt = model.embeddings(row[:5])
            got = inserted_logits(model, layer, prompt, shown[layer.name][0, 4:5], row[None, 5:])
            torch.testing.assert_close(got[0], logits[0, 4:], rtol=1e-4, atol=1e-5)


def test_a_batch_of_insertions_equals_hooks_one_by_one():
    model, states, tokens = TokenModel(llama()), torch.randn(3, 48), ids(3, 2)
    prompt = model.embeddings(ids(1, 4)[0]).detach()
    with model.running():
        together = inserted_logits(model, model.part(1, "output"), prompt, states, tokens)
        for k in range(3):

            def insert(module, args, output, k=k):
                new = output.clone()
                new[0, 3] = states[k]
                return new

            handle = llama().model.layers[1].register_forward_hook(insert)
            embedded = torch.cat([prompt, model.embeddings(tokens[k])])[None]
            alone = llama()(inputs_embeds=embedded).logits[0, 3:]
            handle.remove()
            torch.testing.assert_close(together[k], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:batches are padded on the left")
def test_rows_are_those_followed_at_every_distance():
    seen = []
    run_lens(llama(), [padded(ROWS, "left")], blocks_to_read(llama(), 0), seen.append)
    followed = FollowedRows.of(seen[0], [0, 2])
    assert len(followed.now) == sum(len(row) - 3 for row in ROWS)
    batch = padded(ROWS, "left")["input_ids"]
    rows, now = seen[0], followed.now
    for n in range(2):
        assert followed.tokens[:, n].equal(batch[rows.sample[now], rows.column[now] + 1 + n])
    assert rows.column[followed.later[2]].equal(rows.column[now] + 2)
    assert len(followed.drawn(5, torch.Generator().manual_seed(0)).now) == 5


@pytest.mark.filterwarnings("ignore:batches are padded on the left")
def test_padding_changes_nothing(found):
    tables = [
        FutureLens(layers=[0, 1], ahead=[0, 2], learned_prompt=found[1])(llama(), [padded(ROWS, side)])["layers"]
        for side in ("left", "right")
    ]
    pd.testing.assert_frame_equal(*tables, rtol=1e-4)


def test_the_future_lens_and_a_second_run_read_the_saved_prompts(found):
    again = LearnedPrompt(layers=[0, 1], length=3, ahead=[0, 2], states=None, load_from=found[1])(llama(), DATA)
    future = FutureLens(layers=[0, 1], ahead=[0, 2], learned_prompt=found[1])(llama(), DATA)
    pd.testing.assert_frame_equal(future["layers"], again["layers"])


def test_the_same_seed_gives_the_same_prompts():
    first, second = (LearnedPrompt(layers=0, length=2, ahead=[1])(llama(), DATA, seed=3)["layers"] for _ in range(2))
    pd.testing.assert_frame_equal(first, second)


def test_states_of_a_text_are_decoded(found):
    read = LearnedPrompt(layers=[0, 1], ahead=[0], load_from=found[1], prompts=[[5, 6, 7]], k=2, generate=2)(llama(), DATA)
    assert len(read["predictions"]) == 2 * 3 * 2
    assert read["positions"]["continuation"].str.count("#").eq(2).all()
    top = read["predictions"].query("rank == 1").set_index(["layer", "position"])["predicted"]
    own = read["positions"].set_index(["layer", "position"])["continuation"]
    assert all(own[key].startswith(top[key]) for key in top.index)
    assert len(list(figures_of(read))) == 2


@pytest.mark.slow
def test_the_state_of_a_trained_network_matters_behind_its_prompt():
    model, tokenizer = stories()
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    rows = torch.tensor(tokenizer(story * 8)["input_ids"][:240]).reshape(10, 24)
    data = [{"input_ids": part} for part in rows.split(5)]
    table = LearnedPrompt(layers=[2], ahead=[0, 1], epochs=40)(model, data)
    kl = table["layers"].set_index("ahead")["kl"]
    assert (kl < table["control"].set_index("ahead")["kl"]).all()


def test_bad_input_is_named(tmp_path, found):
    with pytest.raises(
        ValueError, match=r"learned_prompt: ahead is \[-1\] and ks is \[1, 5, 10\]; positions from 0, tokens from 1"
    ):
        LearnedPrompt(ahead=[-1])
    with pytest.raises(ValueError, match=r"learned_prompt: length is 0; it is a number, 1 or more"):
        LearnedPrompt(length=0)
    with pytest.raises(ValueError, match=r"learned_prompt: lr is -1; it is positive"):
        LearnedPrompt(lr=-1)
    with pytest.raises(FileNotFoundError, match=r"no soft prompts at '.*none': give a file that analysis learned_prompt wrote"):
        LearnedPrompt(load_from=str(tmp_path / "none"))(llama(), DATA)
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors' holds no soft prompts, prompts.<block> \(length, d\), of a learned"):
        FutureLens(learned_prompt=str(tmp_path / "other.safetensors"))(llama(), DATA)
    SoftPrompts({5: torch.zeros(2, 8)}).save(tmp_path / "wide.safetensors")
    with pytest.raises(
        ValueError, match=r"is for embeddings of width 8 and block 5; the model has width 48 and 3 blocks: train one"
    ):
        FutureLens(learned_prompt=str(tmp_path / "wide.safetensors"))(llama(), DATA)
    with pytest.raises(ValueError, match=r"there is no learned prompt for block 2, only for 0, 1: train it"):
        FutureLens(learned_prompt=found[1])(llama(), DATA)
    with pytest.raises(ValueError, match=r"no token is followed by 9 others that are predicted: give longer samples"):
        LearnedPrompt(layers=0, ahead=[8])(llama(), DATA)
    with pytest.raises(ValueError, match=r"Identity takes no inputs_embeds: a soft prompt needs a model that does"):
        TokenModel(nn.Identity()).embeddings  # noqa: B018
    assert "learned_prompt" in nl.list_analyses()


def test_states_are_exchanged_with_those_of_another_token():
    seen = []
    run_lens(llama(), [padded(ROWS[:2], "right"), padded(ROWS[6:7], "right")], blocks_to_read(llama(), 0), seen.append)
    for rows in seen:
        followed = FollowedRows.of(rows, [0])
        assert followed.states_of is followed.now
        exchanged = followed.exchanged()
        assert sorted(exchanged.states_of.tolist()) == followed.now.tolist()
        assert not (exchanged.states_of == followed.now).any()
        for part in exchanged.parts(1):
            assert not (part.states_of == part.now).any()


def test_one_state_cannot_be_exchanged():
    with pytest.raises(ValueError, match="learned_prompt: states is 1; it is 2 or more, because the control exchanges"):
        LearnedPrompt(states=1)


def test_metadata_of_loaded_prompts_do_not_claim_a_training(found):
    about = LearnedPrompt(layers=[0, 1], length=7, ahead=[0], epochs=9, load_from=found[1])(llama(), DATA).metadata
    assert (about["length"], about["epochs"], about["lr"], about["loaded"]) == (3, None, None, found[1])


def test_a_lens_is_not_trained_by_several_processes(monkeypatch):
    from nodelens.training import lens_training

    monkeypatch.setattr(lens_training, "world", lambda: (0, 2))
    with pytest.raises(ValueError, match="learned_prompt is trained by one process, and this run has 2: train it in a run of one"):
        LearnedPrompt(layers=[0], length=2, ahead=[0], epochs=1)(llama(), DATA)
