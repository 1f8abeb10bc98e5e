"""The pages: links and anchors lead somewhere, names are known, README is short, CONTRIBUTING is enough to add a metric."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nodelens as nl

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors_of(path):
    """The anchors that Markdown makes of a page's headings."""
    titles = _HEADING.findall(_FENCE.sub("", path.read_text()))
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def broken(page, text):
    """Links of a page that lead nowhere."""
    found = []
    for link in _LINK.findall(_FENCE.sub("", text)):
        place, _, anchor = link.partition("#")
        if link.startswith(("http://", "https://")):
            continue
        target = (page.parent / place).resolve() if place else page
        if not target.is_file() or (anchor and anchor not in anchors_of(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken(page, page.read_text()) == []


def test_a_broken_link_is_found():
    page = ROOT / "README.md"
    assert broken(page, "[a](docs/nowhere.md) [b](docs/concepts.md#nothing) [c](docs/concepts.md#metric)") == [
        "docs/nowhere.md",
        "docs/concepts.md#nothing",
    ]


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").glob("**/*.md")}
    assert {page for page in pages if f": {page}\n" not in navigation} == set()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_metrics_that_are_recommended_exist():
    tables = [line for line in (ROOT / "docs" / "choosing-a-metric.md").read_text().splitlines() if line.startswith("| ")]
    names = {name for line in tables for name in re.findall(r"`([a-z]\w*)`", line)}
    assert len(names) > 50
    assert all(nl.get_metric(name) for name in names)  # an alias will do; an unknown name raises


def test_modules_of_the_reference_exist():
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            path = ROOT.joinpath(*name.split("."))
            assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name


def test_a_metric_written_from_contributing_alone(tmp_path):
    """In a copy of the package: one file and one test, and the metric is known everywhere."""
    blocks = re.findall(r"^<!-- file: (\S+) -->\n```python\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    assert [name for name, _ in blocks] == ["nodelens/metrics/signal_to_noise.py", "tests/metrics/test_signal_to_noise.py"]
    skip = shutil.ignore_patterns("__pycache__")
    for folder in ("nodelens", "conf", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, code in blocks:
        (tmp_path / name).write_text(code)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    tests = ["tests/metrics/test_signal_to_noise.py", "tests/metrics/test_laws_metrics.py"]
    words = [sys.executable, "-m", "pytest", *tests, "-k", "snr or ratio_of_two", "-rp", "-p", "no:cacheprovider"]
    ended = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    passed = re.findall(r"^PASSED (.*)$", ended.stdout, re.MULTILINE)
    assert any("ratio_of_two" in name for name in passed)
    assert any("permuted_units" in name and "snr" in name for name in passed)
