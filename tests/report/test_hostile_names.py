"""Names of layers, metrics, tokens and paths are text everywhere: on every page, in the files beside it, in CSV and Markdown."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pandas as pd
import pytest
from hostile import NAMES, hostile_result, hostile_sweep, hostile_training

import nodelens as nl
from nodelens.pruning.hub.card import as_text, model_card
from nodelens.report import document, unit_data, write_page, write_pruning_page, write_training_page
from nodelens.results.spreadsheets import csv_text

OWN = r"<script( type='application/json' id='data-[\w-]+'| src='plotly.min.js')?>.*?</script>"


class Tags(HTMLParser):
    """The attributes of the tags of a page, as a browser reads them."""

    def __init__(self):
        super().__init__()
        self.attributes = []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs


def compared(folder):
    for seed in range(3):
        result = hostile_result()
        result.metadata["config"] |= {"seed": seed, "model": {NAMES[0]: NAMES[seed]}}
        result.save(folder / "runs" / f"=run <b>{seed}")
    return nl.compare(f"{folder}/runs/*", folder / "page")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One page of each kind, as one file, and with its data in files beside it."""
    found = {}
    for where in ("inside", "beside"):
        home = tmp_path_factory.mktemp(where)
        with pytest.MonkeyPatch.context() as patch:
            if where == "beside":
                patch.setattr(document, "_INSIDE", 0)
                patch.setattr(unit_data, "SAMPLE", 30)
            found["run", where] = write_page(hostile_result().save(home / "run"))
            found["pruning", where] = write_pruning_page(hostile_sweep(home / "prune"))
            found["training", where] = write_training_page(hostile_training(home / "train"))
            found["runs", where] = compared(home / "many")
    return found


@pytest.mark.parametrize("where", ["inside", "beside"])
@pytest.mark.parametrize("kind", ["run", "pruning", "training", "runs"])
def test_no_name_becomes_a_tag_of_a_page(pages, kind, where):
    page = pages[kind, where].read_text()
    outside = re.sub(OWN, "", page, flags=re.DOTALL)
    assert "&lt;" in outside, "the names are there, as text"
    assert "<script" not in outside
    assert "<img" not in outside
    assert "<b>bold" not in page
    found = Tags()
    found.feed(outside)
    assert not [name for name, _ in found.attributes if name.startswith("on")], "no tag has a handler"
    assert all(value.startswith("#") for name, value in found.attributes if name in ("href", "src", "action"))
    assert not any("\u2028" in script for script in re.findall(r"<script.*?</script>", page, re.DOTALL)), (
        "ends a line of JavaScript"
    )


@pytest.mark.parametrize("kind", ["run", "pruning", "training", "runs"])
def test_files_beside_a_page_are_one_call_with_json_as_its_data(pages, kind):
    page = pages[kind, "beside"]
    files = list((page.parent / f"{page.stem}_files").glob("*.js"))
    assert len(files) > 2
    for file in files:
        text = file.read_text()
        key, _, value = text.removeprefix("nodelens.put(").removesuffix(");").partition(",")
        assert json.loads(key) == file.stem
        json.loads(value)
        assert "<" not in value
        assert "\u2028" not in value
    assert any("u003cscript" in file.read_text() for file in files), "the names are there, as text"


def test_formulas_are_words_in_csv():
    frame = hostile_result().units.reset_index()[["layer", "rq", "unit_type"]].astype({"unit_type": "category"})
    read = list(csv.reader(io.StringIO(csv_text(frame))))[1:]
    assert {row[0] for row in read} == {"'=cmd()" if name == "=cmd()" else name for name in NAMES}
    assert {row[2] for row in read} == {"'=1+1", "<i>core</i>"}
    assert float(read[0][1]) == frame["rq"][0]


def test_negative_numbers_are_no_formulas():
    assert csv_text(pd.DataFrame({"=a": [-1.5], "b": ["-x"]})) == "'=a,b\n-1.5,'-x\n"


def test_names_are_text_in_a_model_card(tmp_path):
    """Markdown reads no tag, no link and no cell of a table in a name."""
    sweep = pd.read_parquet(hostile_sweep(tmp_path) / "sweep.parquet")
    sweep["criterion"] = [NAMES[k % len(NAMES)] for k in range(len(sweep))]

    class Groups(tuple):
        opt_in = ()

    groups = Groups(SimpleNamespace(name=name, kind="a|b", n=4) for name in NAMES)
    plan = SimpleNamespace(removed={name: [0] for name in NAMES})
    pruned = SimpleNamespace(model=SimpleNamespace(), groups=groups, plan=plan, summary=lambda: "pruned")
    card = model_card(pruned, False, False, sweep)
    for name in NAMES[:6]:
        assert as_text(name) in card
    assert not re.search(r"(?<!\\)<", card)
    tables = [block.splitlines() for block in card.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for lines in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, "a name ends no cell"
