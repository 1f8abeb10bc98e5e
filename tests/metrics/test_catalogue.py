import re
import subprocess
import sys
from pathlib import Path

import pytest

from nodelens.metrics import METRICS, get_metric, list_metrics
from nodelens.metrics.__main__ import main
from nodelens.metrics.catalogue import catalogue, entry_of

ROOT = Path(__file__).parents[2]


def test_the_page_says_nothing_that_the_catalogue_does_not():
    """A metric may be missing from the file, not from the site, where the catalogue stands in its place."""
    page, *parts = re.split(r"^(?=##)", (ROOT / "docs" / "metrics.md").read_text(), flags=re.MULTILINE)
    head, *current = re.split(r"^(?=##)", catalogue(), flags=re.MULTILINE)
    assert page == head
    assert [part for part in parts if part not in current] == [], "run: python -m nodelens.metrics > docs/metrics.md"
    assert len(parts) > 100


def test_every_name_stands_in_it_once_a_metric_an_entry():
    text = catalogue()
    assert re.findall(r"^### (.*)$", text, re.MULTILINE) == [metric.names[0] for metric in METRICS]
    assert [name for name in list_metrics() if f"`{name}`" not in text and f"### {name}\n" not in text] == []
    assert len(re.findall(r"^## ", text, re.MULTILINE)) == len({metric.__module__ for metric in METRICS})


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.names[0])
def test_an_entry_says_what_a_reader_needs(metric):
    entry = entry_of(metric.names[-1])
    for key in ("formula", "one value per", "unit", "NaN", "source", *(["options"] if get_metric(metric.names[0]).options else [])):
        assert f"\n- {key}: " in entry, f"{metric.__name__} says no {key}"
    assert all(f"`{option}: " in entry for option in metric().options)
    assert "- reads: " in entry


def test_a_line_is_no_longer_than_a_page_and_none_begins_like_another_list():
    lines = catalogue().splitlines()
    assert max(len(line) for line in lines if " " in line[4:]) <= 120
    for line in lines:
        assert not re.match(r"^ +([-+*>#]|\d+[.)]) ", line), line


def test_one_metric_is_printed_by_any_of_its_names(capsys):
    main(["rq"])
    assert capsys.readouterr().out == entry_of("rayleigh_quotient")
    assert "### composite_importance" in entry_of("rq_minus_r")


def test_the_catalogue_is_light_and_an_unknown_name_ends_in_one_line():
    heavy = ["lightning", "hydra", "wandb", "matplotlib", "pandas", "sklearn"]
    code = f"""
import runpy, sys
import nodelens.metrics.catalogue as c
c.catalogue()
print([m for m in {heavy} if m in sys.modules])
sys.argv = ["python -m nodelens.metrics", "rqq"]
runpy.run_module("nodelens.metrics", run_name="__main__")
"""
    words = [sys.executable, "-c", code]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == "[]\n"
    assert ended.returncode == 1
    assert ended.stderr.startswith("nodelens: no metric is called 'rqq'; did you mean 'rq'")
    assert len(ended.stderr.splitlines()) == 1
