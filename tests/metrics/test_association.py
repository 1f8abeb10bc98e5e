"""Associations: equal to full Jacobians and double backward passes, whatever the batches, and to the numbers of Lange et al."""

import json
from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from real import folder
from torch import nn
from torch.testing import assert_close

import nodelens as nl

ALL = ["forward_cov", "forward_jac", "backward_jac", "backward_ggn", "backward_hess"]


def mlp(smooth=False):
    torch.manual_seed(0)
    act = nn.Tanh if smooth else nn.ReLU
    return nn.Sequential(nn.Linear(7, 6), act(), nn.Linear(6, 5), act(), nn.Linear(5, 3)).double().eval()


def convolutional(smooth=False):
    torch.manual_seed(1)
    act = nn.GELU() if smooth else nn.ReLU(inplace=True)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        act,
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 2),
        nn.BatchNorm2d(3),
        act,
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.double().eval()


class Attention(nn.Module):
    """One head of attention over the positions of (samples, positions, width), and a residual connection."""

    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + nn.functional.scaled_dot_product_attention(q, k, v)


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, x):
        return x.mean(1)


def transformer():
    torch.manual_seed(2)
    layers = nn.Linear(3, 6), Attention(6), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 6), Attention(6), Mean(), nn.Linear(6, 3)
    return nn.Sequential(*layers).double().eval()


def rows(n=40, shape=(7,), classes=3):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, *shape, generator=g, dtype=torch.float64), torch.randint(classes, (n,), generator=g)


def in_batches(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def turned(h, tokens):
    """Units and positions of tokens exchanged."""
    return h.mT if tokens else h


def slow(net, k, x, y):
    """{association: (units, units)} of a layer, from full Jacobians and Hessians of each sample, position by position."""
    tokens = x.ndim == 3  # units last
    head, tail = (lambda u: turned(net[: k + 1](u), tokens)), (lambda u: net[k + 1 :](turned(u, tokens)))
    found = {name: [] for name in ALL[1:]}
    for one, label in zip(x, y, strict=True):
        h = head(one[None])[0].detach().clone()
        z = torch.autograd.functional.jacobian(lambda u: tail(u.clone()[None])[0], h).flatten(2 if h.ndim > 1 else 1)
        up = torch.autograd.functional.jacobian(lambda u: head(u[None])[0], one).flatten(h.ndim)
        p = tail(h.clone()[None])[0].softmax(0).detach()
        loss = lambda u, y=label: nn.functional.cross_entropy(tail(u.clone()[None]), y[None])  # noqa: E731
        hessian = torch.autograd.functional.hessian(loss, h)
        units, places = len(h), h[0].numel()
        z, up, hessian = (
            z.reshape(len(p), units, places),
            up.reshape(units, places, -1),
            hessian.reshape(units, places, units, places),
        )
        for q in range(places):
            found["forward_jac"].append(up[:, q] @ up[:, q].T)
            found["backward_jac"].append(z[:, :, q].T @ z[:, :, q])
            found["backward_ggn"].append(z[:, :, q].T @ (p.diag() - p.outer(p)) @ z[:, :, q])
            found["backward_hess"].append(hessian[:, q, :, q])
    h = head(x).detach()
    cov = torch.cov((h.transpose(0, 1).flatten(1) if h.ndim > 2 else h.T), correction=0)
    return {"forward_cov": cov} | {name: torch.stack(each).mean(0) for name, each in found.items()}


CASES = {
    "mlp": (mlp, (7,), [0, 1, 2], 33),
    "smooth_mlp": (lambda: mlp(True), (7,), [0, 1], 33),
    "convolutional": (convolutional, (2, 6, 6), [0, 4], 17),
    "smooth_convolutional": (lambda: convolutional(True), (2, 6, 6), [0, 4], 5),
    "transformer": (transformer, (4, 3), [0, 2], 12),
}


@cache
def expected(case, k):
    make, shape, _, n = CASES[case]
    return slow(make(), k, *rows(n, shape))


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 16])  # of 33 or 17 samples one is left alone
@pytest.mark.parametrize("case", CASES)
def test_associations_are_what_full_jacobians_and_hessians_say(case, size):
    make, shape, layers, n = CASES[case]
    net, (x, y) = make(), rows(n, shape)
    found = nl.analyze(net, in_batches(x, y, size), ALL, layers=[str(k) for k in layers])
    for k in layers:
        for name in ALL:
            value = torch.tensor(found.matrices[str(k), name])
            assert_close(value, expected(case, k)[name], rtol=1e-7, atol=1e-9, msg=lambda m, at=(k, name): f"{at}: {m}")
    methods = {(each["layer"], each["metric"]): each for each in found.metadata["associations"]}
    computed = {methods[str(k), "backward_hess"]["computed"] for k in layers}
    assert computed == {"Gauss-Newton" if case in ("mlp", "convolutional") else "Hessian"}


def _share_of(rank, world, folder, size):
    """Measures every case; the second of three processes has no samples."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    for case, (make, shape, layers, n) in CASES.items():
        x, y = (t.tensor_split([n // 3, n // 3])[rank] for t in rows(n, shape))
        found = nl.analyze(make(), in_batches(x, y, size) if len(x) else [], ALL, layers=[str(k) for k in layers])
        if rank == 0:
            found.save(f"{folder}/{case}")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 32])
def test_three_processes_say_the_same(size, tmp_path):
    start = "spawn" if torch.cuda.is_initialized() else "fork"
    mp.start_processes(_share_of, (3, str(tmp_path), size), 3, start_method=start)
    for case, (_, _, layers, _) in CASES.items():
        found = nl.load(tmp_path / case)
        assert found.metadata["processes"] == 3
        for k in layers:
            for name in ALL:
                value = torch.tensor(found.matrices[str(k), name])
                at = (case, k, name)
                assert_close(value, expected(case, k)[name], rtol=1e-7, atol=1e-9, msg=lambda m, at=at: f"{at}: {m}")


def test_a_linear_layer_that_reads_several_tokens_of_a_sample_has_the_jacobian_of_each():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = rows(20, (3, 9))
    found = nl.analyze(net, in_batches(x, y, 8), ["forward_jac"], layers="1").matrices["1", "forward_jac"]
    w, open_gates = net[0].weight.detach(), (net[0](x).flatten(0, 1) > 0).double()
    assert_close(torch.tensor(found), w @ w.T * (open_gates.T @ open_gates) / 60, rtol=1e-10, atol=0)


class Relu(torch.autograd.Function):
    """A function of a user's, with the name of one of torch's: it adds neighbours."""

    @staticmethod
    def forward(ctx, x):
        return x + x.roll(1, 1)

    @staticmethod
    def backward(ctx, g):
        return g + g.roll(-1, 1)


class Neighbours(nn.Module):
    def forward(self, x):
        return Relu.apply(x)


def test_a_function_of_a_user_is_not_taken_for_one_of_torch_by_its_name():
    torch.manual_seed(0)
    net, (x, y) = nn.Sequential(nn.Linear(7, 6), Neighbours(), nn.Linear(6, 3)).double().eval(), rows(12)
    found = nl.analyze(net, [(x, y)], ["forward_jac", "backward_hess"], layers=["0", "1"])
    assert_close(torch.tensor(found.matrices["1", "forward_jac"]), slow(net, 1, x, y)["forward_jac"], rtol=1e-9, atol=0)
    why = next(each["why"] for each in found.metadata["associations"] if (each["layer"], each["metric"]) == ("0", "backward_hess"))
    assert why == "ReluBackward behind it"


def test_a_hessian_that_is_the_gauss_newton_matrix_is_computed_once_with_it():
    calls = []
    found = nl.analyze(mlp(), in_batches(*rows(), 40), ALL[3:], layers="1", on_plan=lambda plan: calls.append(plan.rows()))
    assert len([each for each in calls[0] if each["statistic"].startswith("Products")]) == 1
    assert found.matrices["1", "backward_hess"].tolist() == found.matrices["1", "backward_ggn"].tolist()
    whys = {each["metric"]: each.get("why", "") for each in found.metadata["associations"]}
    assert whys["backward_ggn"] == ""
    assert "piecewise linear" in whys["backward_hess"]


def test_a_normalized_association_has_ones_on_its_diagonal_and_nan_where_a_unit_has_none():
    net, (x, y) = mlp(), rows()
    net[2].weight.data[:, 2] = 0
    found = nl.analyze(net, in_batches(x, y, 16), ["backward_jac", "backward_jac_norm"], layers="1")
    raw, normed = found.matrices["1", "backward_jac"], found.matrices["1", "backward_jac_norm"]
    live = [k for k in range(6) if raw[k, k] > 0]
    assert 2 not in live
    assert len(live) > 2
    size = np.sqrt(raw.diagonal()[live])
    np.testing.assert_allclose(normed[np.ix_(live, live)], raw[np.ix_(live, live)] / np.outer(size, size), rtol=1e-12)
    assert np.isnan(normed[2]).all()
    assert any(m["column"] == "backward_jac_norm" and m["layer"] == "1" for m in found.metadata["missing"])
    assert {"layer": "1", "metric": "backward_jac", "rule": "zero_units", "count": 6 - len(live)} in found.metadata["counts"]


def document(name):
    return json.loads((folder("NODELENS_GOLDEN") / f"{name}.json").read_text())


@pytest.mark.parametrize("size", [1, 30])
def test_the_numbers_of_lange_et_al_agree(size):
    doc = document("associations_mlp")
    net = mlp()
    net.load_state_dict({k: torch.as_tensor(np.array(v)) for k, v in doc["inputs"]["state_dict"].items()})
    x, y = (torch.as_tensor(np.array(doc["inputs"][k])) for k in ("inputs", "labels"))
    names = {options["metric"] for options in doc["options"].values()}
    stacked = {name: nl.get_metric(name, stacked="hess" not in name) for name in names}
    found = nl.analyze(net, in_batches(x, y, size), stacked, layers=["1", "3"])
    for case, options in doc["options"].items():
        layer = "all" if options["layer"] == "all" else str(2 * options["layer"] + 1)
        value = np.abs(found.matrices[layer, options["metric"]])
        np.testing.assert_allclose(value, np.array(doc["expected"][case], float), **doc["tolerance"], err_msg=case)


class Bare(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("size", [1, 7, 18])
def test_the_numbers_of_lange_et_al_agree_on_maps(size):
    doc = document("associations_conv")
    maps = torch.as_tensor(np.array(doc["inputs"]["outputs"]))
    metrics = {case: nl.get_metric(o["metric"], spatial=o["spatial"]) for case, o in doc["options"].items()}
    net = nn.Sequential(Bare(), Bare())
    found = nl.analyze(net, maps.split(size), metrics, layers="0")
    for case in metrics:
        np.testing.assert_allclose(np.abs(found.matrices["0", case]), doc["expected"][case], **doc["tolerance"], err_msg=case)


def test_tensors_of_one_layer_have_no_derivatives_of_a_model():
    with pytest.raises(ValueError, match=r"backward_jac differentiates the model, which tensors do not contain: use nl\.analyze"):
        nl.get_metric("backward_jac").compute(outputs=torch.ones(4, 2))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("forward_cov", {"spatial": "per_location", "view": "samples"}, "spatial=per_location needs .* leave out view=samples"),
        ("forward_cov", {"spatial": "per_location", "stacked": True}, "spatial=per_location needs .* leave out stacked"),
        ("backward_jac", {"probes": -1}, "backward_jac: probes is -1; it is 0 or more"),
        ("forward_jac", {"probes": 4, "method": "exact"}, "forward_jac: probes is 4; it is left out where method=exact"),
        ("backward_ggn", {"draws": 0}, "backward_ggn: draws is 0; it is 1 or more"),
        (
            "backward_jac",
            {"view": "samples"},
            "backward_jac has no option 'view': positions have derivatives of their own",
        ),
        (
            "forward_jac_norm",
            {"spatial": "per_location"},
            "forward_jac_norm has no option 'spatial': it is the mean over positions",
        ),
        ("backward_hess", {"method": "fast"}, "backward_hess: method is 'fast'; it takes 'auto', 'exact', 'hutchinson'"),
    ],
)
def test_options_that_do_not_fit_are_named(name, options, words):
    with pytest.raises(ValueError, match=words):
        nl.get_metric(name, **options)
