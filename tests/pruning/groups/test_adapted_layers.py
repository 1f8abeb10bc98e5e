"""Layers with adapters of low rank are pruned as the layers that they wrap: adapters are sliced along, their ranks are no units."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import nodelens as nl
from nodelens.network.adapters import adapters_of
from nodelens.pruning.groups.find import find_groups
from nodelens.pruning.surgery.mask import masked


class Lora(nn.Module):
    """What PEFT's layers are made of: the base layer, and by the adapter's name its two small layers."""

    def __init__(self, base, rank=4, bias=False, names=("default",)):
        super().__init__()
        self.base_layer, self.active_adapters, self.merged = base, list(names[:1]), False
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A = nn.ModuleDict({name: nn.Linear(base.in_features, rank, bias=False) for name in names})
        self.lora_B = nn.ModuleDict({name: nn.Linear(rank, base.out_features, bias=bias) for name in names})

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        y = self.base_layer(x)
        return y if self.merged else y + sum(2 * self.lora_B[name](self.lora_A[name](x)) for name in self.active_adapters)

    def merge(self):
        for name in self.active_adapters:
            self.base_layer.weight.data += 2 * self.lora_B[name].weight @ self.lora_A[name].weight
        self.merged = True


class Scaled(nn.Module):
    """An adapter of another kind, which multiplies the weights of its base layer by numbers of its own."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.scales = base, nn.Parameter(torch.rand(base.out_features, 1))

    def forward(self, x):
        return nn.functional.linear(x, self.base_layer.weight * self.scales, self.base_layer.bias)


class Factors(nn.Module):
    """An adapter that is written by hand: two parameters beside a layer."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 3)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 16))

    def forward(self, x):
        return self.fc2((self.fc1(x) + x @ self.lora_A @ self.lora_B).relu())


def mlp(wrap=Lora, **options):
    torch.manual_seed(0)
    return nn.Sequential(
        wrap(nn.Linear(8, 16), **options), nn.ReLU(), wrap(nn.Linear(16, 12), **options), nn.ReLU(), nn.Linear(12, 3)
    )


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    model = LlamaForCausalLM(config).eval()
    for path, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            owner, _, name = path.rpartition(".")
            setattr(model.model.get_submodule(owner), name, Lora(module))
    return model


X, Y = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
DATA = [(X, Y)]
IDS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(1))
TEXTS = [{"input_ids": IDS, "labels": IDS}]


def assert_sliced_as_masked(model, pruned, run):
    with torch.no_grad(), masked(model, pruned.groups, pruned.plan.removed):
        expected = run(model)
    with torch.no_grad():
        assert_close(run(pruned.model), expected, rtol=1e-5, atol=1e-6)


def run_texts(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"names": ("default", "idle")}], ids=str)
def test_adapters_follow_the_layer_that_they_wrap(options):
    model = mlp(**options)
    pruned = nl.prune(model, "taylor", 0.5, data=DATA)
    assert [(group.name, group.n) for group in pruned.groups] == [("0.base_layer", 16), ("2.base_layer", 12)]
    assert_sliced_as_masked(model, pruned, lambda net: net(X))
    kept = 16 - len(pruned.plan.removed["0.base_layer"])
    for name in model[0].lora_B:
        assert pruned.model[0].lora_B[name].weight.shape == (kept, 4)
        assert pruned.model[2].lora_A[name].weight.shape == (4, kept)
    assert (pruned.model[0].out_features, pruned.model[2].in_features) == (kept, kept)  # of the wrappers, for further adapters
    ranks = {f.what: f.reason for f in pruned.groups.frozen}["0.lora_A.default"]
    assert ranks.startswith("4 units: the ranks of an adapter (LoRA) are no units of the network")


def test_an_adapter_that_is_merged_but_still_there_is_sliced_along():
    model = mlp()
    for k in (0, 2):
        model[k].merge()
    pruned = nl.prune(model, "taylor", 0.5, data=DATA)
    assert_sliced_as_masked(model, pruned, lambda net: net(X))
    assert pruned.model[0].lora_B["default"].weight.shape == (16 - len(pruned.plan.removed["0.base_layer"]), 4)


def test_an_adapted_transformer_has_the_groups_and_scores_of_its_merged_twin(tmp_path):
    model = llama()
    merged = copy.deepcopy(model)
    for path, module in list(merged.model.named_modules()):
        if isinstance(module, Lora):
            module.merge()
            owner, _, name = path.rpartition(".")
            setattr(merged.model.get_submodule(owner), name, module.base_layer)
    own, twin = (nl.prune(net, "taylor", 0.5, data=TEXTS) for net in (model, merged))
    assert [(g.name, g.kind, g.n) for g in own.groups] == [(g.name, g.kind, g.n) for g in twin.groups]
    assert_close(*(torch.tensor(p.table["taylor"].to_numpy()) for p in (own, twin)), rtol=1e-4, atol=1e-9)
    assert own.plan.removed == twin.plan.removed
    assert_sliced_as_masked(model, own, run_texts)
    with torch.no_grad():
        assert_close(run_texts(own.model), run_texts(twin.model), rtol=1e-4, atol=1e-6)
    loaded = nl.load_pruned(own.save(tmp_path), copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(run_texts(loaded), run_texts(own.model))
    mlp_of = loaded.model.layers[0].mlp
    assert mlp_of.down_proj.in_features == mlp_of.down_proj.base_layer.in_features == mlp_of.up_proj.out_features
    assert {f.what for f in own.groups.frozen} >= {"adapters"}


def test_an_adapter_that_does_not_run_is_read_by_nobody():
    model = llama()
    for module in model.modules():
        if isinstance(module, Lora):
            module.active_adapters = []
    group = find_groups(model).named("model.layers.0.mlp")
    assert [p.module for p in group.by_role("consumer")] == ["model.layers.0.mlp.down_proj.base_layer"]
    assert "model.layers.0.mlp.down_proj.lora_A.default" in [p.module for p in group.by_role("tied")]


def test_the_ranks_of_an_adapter_written_by_hand_are_no_units():
    model = Factors()
    groups = find_groups(model, X)
    assert [(g.name, g.n) for g in groups] == [("fc1", 16)]
    assert [(p.name, p.dim) for p in groups[0].by_role("tied")] == [("lora_B", 1)]
    assert_sliced_as_masked(model, nl.prune(model, "taylor", 0.5, data=DATA), lambda net: net(X))


def test_another_kind_of_adapter_is_refused_with_the_way_out():
    with pytest.raises(
        ValueError, match=r"leaves no group to prune: 0 \(and 1 more\): has an adapter that cannot be sliced, scales"
    ) as e:
        nl.prune(mlp(Scaled), "magnitude", 0.5, data=DATA)
    assert "merge the adapters first, model = model.merge_and_unload()" in str(e.value)
    with pytest.raises(ValueError, match="has an adapter that cannot be sliced, scales: merge the adapters first"):
        adapters_of(Scaled(nn.Linear(2, 2)))


def test_an_attention_with_another_kind_of_adapter_is_left_out_with_the_way_out():
    model = llama()
    attention = model.model.layers[0].self_attn
    attention.q_proj = Scaled(attention.q_proj.base_layer)
    groups = find_groups(model)
    assert [g.kind for g in groups] == ["ffn"]
    assert any("q_proj has an adapter that cannot be sliced, scales: merge" in f.reason for f in groups.frozen)
