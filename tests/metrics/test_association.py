"""Associations: equal to full Jacobians and double backward passes, whatever the batches, and to the numbers of Lange et al."""

import json

import numpy as np
import pytest
import torch
from real import folder
from torch import nn
from torch.testing import assert_close

import nodelens as nl


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype).eval()


def rows(n=40, shape=(7,), classes=3):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, *shape, generator=g, dtype=torch.float64), torch.randint(classes, (n,), generator=g)


def in_batches(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def split(net, k):
    """The network up to and with a layer, and the rest of it."""
    return net[: k + 1], net[k + 1 :]


def by_row(net, k, x, of_row):
    """The mean over samples and positions of a function of one row: its sample's units, the network behind, and its position."""
    head, tail = split(net, k)
    found = []
    for one in x:
        h = head(one[None])[0].detach()
        places = h.flatten(1).shape[1] if h.ndim > 1 else 1
        for q in range(places):

            def at(u, h=h, q=q):
                if h.ndim == 1:
                    return tail(u[None])[0]
                moved = h.flatten(1).index_copy(1, torch.tensor([q]), u[:, None])
                return tail(moved.reshape(h.shape)[None])[0]

            found.append(of_row(at, h if h.ndim == 1 else h.flatten(1)[:, q]))
    return torch.stack(found).mean(0)


def jacobian_product(at, u):
    j = torch.autograd.functional.jacobian(at, u)
    return j.T @ j


def gauss_newton(at, u):
    j, p = torch.autograd.functional.jacobian(at, u), at(u).softmax(0)
    return j.T @ (p.diag() - p.outer(p)) @ j


@pytest.mark.parametrize("size", [1, 32])
@pytest.mark.parametrize(("name", "twin"), [("backward_jac", jacobian_product), ("backward_ggn", gauss_newton)])
def test_an_association_is_what_full_jacobians_say(name, twin, size):
    net, (x, y) = mlp(), rows()
    found = nl.analyze(net, in_batches(x, y, size), [name], layers=["0", "1", "2"])
    for k in (0, 1, 2):
        assert_close(torch.tensor(found.matrices[str(k), name]), by_row(net, k, x, twin), rtol=1e-9, atol=1e-12)


def test_a_covariance_divides_by_the_number_of_rows():
    net, (x, y) = mlp(), rows()
    found = nl.analyze(net, in_batches(x, y, 7), ["forward_cov"], layers="1")
    h = net[:2](x)
    assert_close(torch.tensor(found.matrices["1", "forward_cov"]), torch.cov(h.T, correction=0).detach(), rtol=1e-9, atol=1e-12)


def test_a_normalized_association_has_ones_on_its_diagonal_and_nan_where_a_unit_has_none():
    net, (x, y) = mlp(), rows()
    net[2].weight.data[:, 2] = 0
    found = nl.analyze(net, in_batches(x, y, 16), ["backward_jac", "backward_jac_norm"], layers="1")
    raw, normed = found.matrices["1", "backward_jac"], found.matrices["1", "backward_jac_norm"]
    live = [k for k in range(6) if raw[k, k] > 0]
    assert 2 not in live
    assert len(live) > 2
    size = np.sqrt(raw[live, live])
    np.testing.assert_allclose(normed[np.ix_(live, live)], raw[np.ix_(live, live)] / np.outer(size, size), rtol=1e-12)
    assert np.isnan(normed[2]).all()
    assert any(m["column"] == "backward_jac_norm" and m["layer"] == "1" for m in found.metadata["missing"])
    assert {"layer": "1", "metric": "backward_jac", "rule": "zero_units", "count": 6 - len(live)} in found.metadata["counts"]


@pytest.mark.parametrize("size", [1, 30])
def test_the_numbers_of_lange_et_al_agree(size):
    doc = json.loads((folder("NODELENS_GOLDEN") / "associations_mlp.json").read_text())
    net = mlp()
    net.load_state_dict({k: torch.as_tensor(np.array(v)) for k, v in doc["inputs"]["state_dict"].items()})
    x, y = (torch.as_tensor(np.array(doc["inputs"][k])) for k in ("inputs", "labels"))
    names = ["forward_cov", "forward_cov_norm", "backward_jac", "backward_jac_norm"]
    found = nl.analyze(net, in_batches(x, y, size), names, layers=["1", "3"])
    for case, options in doc["options"].items():
        if options["metric"] in names and options["layer"] != "all":
            value = np.abs(found.matrices[str(2 * options["layer"] + 1), options["metric"]])
            np.testing.assert_allclose(value, np.array(doc["expected"][case], float), **doc["tolerance"], err_msg=case)


def test_tensors_of_one_layer_have_no_derivatives_of_a_model():
    with pytest.raises(ValueError, match=r"backward_jac differentiates the model, which tensors do not contain: use nl\.analyze"):
        nl.get_metric("backward_jac").compute(outputs=torch.ones(4, 2))
