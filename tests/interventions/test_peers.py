"""The numbers of TransformerLens and nnsight, where they are installed: lens, patches and direct logit attribution."""

import copy

import numpy as np
import pytest
import torch
from lens_models import family, ids, llama

import nodelens as nl
from nodelens.analysis.patching.patching import LogitAttribution
from nodelens.interventions.lenses.scores import row_scores

CLEAN, CORRUPT, ANSWER, WRONG = ids(1, 6), ids(1, 6, seed=1), 9, 17
MODELS = {"llama": llama, "gpt2": lambda: family("gpt2")}
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


def grid(model, component):
    """nodelens' logit differences, (layers, [heads,] positions)."""
    found = nl.patch(model, CLEAN[0], CORRUPT[0], answer=ANSWER, wrong=WRONG, components=component)["cells"]
    axes = ["layer", "head", "position"] if component == "heads" else ["layer", "position"]
    shape = [found[axis].nunique() for axis in axes]
    return found.sort_values(axes)["logit_difference"].to_numpy().reshape(shape)


def lens_numbers(model):
    """KL and entropy of nodelens' lens, (layers, positions)."""
    found = nl.lens(model, CLEAN[0])["positions"].sort_values(["layer", "position"])
    return [found[name].to_numpy().reshape(-1, CLEAN.shape[1]) for name in ("kl", "entropy")]


def check_lens(model, by_layer, final):
    """Compares with the logits (T, V) of a peer's lens at each layer."""
    scores = [row_scores(logits, final, final.argmax(1)) for logits in by_layer]
    for name, own in zip(("kl", "entropy"), lens_numbers(model), strict=True):
        np.testing.assert_allclose(own, torch.stack([each[name] for each in scores]), **CLOSE)


def difference(logits):
    return logits[0, -1, ANSWER] - logits[0, -1, WRONG]


@pytest.fixture(scope="module", params=list(MODELS))
def bridged(request):
    """A model, and a copy of it in TransformerLens."""
    pytest.importorskip("transformer_lens")
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = MODELS[request.param]()
    bridge = build_bridge_from_module(copy.deepcopy(model), type(model).__name__, hf_config=copy.deepcopy(model.config))
    return model, bridge


@torch.no_grad()
def test_the_lens_of_transformer_lens(bridged):
    model, bridge = bridged
    logits, cache = bridge.run_with_cache(CLEAN)
    states = [cache["resid_post", k] for k in range(bridge.cfg.n_layers)]
    check_lens(model, [bridge.unembed(bridge.ln_final(state))[0] for state in states], logits[0])


@pytest.mark.parametrize(
    ("component", "call"),
    [
        ("residual_input", "get_act_patch_resid_pre"),
        ("attention", "get_act_patch_attn_out"),
        ("mlp", "get_act_patch_mlp_out"),
        ("heads", "get_act_patch_attn_head_out_by_pos"),
    ],
)
@torch.no_grad()
def test_the_patches_of_transformer_lens(bridged, component, call):
    from transformer_lens import patching

    model, bridge = bridged
    cache = bridge.run_with_cache(CLEAN)[1]
    found = getattr(patching, call)(bridge, CORRUPT, cache, difference).numpy()
    found = found.swapaxes(1, 2) if component == "heads" else found  # (layers, positions, heads)
    np.testing.assert_allclose(grid(model, component), found, **CLOSE)


@torch.no_grad()
def test_the_attribution_of_transformer_lens(bridged):
    model, bridge = bridged
    logits, cache = bridge.run_with_cache(CLEAN)
    parts = LogitAttribution(CLEAN[0], answer=ANSWER, wrong=WRONG)(model)["components"].set_index(["component", "layer", "head"])
    own = parts["contribution"]
    norm = bridge.ln_final.weight
    line = norm * (bridge.W_U[:, ANSWER] - bridge.W_U[:, WRONG])
    mlps = torch.stack([cache["mlp_out", layer][:, -1] for layer in range(bridge.cfg.n_layers)])
    heads = cache.stack_head_results(layer=-1, pos_slice=-1)
    for name, stack in (("mlp", mlps), ("head", heads)):
        found = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)[:, 0] @ line
        np.testing.assert_allclose(own[name].to_numpy(), found, **CLOSE)
    assert own.sum() == pytest.approx(float(difference(logits)), abs=1e-3)


@pytest.fixture(scope="module", params=list(MODELS))
def traced(request):
    """A model, the same in nnsight, and its blocks, norm, and the name of the attention."""
    nnsight = pytest.importorskip("nnsight")
    model = MODELS[request.param]()
    peer = nnsight.NNsight(copy.deepcopy(model))
    if request.param == "llama":
        return model, peer, peer.model.layers, peer.model.norm, "self_attn"
    return model, peer, peer.transformer.h, peer.transformer.ln_f, "attn"


def test_the_lens_of_nnsight(traced):
    model, peer, blocks, norm, _ = traced
    by_layer = []
    for block in blocks:
        with torch.no_grad(), peer.trace(CLEAN):
            logits = peer.lm_head(norm(block.output))[0].save()
        by_layer.append(logits)
    check_lens(model, by_layer, by_layer[-1])


@pytest.mark.parametrize("component", ["residual", "attention", "mlp"])
def test_the_patches_of_nnsight(traced, component):
    model, peer, blocks, _, attention = traced

    def site(block):
        return block if component == "residual" else getattr(block, attention if component == "attention" else "mlp")

    found = np.zeros((len(blocks), CLEAN.shape[1]))
    for layer, position in np.ndindex(*found.shape):
        with torch.no_grad(), peer.trace(CLEAN):
            out = site(blocks[layer]).output
            state = (out[0] if component == "attention" else out)[:, position].save()
        with torch.no_grad(), peer.trace(CORRUPT):
            out = site(blocks[layer]).output
            (out[0] if component == "attention" else out)[:, position] = state
            logits = peer.lm_head.output.save()
        found[layer, position] = difference(logits)
    np.testing.assert_allclose(grid(model, component), found, **CLOSE)
