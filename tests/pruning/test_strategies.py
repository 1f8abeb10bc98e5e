import pytest
import torch
from torch import nn

import nodelens as nl
from nodelens.network.batch import Batch
from nodelens.pruning.strategies import ALIGNMENT
from nodelens.pruning.sweep.latency import latency


def layer():
    found = nn.Linear(2, 4)
    found.weight.data = torch.tensor([[3.0, -4], [0.1, 0], [1, 1], [0, -2]])
    found.bias.data = torch.ones(4)
    return found


def test_the_keep_mask_of_magnitude_and_what_is_zeroed():
    it = layer()
    config = nl.PruningConfig(amount=0.5, pruning_mode="low")
    keep = nl.get_pruning_strategy("magnitude", config=config).prune(it, amount=0.5)
    assert keep.dtype == torch.bool
    assert keep.tolist() == [True, False, False, True]  # sizes 7, 0.1, 2, 2: of the tied two one goes
    assert not it.weight[~keep].any()
    assert not it.bias[~keep].any()
    assert it.weight[keep].equal(layer().weight[keep])


def test_that_a_tie_is_broken_by_the_seed_and_the_same_way_twice():
    def masks(seed):
        return nl.get_pruning_strategy("magnitude", nl.PruningConfig(0.5, seed=seed)).prune(layer(), apply=False).tolist()

    assert masks(0) == masks(0)
    assert {tuple(masks(seed)) for seed in range(8)} == {(True, False, False, True), (True, False, True, False)}


def test_modes_and_counts():
    def keep(amount, **options):
        return nl.get_pruning_strategy("l2", nl.PruningConfig(amount, **options)).prune(layer(), apply=False).tolist()

    assert keep(0.25) == [True, False, True, True]
    assert keep(0.25, pruning_mode="high") == [False, True, True, True]
    assert keep(0.0) == [True] * 4
    assert keep(0.99) == [True, False, False, False], "a unit stays"
    assert sum(keep(0.375)) == 2, "floor(1.5 + 1/2) go"
    assert sum(keep(0.75, min_keep=2)) == 2
    assert sum(keep(0.3, multiple=2)) == 2
    it, chance = layer(), nl.get_pruning_strategy("random", nl.PruningConfig(0.5, pruning_mode="random", seed=3))
    before = torch.random.get_rng_state()
    assert chance.prune(it).sum() == 2
    assert torch.equal(before, torch.random.get_rng_state())


def test_signed_scores_are_ranked_by_sign(monkeypatch):
    strategy = nl.get_pruning_strategy("magnitude", nl.PruningConfig(0.5))
    monkeypatch.setattr(type(strategy), "scores", lambda self, layer, **t: torch.tensor([-9.0, -1, 0.5, 3]))
    assert strategy.prune(layer()).tolist() == [False, False, True, True]
    high = nl.get_pruning_strategy("magnitude", nl.PruningConfig(0.5, pruning_mode="high"))
    assert high.prune(layer()).tolist() == [True, True, False, False]


def test_strategies_of_tensors_by_hand():
    x, g = torch.tensor([[1.0, 2], [0, 1]]), torch.tensor([[1.0, 0, 2, 0], [0, 1, -1, 3]])
    it = layer()
    y = it(x).detach()

    def scores(name, **options):
        return nl.get_pruning_strategy(name, **options).scores(it, inputs=x, outputs=y, gradients=g)

    q = y * g
    assert torch.allclose(scores("taylor").float(), q.square().mean(0))
    assert torch.allclose(scores("loss_proxy").float(), q.square().mean(0) / 2)
    each = g[:, :, None] * x[:, None, :]  # (n, units, inputs)
    assert torch.allclose(scores("gradient").float(), (it.weight * each.sum(0)).abs().sum(1))
    assert torch.allclose(scores("movement").float(), -(it.weight * each).sum((0, 2)))
    assert torch.allclose(scores("fisher").float(), (it.weight * each).square().mean(0).sum(1) / 2)
    assert scores(ALIGNMENT).allclose(scores("rayleigh_quotient"), equal_nan=True)
    assert scores(ALIGNMENT, metric="activation_variance").allclose(y.var(0).to(scores("activation_variance")))


def test_convolutions_and_single_weights():
    conv = nn.Conv2d(2, 4, 3, padding=1)
    x = torch.randn(3, 2, 5, 5)
    y = conv(x).detach()
    keep = nl.get_pruning_strategy("rq").prune(conv, 0.5, inputs=x, outputs=y)
    assert keep.sum() == 2
    assert not conv.weight[~keep].any()
    it = layer()
    mask = nl.get_pruning_strategy("magnitude", nl.PruningConfig(0.5, structured=False)).prune(it)
    assert mask.shape == it.weight.shape
    assert mask.tolist() == [[True, True], [False, False], [True, False], [False, True]] or mask.sum() == 4
    assert (it.weight != 0).equal(mask & (layer().weight != 0))
    assert it.bias.all()


def test_scores_that_are_given():
    scores = torch.tensor([1.0, 4, -3, 2])
    it = layer()
    assert nl.get_pruning_strategy("precomputed", scores=scores).prune(it).tolist() == [False, True, False, True]
    single = nl.PruningConfig(0.25, structured=False)
    every = nl.get_pruning_strategy("precomputed", single, scores=torch.arange(8.0).reshape(4, 2)).prune(layer(), apply=False)
    assert every.tolist() == [[False, False]] + [[True, True]] * 3
    strategy = nl.get_pruning_strategy("precomputed", nl.PruningConfig(0.5))
    assert strategy.create_pruning_mask(scores).tolist() == [False, True, False, True]
    assert strategy.create_pruning_mask(scores, 0.25, pruning_mode="high").tolist() == [True, False, True, True]
    assert strategy.create_pruning_mask(scores, pruning_mode="random").sum() == 2
    table = torch.tensor([[1.0, 5, 0], [1, -9, 9]])
    assert strategy.create_pruning_mask(table).tolist() == [[True] * 3, [False] * 3]
    assert strategy.create_pruning_mask(table, 0.34, dim=1).tolist() == [[True, False, True]] * 2
    assert strategy.create_pruning_mask(table, structured=False).tolist() == [[False, True, False], [True, False, True]]


def test_a_mask_is_put_on_and_taken_off():
    it, strategy = layer(), nl.get_pruning_strategy("magnitude", nl.PruningConfig(0.5))
    keep, parameters = strategy.prune(it, apply=False), dict(it.named_parameters())
    assert it.weight.equal(layer().weight)
    strategy.apply_pruning(it, keep)
    assert not it.weight[~keep].any()
    assert not it.bias[~keep].any()
    assert strategy.get_sparsity(it) == 0.625, "the mask, and the zero that is there anyway"
    with torch.no_grad():
        it.parametrizations.weight.original.add_(1)  # a step of training does not undo the mask
    assert not it.weight[~keep].any()
    it(torch.ones(1, 2)).sum().backward()
    assert not it.parametrizations.weight.original.grad[~keep].any()
    strategy.apply_pruning(it, ~keep)
    assert not it.weight[keep].any(), "another mask replaces the first"
    strategy.clear_pruning_state(it)
    assert it.weight.equal(layer().weight + 1)
    assert dict(it.named_parameters()) == parameters, "the same parameters as before"
    strategy.apply_pruning(it, keep)
    strategy.remove_pruning(it)
    assert type(it) is nn.Linear
    assert not it.weight[~keep].any()
    assert it.weight[keep].equal(layer().weight[keep] + 1)
    strategy.clear_pruning_state(it)  # nothing left to give back
    assert not it.weight[~keep].any()


def test_a_mask_of_convolutions_and_single_weights():
    conv = nn.ConvTranspose2d(3, 4, 2)
    strategy = nl.get_pruning_strategy("magnitude", nl.PruningConfig(0.5))
    keep = strategy.prune(conv)
    assert not conv.weight[:, ~keep].any()
    assert conv.weight[:, keep].all()
    it, single = layer(), torch.rand(4, 2, generator=torch.Generator().manual_seed(0)) > 0.5
    strategy.apply_pruning(it, single.float(), make_permanent=True)
    assert not it.weight[~single].any()
    assert it.bias.all()


def test_every_layer_of_a_model_by_its_own_weights():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 6))
    masks = nl.get_pruning_strategy("magnitude", nl.PruningConfig(0.5)).prune_model(net)
    assert {name: (len(keep), int(keep.sum())) for name, keep in masks.items()} == {"0": (4, 2), "2": (6, 3)}
    assert not net[2].weight[~masks["2"]].any()
    masks = nl.get_pruning_strategy("magnitude", nl.PruningConfig(0.5)).prune_model(net, 0.25, layers=["0"])
    assert list(masks) == ["0"]


def test_every_name_that_is_listed_can_be_had():
    names = nl.list_pruning_strategies()
    assert {"magnitude", "random", "taylor", "fisher", "wanda", "flap", "fpgm", "hrank", "chip", "lamp", ALIGNMENT} <= set(names)
    for name in names:
        nl.get_pruning_strategy(name)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: nl.get_pruning_strategy("magnitud"), "no pruning strategy is called 'magnitud'. Did you mean 'magnitude'"),
        (lambda: nl.get_pruning_strategy("magnitude", q=2), "magnitude has no option 'q'"),
        (lambda: nl.PruningConfig(amount=1.0), "amount is 1.0"),
        (lambda: nl.PruningConfig(pruning_mode="lo"), "mode is 'lo'"),
        (lambda: nl.get_pruning_strategy("wanda").prune(layer()), "wanda reads what consumes the units"),
        (lambda: nl.get_pruning_strategy("taylor").prune(layer()), "taylor needs outputs= and gradients="),
        (lambda: nl.get_pruning_strategy("magnitude").prune(nn.ReLU()), "ReLU has no weights of its own"),
        (lambda: nl.get_pruning_strategy("effective_rank").prune(layer()), "effective_rank gives one value per layer"),
        (lambda: nl.get_pruning_strategy("rq", relativ=True), "no option 'relativ'; did you mean 'relative'"),
        (lambda: nl.get_pruning_strategy("precomputed", score=1), "precomputed has no option 'score'; it takes scores"),
        (lambda: nl.get_pruning_strategy("precomputed").prune(layer()), "precomputed needs scores="),
        (
            lambda: nl.get_pruning_strategy("precomputed", scores=torch.ones(3)).prune(layer()),
            r"scores are \(3,\), Linear takes \(4,\)",
        ),
        (lambda: nl.get_pruning_strategy("magnitude").prune(layer(), input=torch.ones(1, 2)), "no 'input'. Did you mean 'inputs'"),
        (lambda: nl.get_pruning_strategy("magnitude").apply_pruning(layer(), torch.ones(3)), r"the mask is \(3,\): give \(4,\)"),
        (
            lambda: nl.get_pruning_strategy("magnitude").apply_pruning(nn.ReLU(), torch.ones(3)),
            "ReLU has no weights of its own: mask a Linear",
        ),
        (
            lambda: nl.get_pruning_strategy("magnitude").apply_pruning(nn.ConvTranspose2d(4, 4, 1, groups=2), torch.ones(3)),
            "ConvTranspose2d is a grouped transposed convolution",
        ),
        (lambda: nl.get_pruning_strategy("magnitude").create_pruning_mask(torch.ones(3), 1.0), "amount is 1.0: a share to remove"),
        (lambda: latency({}, Batch.of(torch.ones(1, 2)), repeats=2), "2 repeats"),
    ],
)
def test_what_does_not_fit_is_named(act, said):
    with pytest.raises(ValueError, match=said):
        act()


def test_latency_has_a_median_between_its_quartiles_for_every_model_and_batch():
    models = {"a": nn.Linear(4, 4), "b": nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4))}
    found = latency(models, Batch.of(torch.rand(3, 4)), (1, 7), repeats=5)
    for times in found.values():
        for batch in (1, 7):
            assert 0 < times[f"batch{batch}_q25"] <= times[f"batch{batch}_median"] <= times[f"batch{batch}_q75"]
    assert models["a"].training
