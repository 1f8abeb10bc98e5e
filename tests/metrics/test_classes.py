"""What units tell of the class, alone and in pairs: planted cases, golden numbers, slow twins, bias."""

import math
from collections import Counter

import pytest
import torch
from ids import label
from laws import everything
from planted import equal, golden_cases, planted
from torch.testing import assert_close

from nodelens.metrics import get_metric
from nodelens.metrics.pair_bins import class_information_of_pairs, quantile_bins
from nodelens.statistics import ByClass, ClassGram, Gram, Sample, kernels
from nodelens.statistics.rows import Rows


def near(value, expected, tolerance=1e-9):
    assert_close(value, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance, equal_nan=True)


def of(name, y, labels, **options):
    return get_metric(name, **options).compute(outputs=y, labels=labels)


def two(first, second):
    return torch.cat([first, second]), torch.arange(2).repeat_interleave(len(first))


def mixed(n=90, units=5, classes=3, seed=0):
    """Classes that differ in mean and covariance, of uneven size."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g).clamp_max(torch.arange(n) % classes)
    y = torch.randn(n, units, generator=g, dtype=torch.float64)
    mixes = torch.randn(classes, units, units, generator=g, dtype=torch.float64)
    return torch.einsum("nu,nuv->nv", y, mixes[labels]) + torch.randn(classes, units, generator=g, dtype=torch.float64)[
        labels
    ], labels


def test_golden_numbers_agree():
    for case, metric, options, arrays, expected, tolerance in golden_cases("mi_about_class"):
        assert_close(
            get_metric(metric, **options).compute(**arrays), expected, **tolerance, msg=lambda m, case=case: f"{case}: {m}"
        )


@pytest.mark.parametrize("method", ["gaussian", "pooled"])
def test_two_classes_apart(method):
    y, labels = two(planted([[1.0]], ddof=0) - 1, planted([[1.0]], ddof=0, seed=1) + 1)
    near(of("class_mi", y, labels, method=method, ddof=0), [0.5 * math.log(2)])
    near(of("class_mi", y, labels, method=method)[0], 0.3466, 2e-3)


def test_bins_of_two_classes():
    y = torch.cat([torch.arange(20.0), torch.arange(20.0) + 20])[:, None]
    labels = torch.arange(2).repeat_interleave(20)
    near(of("class_mi", y, labels, method="binning"), [math.log(2)])
    near(of("class_mi", y, labels, method="binning", bins=2), [math.log(2)])
    near(of("class_mi", y, torch.arange(40) % 2, method="binning", bins=2), [0])
    unlabelled = torch.cat([labels, torch.full((4,), -100)])
    near(of("class_mi", torch.cat([y, torch.full((4, 1), 1e6)]), unlabelled, method="binning"), [math.log(2)])


def test_bins_are_of_the_samples_held():
    n = 2500
    y, labels = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3
    metric = get_metric("class_mi", method="binning")
    held = Sample.of(Rows.of(y), labels, hashes=torch.arange(n))
    assert metric.counts(None, y=held) == {"constant": 0, "rows_left_out": n - 2048}
    near(metric(None, y=held), of("class_mi", y[:2048], labels[:2048], method="binning"))


def test_a_unit_silent_in_a_class_and_one_silent_in_all():
    y, labels = mixed()
    y[labels == 1, 0] = 4.0
    y[:, 1] = 1e4
    metric = get_metric("class_mi", method="gaussian")
    found = metric.counts(None, y=ByClass.of(y, labels))
    assert found == {"constant": 1, "degenerate": 1, "classes_left_out": 0, "above_entropy": 1}
    for options in (
        {},
        {"method": "gaussian"},
        {"method": "gaussian", "bias": "gaussian"},
        {"method": "pooled"},
        {"method": "binning"},
    ):
        value = of("class_mi", y, labels, **options)
        assert value.isfinite().all()
        assert value[1] == 0


DRAWS = 500


@pytest.mark.parametrize("options", [{"method": "gaussian"}, {"method": "gaussian", "ddof": 0}, {"method": "pooled"}], ids=label)
def test_bias_of_units_that_tell_nothing(options):
    """Exact for them: the mean of independent draws lies within five of its standard errors."""
    x = torch.randn(60, DRAWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(60) % 3
    plain, value = of("class_mi", x, labels, **options), of("class_mi", x, labels, bias="gaussian", **options)
    assert abs(float(value.mean())) < 5 * float(value.std()) / math.sqrt(DRAWS)
    if options == {"method": "gaussian"}:
        near(plain - value, torch.full((DRAWS,), 0.01825), 5e-6)


def test_no_class_of_two_rows():
    y = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    near(of("class_mi", y, torch.arange(3), method="gaussian"), [math.nan] * 2)
    near(of("class_mi", y[:1], torch.arange(1), method="binning"), [math.nan] * 2)


def opposite(units=2):
    """Two classes whose covariances differ in the sign of the correlation only."""
    return two(planted(equal(units, 0.8), ddof=0), planted(equal(units, -0.8), seed=1, ddof=0))


def test_opposite_correlations():
    y, labels = opposite()
    near(of("synergy_gaussian_mmi", y, labels), [-0.5 * math.log(0.36)] * 2)
    near(of("synergy_gaussian_mmi", y, labels, covariance="pooled"), [0, 0])
    near(of("class_mi", y, labels, method="gaussian", ddof=0), [0, 0])


def information(y, labels, ddof, pooled):
    """From determinants, class by class."""
    n, classes = len(y), labels.unique()

    def covariance(rows):
        centred = rows - rows.mean(0)
        return centred.T @ centred

    within = {int(c): covariance(y[labels == c]) for c in classes}
    if pooled:
        each = torch.logdet(sum(within.values()) / (n - ddof * len(classes)))
    else:
        size = {c: int((labels == c).sum()) for c in within}
        each = sum(size[c] / n * torch.logdet(w / (size[c] - ddof)) for c, w in within.items())
    return 0.5 * (torch.logdet(covariance(y) / (n - ddof)) - each)


@pytest.mark.parametrize("covariance", ["per_class", "pooled"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_class_synergy_of_a_slow_loop(covariance, ddof):
    y, labels = mixed()
    slow = torch.zeros(5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            if i != j:
                both, one, other = (information(y[:, k], labels, ddof, covariance == "pooled") for k in ([i, j], [i], [j]))
                slow[i, j] = both - max(one, other)
    value = of("synergy_gaussian_mmi", y, labels, covariance=covariance, ddof=ddof, reduce="none")
    near(value, slow, 1e-10)
    near(of("synergy_gaussian_mmi", y, labels, covariance=covariance, ddof=ddof), slow.sum(1) / 4, 1e-10)


@pytest.mark.parametrize("covariance", ["per_class", "pooled"])
@pytest.mark.parametrize("case", ["plain", "twins", "near twins", "twins in a class", "silent in a class", "dead", "few"])
def test_class_synergy_is_never_below_0(covariance, case):
    for seed in range(5):
        y, labels = mixed(20 if case == "few" else 90, seed=seed)
        if case == "twins":
            y[:, 1] = -3 * y[:, 0] + 2
        elif case == "near twins":
            y[:, 1] = y[:, 0] + 1.2e-3 * y[:, 1]
        elif case == "twins in a class":
            y[labels == 0, 1] = y[labels == 0, 2]
        elif case == "silent in a class":
            y[labels == 0, 1] = 5
        elif case == "dead":
            y[:, 1] = 5
        value = of("synergy_gaussian_mmi", y, labels, covariance=covariance, reduce="none")
        assert value.isfinite().all()
        assert float(value.min()) > -1e-12
        if case == "twins":
            assert value[0, 1] == 0
            near(value[0, 2:], value[1, 2:], 1e-9)
        if case == "dead":
            near(value[1], torch.zeros(5))


def test_rules_of_class_synergy_are_counted():
    y, labels = mixed()
    y[:, 1] = 5
    y[:, 2] = y[:, 0]
    y[labels == 0, 3] = y[labels == 0, 4]
    labels = torch.cat([labels, torch.full((3,), 3), torch.full((2,), -100)])
    y = torch.cat([y, torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)])
    y[90:, 1], y[90:, 2] = 5, y[90:, 0]
    metric = get_metric("synergy_gaussian_mmi")
    found = metric.counts(None, y=ClassGram.of(y, labels))
    assert found == {"classes_left_out": 1, "constant": 1, "degenerate": 1, "collinear": 1, "above_entropy": 1}
    near(of("synergy_gaussian_mmi", y, labels), of("synergy_gaussian_mmi", y[:90], labels[:90]))
    pooled = get_metric("synergy_gaussian_mmi", covariance="pooled")
    found = pooled.counts(None, y=ByClass.of(y, labels), every=Gram.of(y[labels >= 0]))
    assert found == {"constant": 1, "degenerate": 0, "collinear": 1, "above_entropy": 0}
    near(pooled.compute(outputs=y, labels=labels), pooled.compute(outputs=y[:93], labels=labels[:93]), 1e-10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("class_mi", {}),
        ("class_mi", {"method": "gaussian"}),
        ("class_mi", {"method": "pooled"}),
        ("class_synergy", {}),
        ("synergy_gaussian_mmi", {}),
        ("synergy_gaussian_mmi", {"covariance": "pooled"}),
    ],
    ids=label,
)
def test_shifts_scales_and_order_change_nothing(name, options):
    y, labels = mixed()
    value = of(name, y, labels, **options)
    scale = torch.tensor([1e-3, 2.0, 5.0, 1.0, 100.0], dtype=torch.float64)
    near(of(name, y * scale + 1000 * scale, labels, **options), value, 1e-8)
    if get_metric(name, **options).options["method"] != "binning":  # an edge of a bin may round to the other side
        near(of(name, (y + 1000 * y.std(0)).float(), labels, **options), value, 2e-3)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    near(of(name, y[order], labels[order], **options), value, 1e-10)
    near(of(name, y, 2 - labels, **options), value, 1e-10)
    units = torch.tensor([3, 0, 4, 1, 2])
    near(of(name, y[:, units], labels, **options), value[units], 1e-10)


def plug_in(*columns):
    """Information of the last column about the others together, from counts in a loop."""
    n, joint = len(columns[0]), list(zip(*columns[:-1], strict=True))
    both, first, last = Counter(zip(joint, columns[-1], strict=True)), Counter(joint), Counter(columns[-1])
    return sum(m / n * math.log(m * n / (first[a] * last[b])) for (a, b), m in both.items())


@pytest.mark.parametrize("bins", [2, 6])
def test_binned_class_synergy_of_a_slow_loop(bins):
    y, labels = mixed(200)
    y[:, 0] = y[:, 0].relu()
    y[:, 1] = 3.0
    n, places = len(y), []
    for column in y.T.tolist():
        edges = sorted(column)
        edges = {edges[math.ceil(k * n / bins) - 1] for k in range(1, bins)}
        places.append([sum(edge < value for edge in edges) for value in column])
    slow = torch.zeros(5, 5, dtype=torch.float64)
    c = labels.tolist()
    for i in range(5):
        for j in set(range(5)) - {i}:
            slow[i, j] = plug_in(places[i], places[j], c) - max(plug_in(places[i], c), plug_in(places[j], c))
    near(of("class_synergy", y, labels, bins=bins, reduce="none"), slow, 1e-12)
    near(of("class_synergy", y, labels, bins=bins), slow.sum(1) / 4, 1e-12)
    assert float(slow.min()) > -1e-12
    near(slow[1], torch.zeros(5), 1e-12)


def test_the_class_of_two_signs_takes_both_units():
    """The class is the product of two signs: no unit tells anything of it, both tell all of it."""
    y = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).repeat(10, 1)
    labels = (y.prod(1) > 0).long()
    near(of("class_synergy", y, labels), [math.log(2)] * 2)
    unlabelled = torch.cat([labels, torch.full((4,), -100)])
    near(of("class_synergy", torch.cat([y, torch.full((4, 2), 1e6)]), unlabelled), [math.log(2)] * 2)


def test_zeros_have_a_bin_of_their_own():
    y = torch.tensor([0.0] * 6 + [1.0, 2.0, 3.0, 4.0])[:, None]
    assert quantile_bins(y, 5).flatten().tolist() == [0] * 6 + [1, 1, 2, 2]


@pytest.mark.parametrize("method", ["gaussian", "pooled"])
def test_values_above_the_entropy_of_the_class_are_counted(method):
    """Classes far apart: H(class) is ln 2, the Gaussian estimate grows with the distance."""
    y = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(60) % 2
    y[:, 0] += 100 * labels
    metric = get_metric("class_mi", method=method)
    assert metric.counts(None, y=ByClass.of(y, labels))["above_entropy"] == 1
    assert metric.compute(outputs=y, labels=labels)[0] > math.log(2)
    near(of("class_mi", y, labels)[0], math.log(2))
    pairs = get_metric("class_synergy", method="gaussian", covariance="per_class" if method == "gaussian" else "pooled")
    held = {"y": ClassGram.of(y, labels)} if method == "gaussian" else {"y": ByClass.of(y, labels), "every": Gram.of(y)}
    assert pairs.counts(None, **held)["above_entropy"] == 2


@pytest.mark.parametrize("covariance", ["per_class", "pooled"])
def test_where_class_synergy_has_no_answer(covariance):
    y, labels = mixed(9)
    near(of("synergy_gaussian_mmi", y[:, :1], labels, covariance=covariance), [math.nan])
    near(of("synergy_gaussian_mmi", y[:1], labels[:1], covariance=covariance), [math.nan] * 5)
    near(of("synergy_gaussian_mmi", y[:6], torch.arange(6) % 2), [math.nan] * 5)
    near(of("class_synergy", y[:1], labels[:1]), [math.nan] * 5)
    near(of("class_synergy", y[:, :1], labels), [math.nan])


def test_a_control_asks_for_the_samples_and_changes_no_value():
    t = everything()
    for name, options in (
        ("class_mi", {}),
        ("class_mi", {"method": "gaussian"}),
        ("class_synergy", {}),
        ("synergy_gaussian_mmi", {"covariance": "pooled"}),
    ):
        metric, plain = get_metric(name, permutations=5, **options), get_metric(name, **options)
        assert set(metric.needs()) == {*plain.needs(), "permutations"}
        near(metric.compute(**t), plain.compute(**t))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: get_metric("class_mi", method="bins"), "method is 'bins'; it takes 'binning', 'gaussian', 'pooled'"),
        (lambda: get_metric("class_mi", method="binning", bias="gaussian"), "bias: gaussian is for method: gaussian and pooled"),
        (lambda: get_metric("class_mi", bins=0), "bins is 0; it must be a whole number, 2 or more"),
        (lambda: get_metric("class_synergy", bins=1), "bins is 1; it must be a whole number, 2 or more"),
        (lambda: get_metric("class_synergy", covariance="pooled"), "covariance: pooled is for method: gaussian; set it, or leave"),
        (lambda: get_metric("synergy_gaussian_mmi", permutations=-1), "permutations is -1; it must be a number of permutations"),
        (lambda: get_metric("synergy_gaussian_mmi").compute(outputs=torch.ones(3, 2)), "needs outputs= and labels="),
    ],
    ids=label,
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("rows", "bins", "classes"), [(40, 3, 2), (90, 8, 3), (400, 6, 40), (700, 40, 2), (300, 2, 1), (300, 256, 2)]
)
def test_information_of_pairs_is_that_of_a_slow_loop(rows, bins, classes, back_end):
    """Classes of one row to 700; few and many rows per bin; products of counts that would overflow."""
    generator = torch.Generator().manual_seed(0)
    y, label = torch.randint(bins, (rows, 5), generator=generator), torch.randint(classes, (rows,), generator=generator)
    y[:, 0] = 1  # one bin holds all rows
    y[:, 1] = y[:, 1].clamp_max(1)
    y[:, 2] = label % bins
    label[0] = classes  # a class of one row
    single, pairs = class_information_of_pairs(y, label, bins)
    units, c = y.T.tolist(), label.tolist()
    near(single, [plug_in(unit, c) for unit in units], 1e-12)
    near(pairs, [[plug_in(one, other, c) for other in units] for one in units], 1e-12)


@pytest.mark.parametrize(("rows", "bins"), [(59, 6), (61, 6), (255, 30), (256, 30), (700, 6), (100, 40)])
def test_loops_over_pairs_are_torch_over_blocks_of_units_and_threads(rows, bins, compiler, monkeypatch):
    """More units than a block holds, of which most rows share a bin, as behind a ReLU; sets on both sides of each limit."""
    generator = torch.Generator().manual_seed(0)
    y = (torch.randn(rows, 130, generator=generator).relu() * bins).long().clamp_max(bins - 1)
    label = torch.randint(3, (rows,), generator=generator)
    expected = class_information_of_pairs(y, label, bins)[1]
    monkeypatch.setattr("nodelens.metrics.pair_bins._sum_over_cells", None)  # only the loops can answer
    monkeypatch.setattr("nodelens.metrics.pair_bins._sum_over_rows", None)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with kernels.using("compiled"):
            near(class_information_of_pairs(y, label, bins)[1], expected, 1e-12)
    torch.set_num_threads(before)


def test_more_bins_than_a_byte_tells_apart_are_counted_by_torch(back_end):
    y, label = torch.arange(300)[:, None] * torch.ones(2, dtype=torch.long), torch.arange(300) % 2
    assert class_information_of_pairs(y, label, 300)[1].flatten().tolist() == pytest.approx(4 * [math.log(2)], rel=1e-12)
