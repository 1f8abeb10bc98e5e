"""What pages say about columns: meaning, unit, and missing values by reason."""

import re

import pandas as pd
import pytest

from nodelens.report.definitions import definitions, definitions_of, label, missing
from nodelens.report.metric_figures import distributions, layers, overview
from nodelens.results.result import Result


@pytest.fixture
def result():
    """Two layers with metrics that have a unit, one that an option changes, and one of a user's own."""
    about = {
        "redundancy": {"metric": "redundancy", "options": {"reduce": "mean"}},
        "d_pr": {"metric": "participation_ratio", "options": {"normalize": False}},
        "d_pr_norm": {"metric": "participation_ratio", "options": {"normalize": True}},
        "magnitude": {"metric": "magnitude", "options": {"p": 1}},
        "mine": {"metric": "my_own", "options": {}},
    }
    about = {name: {**each, "needs": {}, "source": "a book"} for name, each in about.items()}
    index = pd.MultiIndex.from_product([["a", "b"], range(3)], names=["layer", "unit"])
    units = pd.DataFrame({"redundancy": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "mine": 1.0}, index)
    table = pd.DataFrame({"units": 3, "d_pr": [1.0, 2.0], "d_pr_norm": [0.1, float("nan")]}, pd.Index(["a", "b"], name="layer"))
    lost = [{"layer": f"l{k}", "column": "redundancy", "count": 1000, "reason": "no <rows>"} for k in range(6)]
    lost += [{"layer": "a", "column": "d_pr_norm", "reason": "other"}, {"layer": "a", "column": "redundancy", "reason": "other"}]
    return Result(units, table, {}, {"schema_version": 1, "metrics": about, "missing": lost})


def test_axes_name_units_that_no_option_changes(result):
    assert label(result, "redundancy") == "redundancy (nats)"
    assert label(result, "d_pr") == "d_pr (directions)"
    assert [label(result, name) for name in ("d_pr_norm", "magnitude", "mine", "none")] == [
        "d_pr_norm",
        "magnitude",
        "mine",
        "none",
    ]
    assert distributions(result).figure.layout.xaxis.title.text == "redundancy (nats)"
    assert layers(result, "d_pr_norm").figure.layout.updatemenus[0].buttons[1].args[1] == {"xaxis.title.text": "d_pr (directions)"}


def test_a_menu_of_metrics_says_what_each_is(result):
    buttons = distributions(result).figure.layout.updatemenus[0].buttons
    assert buttons[0].name == definitions_of(result)["redundancy"]
    assert "Unit: nats" in buttons[0].name
    assert buttons[1].name == "Source: a book."


def test_definitions_have_meaning_and_unit(result):
    rows = re.findall(r"<tr><td>(.*?)</td><td class='words'>(.*?)</td><td class='words'>(.*?)</td>", definitions(result))
    assert [row[0] for row in rows] == [
        "redundancy",
        "d_pr: participation_ratio",
        "d_pr_norm: participation_ratio",
        "magnitude",
        "mine: my_own",
    ]
    assert rows[0][1].startswith("Gaussian mutual information")
    assert rows[0][2].startswith("nats")
    assert rows[4][1:] == ("", "")


def test_missing_values_are_listed_by_column_and_reason(result):
    rows = re.findall(r"<tr>(<td>.*?)</tr>", missing(result))
    found = [re.sub(r"</td><td class='words'>", "|", row).replace("<td>", "").replace("</td>", "") for row in rows]
    assert found == [
        "redundancy|6,000|no &lt;rows&gt;|l0, l1, l2, l3 and 2 more",
        "d_pr_norm|1|other|a",
        "redundancy|1|other|a",
    ]


def test_a_metric_of_one_layer_has_no_rank(result):
    assert list(overview(result).table) == ["redundancy", "mine", "d_pr"]
