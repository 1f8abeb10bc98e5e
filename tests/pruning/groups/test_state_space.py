"""The heads of Mamba 2 blocks are found by name, and sliced where they lie."""

import copy

import pytest
import torch
from torch.testing import assert_close

import nodelens as nl
from nodelens.pruning.groups.families import family_groups
from nodelens.pruning.surgery.mask import masked
from nodelens.pruning.surgery.slice import slice_units

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(0))


def mamba2(groups: int):
    options = {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": groups, "expand": 2, "chunk_size": 4}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**SMALL, **options)).eval()


def zamba2():
    options = {
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_d_state": 4,
        "mamba_ngroups": 2,
        "n_mamba_heads": 8,
        "mamba_d_conv": 4,
    }
    options |= {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48, "adapter_rank": 4, "chunk_size": 4}
    return transformers.Zamba2ForCausalLM(transformers.Zamba2Config(**SMALL, num_mem_blocks=1, **options)).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_heads_are_sliced_where_they_lie(groups, monkeypatch):
    from transformers.models.mamba2 import modeling_mamba2

    def only_gate(self, hidden_states, gate=None):  # without the norm over all heads, slicing equals masking
        return self.weight * hidden_states * torch.nn.functional.silu(gate)

    monkeypatch.setattr(modeling_mamba2.MambaRMSNormGated, "forward", only_gate)
    model = mamba2(groups)
    found = family_groups(model)
    assert [(g.name, g.kind, g.n, g.exact) for g in found] == [
        (f"backbone.layers.{k}.mixer", "head", 8 // groups, False) for k in (0, 1)
    ]
    removed = {found[0].name: [0], found[1].name: list(range(1, found[1].n))}
    with masked(model, found, removed):
        expected = logits(model)
    sliced = slice_units(copy.deepcopy(model), found, removed)
    assert_close(logits(sliced), expected)
    assert float((expected - logits(model)).abs().max()) > 1e-4
    assert sliced.backbone.layers[1].mixer.num_heads == groups


def test_pruned_heads_are_saved_and_generate_with_their_cache(tmp_path):
    pruned = nl.prune(mamba2(2), "magnitude", 0.5, data=[{"input_ids": IDS}], allow_approximate=True)
    again = nl.load_pruned(pruned.save(tmp_path))
    assert_close(logits(again), logits(pruned.model), rtol=0, atol=0)
    told = [
        m.generate(IDS[:, :4], max_new_tokens=4, do_sample=False, use_cache=cached)
        for m in (again, pruned.model)
        for cached in (True, False)
    ]
    assert all(torch.equal(each, told[0]) for each in told)


def test_a_shared_block_with_adapters_keeps_its_width():
    groups = nl.find_groups(zamba2(), {"input_ids": IDS})
    assert {(g.name, g.n) for g in groups if "mamba" in g.name} == {
        ("model.layers.0.mamba", 4),
        ("model.layers.1.mamba_decoder.mamba", 4),
    }
    reasons = {f.what: f.reason for f in groups.frozen}
    assert "gate_up_proj_adapter_list" in reasons["model.layers.1.shared_transformer.feed_forward"]


def test_widths_that_are_not_those_of_mamba_2_are_frozen_with_the_reason():
    model = mamba2(2)
    model.backbone.layers[0].mixer.n_groups = 3
    found = family_groups(model)
    assert [g.name for g in found] == ["backbone.layers.1.mixer"]
    reasons = {f.what: f.reason for f in found.frozen}
    assert reasons["backbone.layers.0.mixer"] == "in_proj has 152 outputs: they are not those of 8 heads and 3 groups of Mamba 2"
