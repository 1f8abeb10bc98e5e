"""Compiled modules and fused kernels: models are measured as they are written, and the results are those of the plain model."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.evaluation.evaluate import evaluate
from nodelens.network.eval_mode import eval_mode, training_mode

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
    assert found.index.levels[0].tolist() == ["_orig_mod.0", "_orig_mod.3"]
    assert (found.to_numpy() == expected.to_numpy()).all()
    a, b = (nl.prune(model, "taylor", 0.5, data=IMAGES) for model in (plain, compiled))
    assert [*a.plan.removed.values()] == [*b.plan.removed.values()]
    assert torch.equal(a.model(IMAGES[0][0]), b.model(IMAGES[0][0]))


def test_a_part_that_is_compiled_in_place_is_measured():
    torch._dynamo.reset()
    plain, part = net(), net()
    part[0].compile(backend="eager")
    expected, found = (nl.analyze(model, IMAGES, METRICS).units for model in (plain, part))
    assert found.equals(expected)


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
