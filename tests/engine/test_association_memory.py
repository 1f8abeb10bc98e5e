"""The memory of vectors of derivatives: the plan counts what a pass takes, and refuses what does not fit."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import nodelens as nl


def perceptron():
    net = nn.Sequential(nn.Linear(100, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 50))
    return net, torch.randn(400, 100), torch.randint(50, (400,))


def convolutional():
    layers = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)
    return nn.Sequential(*layers), torch.randn(64, 1, 14, 14), torch.randint(10, (64,))


def peak(run):
    """The largest number of bytes that torch holds at once during a call, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.cumsum(0).max())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("backward_jac", {}),
        ("backward_ggn", {}),
        ("forward_jac", {}),
        ("backward_jac", {"probes": 64}),
        ("backward_hess", {"method": "hutchinson"}),
    ],
)
@pytest.mark.parametrize("make", [perceptron, pytest.param(convolutional, marks=pytest.mark.slow)])
def test_a_plan_counts_the_vectors_of_derivatives(make, name, options):
    """Measured: 0.5 to 1.3 times what the plan says."""
    torch.manual_seed(0)
    net, x, y = make()
    plans = []
    found = peak(lambda: nl.analyze(net, [(x, y)], {"a": nl.get_metric(name, **options)}, layers=["1", "3"], on_plan=plans.append))
    assert plans[0].total_bytes / 2.5 < found < 1.5 * plans[0].total_bytes


def test_a_plan_counts_the_vectors_of_small_batches_that_wait_for_more():
    net, x, y = perceptron()
    plans = []
    for size in (4, 400):
        data = list(zip(x.split(size), y.split(size), strict=True))
        nl.analyze(net, data, ["backward_jac"], layers=["1", "3"], on_plan=plans.append)
    few, many = (plan.vector_bytes / plan.dry_run.samples for plan in plans)
    waiting = 2 * 4 * 256 * 4096  # bytes of both layers
    assert waiting < plans[0].vector_bytes < 4 * waiting
    assert few > 10 * many


def test_vectors_of_float64_that_wait_take_twice_the_bytes():
    net, x, y = perceptron()
    plans = []
    for dtype in (torch.float32, torch.float64):
        data = list(zip(x.to(dtype).split(4), y.split(4), strict=True))
        nl.analyze(net.to(dtype), data, ["backward_jac"], layers=["1", "3"], on_plan=plans.append)
    single, double = (plan.vector_bytes for plan in plans)
    assert 1.9 * single < double < 2.1 * single


def test_vectors_that_exceed_the_budget_are_refused_before_the_data_are_read():
    net, x, y = convolutional()
    with pytest.raises(
        MemoryError, match=r"the largest are vectors of derivatives with [\d.]+ MiB: choose smaller batches"
    ) as error:
        nl.analyze(net, [(x, y)], ["backward_jac"], layers=["1", "3"], budget="1MB")
    assert "\n" not in str(error.value)
    nl.analyze(net, [(x[:1], y[:1])], ["backward_jac"], layers=["1", "3"], budget="1MB")
