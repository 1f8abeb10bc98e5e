"""Models inside adapters of PEFT are measured and pruned as the models that they wrap."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nodelens as nl
from nodelens.network.objective import Objective
from nodelens.pruning.surgery.mask import masked

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers deprecates


@pytest.fixture(scope="module")
def adapted():
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return peft.get_peft_model(LlamaForCausalLM(config), adapter).eval()


def texts():
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "labels": ids}]


def test_an_adapted_model_takes_what_its_base_takes(adapted):
    objective = Objective.of(adapted)
    assert objective.task == "causal_lm"
    assert objective.positions is not None
    assert objective.batch(texts()[0]).kwargs["use_cache"] is False


def test_an_adapted_model_is_analysed_and_pruned(adapted, tmp_path):
    found = nl.analyze(adapted, texts(), ["activation_mean", "taylor"])
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default" in found.layers.index
    pruned = nl.prune(adapted, "taylor", 0.5, data=texts())
    assert {group.kind for group in pruned.groups} == {"ffn", "head"}
    ids = texts()[0]["input_ids"]
    with torch.no_grad(), masked(adapted, pruned.groups, pruned.plan.removed):
        expected = adapted(input_ids=ids).logits
    with torch.no_grad():
        assert (pruned.model(input_ids=ids).logits - expected).abs().max() < 1e-5
    folder = pruned.save(tmp_path)
    with pytest.raises(ValueError, match="give a model to load into"):
        nl.load_pruned(folder)
    loaded = nl.load_pruned(folder, copy.deepcopy(adapted)).merge_and_unload()
    with torch.no_grad():
        assert (loaded(input_ids=ids).logits - expected).abs().max() < 1e-5


def test_a_merged_model_is_pruned_and_loaded_as_its_base_model(adapted, tmp_path):
    merged = copy.deepcopy(adapted).merge_and_unload()
    own, twin = nl.prune(adapted, "taylor", 0.5, data=texts()), nl.prune(merged, "taylor", 0.5, data=texts())
    assert {f"base_model.model.{name}": units for name, units in twin.plan.removed.items()} == own.plan.removed
    ids = texts()[0]["input_ids"]
    with torch.no_grad():
        expected = twin.model(input_ids=ids).logits
        assert torch.equal(nl.load_pruned(twin.save(tmp_path))(input_ids=ids).logits, expected)
        assert (own.model(input_ids=ids).logits - expected).abs().max() < 1e-5


def test_weights_of_two_factors_and_a_size_each_are_refused_with_the_way_out(adapted):
    base = copy.deepcopy(adapted).unload()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True)).eval()
    with pytest.raises(ValueError, match=r"lora_magnitude_vector\.default\.weight: merge the adapters first, model = model\.merge"):
        nl.prune(model, "magnitude", 0.5, data=texts())
