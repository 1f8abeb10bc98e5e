"""Cells of a sweep that are damaged, or have no result, are refused by name."""

import pytest

from nodelens.app.tasks.prune import _cached_json
from nodelens.pruning.sweep.sweep import _finished
from nodelens.results.files import write_json

DONE = {"status": "done", "cell": "a", "outcome_key": "k", "result": {}, "removed": {}, "about": {}, "finetuned": {}, "clock": {}}


@pytest.mark.parametrize(
    ("row", "lacks"),
    [
        ([], "status"),
        ({}, "status"),
        ({**DONE, "status": "running"}, "status"),
        ({k: v for k, v in DONE.items() if k != "result"}, "result"),
        ({**DONE, "result": None}, "result"),
        ({k: v for k, v in DONE.items() if k != "outcome_key"}, "outcome_key"),
        ({"status": "infeasible", "cell": "a", "outcome_key": ""}, "error"),
    ],
)
def test_a_cell_without_its_result_is_refused_by_name(row, lacks, tmp_path):
    write_json(tmp_path / "one.json", row)
    with pytest.raises(ValueError, match=rf"one\.json is no finished cell of a sweep, it has no {lacks}: delete it, and the sweep"):
        _finished(tmp_path / "one.json")


def test_a_damaged_cell_is_refused_by_name(tmp_path):
    write_json(tmp_path / "one.json", DONE)
    assert _finished(tmp_path / "one.json") == DONE
    (tmp_path / "one.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"one\.json is damaged"):
        _finished(tmp_path / "one.json")
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"one\.json is not valid JSON"):
        _finished(tmp_path / "one.json")


def test_scores_of_the_dense_model_that_are_none_are_refused(tmp_path):
    write_json(tmp_path / "dense.json", [1])
    with pytest.raises(ValueError, match=r"dense\.json holds no scores of the dense model: delete it"):
        _cached_json(tmp_path / "dense.json", dict)
