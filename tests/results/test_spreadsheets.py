import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from nodelens.results.spreadsheets import with_formulas, without_formulas


@pytest.mark.parametrize(
    "name", ["=cmd('x')", "+1", "-2", "@SUM(A1)", "\t=1", "<script>", "é漢", 'a "quoted" [name]', "fc1", "'plain"]
)
def test_a_name_is_text_in_a_csv_file_and_the_same_when_read(name, tmp_path):
    table = pd.DataFrame({"layer": [name, "fc2"], "value": [-1.5, 2.0]})
    without_formulas(table).to_csv(tmp_path / "t.csv", index=False)
    raw = pd.read_csv(tmp_path / "t.csv")
    assert not raw["layer"].str.startswith(("=", "+", "-", "@", "\t")).any()
    assert raw["value"].tolist() == [-1.5, 2.0]
    assert_frame_equal(with_formulas(raw), table, check_dtype=False)
