"""What a unit matters to the loss."""

import json
import math

import numpy as np
import pytest
import torch
from ids import metric_id
from real import folder
from torch import nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.metrics import Need, get_metric
from nodelens.metrics.gradient import (
    Curvature,
    FisherInformation,
    GradientAlignment,
    LossProxyFactored,
    ScarActivationPower,
    ScarLossProxy,
    ScarTaylor,
    TaylorSaliency,
)
from nodelens.statistics import Moments, Sizes
from nodelens.statistics.weight_sums import WeightSums

SIGNED = [TaylorSaliency(mode="mean_abs"), TaylorSaliency(mode="sq_mean")]
REMOVALS = [TaylorSaliency(), *SIGNED, FisherInformation(), ScarTaylor(), ScarLossProxy()]
SCORES = [*REMOVALS, ScarActivationPower(), Curvature(), LossProxyFactored()]
named = {"ids": metric_id}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(n: int = 200_000) -> torch.Tensor:
    """Rows at the quantiles of N(0, 1): its moments without a sample's error."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]


@pytest.mark.parametrize("name", ["taylor_saliency", "taylor_saliency_conv"])
def test_golden_saliencies_agree(name):
    doc = json.loads((folder("NODELENS_GOLDEN") / f"{name}.json").read_text())
    arrays = {k: torch.as_tensor(np.array(doc["inputs"][k])) for k in ("outputs", "gradients")}
    for case, options in doc["options"].items():
        value = get_metric("taylor_saliency", **options).compute(**arrays)
        assert_close(value, torch.tensor(doc["expected"][case], dtype=torch.float64), **doc["tolerance"], msg=case)


def scar_net() -> tuple[dict, nn.Sequential, torch.Tensor, torch.Tensor]:
    doc = json.loads((folder("NODELENS_GOLDEN") / "scar_conv.json").read_text())
    back = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), *back).double()
    net.load_state_dict({k: torch.tensor(v, dtype=torch.float64) for k, v in doc["inputs"]["state_dict"].items()})
    return doc, net, torch.tensor(doc["inputs"]["images"], dtype=torch.float64), torch.tensor(doc["inputs"]["labels"])


def test_golden_scar_scores_of_a_convolutional_net_agree():
    doc, net, x, labels = scar_net()
    kept = {}
    for name, layer in net.named_children():
        x = kept[name] = layer(x)
    loss = nn.functional.cross_entropy(x, labels, reduction="sum")
    for case, options in doc["options"].items():
        options = dict(options)
        at = kept[options.pop("layer")]
        (g,) = torch.autograd.grad(loss, at, retain_graph=True)
        assert options.pop("port") == "output"
        value = get_metric(options.pop("metric", doc["metric"]), **options).compute(outputs=at.detach(), gradients=g)
        assert_close(value, torch.tensor(doc["expected"][case], dtype=torch.float64), **doc["tolerance"], msg=case)


@pytest.mark.parametrize("sizes", [[12], [5, 7], [1] * 12], ids=len)
def test_golden_scar_scores_agree_in_a_pass_of_any_batch_size(sizes):
    doc, net, x, labels = scar_net()
    batches = list(zip(x.split(sizes), labels.split(sizes), strict=True))
    units = nl.analyze(net, batches, metrics=["scar_loss_proxy", "scar_taylor"]).units
    for case, options in doc["options"].items():
        value = units.loc[options["layer"], options.get("metric", doc["metric"])].to_numpy()
        assert_close(torch.from_numpy(value.copy()), torch.tensor(doc["expected"][case], dtype=torch.float64), **doc["tolerance"])


def test_a_pass_aligns_a_convolution_s_rule_with_its_gradient():
    _, net, x, labels = scar_net()
    kept = {}
    net[2].register_forward_hook(lambda module, args, output: kept.update(x=args[0].detach(), y=output))
    nn.functional.cross_entropy(net(x), labels, reduction="sum").backward()
    patches = nn.functional.unfold(kept["x"], 3, stride=2)
    hebbian = torch.einsum("nup,nfp->uf", kept["y"].detach().flatten(2), patches)
    gradient = net[2].weight.grad.flatten(1)
    square = kept["y"].detach().flatten(2).square().sum((0, 2))
    oja = hebbian - square[:, None] * net[2].weight.detach().flatten(1)
    metrics = {name: get_metric("gradient_alignment", local_signal=name) for name in ("hebbian", "anti_hebbian", "oja")}
    value = nl.analyze(net, [(x[:5], labels[:5]), (x[5:], labels[5:])], metrics=metrics).units.loc["2"]
    for name, signal in {"hebbian": hebbian, "anti_hebbian": -hebbian, "oja": oja}.items():
        expected = [torch.corrcoef(torch.stack(pair))[0, 1].abs() for pair in zip(signal, gradient, strict=True)]
        assert_close(torch.from_numpy(value[name].to_numpy().copy()), torch.stack(expected))
    assert not (value["oja"] - value["hebbian"]).abs().lt(1e-6).any()


def test_a_linear_loss_of_gaussian_units():
    """Loss w u: E|q| = 0.7979 |w|, E q^2 = w^2."""
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    t = {"outputs": gaussian().expand(-1, 3), "gradients": w.expand(200_000, 3)}
    mean_size = math.sqrt(2 / math.pi) * w.abs()
    for name, expected in {
        "taylor_saliency": mean_size,
        "taylor": w**2,
        "loss_proxy": w**2 / 2,
        "scar_taylor": mean_size,
        "fisher_information": w**2,
        "lp": w**2 / 2,
        "scar_loss_proxy_factored": w**2 / 2,
        "scar_activation_power": torch.ones_like(w),
    }.items():
        assert_close(get_metric(name).compute(**t), expected, rtol=1e-4, atol=0, msg=name)
    assert_close(Curvature()(None, Moments.of(t["gradients"])), w**2)
    assert get_metric("taylor_saliency", mode="mean_abs").compute(**t).abs().max() < 1e-9


def test_of_a_map_the_sum_is_what_its_removal_changes():
    """A loss sum of a_i u_i over a map changes by sum a_i u_i when the map is set to 0."""
    u, a = normal(6, 3, 4, 5), normal(6, 3, 4, 5, seed=1)
    change = (u * a).sum((2, 3)).abs().mean(0)
    assert_close(TaylorSaliency().compute(outputs=u, gradients=a), change)
    assert_close(ScarTaylor().compute(outputs=u, gradients=a), change)
    assert_close(ScarLossProxy().compute(outputs=u, gradients=a), 0.5 * (u * a).sum((2, 3)).square().mean(0))
    for metric in (TaylorSaliency(spatial="per_position"), ScarTaylor(spatial="per_position")):
        assert_close(metric.compute(outputs=u, gradients=a), (u * a).abs().mean((0, 2, 3)))


@pytest.mark.parametrize("metric", REMOVALS, **named)
def test_opposite_pulls_on_equal_places_cancel(metric):
    u = normal(6, 3, 1, 1).expand(-1, -1, 1, 2)
    a = normal(6, 3, 1, 1, seed=1) * torch.tensor([1.0, -1.0])
    assert metric.compute(outputs=u, gradients=a).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("metric", "power"),
    [
        (TaylorSaliency(), 1),
        (TaylorSaliency(mode="sq_mean"), 2),
        (FisherInformation(), 2),
        (ScarTaylor(), 1),
        (Curvature(), 2),
        (ScarLossProxy(), 2),
        (LossProxyFactored(), 2),
        (ScarActivationPower(), 0),
    ],
    ids=lambda m: m.names[0] if hasattr(m, "names") else str(m),
)
def test_a_doubled_loss(metric, power):
    u, g = normal(30, 4), normal(30, 4, seed=1)
    doubled = metric.compute(outputs=u, gradients=2 * g)
    assert_close(doubled, 2**power * metric.compute(outputs=u, gradients=g))


def test_the_proxy_factors_where_power_and_curvature_do_not_correlate():
    u, g = torch.meshgrid(normal(20), normal(15, seed=1), indexing="ij")
    t = {"outputs": u.reshape(-1, 1), "gradients": g.reshape(-1, 1)}
    assert_close(ScarLossProxy().compute(**t), LossProxyFactored().compute(**t))
    assert_close(LossProxyFactored().compute(**t), 0.5 * ScarActivationPower().compute(**t) * Curvature().compute(**t))


def test_the_fisher_information_of_a_mask_is_twice_the_proxy():
    t = {"outputs": normal(30, 4), "gradients": normal(30, 4, seed=1)}
    assert_close(FisherInformation().compute(**t), 2 * ScarLossProxy().compute(**t))
    assert_close(FisherInformation().compute(**t), TaylorSaliency(mode="sq_mean").compute(**t))
    mask = torch.ones(30, 4, dtype=torch.float64, requires_grad=True)
    ((t["outputs"] * mask) * t["gradients"]).sum().backward()
    assert_close(FisherInformation().compute(**t), mask.grad.square().mean(0))


@pytest.mark.parametrize("metric", SCORES, **named)
def test_a_dead_unit_is_worth_nothing_and_two_equal_ones_the_same(metric):
    u, g = normal(30, 5), normal(30, 5, seed=1)
    u[:, 1], u[:, 3], g[:, 3] = 0, u[:, 2], g[:, 2]
    value = metric.compute(outputs=u, gradients=g)
    assert value.isfinite().all()
    assert value[2] == value[3]
    if not isinstance(metric, Curvature):
        assert value[1] == 0


@pytest.mark.parametrize("metric", SCORES, **named)
def test_units_far_from_zero_keep_their_digits(metric):
    u, g = 1000 + normal(400, 4), normal(400, 4, seed=1)
    exact = metric.compute(outputs=u, gradients=g)
    assert_close(metric.compute(outputs=u.float(), gradients=g.float()), exact, rtol=1e-5, atol=1e-5 * float(exact.max()))


@pytest.mark.parametrize("metric", SCORES, **named)
def test_a_single_row_of_a_single_unit(metric):
    value = metric.compute(outputs=normal(1, 1), gradients=normal(1, 1, seed=1))
    assert value.shape == (1,)
    assert value.isfinite().all()


@pytest.mark.parametrize(
    ("options", "port", "view"),
    [
        ({}, "output*grad", "whole"),
        ({"spatial": "per_position"}, "output*grad", "positions"),
        ({"tokens": "per_sequence"}, "output*grad", "samples"),
        ({"loss_reduction": "mean"}, "output*grad/tokens", "whole"),
    ],
)
@pytest.mark.parametrize("metric", [TaylorSaliency, FisherInformation, ScarTaylor, ScarLossProxy])
def test_options_say_which_rows_are_wanted(metric, options, port, view):
    (need,) = metric(**options).needs().values()
    assert (need.port, need.view) == (port, view)


def test_power_and_curvature_take_every_position():
    assert ScarActivationPower().needs()["u"] == Need(Moments, "output")
    assert Curvature().needs()["g"] == Need(Moments, "grad")
    assert Curvature(loss_reduction="mean").needs()["g"].port == "grad/tokens"
    assert LossProxyFactored(loss_reduction="mean").needs()["g"].port == "grad/tokens"


def test_of_texts_a_token_is_a_row_and_a_mean_loss_weighs_it_less():
    """Texts of equal length T + 1: a mean loss has gradients 1/T as large."""
    t = {"outputs": normal(5, 8, 3), "gradients": normal(5, 8, 3, seed=1)}  # (texts, tokens, units)
    q = t["outputs"] * t["gradients"]
    assert_close(ScarLossProxy().compute(**t), 0.5 * q.square().mean((0, 1)))
    assert_close(ScarLossProxy().compute(**t), 7**2 * ScarLossProxy(loss_reduction="mean").compute(**t))
    assert_close(LossProxyFactored().compute(**t), 7**2 * LossProxyFactored(loss_reduction="mean").compute(**t))
    assert_close(ScarTaylor().compute(**t), 7 * ScarTaylor(loss_reduction="mean").compute(**t))
    assert_close(FisherInformation(tokens="per_sequence").compute(**t), q.sum(1).square().mean(0))
    one = {k: v[:1] for k, v in t.items()}
    assert_close(ScarLossProxy().compute(**one), 0.5 * q[0].square().mean(0))


def test_rows_alone_and_rows_added_up_are_two_things():
    with pytest.raises(ValueError, match=r"scar_taylor: spatial: per_position .*, tokens: per_sequence .*; choose one"):
        ScarTaylor(spatial="per_position", tokens="per_sequence")


def test_parts_add_up_to_the_same_score():
    q = normal(30, 4)
    for metric in (FisherInformation(), ScarLossProxy()):
        assert_close(metric(None, q=Moments.of(q[:7]) + Moments.of(q[7:])), metric(None, q=Moments.of(q)))
    assert_close(ScarTaylor()(None, q=Sizes.of(q[:7]) + Sizes.of(q[7:])), ScarTaylor()(None, q=Sizes.of(q)))


# what a rule that sees the layer alone would change


def layer(n: int = 50, fan_in: int = 6, units: int = 4, groups: int = 1):
    return normal(n, groups * fan_in) + 0.3, normal(n, units, seed=1), normal(n, units, seed=2)


def test_sums_of_products_are_products_of_sums():
    x, y, g = layer()
    s = WeightSums.of(x, y, g)
    assert_close(s.hebbian, y.T @ x)
    assert_close(s.gradient, g.T @ x)
    assert_close(s.inputs, x.sum(0))
    assert s.n.tolist() == [50]


def test_the_second_sum_is_the_gradient_in_the_weights():
    linear = nn.Linear(6, 4).double()
    x = normal(20, 6)
    y = linear(x)
    y.retain_grad()
    y.square().sum().backward()
    assert_close(WeightSums.of(x, y.detach(), y.grad).gradient, linear.weight.grad)


def test_the_second_sum_of_patches_is_the_gradient_of_a_grouped_convolution():
    conv = nn.Conv2d(4, 6, 3, groups=2, bias=False).double()
    x = normal(5, 4, 6, 7)
    y = conv(x)
    y.retain_grad()
    (y * normal(*y.shape, seed=3)).sum().backward()
    patches = nn.functional.unfold(x, 3).transpose(1, 2).flatten(0, 1)  # (rows, channels x kernel), group after group
    rows = (t.flatten(2).transpose(1, 2).flatten(0, 1) for t in (y.detach(), y.grad))
    s = WeightSums.of(patches, *rows, groups=2)
    assert_close(s.gradient, conv.weight.grad.flatten(1))
    assert s.inputs.shape == (36,)


def test_parts_of_the_sums_add_and_what_is_not_finite_is_left_out():
    x, y, g = layer()
    whole = WeightSums.of(x, y, g)
    parts = WeightSums.of(x[:0], y[:0], g[:0]) + WeightSums.of(x[:20], y[:20], g[:20]) + WeightSums.of(x[20:], y[20:], g[20:])
    for name, value in whole.tensors().items():
        assert_close(parts.tensors()[name], value, rtol=1e-12, atol=1e-12)
    keep = torch.arange(50) > 2
    x[0, 0], y[1, 1], g[2, 2] = torch.nan, torch.inf, torch.nan
    for some in (WeightSums.of(x, y, g), WeightSums.of(x, y, g, weights=keep)):
        assert some.n.tolist() == [47]
        assert_close(some.hebbian, y[3:].T @ x[3:])


def test_sums_of_float32_rows_far_from_zero_keep_what_differs():
    x, y, g = layer(2000)
    x, y = x + 1000, y + 1000
    exact = y.T @ x
    s = WeightSums.of(x.float(), y.float(), g.float())
    differs = exact - exact.mean(1, keepdim=True)
    assert_close(s.hebbian - s.hebbian.mean(1, keepdim=True), differs, rtol=0, atol=1e-3 * float(differs.abs().max()))
    assert_close(s.gradient, g.T @ x, rtol=1e-5, atol=0.1)


def test_widths_that_differ_are_named():
    x, y, g = layer()
    with pytest.raises(ValueError, match=r"inputs \(49, 6\), outputs \(50, 4\), gradients \(50, 4\): rows differ"):
        WeightSums.of(x[1:], y, g)


def test_a_rule_that_is_the_gradient_is_aligned_with_it():
    x, y, _ = layer()
    for g in (y, -3 * y):
        assert_close(GradientAlignment()(None, WeightSums.of(x, y, g)), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("signal", ["hebbian", "input"])
def test_the_alignment_is_a_correlation_over_the_fan_in(signal):
    x, y, g = layer()
    s = (y.T @ x) if signal == "hebbian" else x.sum(0).expand(4, -1)
    dw = g.T @ x
    expected = torch.stack([torch.corrcoef(torch.stack([a, b]))[0, 1].abs() for a, b in zip(s, dw, strict=True)])
    assert_close(GradientAlignment(local_signal=signal)(None, WeightSums.of(x, y, g)), expected)
    scaled = GradientAlignment(local_signal=signal)(None, WeightSums.of(x, 7 * y, 1e-9 * g))
    assert_close(scaled, expected)


def test_a_group_s_signal_is_what_it_reads():
    x, y, g = layer(groups=2)
    value = GradientAlignment(local_signal="input")(None, WeightSums.of(x, y, g, groups=2))
    for k in range(2):
        part = WeightSums.of(x[:, 6 * k : 6 * k + 6], y[:, 2 * k : 2 * k + 2], g[:, 2 * k : 2 * k + 2])
        assert_close(value[2 * k : 2 * k + 2], GradientAlignment(local_signal="input")(None, part))


def test_what_does_not_differ_over_the_fan_in_has_no_alignment():
    x, y, g = layer()
    y[:, 1], g[:, 2] = 0, 0
    metric, s = GradientAlignment(), WeightSums.of(x, y, g)
    assert metric(None, s).isnan().tolist() == [False, True, True, False]
    assert metric.counts(None, s) == {"constant": 2}
    alone = WeightSums.of(x[:, :1], y, g)
    assert metric(None, alone).isnan().all()
    equal = WeightSums.of(x[:, :1].expand(-1, 6), y[:, [0, 3]], g[:, [0, 3]])
    assert metric(None, equal).isnan().all()


def test_the_output_is_no_local_signal():
    with pytest.raises(ValueError, match="local_signal is 'output'; it takes 'hebbian', 'anti_hebbian', 'oja', 'input'"):
        GradientAlignment(local_signal="output")


@pytest.mark.parametrize("alias", ["lp", "scar_loss_proxy"])
def test_names(alias):
    assert type(get_metric(alias)) is ScarLossProxy
    assert type(get_metric("fisher_information")) is FisherInformation
