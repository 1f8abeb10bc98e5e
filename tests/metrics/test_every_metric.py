"""Every metric of the catalogue, through a pass: what it is in hand, whatever the batches, and no NaN without a reason."""

import numpy as np
import pandas as pd
import pytest
import torch
from cases_metrics import NAMES, NAMES_PLAIN, OF_NORMS, batches, convolutional, plain, rows, start_of
from torch import nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.metrics import get_metric


def measured(net, data, names, size, **options):
    names = list(names)
    part = nl.analyze(net, batches(data, size), [n for n in names if n not in OF_NORMS], initial=start_of(net), **options)
    normed = [n for n in names if n in OF_NORMS]
    if normed:
        found = nl.analyze(net, batches(data, size), normed, **options)
        part.units = part.units.join(found.units)
        part.metadata["missing"] += found.metadata["missing"]
    return part


@pytest.fixture(scope="module")
def in_hand():
    """The tensors of the first layer of the plain network."""
    net, data = plain(), rows()
    kept = {}
    x = data["x"].clone()
    y = net[0](x)
    y.retain_grad()
    kept["next_outputs"] = net[2](net[1](y))
    logits = net[3:](kept["next_outputs"])
    nn.functional.cross_entropy(logits, data["labels"], reduction="sum").backward()
    tensors = {"inputs": x, "outputs": y, "weights": net[0].weight, "gradients": y.grad, "logits": logits, **kept}
    tensors = {k: t.detach() for k, t in tensors.items()}
    return tensors | {"labels": data["labels"], "initial_weights": start_of(net)["0.weight"], "targets": None}


@pytest.fixture(scope="module")
def passed():
    return measured(plain(), rows(), NAMES_PLAIN, 13)


@pytest.mark.parametrize("name", NAMES_PLAIN)
def test_a_pass_gives_what_the_metric_gives_in_hand(name, in_hand, passed):
    metric = get_metric(name)
    if metric.grouped:
        pytest.skip("reads groups of samples, which one batch in hand has not")
    behind = any(need.port == "activated" for need in metric.needs().values())
    value = metric.compute(**in_hand | ({"outputs": plain()[1](in_hand["outputs"])} if behind else {}))
    if metric.shape == "layer":
        found = torch.tensor(passed.layers.loc["0", name], dtype=torch.float64)
    elif metric.shape == "edge":
        found = torch.tensor(passed.edges.loc[("0", "2"), name], dtype=torch.float64)
    elif metric.shape == "unit":
        found = torch.tensor(passed.units.loc["0", name].to_numpy())
    else:
        found = torch.tensor(passed.matrices["0", name])
    assert_close(found, value, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.fixture(scope="module")
def one_batch():
    return measured(convolutional(), rows(90, (3, 9, 9)), NAMES, 90, bias=True)


SLOW = [pytest.param(size, marks=pytest.mark.slow) for size in (1, 7, 64)]


@pytest.mark.parametrize("size", [89, *SLOW])  # 89 samples, then one alone
def test_batches_change_no_value_no_error_no_bias(size, one_batch):
    found = measured(convolutional(), rows(90, (3, 9, 9)), NAMES, size, bias=True)
    for table in ("units", "layers", "edges"):
        a, b = getattr(found, table), getattr(one_batch, table)
        assert list(a.columns) == list(b.columns)
        for column in a.select_dtypes("number"):
            scale = float(b[column.removesuffix("_bias").removesuffix("_se")].abs().max())
            np.testing.assert_allclose(a[column], b[column], rtol=1e-7, atol=1e-9 * scale + 1e-12, err_msg=f"{table} {column}")
    assert found.matrices.keys() == one_batch.matrices.keys()
    for key, matrix in found.matrices.items():
        np.testing.assert_allclose(matrix, one_batch.matrices[key], rtol=1e-7, atol=1e-12, err_msg=str(key))


def test_every_value_that_is_missing_has_its_reason(one_batch):
    told = {(m["layer"], m["column"]): m["count"] for m in one_batch.metadata["missing"]}
    for (layer, _), row in one_batch.units.iterrows():
        for column in row.index[row.isna()]:
            assert (layer, column) in told
    for layer, row in one_batch.layers.select_dtypes("number").iterrows():
        assert all((layer, column) in told for column in row.index[row.isna()])
    for (first, second), row in one_batch.edges.select_dtypes("number").iterrows():
        assert all((f"{first} -> {second}", column) in told for column in row.index[row.isna()])
    assert all(m["reason"] for m in one_batch.metadata["missing"])


def test_every_metric_but_those_of_weights_has_its_error(one_batch):
    for name in NAMES:
        metric = get_metric(name)
        table = {"unit": one_batch.units, "layer": one_batch.layers, "edge": one_batch.edges}.get(metric.shape)
        if table is None:
            continue
        with_error = bool(metric.needs()) and not metric.grouped
        assert (f"{name}_se" in table) == with_error, name
        if with_error and not metric.no_error and name != "activation_outlier_index":
            assert table[f"{name}_se"].notna().sum() >= 0.5 * table[name].notna().sum(), name


def test_a_saved_result_has_its_edges_again(one_batch, tmp_path):
    back = nl.load(one_batch.save(tmp_path))
    pd.testing.assert_frame_equal(back.edges, one_batch.edges)
    assert {view for views in one_batch.edges["view"] for view in views.split("+")} == {"positions", "samples"}
