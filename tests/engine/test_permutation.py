"""Targets of a user's own, the permutation control, effective samples and the jackknife's bias: through passes."""

import sys

import numpy as np
import pytest
import torch
from ids import label
from torch import nn

import nodelens as nl
from nodelens.metrics import get_metric
from nodelens.metrics.sampling import jackknife
from nodelens.network.targets import target_of

N = 400


def rows():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=g, dtype=torch.float64)
    return {"x": x, "targets": x[:, 0] + 0.5 * torch.randn(N, generator=g, dtype=torch.float64), "labels": (x[:, 1] > 0).long()}


def measured(metrics, size=50, data=None, **options):
    data = data or rows()
    net = nn.Sequential(nn.Identity(), nn.Linear(3, 4, dtype=torch.float64))
    split = [{k: t[a : a + size] for k, t in data.items()} for a in range(0, N, size)]
    return nl.analyze(net, split, metrics, "0", **options)


@pytest.fixture(scope="module")
def controlled():
    metrics = {
        "mi": get_metric("mi", target="given", permutations=99),
        "class_mi": get_metric("class_mi", method="gaussian", permutations=99),
        "synergy": get_metric("synergy", target="given", permutations=99),
        "binned": get_metric("mi_binning", target="given", permutations=99, bias="none"),
        "pairs": get_metric("synergy", target="given", permutations=99, reduce="none"),
    }
    return metrics, measured(metrics)


def test_a_unit_that_makes_the_target_stands_out_and_one_that_does_not_does_not(controlled):
    units = controlled[1].units.loc["0"]
    assert units["mi_p"].iloc[0] == units["binned_p"].iloc[0] == 0.01, "the least that 99 copies can say"
    assert units["class_mi_p"].iloc[1] == 0.01
    assert (units["mi_p"].iloc[1:] > 0.02).all()
    assert (units["class_mi_p"].iloc[[0, 2]] > 0.02).all()


def test_the_null_is_what_independence_reads(controlled):
    """1/(2n) for a correlation, (K - 1)/(2n) for two classes, (bins - 1)^2/(2n) in bins."""
    units = controlled[1].units.loc["0"]
    np.testing.assert_allclose(units["mi_null"], 1 / (2 * N), rtol=0.35)
    np.testing.assert_allclose(units["class_mi_null"], 1 / (2 * N), rtol=0.6)
    np.testing.assert_allclose(units["binned_null"], 81 / (2 * N), rtol=0.35)


def test_pairs_have_a_null_a_pair(controlled):
    matrices = controlled[1].matrices
    assert matrices["0", "pairs_null"].shape == matrices["0", "pairs_p"].shape == (3, 3)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 64, 400])
def test_the_control_does_not_hang_on_batches_or_their_order(size, controlled):
    metrics, found = controlled
    turned = {k: t.flip(0) for k, t in rows().items()}
    again = measured(metrics, size, turned).units
    for column in found.units:
        np.testing.assert_allclose(again[column], found.units[column], rtol=1e-9, atol=1e-13, err_msg=column)


def test_another_seed_is_another_control(controlled):
    metrics, found = controlled
    assert (measured(metrics, seed=1).units["mi_null"] != found.units["mi_null"]).all()


def entropy(logits, labels):
    return torch.special.entr(logits.softmax(1)).sum(1)


def test_a_function_is_a_target_by_itself_and_by_its_dotted_name(monkeypatch, tmp_path):
    (tmp_path / "my_targets.py").write_text(
        "import torch\ndef entropy(logits, labels):\n    return torch.special.entr(logits.softmax(1)).sum(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    found = measured({"own": get_metric("mi", target=entropy)})
    torch.manual_seed(0)
    named = measured({"own": get_metric("mi", target="my_targets.entropy")})
    np.testing.assert_array_equal(found.units["own"], named.units["own"])
    assert found.metadata["metrics"]["own"]["options"]["target"] == "entropy"
    assert "with entropy" in found.metadata["metrics"]["own"]["needs"]["z"]
    sys.modules.pop("my_targets")


def test_joined_targets_are_columns():
    logits, labels = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 4
    both = target_of("logit_margin+loss", logits, labels)
    assert torch.equal(both, torch.stack([target_of("logit_margin", logits, labels), target_of("loss", logits, labels)], 1))
    assert target_of("label+logits", logits, labels).shape == (9, 5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("margin", "no target is called 'margin'; choose from label, logit_margin"),
        (lambda logits, labels: logits.sum(), "returns \\(\\) for 9 samples; return \\(samples,\\) or \\(samples, t\\)"),
        ("math.tan_h", "math has no function 'tan_h'"),
    ],
    ids=label,
)
def test_targets_that_do_not_fit_are_named(name, words):
    with pytest.raises(ValueError, match=words):
        target_of(name, torch.randn(9, 4), torch.arange(9) % 4)


def test_effective_samples_are_the_samples_where_a_map_says_one_thing_and_the_rows_where_they_are_independent():
    g = torch.Generator().manual_seed(0)
    samples, places = 2000, 16
    alone = torch.randn(samples, 1, 4, 4, generator=g)
    one = torch.randn(samples, 1, 1, 1, generator=g).expand(-1, -1, 4, 4)
    net = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(2 * places, 2))
    x = torch.cat([alone, one], 1)
    found = nl.analyze(net, x.split(100), ["n_eff"], "0", groups=200).units["n_eff"]
    np.testing.assert_allclose(found, [samples * places, samples], rtol=0.3)  # sqrt(2/199) is 0.1


def test_the_bias_beside_a_value_is_that_of_the_value():
    """Of a variance with ddof 0, which reads sigma^2/n too little, the jackknife's is exact."""
    columns = [f"{name}{suffix}" for name in ("activation_variance", "class_mi") for suffix in ("", "_se", "_bias")]
    assert list(measured(["activation_variance", "class_mi"], bias=True).units) == columns
    x = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left = torch.stack([torch.cat([x[:k], x[k + 1 :]]).var(correction=0) for k in range(40)])
    error, bias = jackknife(x.var(correction=0), left, torch.ones(40))
    torch.testing.assert_close(bias, -x.var() / 40, rtol=1e-10, atol=0)
    assert error > 0
