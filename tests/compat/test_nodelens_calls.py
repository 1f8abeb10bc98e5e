"""The calls that users of NodeLens 0.2 write, quoted as they write them."""

import numpy as np
import pytest
import torch
from nets import build, generator
from torch import nn
from torch.testing import assert_close


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.ModuleDict({"conv1": nn.Conv2d(3, 8, 3, padding=1)}))
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.layer1[0]["conv1"](x).relu().mean((2, 3)))


@pytest.fixture
def model():
    return build(Net)


@pytest.fixture
def inputs():
    return torch.randn(6, 3, 5, 5, generator=generator())


def test_wrapper(model, inputs):
    from nodelens import ModelWrapper

    w = ModelWrapper(model, tracked_layers=["layer1.0.conv1"])
    outputs, activations = w.forward_with_activations(inputs)
    assert outputs.shape == (6, 4)
    assert activations["layer1.0.conv1"].shape == (6, 8, 5, 5)
    weights = w.get_layer_weights(layers=["layer1.0.conv1"])
    assert weights["layer1.0.conv1"].shape == (8, 3, 3, 3)
    assert w.tracked_layers == ["layer1.0.conv1"]


def test_layers_of_the_wrapper(model):
    from nodelens import ModelWrapper

    w = ModelWrapper(model, tracked_layers=["layer1.0.conv1", "fc"])
    assert w.get_layer("fc") is model.fc
    info = w.get_layer_info("layer1.0.conv1")
    assert info == {
        "name": "layer1.0.conv1",
        "type": "Conv2d",
        "total_params": 224,
        "trainable_params": 224,
        "weight_shape": [8, 3, 3, 3],
        "in_channels": 3,
        "out_channels": 8,
        "kernel_size": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "groups": 1,
    }
    model.fc.bias.requires_grad_(False)
    assert w.get_layer_info() == {"layer1.0.conv1": info, "fc": w.get_layer_info("fc")}
    assert w.get_layer_info("fc")["trainable_params"] == 32
    with pytest.raises(ValueError, match="no layer matches 'fcc'; did you mean 'fc'"):
        w.get_layer("fcc")
    with pytest.raises(ValueError, match=r"'\*' names 2 layers: layer1.0.conv1, fc; give one"):
        w.get_layer_info("*")


def test_metric():
    from nodelens.metrics import get_metric, list_metrics

    layer_inputs, layer_weights = torch.randn(50, 4, generator=generator()), torch.eye(4)[:2]
    found = get_metric("rayleigh_quotient", relative=True, regularization=1e-6).compute(inputs=layer_inputs, weights=layer_weights)
    variances = layer_inputs.double().var(0) + 1e-6
    assert_close(found.double(), (variances / variances.sum())[:2], rtol=1e-5, atol=0)
    assert "rayleigh_quotient" in list_metrics()


def test_pruning():
    from nodelens.pruning import PruningConfig, get_pruning_strategy, list_pruning_strategies

    layer = nn.Linear(2, 4)
    layer.weight.data = torch.tensor([[3.0, -4], [0.1, 0], [1, 1], [0, -2]])
    config = PruningConfig(amount=0.5, pruning_mode="low")
    mask = get_pruning_strategy("magnitude", config=config).prune(layer, amount=0.5)
    assert mask.sum() == 2
    assert mask[0]
    assert not mask[1]
    assert {"magnitude", "precomputed"} <= set(list_pruning_strategies())


def test_the_package_names_are_lazy_and_listed():
    from nodelens import pruning

    assert {"PruningConfig", "get_pruning_strategy"} <= set(dir(pruning))
    with pytest.raises(AttributeError, match=r"'nodelens\.pruning' has no attribute 'get_strategy'"):
        _ = pruning.get_strategy


def test_wrapper_pruning_and_metrics_in_one_script(model, inputs):
    from nodelens import ModelWrapper
    from nodelens.metrics import get_metric
    from nodelens.pruning import PruningConfig, get_pruning_strategy, list_pruning_strategies

    w = ModelWrapper(model, tracked_layers=["layer1.0.conv1"])
    before, activations = w.forward_with_activations(inputs)
    layer = w.get_layer("layer1.0.conv1")
    scores = get_metric("activation_l2_norm").compute(outputs=activations["layer1.0.conv1"])
    assert scores.shape == (8,)
    assert "rayleigh_quotient" in list_pruning_strategies()
    config = PruningConfig(amount=0.25, structured=True, pruning_mode="low")
    strategy = get_pruning_strategy("precomputed", config=config, scores=scores)
    mask = strategy.prune(layer, amount=0.25)
    assert sorted((~mask).nonzero()[:, 0].tolist()) == sorted(scores.topk(2, largest=False).indices.tolist())
    assert (w.get_layer_weights(layers=["layer1.0.conv1"])["layer1.0.conv1"][~mask] == 0).all()
    after, _ = w.forward_with_activations(inputs)
    assert not torch.equal(before, after)
    mask = get_pruning_strategy("rayleigh_quotient", config=PruningConfig(amount=0.5)).prune(model.fc, inputs=torch.randn(20, 8))
    assert mask.sum() == 2


def test_clusters_and_halo_of_a_network(model):
    from nodelens import ModelWrapper
    from nodelens.analysis.clustering import CrossLayerHaloAnalysis, MetricSpaceClustering
    from nodelens.metrics import get_metric

    inputs = torch.randn(64, 3, 5, 5, generator=generator())
    w = ModelWrapper(model, tracked_layers=["layer1.0.conv1", "fc"])
    outputs, activations = w.forward_with_activations(inputs)
    weights = w.get_layer_weights(layers=["layer1.0.conv1", "fc"])
    conv = {"inputs": inputs, "weights": weights["layer1.0.conv1"], "padding": 1}
    rq_scores = get_metric("rayleigh_quotient", relative=True, regularization=1e-6).compute(**conv)
    redundancy_scores = get_metric("average_redundancy").compute(**conv)
    synergy_scores = get_metric("gaussian_pid_synergy_mmi").compute(outputs=activations["layer1.0.conv1"], targets=outputs[:, 0])
    found = MetricSpaceClustering(n_clusters=4, seed=42).fit(rq_scores, redundancy_scores, synergy_scores, layer_name="conv1")
    assert set(found.types) == {"critical", "redundant", "synergistic", "background"}
    cluster_indices = np.flatnonzero(found.types == "critical")
    halo = CrossLayerHaloAnalysis(percentile=90.0, use_activation_weight=True)
    read = activations["layer1.0.conv1"].relu().mean((2, 3))
    influence = halo.compute_influence(weights["fc"], read)
    np.testing.assert_allclose(influence, weights["fc"].abs() * read.std(0, correction=0), rtol=1e-5)
    indices, relative = halo.find_halo(influence, cluster_indices)
    np.testing.assert_allclose(relative, influence[:, cluster_indices].sum(1) / influence.sum(1))
    assert indices.tolist() == [int(relative.argmax())]


def test_masks_and_sparsity_of_a_strategy(model):
    from nodelens.pruning import PruningConfig, get_pruning_strategy

    strategy = get_pruning_strategy("magnitude", config=PruningConfig(amount=0.5, structured=False))
    mask = strategy.create_pruning_mask(model.fc.weight.abs(), amount=0.5, structured=False)
    before = model.fc.weight.detach().clone()
    strategy.apply_pruning(model.fc, mask)
    assert strategy.get_sparsity(model.fc) == 0.5
    strategy.clear_pruning_state(model.fc)
    assert torch.equal(model.fc.weight, before)
    strategy.apply_pruning(model.fc, mask)
    strategy.remove_pruning(model.fc)
    assert torch.equal(model.fc.weight != 0, mask)
    assert strategy.prune_model(model, 0.25).keys() == {"layer1.0.conv1", "fc"}
    scores = torch.arange(4.0)
    for mode, kept in {"low": [2, 3], "high": [0, 1]}.items():
        config = PruningConfig(amount=0.5, pruning_mode=mode)
        found = get_pruning_strategy("precomputed", config=config, scores=scores).prune(model.fc)
        assert found.nonzero()[:, 0].tolist() == kept
    configs = [PruningConfig(amount=0.5, pruning_mode="random", seed=seed) for seed in range(9)]
    random = [get_pruning_strategy("precomputed", config=config, scores=scores) for config in configs]
    assert len({tuple(each.prune(model.fc, apply=False).tolist()) for each in random}) > 2
