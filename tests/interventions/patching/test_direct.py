"""Direct logit attribution: parts that add up to the model's logit."""

import math

import numpy as np
import pytest
import torch
from lens_models import CAUSAL, ODD_TAILS, family, ids, llama, odd, stories
from torch import nn

import nodelens as nl
from nodelens.analysis.patching.patching import LogitAttribution
from nodelens.interventions.patching.direct import frozen
from nodelens.report.patching_figures import figures_of

TOKENS = ids(2, 7)


@pytest.mark.parametrize("name", ["llama 8/4", "cohere", "granite", "opt", "falcon"])
def test_the_parts_add_up_to_the_logit(name):
    model = odd(name) if name in ODD_TAILS else family(name)
    found = LogitAttribution(TOKENS, answer=7, wrong=9, position="all")(model)
    with torch.no_grad():
        logits = model(TOKENS).logits
    wanted = (logits[..., 7] - logits[..., 9]).flatten().tolist()
    np.testing.assert_allclose(found["runs"]["sum"], wanted, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found["runs"]["logit"], wanted, rtol=1e-4, atol=1e-4)
    assert found.metadata["missing"] == []
    assert {"embedding", "head", "mlp", "bias"} <= set(found["components"]["component"])


def test_a_block_that_adds_something_else_is_one_part():
    found = LogitAttribution(TOKENS)(odd("gemma2"))
    np.testing.assert_allclose(found["runs"]["sum"], found["runs"]["logit"], rtol=1e-4)
    assert set(found["components"]["component"]) == {"embedding", "block", "bias"}
    assert [row["layer"] for row in found.metadata["missing"]] == [f"model.layers.{k}" for k in range(3)]


def test_each_head_is_its_slice_of_the_output_projection():
    net = llama()
    found = LogitAttribution(TOKENS[:1], answer=7)(net)["components"].query("component == 'head' and layer == 1")
    read = []
    handle = net.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, a: read.append(a[0][0, -1]))
    with torch.no_grad():
        state = net(TOKENS[:1], output_hidden_states=True).hidden_states[-1]
    handle.remove()
    last = []
    handle = net.model.norm.register_forward_pre_hook(lambda m, a: last.append(a[0][0, -1]))
    with torch.no_grad():
        net(TOKENS[:1])
    handle.remove()
    scale = state[0, -1] / last[0]  # the norm at this state, entry by entry
    direction = net.lm_head.weight[7] * scale
    weight = net.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        wanted = [float(weight[:, 12 * h : 12 * h + 12] @ read[0][12 * h : 12 * h + 12] @ direction) for h in range(4)]
    np.testing.assert_allclose(found["contribution"], wanted, rtol=1e-3, atol=1e-5)


def test_whole_attentions_are_the_sums_of_their_heads():
    heads = LogitAttribution(TOKENS, answer=7)(llama())["components"].query("component == 'head'")
    whole = LogitAttribution(TOKENS, answer=7, heads=False)(llama())["components"].query("component == 'attention'")
    sums = heads.groupby(["sample", "layer"])["contribution"].sum()
    np.testing.assert_allclose(sums, whole.groupby(["sample", "layer"])["contribution"].sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [6, 7])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_is_linear_once_its_scale_is_frozen(kind, width):
    torch.manual_seed(0)
    norm = kind(width)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 0.5)
    state = torch.randn(width)
    with torch.no_grad():
        gain, shift, centred = frozen(norm, state)
        x = state - state.mean() if centred else state
        np.testing.assert_allclose(gain * x + shift, norm(state), rtol=1e-4, atol=1e-5)
    assert centred == (kind is nn.LayerNorm)


def test_another_module_is_no_norm():
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="Tanh is neither a layer norm nor a root-mean-square norm: its scale cannot"),
    ):
        frozen(nn.Tanh(), torch.randn(6))


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_the_parts_add_up_in_every_family(name):
    runs = LogitAttribution(TOKENS, answer=7)(family(name))["runs"]
    np.testing.assert_allclose(runs["sum"], runs["logit"], rtol=1e-3, atol=2e-3 * runs["logit"].abs().max())


def test_a_trained_network_has_a_head_for_she():
    model, tokenizer = stories()
    prompt = "Once upon a time, there was a little girl named Lily."
    found = LogitAttribution(prompt, answer=" She", wrong=" He", tokenizer=tokenizer)(model)
    best = found["components"].sort_values("contribution").iloc[-1]
    assert (best["component"], best["layer"]) == ("head", 4)
    assert "largest contributions: head 2 of layer 4 +2.59" in found.summary()
    assert math.isclose(found["runs"]["sum"].item(), found["runs"]["logit"].item(), rel_tol=1e-5)


def test_figures_are_drawn():
    found = LogitAttribution(TOKENS, answer=7)(llama())
    assert [plot.name for plot in figures_of(found)] == ["components"]


def test_prompts_come_from_the_data():
    found = nl.analyze(llama(), [{"input_ids": TOKENS}], metrics=[], layers="head", analysis=LogitAttribution(samples=1)).analyses[
        "logit_attribution"
    ]
    assert found["runs"]["sample"].tolist() == [0]
    with pytest.raises(ValueError, match="there are no prompts and no data: give prompts=, texts or token ids"):
        LogitAttribution()(llama())
