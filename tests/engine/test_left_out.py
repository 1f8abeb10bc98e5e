"""Rows that are left out: standard errors are those of the data without them, and many of them are a warning."""

import math

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import nn
from torch.utils.data import DataLoader

import nodelens as nl
from nodelens.metrics import get_metric
from nodelens.network.batch import Batch
from nodelens.results.left_out import left_out_rows, many_left_out

METRICS = ["activation_mean", "activation_variance", "rq", "redundancy", "n_eff", "effective_rank", "class_mi", "synergy", "taylor"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.fc(self.conv(x).relu().mean((2, 3))).relu())


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().double()


def data(bad: str = "", without: bool = False, n: int = 200) -> DataLoader:
    """Batches in which some samples, more of them in group 0 than elsewhere, are bad: a NaN, or no label; or are not there.

    A loader, not a list, so that the group of a sample does not depend on the others.
    """
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 2, 4, 4, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)
    ids = torch.arange(n)
    group = Batch.of({"x": x, "ids": ids}, groups=5).group
    broken = (torch.rand(n, generator=g) < 0.05) | ((group == 0) & (torch.rand(n, generator=g) < 0.8))
    if bad == "group":
        broken = group == 0
    if bad == "label":
        x[broken], y[broken] = x[broken] + 2, -100
    elif bad:
        x[broken] = math.nan
    keep = ~broken if without else torch.ones_like(broken)
    parts = zip(*(t[keep].split(16) for t in (x, y, ids)), strict=True)
    return DataLoader([{"x": a, "labels": b, "ids": i} for a, b, i in parts], batch_size=None)


def agree(found, expected):
    for one, other in ((found.units, expected.units), (found.layers, expected.layers)):
        assert_frame_equal(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bad", ["nan", "group"])
def test_standard_errors_are_those_of_the_data_without_the_rows(net, bad):
    with pytest.warns(UserWarning, match="are not finite and were left out"):
        found = nl.analyze(net, data(bad), METRICS, groups=5, bias=True)
    expected = nl.analyze(net, data(bad, without=True), METRICS, groups=5, bias=True)
    agree(found, expected)
    assert found.units["taylor_se"].notna().all()


def test_standard_errors_of_samples_without_a_target():
    torch.manual_seed(0)
    net = Net().double()
    names = ["class_mi", "synergy", "mi", "delta_rq", "class_synergy", "taylor", "scar_taylor", "scar_curvature"]
    found = nl.analyze(net, data("label"), names, groups=5, bias=True)
    agree(found, nl.analyze(net, data("label", without=True), names, groups=5, bias=True))
    left = int((torch.cat([b["labels"] for b in data("label")]) < 0).sum())
    counted = [c for c in found.metadata["counts"] if c["rule"] == "without_target"]
    assert {c["count"] for c in counted} == {left}
    assert {"class_mi", "synergy", "mi", "class_synergy"} <= {c["metric"] for c in counted}


def test_standard_errors_of_pruning_groups(net):
    groups = nl.find_groups(net, torch.randn(2, 2, 4, 4, dtype=torch.float64))
    names = ["taylor", "activation_variance", "rq"]
    with pytest.warns(UserWarning, match="not finite"):
        found = nl.analyze(net, data("group"), names, groups, groups=5)
    agree(found, nl.analyze(net, data("group", without=True), names, groups, groups=5))


def test_more_than_one_percent_is_a_warning_and_less_is_counted(net):
    x = torch.randn(300, 4, dtype=torch.float64)
    x[3] = math.nan
    layer = nn.Linear(4, 3).double()
    found = nl.analyze(layer, x.split(50), ["activation_mean"])  # warnings are errors here
    assert [(entry["rows"], entry["of"]) for entry in found.metadata["left_out"]] == [(1, 300)]
    assert "warning" not in found.summary()
    x[10:13] = math.nan
    with pytest.warns(UserWarning, match=r"4 of 300 rows \(1%\) at .* are not finite and were left out: the values describe"):
        found = nl.analyze(layer, x.split(50), ["activation_mean"])
    assert "warning: 4 of 300 rows" in found.summary()


def test_the_line_names_the_worst_site():
    entries = left_out_rows(["a", "b", "c"], [5, 0, 30], [100, 100, 100])
    assert entries == [{"site": "a", "rows": 5, "of": 100}, {"site": "c", "rows": 30, "of": 100}]
    line = many_left_out(entries)
    assert line.startswith("30 of 100 rows (30%) at c are not finite and were left out, and more than 1% at 1 other site:")
    assert many_left_out([{"site": "a", "rows": 1, "of": 100}]) == ""
    assert many_left_out([{"site": "a", "rows": 1}]) == ""  # a result of an earlier version


def test_errors_of_maps_and_of_pairs_of_sites_are_finite(net):
    metrics = {"cka": get_metric("linear_cka"), "mi": get_metric("mi", reference="input_pc1")}
    with pytest.warns(UserWarning, match="not finite"):
        found = nl.analyze(net, data("nan"), metrics, groups=5)
    assert isinstance(found.edges, pd.DataFrame)
    assert found.edges["cka_se"].notna().all()


def test_the_page_and_the_terminal_say_it(tmp_path):
    from rich.console import Console

    from nodelens.app.tasks.show import show_result
    from nodelens.report import write_page

    x = torch.randn(40, 4, dtype=torch.float64)
    x[:9] = math.nan
    with pytest.warns(UserWarning, match="9 of 40 rows"):
        found = nl.analyze(nn.Linear(4, 3).double(), x.split(20), ["activation_mean", "redundancy"])
    found.save(tmp_path)
    page = write_page(tmp_path).read_text()
    assert "<p class='warning'>Warning: 9 of 40 rows (22%)" in page
    console = Console(record=True, width=200)
    show_result(console, nl.load(tmp_path))
    assert "warning: 9 of 40 rows (22%)" in console.export_text()


def test_repeated_samples_and_few_rows_are_said_in_the_summary():
    x = torch.randn(6, 5)
    data = [{"x": torch.cat([x, x]), "ids": torch.arange(12)}]
    found = nl.analyze(nn.Sequential(nn.Linear(5, 4)), data, ["effective_rank"])
    said = found.summary()
    assert "warning: 6 of 12 samples (50.0%) have the content of another one under another id" in said
    assert "warning: few rows for the number of units bias effective_rank at 1 place: measure more samples" in said
    enough = nl.analyze(nn.Sequential(nn.Linear(5, 4)), [torch.randn(40, 5)], ["effective_rank"])
    assert "warning" not in enough.summary()
