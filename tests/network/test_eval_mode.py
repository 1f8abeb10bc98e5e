"""Compiled modules and fused kernels: models are measured as they are written, and the results are those of the plain model."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.evaluation.evaluate import evaluate
from nodelens.network.eval_mode import copy_of, eval_mode, training_mode

METRICS = ["activation_mean", "rq", "taylor", "magnitude"]
IMAGES = [(torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)), torch.arange(n) % 3) for n in (16, 8)]


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))


class Padded(nn.Module):
    """A text classifier whose encoder skips padding, and for which torch has fused kernels with nested tensors."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(50, 16, padding_idx=0)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
            self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=x == 0).mean(1))


@pytest.fixture
def texts():
    x = torch.randint(1, 50, (8, 12), generator=torch.Generator().manual_seed(0))
    x[:4, 6:] = 0
    return [(x, torch.arange(8) % 3)]


def test_a_compiled_model_has_the_results_of_the_plain_one():
    """Batches of two sizes, for which torch compiles again."""
    torch._dynamo.reset()
    plain, compiled = net(), torch.compile(net(), backend="eager")
    expected, found = (nl.analyze(model, IMAGES, METRICS).units for model in (plain, compiled))
    assert found.equals(expected)
    a, b = (nl.prune(model, "taylor", 0.5, data=IMAGES) for model in (plain, compiled))
    assert a.plan.removed == b.plan.removed
    assert type(b.model) is nn.Sequential
    assert torch.equal(a.model(IMAGES[0][0]), b.model(IMAGES[0][0]))
    assert [layer.name for layer in nl.find_layers(compiled, "0")] == ["0"]
    assert [group.name for group in nl.find_groups(compiled, IMAGES[0])] == ["0"]
    assert nl.evaluate(compiled, IMAGES) == nl.evaluate(plain, IMAGES)
    found, expected = (nl.Supernodes(scope="channel", draws=2)(model, IMAGES).units for model in (compiled, plain))
    assert found.equals(expected)


def test_a_part_that_is_compiled_in_place_is_measured():
    torch._dynamo.reset()
    plain, part = net(), net()
    part[0].compile(backend="eager")
    expected, found = (nl.analyze(model, IMAGES, METRICS).units for model in (plain, part))
    assert found.equals(expected)


def test_a_compiled_part_is_measured_and_pruned_inside_the_network():
    torch._dynamo.reset()
    plain, outer = (nn.Sequential(net()[:3], net()[3]) for _ in range(2))
    outer[0] = torch.compile(outer[0], backend="eager")
    outer(IMAGES[0][0])
    expected, found = (nl.analyze(model, IMAGES, METRICS).units for model in (plain, outer))
    assert (found.to_numpy() == expected.to_numpy()).all()
    a, b = (nl.prune(model, "taylor", 0.5, data=IMAGES) for model in (plain, outer))
    assert [*a.plan.removed.values()] == [*b.plan.removed.values()]
    assert_close(a.model(IMAGES[0][0]), b.model(IMAGES[0][0]))


def test_a_model_made_in_inference_mode_is_measured_and_keeps_its_tensors():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
    plain.load_state_dict(model.state_dict())
    before = dict([*model.named_parameters(), *model.named_buffers()])
    assert nl.analyze(model, IMAGES, METRICS).units.equals(nl.analyze(plain, IMAGES, METRICS).units)
    assert nl.prune(model, data=IMAGES).plan.removed == nl.prune(plain, data=IMAGES).plan.removed
    assert nl.evaluate(model, IMAGES) == nl.evaluate(plain, IMAGES)
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(after[name] is tensor and tensor.is_inference() for name, tensor in before.items())
    assert all(p.requires_grad for p in model.parameters())
    assert model.training


def test_calls_from_two_threads_run_one_after_the_other():
    """Without a lock, each would see the rows of the other."""

    def slow():
        for batch in IMAGES * 3:
            time.sleep(0.02)
            yield batch

    model = net().train()
    expected = nl.analyze(model, list(slow()), METRICS, groups=1).units
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: nl.analyze(model, slow(), METRICS, groups=1).units, range(3)))
    assert all(each.equals(expected) for each in found)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_an_encoder_with_padding_is_measured_and_pruned(texts):
    """Taylor of the hidden units against a gate on each of them, without nodelens."""
    model = Padded().eval()
    pruned = nl.prune(model, "taylor", 0.5, data=texts)
    (x, y), layer = texts[0], model.encoder.layers[0]
    gates = torch.ones(8, 1, 32, requires_grad=True)
    handle = layer.linear2.register_forward_pre_hook(lambda module, args: args[0] * gates)
    try:
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
        (slopes,) = torch.autograd.grad(loss, gates)
    finally:
        handle.remove()
    found = torch.tensor(pruned.table.loc["encoder.layers.0", "taylor"].to_numpy())
    assert_close(found, slopes[:, 0].double().square().mean(0), rtol=1e-4, atol=1e-9)
    assert pruned.model.encoder.layers[0].linear1.out_features == 16


def test_evaluation_runs_the_encoder_as_it_was_measured(texts):
    """The fused kernels put out zeros at padding, which the mean over tokens would read."""
    model, (x, y) = Padded(), texts[0]
    expected = nn.functional.cross_entropy(model.eval()(x), y)  # with gradients, torch does not fuse
    assert_close(evaluate(model, texts)["loss"], expected.item(), rtol=1e-5, atol=0)


def test_what_was_enabled_before_is_enabled_after():
    before = torch.backends.mha.get_fastpath_enabled()
    model = net().train()
    with eval_mode(model):
        assert not model.training
        assert not torch.backends.mha.get_fastpath_enabled()
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled() == before
    with eval_mode(model, as_written=False):
        assert torch.backends.mha.get_fastpath_enabled() == before


def test_training_mode_is_undone():
    model = net().eval()
    state = torch.get_rng_state()
    with training_mode(model):
        assert model[0].training
        torch.rand(3)
    assert not model[0].training
    assert torch.equal(torch.get_rng_state(), state)


class Remembering(nn.Module):
    """Keeps the states of its LSTM, with their graph."""

    def __init__(self):
        super().__init__()
        self.lstm, self.states = nn.LSTM(3, 4, batch_first=True), None

    def forward(self, x: Tensor) -> Tensor:
        out, self.states = self.lstm(x)
        return out


def test_a_model_that_keeps_states_of_a_pass_in_a_tuple_is_copied():
    model = Remembering()
    model(torch.ones(2, 5, 3))
    made = copy_of(model)
    assert all(not state.requires_grad and state.equal(own) for state, own in zip(made.states, model.states, strict=True))
    assert made.lstm.weight_ih_l0 is not model.lstm.weight_ih_l0


def test_an_empty_dictionary_that_two_modules_share_is_copied_once():
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    model[0].seen = model[1].seen = {}
    made = copy_of(model)
    made[0].seen["a"] = 1
    assert made[1].seen == {"a": 1}
    assert model[0].seen == {}
    made.register_forward_hook(lambda *_: None)
    assert not model._forward_hooks
