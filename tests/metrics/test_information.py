"""Information of units about each other and a target: planted cases, golden numbers, slow twins, bias."""

import math

import numpy as np
import pytest
import torch
from ids import label
from laws import everything
from planted import equal, golden_cases, planted, sums
from torch.testing import assert_close

from nodelens.metrics import get_metric
from nodelens.metrics.binning import binned_information, bins_of
from nodelens.statistics import Cross, Gram
from nodelens.statistics.rows import Rows

MI6 = -0.5 * math.log(1 - 0.36)
TOP = -0.5 * math.log(1e-6)
PAIRS = ("redundancy", "synergy", "pid_redundancy", "pid_unique")


def near(value, expected, tolerance=1e-9):
    assert_close(value, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance, equal_nan=True)


def of(name, y, z=None, **options):
    """A metric of rows and a target given in hand."""
    return get_metric(name, **options).compute(outputs=y, **({} if z is None else {"targets": z}))


def mixed(n=80, units=6, t=3, seed=0):
    """Rows and targets that have to do with each other, off zero."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(n, units, generator=g, dtype=torch.float64) @ torch.randn(units, units, generator=g, dtype=torch.float64) + 3
    return y, y[:, :t] @ torch.randn(t, t, generator=g, dtype=torch.float64) + torch.randn(n, t, generator=g, dtype=torch.float64)


@pytest.mark.parametrize(
    "name",
    ["average_redundancy", "mutual_information_gaussian", "gaussian_pid_synergy_mmi", "input_information"],
)
def test_golden_numbers_agree(name):
    for case, metric, options, arrays, expected, tolerance in golden_cases(name):
        value = get_metric(metric, **options).compute(**arrays)
        assert_close(value, expected, **tolerance, msg=lambda m, case=case: f"{case}: {m}")


def test_a_correlation_of_0_6():
    rows = planted(equal(2, 0.6))
    near(of("redundancy", rows), [MI6, MI6])
    near(of("layer_redundancy", rows), MI6)
    near(of("mi", rows[:, :1], rows[:, 1]), [MI6])
    near(get_metric("input_redundancy").compute(inputs=rows), [0.6, 0.6])


def test_twins():
    rows = planted(equal(2, 0.3))
    for twin in (rows[:, 0], -rows[:, 0]):
        y = torch.stack([rows[:, 0], twin], 1)
        near(of("redundancy", y), [TOP, TOP])
        assert get_metric("redundancy").counts(None, y=Gram.of(y)) == {"constant": 0, "saturated": 1}
        for z in (rows[:, 1], rows[:, 0], rows):
            near(of("synergy", y, z, reduce="none"), torch.zeros(2, 2))
        assert get_metric("synergy").counts(None, y=Gram.of(y), z=Cross.of(y, rows[:, 1]))["collinear"] == 1


@pytest.mark.parametrize(
    ("weights", "single", "shared", "synergy"),
    [
        ([(1, 0, 0), (0, 1, 0), (1, 1, 1)], (0.2027, 0.2027), 0.2027, 0.3466),  # z = y_1 + y_2 + e
        ([(1, 1, 0), (0, 1, 0), (1, 0, 1)], (0.1438, 0.0), 0.0, 0.2027),  # the second unit takes the noise off the first
    ],
    ids=["sum", "suppressor"],
)
def test_planted_atoms(weights, single, shared, synergy):
    rows = planted(sums(*weights))
    y, z = rows[:, :2], rows[:, 2]
    near(of("mi", y, z), single, 5e-5)
    near(of("synergy", y, z), [synergy] * 2, 5e-5)
    near(of("pid_redundancy", y, z), [shared] * 2, 5e-5)
    near(of("pid_unique", y, z), [s - shared for s in single], 5e-5)


def test_a_unit_that_is_the_target():
    y = planted(equal(3, 0.4))
    near(of("mi", y, y[:, 0])[0], TOP)
    near(of("synergy", y, y[:, 0], reduce="none")[0], [0, 0, 0], 1e-5)


@pytest.mark.parametrize("reduce", ["joint", "mean"])
@pytest.mark.parametrize("t", [1, 2, 3])
def test_the_atoms_add_up_to_what_both_tell(t, reduce):
    y, z = mixed(t=t)
    y = torch.cat([y, y[:, :1]], 1)  # and a twin
    parts = {n: of(n, y, z, reduce="none", target_reduce=reduce) for n in ("pid_redundancy", "pid_unique", "pid_synergy")}
    total = parts["pid_redundancy"] + parts["pid_unique"] + parts["pid_unique"].T + parts["pid_synergy"]
    for i in range(7):
        for j in range(7):
            if i != j and {i, j} != {0, 6}:
                near(total[i, j], together(y[:, [i, j]], z, reduce), 1e-10)
    near(total[0, 6], of("mi", y, z, target_reduce=reduce)[0], 1e-10)


def together(y, z, reduce):
    """Information of some units and a target from determinants of their covariances."""
    if reduce == "mean":
        return sum(together(y, column, "joint") for column in z.split(1, 1)) / z.shape[1]
    whole = torch.cov(torch.cat([y, z], 1).T)
    k = y.shape[1]
    parts = torch.logdet(whole[:k, :k].reshape(k, k)) + torch.logdet(whole[k:, k:])
    return 0.5 * (parts - torch.logdet(whole))


@pytest.mark.parametrize("reduce", ["joint", "mean"])
@pytest.mark.parametrize("t", [1, 2, 3])
def test_synergy_of_a_slow_loop(t, reduce):
    y, z = mixed(t=t)
    slow = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            if i != j:
                one, other = (together(y[:, [k]], z, reduce) for k in (i, j))
                slow[i, j] = together(y[:, [i, j]], z, reduce) - max(one, other)
    assert_close(of("synergy", y, z, reduce="none", target_reduce=reduce), slow, rtol=0, atol=1e-10)
    assert_close(of("synergy", y, z, target_reduce=reduce), slow.sum(1) / 5, rtol=0, atol=1e-10)


@pytest.mark.parametrize("reduce", ["joint", "mean"])
def test_information_with_several_columns_of_a_slow_loop(reduce):
    y, z = mixed()
    slow = [together(y[:, [k]], z, reduce) for k in range(6)]
    near(of("mi", y, z, target_reduce=reduce), torch.stack(slow), 1e-10)


def test_redundancy_of_a_slow_loop():
    y, _ = mixed()
    rho = torch.corrcoef(y.T)
    slow = torch.tensor([[0 if i == j else -0.5 * math.log(1 - float(rho[i, j]) ** 2) for j in range(6)] for i in range(6)])
    assert_close(of("redundancy", y, reduce="none"), slow.double(), rtol=1e-6, atol=1e-7)
    assert_close(of("layer_redundancy", y), of("redundancy", y).mean(), rtol=1e-12, atol=0)
    assert_close(get_metric("node_redundancy").compute(inputs=y), (rho.abs().sum(1) - 1) / 5, rtol=1e-10, atol=0)


def test_columns_that_follow_from_others_tell_nothing_of_their_own():
    y, z = mixed(t=2)
    more = torch.cat([z, z @ torch.tensor([[1.0], [-2.0]], dtype=torch.float64), torch.full((80, 1), 5.0)], 1)
    for name in (*PAIRS[1:], "mi"):
        near(of(name, y, more), of(name, y, z), 1e-9)


def test_a_target_on_any_axes_is_the_same_target():
    y, z = mixed()
    turned = z @ torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 7
    for name in (*PAIRS[1:], "mi"):
        near(of(name, y, turned), of(name, y, z), 1e-9)


@pytest.mark.parametrize("name", [*PAIRS, "mi"])
@pytest.mark.parametrize("t", [1, 3])
def test_shifts_scales_and_order_change_nothing(name, t):
    y, z = mixed(t=t)
    z = None if name == "redundancy" else z
    value = of(name, y, z)
    scale = torch.tensor([1e-3, -2.0, 5.0, 1.0, 100.0, 0.5], dtype=torch.float64)
    near(of(name, y * scale + 1000 * scale, None if z is None else -3 * z + 40), value, 1e-8)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    near(of(name, y[order], None if z is None else z[order]), value, 1e-10)
    units = torch.tensor([3, 0, 5, 1, 4, 2])
    near(of(name, y[:, units], z), value[units], 1e-10)


@pytest.mark.parametrize("name", [*PAIRS, "mi"])
def test_float32_far_from_zero(name):
    y, z = mixed(400)
    z = None if name == "redundancy" else z
    spread = y.std(0)
    far = (y + 1000 * spread).float()
    near(of(name, far, z), of(name, far.double(), z), 1e-4)


@pytest.mark.parametrize("name", [*PAIRS, "mi", "mi_1"])
@pytest.mark.parametrize("t", [1, 2])
def test_units_and_targets_that_do_not_vary_tell_nothing(name, t):
    y, z = mixed(t=t)
    y[:, 2] = 1e3
    value = of(name, y, None if name == "redundancy" else z)
    assert value.isfinite().all()
    assert value[2] == 0
    if name != "redundancy":
        near(of(name, y, torch.ones(80, t, dtype=torch.float64)), torch.zeros(6))
        assert of("mi", y, z, bias="gaussian")[2] == 0


@pytest.mark.parametrize("name", PAIRS)
def test_one_unit_has_no_partners(name):
    y, z = mixed(units=1, t=1)
    z = None if name == "redundancy" else z
    near(of(name, y, z), [math.nan])
    near(of(name, y, z, reduce="none"), [[0]])
    near(of("layer_redundancy", y), math.nan)
    near(get_metric("node_redundancy").compute(inputs=y), [math.nan])


@pytest.mark.parametrize("name", [*PAIRS, "mi", "gaussian_mi_analytic", "ixy", "mi_1"])
def test_one_row_has_no_answer(name):
    y, z = mixed(1)
    assert of(name, y, z if name in ("synergy", "pid_redundancy", "pid_unique", "mi", "mi_1") else None).isnan().all()


def test_fewer_rows_than_units():
    y, z = mixed(4, units=9, t=1)
    for name in PAIRS:
        assert of(name, y, None if name == "redundancy" else z).isfinite().all()


def test_the_first_axis_of_the_input():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=g, dtype=torch.float64) * torch.tensor([1.0, 5.0, 2.0, 1.0, 1.0]) + 4
    y = x @ torch.randn(5, 3, generator=g, dtype=torch.float64) + torch.randn(200, 3, generator=g, dtype=torch.float64)
    metric = get_metric("mi", reference="input_pc1")
    first = (x - x.mean(0)) @ torch.linalg.eigh(torch.cov(x.T)).eigenvectors[:, -1]
    near(metric.compute(inputs=x, outputs=y), of("mi", y, first), 1e-10)
    near(metric.compute(inputs=torch.ones_like(x), outputs=y), [0, 0, 0])
    made = {
        k: need.statistic.of(x if need.port == "input" else y, *[x] * (need.target == "input"))
        for k, need in metric.needs().items()
    }
    assert metric.counts(None, **made) == {"constant": 0, "close_eigenvalues": 0}
    made["x"] = Gram.of(planted(equal(5, 0.0)))
    assert metric.counts(None, **made)["close_eigenvalues"] == 1
    made["x"] = Gram.of(x[:, :1])
    assert metric.counts(None, **made)["close_eigenvalues"] == 0


def test_the_first_axis_of_the_logits():
    from nodelens.network.targets import logit_pc1

    t = everything()
    for name in ("mi", "synergy", "pid_unique", "mi_1"):
        value = get_metric(name, target="logit_pc1").compute(outputs=t["outputs"], logits=t["logits"])
        near(value, of(name, t["outputs"], logit_pc1(t["logits"])), 1e-9)


def test_targets_side_by_side_and_of_one_s_own():
    t = everything()
    z = t["logits"]
    joined = get_metric("synergy", target="loss+logits").compute(outputs=t["outputs"], logits=z, labels=t["labels"])
    loss = torch.nn.functional.cross_entropy(z, t["labels"], reduction="none")
    near(joined, of("synergy", t["outputs"], torch.cat([loss[:, None], z], 1)), 1e-9)
    own = get_metric("synergy", target=lambda logits, labels: logits[:, 0] - logits[:, 1])
    near(own.compute(outputs=t["outputs"], logits=z, labels=t["labels"]), of("synergy", t["outputs"], z[:, 0] - z[:, 1]), 1e-9)


def test_magnitudes_in_disguise():
    y = planted([[0.01, 0, 0], [0, 1, 0], [0, 0, 4]], mean=50)
    near(of("gaussian_mi_analytic", y)[0], 0.5 * math.log(2))
    near(of("gaussian_mi_analytic", y, noise_std=2)[2], 0.5 * math.log(2))
    near(of("ixy", y), [0.5 * math.log1p(v) for v in (0.01, 1.0, 4.0)])
    near(of("ixy", y, noise=4), [0.5 * math.log1p(v / 4) for v in (0.01, 1.0, 4.0)])
    near(of("ixy", y, noise="p90")[2], 0.5 * math.log1p(4 / 3.4))
    y[:, :2] = 7
    near(of("ixy", y), [math.nan] * 3)
    near(of("ixy", y, noise="mean"), [0, 0, 0.5 * math.log1p(3)])


def test_information_within_classes():
    label = torch.arange(2).repeat_interleave(200)
    rows = torch.cat([planted(equal(2, 0.6), 200), planted(equal(2, -0.6), 200, seed=1) + torch.tensor([5.0, -9.0])])
    near(get_metric("cond_mi").compute(outputs=rows[:, :1], targets=rows[:, 1], labels=label), [MI6])
    few = torch.cat([label, torch.full((3,), 2), torch.full((2,), -1)])
    more = torch.cat([rows, torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)])
    metric = get_metric("cond_mi")
    near(metric.compute(outputs=more[:, :1], targets=more[:, 1], labels=few), [MI6])
    need = metric.needs()["y"]
    y = need.statistic.of(Rows.of(more[:, :1]), torch.stack([few.double(), more[:, 1]], 1))
    assert metric.counts(None, y=y) == {"constant": 0, "classes_left_out": 1}
    near(metric.compute(outputs=rows[:3, :1], targets=rows[:3, 1], labels=label[:3]), [math.nan])
    still = torch.cat([rows[:, :1] * label[:, None], torch.ones(400, 1)], 1)
    near(metric.compute(outputs=still, targets=rows[:, 1], labels=label), [MI6 / 2, 0])


def test_within_classes_of_a_slow_loop():
    y, z = mixed(t=2)
    label = torch.arange(80) % 3
    slow = sum(
        float((label == c).sum()) / 80 * torch.stack([together(y[label == c][:, [k]], z[label == c], "mean") for k in range(6)])
        for c in range(3)
    )
    near(get_metric("cond_mi").compute(outputs=y, targets=z, labels=label), slow, 1e-10)


def test_information_given_another_target():
    rows = planted(sums((1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 0), (0, 0, 0, 1)))
    y, z, common, other = rows.split(1, 1)
    metric = get_metric("conditional_mutual_information", target="given", condition="given")
    near(metric.compute(outputs=y, targets=torch.cat([z, common], 1)), [0], 1e-9)
    near(metric.compute(outputs=y, targets=torch.cat([z, other], 1)), of("mi", y, z), 1e-9)
    near(metric.compute(outputs=y, targets=torch.cat([z, z, other], 1)), [0])
    near(metric.compute(outputs=y, targets=torch.cat([z, y, other], 1)), [0])
    near(metric.compute(outputs=y.float(), targets=torch.cat([z, y + 1e-5 * other], 1)), [0])  # but for rounding
    y, z = mixed(t=3)
    both = [together(y[:, [k]], z, "joint") - together(y[:, [k]], z[:, 1:], "joint") for k in range(6)]
    near(metric.compute(outputs=y, targets=z), torch.stack(both), 1e-9)


def test_names_as_condition():
    t = everything()
    z = torch.nn.functional.cross_entropy(t["logits"], t["labels"], reduction="none")
    value = get_metric("conditional_mutual_information", target="loss", condition="logits").compute(**t)
    given = get_metric("conditional_mutual_information", target="given", condition="given")
    near(value, given.compute(outputs=t["outputs"], targets=torch.cat([z[:, None], t["logits"]], 1)), 1e-9)
    with pytest.raises(ValueError, match="got 4 target columns; the first is the target"):
        get_metric("conditional_mutual_information").compute(outputs=t["outputs"], targets=torch.randn(60, 4))


def histogram(y, z, bins):
    """Information in bins, counted one by one."""
    joint = np.histogram2d(y.numpy(), z.numpy(), bins)[0] / len(y)
    ratio = joint / np.outer(joint.sum(1), joint.sum(0)).clip(1e-300)
    return float((joint[joint > 0] * np.log(ratio[joint > 0])).sum())


def test_bins_of_a_slow_loop():
    y, z = mixed(200, t=2)
    for bins in (4, 10):
        slow = [[histogram(y[:, k], z[:, c], bins) for c in range(2)] for k in range(6)]
        near(of("mi_binning", y, z, bins=bins, bias="none"), torch.tensor(slow).double().mean(1), 1e-6)
    ramp = torch.arange(100.0)
    near(of("mi_1", ramp[:, None], ramp**3, bins=2, bias="none"), [histogram(ramp, ramp**3, 2)], 1e-6)
    near(of("mi_1", ramp[:, None], ramp, bias="none"), [math.log(10)])
    near(of("mi_1", ramp[:, None], ramp), [math.log(10)], 0.02)
    near(of("mi_1", ramp[:, None], torch.ones(100)), [0])
    near(of("mi_1", torch.ones(100, 1), ramp), [0])


def test_entropies_of_bins_are_grassberger_s():
    """G(1) = -gamma - ln 2, G(2) = 2 - gamma - ln 2, G(2k + 1) = G(2k), G(2k + 2) = G(2k) + 2/(2k + 1)."""
    g = [0.0, -np.euler_gamma - math.log(2), 2 - np.euler_gamma - math.log(2)]
    for k in range(1, 101):
        g += [g[2 * k], g[2 * k] + 2 / (2 * k + 1)]

    def entropy(cells):
        counted = cells.astype(int).flatten()
        return math.log(counted.sum()) - sum(c * g[c] for c in counted) / counted.sum()

    y, z = mixed(200)
    joint = [np.histogram2d(y[:, k].numpy(), z[:, 0].numpy(), 10)[0] for k in range(6)]
    slow = [entropy(c.sum(0)) + entropy(c.sum(1)) - entropy(c) for c in joint]
    near(of("mi_binning", y, z[:, 0]), slow, 1e-9)


FEW = [(0.5, 0.083, 0.016), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0.0, 0.095, 0.013), (0.9, 0.042, 0.003)))]


@pytest.mark.parametrize(("rho", "plain", "corrected"), FEW)
def test_bins_of_few_samples_tell_about_what_many_samples_in_the_same_bins_tell(rho, plain, corrected):
    g = torch.Generator().manual_seed(7)

    def draw(n):
        z = torch.randn(n, 1, generator=g, dtype=torch.float64)
        return z, rho * z + math.sqrt(1 - rho**2) * torch.randn(n, 1, generator=g, dtype=torch.float64)

    many, errors = draw(200_000), []
    for z, y in (draw(400) for _ in range(100)):
        every_z, every_y = (x.clamp(float(few.min()), float(few.max())) for x, few in zip(many, (z, y), strict=True))
        truth = binned_information(every_y, bins_of(every_z, 10)[:, 0], 10, 10)
        errors.append(torch.cat([of("mi_binning", y, z, bias=bias) - truth for bias in ("none", "grassberger")]))
    mean, error = torch.stack(errors).mean(0), torch.stack(errors).std(0) / 10
    assert abs(float(mean[0]) - plain) < 3 * float(error[0])
    assert abs(float(mean[1]) - corrected) < 3 * float(error[1])


DRAWS = 400


def noise(n, units):
    g = torch.Generator().manual_seed(n)
    return torch.randn(DRAWS, n, units, generator=g, dtype=torch.float64)


def agrees(values, expected=0.0):
    """Mean of independent draws, within five of its standard errors."""
    assert abs(float(values.mean()) - expected) < 5 * float(values.std()) / math.sqrt(values.numel())


@pytest.mark.parametrize("rho", [pytest.param(0.0, marks=pytest.mark.slow), 0.6])
def test_bias_of_pairs_and_of_one_target(rho):
    n, truth = 20, -0.5 * math.log(1 - rho**2)
    x = noise(n, 2) @ torch.linalg.cholesky(equal(2, rho)).T
    pairs = torch.stack([of("layer_redundancy", rows, bias="gaussian") for rows in x])
    single = torch.stack([of("mi", rows[:, :1], rows[:, 1], bias="gaussian")[0] for rows in x])
    agrees(pairs, truth)
    assert_close(pairs, single, rtol=1e-9, atol=1e-12)
    plain = of("redundancy", x[0])
    near(plain - of("redundancy", x[0], bias="gaussian"), [0.02855] * 2, 5e-6)
    near(of("mi", x[0][:, :1], x[0][:, 1], bias="gaussian", target_reduce="mean"), pairs[:1])


def test_bias_of_several_columns_and_within():
    x = noise(20, 4)
    agrees(torch.stack([of("mi", rows[:, :1], rows[:, 1:], bias="gaussian") for rows in x]))
    label = torch.tensor([0] * 8 + [1] * 12)
    conditional = [get_metric("cond_mi", bias="gaussian").compute(outputs=r[:, :1], targets=r[:, 1], labels=label) for r in x]
    agrees(torch.stack(conditional))
    given = get_metric("conditional_mutual_information", target="given", condition="given", bias="gaussian")
    corrected = torch.stack([given.compute(outputs=rows[:, :1], targets=rows[:, 1:]) for rows in x])
    agrees(corrected)
    plain = get_metric("conditional_mutual_information", target="given", condition="given")
    lean = plain.compute(outputs=x[0][:, :1], targets=x[0][:, 1:]) - corrected[0]
    near(lean, (torch.special.digamma(torch.tensor([8.5])) - torch.special.digamma(torch.tensor([8.0]))) / 2, 1e-6)
    assert of("mi", x[0][:4, :1], x[0][:4, 1:], bias="gaussian").isnan().all()


def test_a_control_asks_for_the_samples_and_changes_no_value():
    t = everything()
    for name in (*PAIRS[1:], "mi", "mi_1", "cond_mi", "conditional_mutual_information"):
        metric, plain = get_metric(name, permutations=5), get_metric(name)
        assert set(metric.needs()) == {*plain.needs(), "permutations"}
        assert metric.needs()["permutations"].target == next(need.target for need in metric.needs().values() if need.target)
        near(metric.compute(**t), plain.compute(**t))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: get_metric("synergy", target="margin"),
            "target is 'margin'; it takes logit_margin, correct_logit, .*, several joined",
        ),
        (lambda: get_metric("mi", target="loss+entropy"), "target is 'entropy'; it takes"),
        (lambda: get_metric("pid_unique", target="label"), "target is 'label'; it takes"),
        (lambda: get_metric("mi_1", target=3), "target is 3; it takes"),
        (lambda: get_metric("synergy", target="logit_pc1+loss"), "logit_pc1 is made of the logits of all samples"),
        (lambda: get_metric("cond_mi", target="logit_pc1"), "target is 'logit_pc1'; it takes logit_margin"),
        (lambda: get_metric("conditional_mutual_information", target="logits"), "target is 'logits'; it takes"),
        (lambda: get_metric("conditional_mutual_information", condition="x"), "condition: target is 'x'; it takes"),
        (lambda: get_metric("mi", permutations=-1), "permutations is -1; it must be a number of permutations"),
        (
            lambda: get_metric("mi", permutations=5, reference="input_pc1"),
            "permutations shuffle a target, but reference: input_pc1 has none",
        ),
        (lambda: get_metric("mi_1", bins=1), "bins is 1; it must be a whole number, 2 or more"),
        (lambda: get_metric("ixy", noise="p50"), "noise is 'p50'; it must be mean, median, p75, p90, or a number above 0"),
        (lambda: get_metric("gaussian_mi_analytic", noise_std=0), "noise_std is 0; it must be a number above 0"),
        (lambda: get_metric("synergy", target_reduce="sum"), "target_reduce is 'sum'; it takes 'joint', 'mean'"),
        (
            lambda: get_metric("cond_mi").compute(outputs=torch.ones(3, 2), targets=torch.ones(3)),
            "needs outputs= and labels=; given: outputs=",
        ),
    ],
    ids=label,
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
