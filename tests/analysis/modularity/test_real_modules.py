"""Two trained networks for MNIST of one architecture: how alike they are, and whether their modules are."""

from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest
import torch
from real import folder
from safetensors.torch import load_file

import nodelens as nl
from nodelens.analysis.modularity.modularity_analysis import ModularityAnalysis

NAMES = ("hanssen", "ryu")


def networks():
    home = folder("NODELENS_DATA")
    spec = spec_from_file_location("trained_nets", home / "nets.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {name: module.MnistCnn().eval() for name in NAMES}
    for name, net in found.items():
        net.load_state_dict(load_file(home / f"models/mnist_cnn_{name}/model.safetensors"))
    return found


def batches(count=2000):
    with np.load(folder("NODELENS_DATA") / "images/mnist.npz") as file:
        x, y = torch.from_numpy(file["x_test"][:count]), torch.from_numpy(file["y_test"][:count]).long()
    x = ((x.float() / 255 - 0.1307) / 0.3081)[:, None]
    return list(zip(x.split(500), y.split(500), strict=True))


def activations(net, data):
    """Outputs of fc1 before the ReLU, (images, 500) float64."""
    seen = []
    with net.fc1.register_forward_hook(lambda module, args, output: seen.append(output)), torch.no_grad():
        for x, _ in data:
            net(x)
    return torch.cat(seen).double()


@pytest.mark.slow
def test_two_networks_for_mnist_are_alike_and_their_modules_agree_in_part():
    """Linear CKA of fc1 is 0.86 behind the ReLU, 0.84 before it. Modules of forward_cov agree above chance, others do not."""
    nets, data = networks(), batches()
    before = {name: activations(net, data) for name, net in nets.items()}
    one, other = (before[name] for name in NAMES)
    cka = nl.get_metric("linear_cka")
    assert float(cka.compute(outputs=one, next_outputs=other)) == pytest.approx(0.84, abs=0.01)
    assert float(cka.compute(outputs=one.relu(), next_outputs=other.relu())) == pytest.approx(0.86, abs=0.005)
    units = {"fc1": nl.match_units(one, other)}
    analysis = ModularityAnalysis(shuffles=0, alignments=0)
    found = {name: nl.analyze(net, data, [], ["fc1"], analysis=analysis) for name, net in nets.items()}
    table = nl.compare_modules(found, units=units, shuffles=1000).set_index("association")
    assert table.loc["forward_cov", "alignment_p"] <= 0.01
    assert table.loc["backward_ggn", "alignment_p"] > 0.05
