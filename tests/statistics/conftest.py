"""Back ends of sums: tests that name ``kernels`` run over each."""

import pytest

from nodelens.statistics import reductions


@pytest.fixture(params=["torch", "numba"])
def kernels(request, monkeypatch):
    """The back end, which also takes rows that it would leave to torch."""
    if request.param == "numba":
        pytest.importorskip("numba")
    monkeypatch.setattr(reductions, "POSITIONS", 1)
    monkeypatch.setattr(reductions, "_fast_in_torch", lambda raw, wanted: False)
    with reductions.using(request.param):
        yield request.param
