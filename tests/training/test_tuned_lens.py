"""The tuned lens: trained, saved, loaded, and better than the logit lens."""

import pandas as pd
import pytest
import torch
from lens_models import hooks, ids, llama, stories
from safetensors.torch import save_file

import nodelens as nl
from nodelens.interventions.lenses.translators import Translators
from nodelens.report.lens_figures import figures_of
from nodelens.training.tuned_lens import TunedLens

DATA = [{"input_ids": part} for part in ids(8, 9).split(2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = str(tmp_path_factory.mktemp("lens") / "tuned.safetensors")
    before, state = hooks(llama()), {name: tensor.clone() for name, tensor in llama().state_dict().items()}
    tuned = TunedLens(epochs=20, lr=3e-3, save_to=file)(llama(), DATA)
    assert hooks(llama()) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in llama().state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in llama().parameters())
    return tuned, file


def test_training_lowers_the_kl_of_every_block_but_the_last(found):
    table = found[0]["layers"].set_index(["lens", "layer"])["kl"]
    assert (table["tuned"][:-1] < 0.7 * table["logit"][:-1]).all()
    assert table["tuned"].iloc[-1] == table["logit"].iloc[-1]
    assert "nats with the logit lens" in found[0].summary()
    assert [plot.name for plot in figures_of(found[0])] == ["lens"]


def test_saved_translators_give_the_same_lens(found):
    again = TunedLens(load_from=found[1])(llama(), DATA)
    pd.testing.assert_frame_equal(again["layers"], found[0]["layers"])
    prompt = ids(1, 6)[0]
    tuned, plain = nl.lens(llama(), prompt, translators=found[1]), nl.lens(llama(), prompt)
    kl = {name: table["positions"].groupby("layer")["kl"].mean() for name, table in (("tuned", tuned), ("plain", plain))}
    assert kl["tuned"][0] < kl["plain"][0]
    assert kl["tuned"][2] == kl["plain"][2]


def test_the_same_seed_gives_the_same_translators():
    first, second = (TunedLens(layers=[0])(llama(), DATA, seed=3)["layers"] for _ in range(2))
    pd.testing.assert_frame_equal(first, second)


def test_new_translators_are_the_identity():
    states = torch.randn(3, 4)
    assert torch.equal(Translators([1], 4)(1, states), states)
    assert torch.equal(Translators([1], 4)(0, states), states)


def test_a_trained_network_is_read_better():
    model, tokenizer = stories()
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    rows = torch.tensor(tokenizer(story * 8)["input_ids"][:240]).reshape(10, 24)
    data = [{"input_ids": part} for part in rows.split(5)]
    table = TunedLens(epochs=10)(model, data)["layers"].set_index(["lens", "layer"])["kl"]
    assert (table["tuned"][:-1] < table["logit"][:-1]).all()


def test_bad_input_is_named(tmp_path, found):
    with pytest.raises(ValueError, match=r"tuned_lens: epochs is 0 and lr is 0.001; both are positive"):
        TunedLens(epochs=0)
    with pytest.raises(ValueError, match=r"a tuned lens translates the blocks before the last one: choose others with layers="):
        TunedLens(layers=-1)(llama(), DATA)
    with pytest.raises(FileNotFoundError, match=r"no tuned lens at '.*none': give a file that analysis tuned_lens wrote"):
        TunedLens(load_from=str(tmp_path / "none"))(llama(), DATA)
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors' holds no translators of a tuned lens, maps"):
        nl.lens(llama(), [3, 4], translators=str(tmp_path / "other.safetensors"))
    Translators([5], 8).save(tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"is for states of width 8 and block 5; the model has width 48 and 3 blocks: train one"):
        nl.lens(llama(), [3, 4], translators=str(tmp_path / "wide.safetensors"))
