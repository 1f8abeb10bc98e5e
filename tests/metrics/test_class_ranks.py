"""Information about the class at ReLU outputs of trained networks, against nearest-neighbour estimates (Ross 2014)."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from real import folder
from safetensors.torch import load_file
from scipy.special import digamma
from scipy.stats import spearmanr
from sklearn.feature_selection import mutual_info_classif
from sklearn.neighbors import KDTree

from nodelens.metrics import get_metric

SITES = {
    "cifar_resnet20": ["bn1", "layer1.1.bn1", "layer2.1.bn1", "layer3.0.bn1", "layer3.2.bn1"],  # a ReLU follows
    "mnist_lenet5_pyribs": ["conv1", "conv2", "fc1", "fc2"],
}
IMAGES = {"cifar_resnet20": "cifar10_train4000.npz", "mnist_lenet5_pyribs": "mnist.npz"}
SAMPLES = 2000


def architectures(home):
    """The module of the stored networks; it has the name of a module of the tests."""
    spec = importlib.util.spec_from_file_location("stored_nets", home / "nets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=SITES)
def fired(request):
    """{layer: mean over positions of the ReLU's output, (samples, units)} of a trained network, and the labels."""
    name, real_data = request.param, folder("NODELENS_DATA")
    nets = architectures(real_data)
    home = real_data / "models" / name
    config = json.loads((home / "config.json").read_text())
    net = nets.CifarResNet(20) if name == "cifar_resnet20" else nets.LeNetPyribs()
    net.load_state_dict(load_file(home / "model.safetensors"))
    net.eval()
    stored = np.load(real_data / "images" / IMAGES[name])
    images, labels = (stored[key][:SAMPLES] for key in stored.files[:2])
    seen = {site: [] for site in SITES[name]}

    def see(module, args, output, site):
        y = output.relu()
        seen[site].append((y.mean((2, 3)) if y.ndim == 4 else y).double())

    for site in seen:
        net.get_submodule(site).register_forward_hook(lambda m, a, o, site=site: see(m, a, o, site))
    with torch.no_grad():
        for part in nets.prep(images, config).split(250):
            net(part)
    return {site: torch.cat(parts) for site, parts in seen.items()}, torch.as_tensor(labels).long()


@pytest.mark.slow
def test_class_mi_ranks_units_as_nearest_neighbours_do_and_stays_below_the_entropy(fired):
    rows, labels = fired
    for site, y in rows.items():
        reference = mutual_info_classif(y.numpy(), labels.numpy(), random_state=0)
        value = get_metric("class_mi").compute(outputs=y, labels=labels)
        assert spearmanr(value, reference).statistic > 0.85, site
        assert float(value.max()) <= math.log(10), site


def nearest_neighbours(x, labels, neighbours=3):
    """Information of one or two columns about the class: Ross 2014, eqs. 2 and 3, with the largest difference as the distance."""
    chance = np.random.RandomState(0)
    x = x.numpy() / x.numpy().std(0)
    x = x + 1e-10 * chance.standard_normal(x.shape)  # ties, as at zero, in random order
    radius, own = np.empty(len(x)), np.empty(len(x))
    for c in np.unique(labels):
        here = np.flatnonzero(labels == c)
        found = KDTree(x[here], metric="chebyshev").query(x[here], neighbours + 1)[0][:, -1]
        radius[here], own[here] = np.nextafter(found, 0), len(here)
    among = KDTree(x, metric="chebyshev").query_radius(x, radius, count_only=True)
    return digamma(len(x)) + digamma(neighbours) - digamma(own).mean() - digamma(among).mean()


@pytest.mark.slow
def test_class_synergy_ranks_pairs_as_nearest_neighbours_do(fired):
    rows, labels = fired
    y = list(rows.values())[-1]
    y = y[:, (y > 0).double().mean(0) > 0.02][:, :16]
    single = [nearest_neighbours(y[:, [i]], labels.numpy()) for i in range(y.shape[1])]
    upper = np.triu_indices(y.shape[1], 1)
    reference = [nearest_neighbours(y[:, [i, j]], labels.numpy()) - max(single[i], single[j]) for i, j in zip(*upper, strict=True)]
    value = get_metric("class_synergy", reduce="none").compute(outputs=y, labels=labels).numpy()
    assert spearmanr(value[upper], reference).statistic > 0.85
    assert value.max() <= math.log(10)
