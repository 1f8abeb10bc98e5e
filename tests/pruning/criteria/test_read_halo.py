"""Pruning that keeps, or removes first, the units that read what the supernodes write, and its random control of equal size."""

import pytest
import torch
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

import nodelens as nl
from nodelens.analysis.supernodes.supernodes import Supernodes
from nodelens.app.config import CONF

SECOND = "model.layers.1.mlp"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**size, initializer_range=0.3)).eval()
    ids = torch.randint(1, 32, (8, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": part, "labels": part} for part in ids.split(4)]
    supernodes = Supernodes(connectivity_topk=4, draws=2, resamples=2)
    result = nl.analyze(model, data, ["scar_loss_proxy"], list(nl.find_groups(model)), analysis={"supernodes": supernodes})
    folder = tmp_path_factory.mktemp("run")
    result.save(folder)
    return model, data, result, folder / "supernodes"


def criteria(folder, **types):
    own = OmegaConf.load(CONF / "criterion/read_halo.yaml")
    own.read_halo.types = OmegaConf.merge(own.read_halo.types, {"units": str(folder)})
    for name, value in types.items():
        own.read_halo.types[name] = value
    return OmegaConf.to_container(OmegaConf.create({"criterion": own}), resolve=True)["criterion"]


def test_the_preset_keeps_the_read_halo_and_its_control_as_many_others(run):
    model, data, result, folder = run
    spec = criteria(folder)
    halo = result.analyses["supernodes"].units["read_halo"].loc[SECOND]
    members = set(halo.index[halo])
    assert len(members) == 4
    plain = nl.prune(model, "scar_loss_proxy", 0.7, data=data, scope="ffn").plan.removed
    assert members & set(plain[SECOND]), "the loss proxy alone removes some of them"
    kept = nl.prune(model, spec["read_halo"], 0.7, data=data, scope="ffn").plan.removed
    assert not members & set(kept[SECOND])
    rest = result.units["scar_loss_proxy"].loc[SECOND].drop(list(members))
    assert set(kept[SECOND]) == set(rest.nsmallest(28).index)
    assert kept["model.layers.0.mlp"] == plain["model.layers.0.mlp"], "the first layer reads no supernodes"
    controls = [
        nl.prune(model, spec["read_halo_control"], 0.7, data=data, scope="ffn", seed=seed).plan.removed for seed in range(3)
    ]
    assert {len(control[SECOND]) for control in controls} == {28}
    assert len({tuple(control[SECOND]) for control in controls}) > 1
    assert all(control["model.layers.0.mlp"] == plain["model.layers.0.mlp"] for control in controls)


def test_it_can_be_removed_first(run):
    model, data, result, folder = run
    halo = result.analyses["supernodes"].units["read_halo"].loc[SECOND]
    removed = nl.prune(model, criteria(folder, rates={}, first=["True"])["read_halo"], 0.2, data=data, scope="ffn").plan.removed
    assert set(halo.index[halo]) <= set(removed[SECOND])


def test_a_run_without_the_column_is_said(run):
    model, data, _, folder = run
    words = r"units of .* has no column 'read_halo'.* those of supernodes are in <run>/supernodes"
    with pytest.raises(ValueError, match=words):
        nl.prune(model, criteria(folder.parent)["read_halo"], 0.2, data=data, scope="ffn")
