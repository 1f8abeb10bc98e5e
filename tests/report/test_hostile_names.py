"""Names of layers, tokens, paths and labels are text everywhere: on the page and in CSV."""

import csv
import io
import re

import pandas as pd
from hostile import NAMES, hostile_result

from nodelens.report import write_page
from nodelens.results.spreadsheets import csv_text


def test_no_name_becomes_a_tag_of_the_page(tmp_path):
    page = write_page(hostile_result().save(tmp_path / "run")).read_text()
    outside = re.sub(
        r"<script( type='application/json' id='data-[\w-]+'| src='plotly.min.js')?>.*?</script>", "", page, flags=re.DOTALL
    )
    assert "alert(" in outside, "the names are there, as text"
    assert "<script" not in outside
    assert "<img" not in outside
    assert "<b>bold" not in page
    assert not any("\u2028" in script for script in re.findall(r"<script.*?</script>", page, re.DOTALL)), (
        "ends a line of JavaScript"
    )


def test_formulas_are_words_in_csv():
    frame = hostile_result().units.reset_index()[["layer", "rq", "unit_type"]].astype({"unit_type": "category"})
    read = list(csv.reader(io.StringIO(csv_text(frame))))[1:]
    assert {row[0] for row in read} == {"'=cmd()" if name == "=cmd()" else name for name in NAMES}
    assert {row[2] for row in read} == {"'=1+1", "<i>core</i>"}
    assert float(read[0][1]) == frame["rq"][0]


def test_negative_numbers_are_no_formulas():
    assert csv_text(pd.DataFrame({"=a": [-1.5], "b": ["-x"]})) == "'=a,b\n-1.5,'-x\n"
