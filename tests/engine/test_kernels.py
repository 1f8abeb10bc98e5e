"""The back end of a pass: the same numbers from each, and which one runs."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import nn

import nodelens as nl
from nodelens.engine import kernels
from nodelens.statistics import jit

ANALYZE = """
import sys, torch, nodelens as nl
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 40, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(40 * 36, 4)).eval()
data = [(torch.randn(24, 3, 8, 8), torch.randint(4, (24,))) for _ in range(2)]
result = nl.analyze(net, data, "default", "0", groups=2, kernels=sys.argv[1])
print(result.metadata["kernels"], float(result.units["rq"].sum()), sep="|")
"""


def case():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 70, 3, stride=2), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(*net, nn.Linear(70 * 9, 4)).eval()
    data = [(torch.randn(24, 3, 10, 10) + 1, torch.randint(4, (24,))) for _ in range(2)]
    return net, data


def every_metric(net, data, **options):
    return nl.analyze(net, data, "forward", groups=3, **options)


def run(*arguments, env):
    command = [sys.executable, "-c", ANALYZE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | env, timeout=240).stdout.split("|")


def test_all_forward_metrics_are_the_same_with_both():
    pytest.importorskip("numba")
    net, data = case()
    by_torch, by_numba = (every_metric(net, data, kernels=name) for name in ("torch", "numba"))
    assert by_torch.metadata["kernels"] == "torch"
    assert by_numba.metadata["kernels"].startswith("numba")
    assert_frame_equal(by_torch.units, by_numba.units, rtol=2e-3, atol=2e-4)
    assert_frame_equal(by_torch.layers, by_numba.layers, rtol=2e-3, atol=2e-4)


def test_in_float64_they_agree_to_rounding():
    pytest.importorskip("numba")
    net, data = case()
    by_torch, by_numba = (every_metric(net, data, kernels=name, precision="float64") for name in ("torch", "numba"))
    assert_frame_equal(by_torch.units, by_numba.units, rtol=1e-7, atol=1e-9)


def test_rows_that_are_not_finite_are_left_out_alike():
    pytest.importorskip("numba")
    net, data = case()
    data[0][0][5, 1, 4, 4] = torch.nan
    with pytest.warns(UserWarning, match="not finite"):
        by_torch = every_metric(net, data, kernels="torch")
    with pytest.warns(UserWarning, match="not finite"):
        by_numba = every_metric(net, data, kernels="numba")
    assert by_torch.metadata["left_out"] == by_numba.metadata["left_out"]
    assert_frame_equal(by_torch.units, by_numba.units, rtol=2e-3, atol=2e-4)


def test_auto_compiles_nothing_for_little_data(monkeypatch):
    monkeypatch.setattr(jit, "INSTALLED", True)
    found = kernels.choose("auto", torch.float32, torch.device("cpu"), 1e6)
    assert str(found) == "torch (rows are not known to take 4 GiB)"


def test_auto_says_why_it_is_torch(monkeypatch):
    assert str(kernels.choose("auto", torch.float32, torch.device("cuda"), 1e12)) == "torch (on cuda)"
    monkeypatch.setattr(jit, "INSTALLED", False)
    assert "numba is not installed: pip install" in str(kernels.choose("auto", torch.float32, torch.device("cpu"), 1e12))


def test_numba_that_does_not_work_leaves_torch(monkeypatch):
    monkeypatch.setattr(jit, "INSTALLED", True)
    monkeypatch.setattr(kernels.importlib, "import_module", lambda name: 1 / 0)
    found = kernels.choose("auto", torch.float32, torch.device("cpu"), 1e12)
    assert str(found) == "torch (numba does not work here: ZeroDivisionError: division by zero)"
    with pytest.raises(ZeroDivisionError):
        kernels.choose("numba", torch.float32, torch.device("cpu"), 1e12)


def test_another_back_end_raises(monkeypatch):
    net, data = case()
    with pytest.raises(ValueError, match="kernels is 'cuda'; it is auto, torch, numba"):
        nl.analyze(net, data, "rq", kernels="cuda")
    monkeypatch.setattr(jit, "INSTALLED", False)
    with pytest.raises(ValueError, match="kernels is 'numba', which is not installed: pip install 'nodelens\\[fast\\]'"):
        nl.analyze(net, data, "rq", kernels="numba")


@pytest.mark.slow
def test_the_same_numbers_without_a_compiler_and_after_a_run_killed_in_compilation(tmp_path):
    pytest.importorskip("numba")
    env = {"CC": "/bin/false", "NUMBA_CACHE_DIR": str(tmp_path)}
    killed = subprocess.Popen([sys.executable, "-c", ANALYZE, "numba"], env=os.environ | env, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not any(tmp_path.rglob("*.nbi")) and killed.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    by_torch, uncached, cached = (run(name, env=env) for name in ("torch", "numba", "numba"))
    assert by_torch[0] == "torch"
    assert uncached[0].startswith("numba")
    assert cached[0].startswith("numba")
    assert float(uncached[1]) == float(cached[1]) == pytest.approx(float(by_torch[1]), rel=1e-4)
