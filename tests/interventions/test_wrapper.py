import pytest
import torch
import transformers
from ids import label
from lens_models import llama
from nets import Mixed, build, generator
from torch import nn
from torch.testing import assert_close

import nodelens as nl
from nodelens import ModelWrapper
from nodelens.data import ByteTokenizer
from nodelens.interventions import running
from nodelens.network.hooks import Site
from nodelens.network.layers import Layer


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.spare = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(2, 2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


@pytest.fixture
def mlp():
    return build(MLP)


@pytest.fixture
def x():
    return torch.randn(20, 6, generator=generator())


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_it_hands_out_what_layers_put_out_before_it_is_overwritten(mlp, x):
    wrapper = ModelWrapper(mlp, tracked_layers=["fc1", "fc2"])
    outputs, shown = wrapper.forward_with_activations(x)
    assert wrapper.layers == list(shown) == ["fc1", "fc2"]
    assert_close(shown["fc1"], mlp.fc1(x).detach(), rtol=0, atol=0)
    assert (shown["fc1"] < 0).any()
    assert_close(outputs, mlp(x))
    assert outputs.requires_grad
    assert not any(a.requires_grad for a in shown.values())
    outputs.sum().backward()
    assert mlp.fc1.weight.grad is not None


def test_it_hands_out_what_layers_read(mlp, x):
    wrapper = ModelWrapper(mlp, ["fc1", "fc2"], sites=["act", "fc2.input"])
    _, read = wrapper.forward_with_activations(x, layers=["fc1", "fc2"], port="input")
    assert_close(read["fc1"], x)
    assert_close(read["fc2"], mlp.fc1(x).relu().detach())
    _, same = wrapper.forward_with_activations(x, layers="fc2.input")
    assert_close(same["fc2.input"], read["fc2"])


def test_an_extra_site_costs_nothing_unless_it_is_asked_for(mlp, x, monkeypatch):
    wrapper = ModelWrapper(mlp, ["fc1"], sites=["act", "fc2"])
    copies = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t, *a, **k: copies.append(t.shape) or clone(t, *a, **k))
    _, shown = wrapper.forward_with_activations(x)
    assert (list(shown), copies) == (["fc1"], [(20, 5)])
    assert list(wrapper.forward_with_activations(x, layers="act")[1]) == ["act"]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(mlp, x, training):
    mlp.train(training)
    mlp.fc2.eval()
    ModelWrapper(mlp, ["fc1"]).forward_with_activations(x)
    with pytest.raises(RuntimeError):
        ModelWrapper(mlp, ["fc1"]).forward_with_activations(torch.ones(2, 7))
    assert hooks(mlp) == 0
    assert (mlp.training, mlp.fc1.training, mlp.fc2.training) == (training, training, False)


def test_weights_come_as_they_are_stored():
    net = build(Mixed)
    weights = ModelWrapper(net, ["grouped", "up", "head"]).get_layer_weights()
    assert {name: tuple(w.shape) for name, w in weights.items()} == {"grouped": (12, 2, 3, 3), "up": (12, 3, 3, 3), "head": (4, 5)}
    assert not any(w.requires_grad for w in weights.values())
    assert list(ModelWrapper(net, "*").get_layer_weights("head")) == ["head"]


def test_weights_come_by_unit_and_with_biases():
    net = build(Mixed)
    weights = ModelWrapper(net, ["grouped", "up", "point"]).get_layer_weights(flatten=True, include_bias=True)
    shapes = {"grouped": (12, 18), "grouped_bias": (12,), "up": (6, 54), "up_bias": (6,), "point": (5, 6)}
    assert {name: tuple(w.shape) for name, w in weights.items()} == shapes
    assert_close(weights["grouped"], net.grouped.weight.detach().flatten(1), rtol=0, atol=0)
    assert not any(w.requires_grad for w in weights.values())


def test_activations_are_flattened_where_they_have_positions():
    net, x = build(Mixed), torch.randn(2, 3, 9, 9, generator=generator())
    wrapper = ModelWrapper(net, ["stem", "head"])
    shown = wrapper.capture_activations_safe(x)
    flat = wrapper.preprocess_activations(shown)
    assert_close(flat["stem"], wrapper.forward_with_activations(x)[1]["stem"].reshape(2, -1), rtol=0, atol=0)
    assert flat["head"] is shown["head"]
    assert wrapper.preprocess_activations(shown, mode="none") == shown


def test_masked_units_put_out_zero_until_the_weights_are_restored(mlp, x):
    wrapper, before = ModelWrapper(mlp, ["fc1", "fc2"]), {k: v.clone() for k, v in mlp.state_dict().items()}
    clean, mask = mlp(x), torch.tensor([True, False, True, True, False])
    wrapper.apply_structured_dropout({"fc1": mask})
    wrapper.apply_structured_dropout({"fc2": torch.tensor([1.0, 0.5, 0.0])})
    outputs, shown = wrapper.forward_with_activations(x)
    assert (shown["fc1"][:, ~mask] == 0).all()
    assert_close(shown["fc1"][:, mask], mlp.fc1.weight[mask].mm(x.T).T.add(mlp.fc1.bias[mask]).detach())
    assert_close(outputs, mlp.fc2(shown["fc1"].relu()))
    assert (outputs[:, 2] == 0).all()
    wrapper.restore_weights()
    wrapper.restore_weights()
    wrapper.apply_structured_dropout({"fc2": torch.tensor([1.0, 0.5, 0.0])}, mode="zeroing", permanent=False)
    assert_close(mlp(x), clean * torch.tensor([1.0, 1, 0]), rtol=0, atol=0)
    wrapper.restore_weights()
    assert_close(mlp(x), clean, rtol=0, atol=0)
    assert hooks(mlp) == 0
    assert all(torch.equal(v, before[k]) for k, v in mlp.state_dict().items())


@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_a_metric_takes_what_the_wrapper_gives(mlp, x, name):
    wrapper = ModelWrapper(mlp, tracked_layers=["fc1", "fc2"])
    read = wrapper.forward_with_activations(x, port="input")[1][name]
    metric = nl.get_metric("rayleigh_quotient", relative=True, regularization=1e-6)
    value = metric.compute(inputs=read, weights=wrapper.get_layer_weights()[name])
    c = torch.cov(read.double().T)
    w = getattr(mlp, name).weight.detach().double()
    along = ((w @ c) * w).sum(1) / w.square().sum(1) + 1e-6
    assert_close(value, along / (c.trace() + 1e-6 * len(c)), rtol=1e-5, atol=1e-9)


def test_a_metric_takes_a_convolution_s_tensors_as_the_pass_does():
    net, images = build(Mixed), torch.randn(12, 3, 9, 9, generator=generator())
    layers = ["stem", "grouped"]
    wrapper = ModelWrapper(net, layers)
    _, read = wrapper.forward_with_activations(images, port="input")
    _, put_out = wrapper.forward_with_activations(images)
    weights = wrapper.get_layer_weights()
    assert weights["grouped"].ndim == 4
    rq = nl.analyze(net, [images], {"rq": nl.get_metric("rq", regularization=1e-6)}, layers).units["rq"]
    metric = nl.get_metric("rayleigh_quotient", relative=True, regularization=1e-6)
    geometry = {"stem": {"padding": 1, "padding_mode": "reflect"}, "grouped": {"stride": 2, "padding": 1, "groups": 4}}
    for name in layers:
        for more in ({}, {"outputs": put_out[name]}):
            value = metric.compute(inputs=read[name], weights=weights[name], **geometry[name], **more)
            assert_close(value, torch.tensor(rq[name].to_numpy()), rtol=1e-4, atol=1e-8)


def test_calls_of_one_layer_follow_one_another(x):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return self.fc(self.fc(x))

    net = build(Twice)
    _, shown = ModelWrapper(net, ["fc"]).forward_with_activations(x)
    assert_close(shown["fc"], torch.cat([net.fc(x), net.fc(net.fc(x))]).detach())


def test_keyword_tensors_and_outputs_with_fields():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = transformers.GPT2LMHeadModel(config).eval()
    wrapper = ModelWrapper(net, ["*.mlp.c_fc", "*.h.0"])
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        outputs, shown = wrapper.forward_with_activations({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert outputs.logits.shape == (2, 5, 11)
    assert {name: tuple(a.shape) for name, a in shown.items()} == {
        "transformer.h.0": (2, 5, 8),
        "transformer.h.0.mlp.c_fc": (2, 5, 32),
    }
    assert wrapper.get_layer_weights("transformer.h.0.mlp.c_fc")["transformer.h.0.mlp.c_fc"].shape == (8, 32)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: ModelWrapper(m, ["fc3"]), "no layer matches 'fc3'; did you mean 'fc2'"),
        (lambda m, x: ModelWrapper(m, ["fc1"]).forward_with_activations(x, layers=["fc9"]), "no layer matches 'fc9'"),
        (
            lambda m, x: ModelWrapper(m, ["fc1"]).forward_with_activations(x, layers=["fc2"]),
            "'fc2' is not tracked; tracked layers: fc1",
        ),
        (lambda m, x: ModelWrapper(m).forward_with_activations(x), "layer 'spare' is never called by MLP.forward"),
        (lambda m, x: ModelWrapper(m, ["fc1", "act"]).get_layer_weights(), r"layer 'act' \(ReLU\) has no weights"),
        (
            lambda m, x: ModelWrapper(m, ["fc1"]).forward_with_activations(x, port="grad"),
            "port is 'grad'; it must be 'output' or 'input'",
        ),
        (lambda m, x: ModelWrapper(m, ["fc1"]).forward_with_activations([x]), "a tensor or a mapping .* not a list"),
        (lambda m, x: ModelWrapper(m).preprocess_activations({}, mode="mean"), "mode is 'mean'; it must be 'flatten' or 'none'"),
        (lambda m, x: ModelWrapper(m).apply_structured_dropout({}, mode="rows"), "mode is 'rows'; it must be 'multiplicative' or"),
        (
            lambda m, x: ModelWrapper(m).apply_structured_dropout({}, permanent=True),
            "permanent=True changes weights, which a wrapper",
        ),
        (lambda m, x: ModelWrapper(m).get_layer_info(layer_name="fc7"), "no layer matches 'fc7'"),
        (lambda m, x: ModelWrapper(m).apply_structured_dropout({"fc8": torch.ones(5)}), "no layer matches 'fc8'"),
    ],
    ids=label,
)
def test_mistakes_are_named(mlp, x, call, words):
    with pytest.raises(ValueError, match=words):
        call(mlp, x)
    assert hooks(mlp) == 0


def test_contexts_of_another_width_or_none_are_named():
    wrapper = nl.ModelWrapper(llama())
    with pytest.raises(TypeError, match=r"run takes a RepresentationContext, which says what to run, and not NoneType"):
        wrapper.run(None)
    for prompt in (torch.zeros(1, 4, 40), torch.zeros(1, 4, 48, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"a soft prompt has width \d+ and float\d+, the embeddings of"):
            wrapper.run(nl.RepresentationContext(prompt, "tiny", "all", "all"))


def test_states_of_a_model_that_shows_tokens_before_samples():
    config = transformers.XLNetConfig(vocab_size=300, d_model=32, n_layer=2, n_head=4, d_inner=40)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.XLNetLMHeadModel(config).eval()
    states = nl.StateManager(nl.StateConfig(save_states="layer"))
    prompt = nl.RepresentationContext(["abcd", "efgh"], position=[1, -1], layer=0)
    nl.ModelWrapper(model, tokenizer=ByteTokenizer()).run(prompt, state_manager=states)
    shown = []
    with torch.no_grad():
        handle = model.transformer.layer[0].register_forward_hook(lambda m, a, o: shown.append(o[0]))
        model(torch.tensor([list(b"abcd"), list(b"efgh")]))
        handle.remove()
    torch.testing.assert_close(states.load("layer_0"), shown[0][[1, 3]].transpose(0, 1), rtol=0, atol=1e-6)


def test_a_state_without_a_row_per_token_is_refused():
    site = Site(Layer("inner", nn.Identity()), "output")
    with pytest.raises(ValueError, match=r"inner shows \(3, 2, 4\) for 2 prompts of 5 tokens: a state needs one row per token"):
        running._by_prompt(site, torch.zeros(3, 2, 4), torch.ones(2, 5, dtype=torch.bool))
