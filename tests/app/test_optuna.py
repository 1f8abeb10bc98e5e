"""Optuna through Hydra's sweeper: pruning options against accuracy and MACs."""

import pandas as pd
import pytest
import yaml
from command import command

from nodelens.pruning.sweep.ranking import best_cell, score_of

ROWS = {"status": ["done", "done", "infeasible"], "amount": [0.5, 0.5, 0.5], "name": ["a", "b", "c"], "accuracy": [0.8, 0.9, None]}
ROWS |= {"val_accuracy": [0.7, 0.6, None], "macs_share": [0.4, 0.5, None], "params_share": [0.4, 0.5, None]}


def test_the_score_is_the_best_cells_on_validation_data():
    table = pd.DataFrame(ROWS)
    assert best_cell(table)["name"] == "a"
    assert score_of(table, ["val_accuracy", "macs_share"]) == (0.7, 0.4)
    assert score_of(table, "accuracy") == 0.8
    assert best_cell(table[2:]) is None
    assert all(value != value for value in score_of(table[2:], ["val_accuracy"]))
    with pytest.raises(ValueError, match="score is 'colour'; it is area, or columns of the sweep: amount, accuracy, val_accuracy"):
        score_of(table, ["val_accuracy", "colour"])


def test_an_amount_that_is_no_number_is_named(quiet_home):
    ended = command("prune", "amounts=[0.5,half]", "hydra.run.dir=run")
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith("nodelens: amounts has 'half'; an amount is a share to remove, a number from 0")


@pytest.mark.filterwarnings("ignore")  # of optuna 2, which the sweeper needs
def test_a_search_for_accuracy_and_few_macs_finds_a_front(quiet_home):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = (
        "-m",
        "hydra/sweeper=optuna_pruning",
        "hydra.sweeper.n_trials=3",
        "score=[val_accuracy,macs_share]",
        "latency.batches=[]",
    )
    words += ("dataset.calibration=64", "logger=none", "save=none", "hydra.sweep.dir=search")
    ended = command("prune", *words)
    assert ended.code == 0, ended.err
    found = yaml.safe_load((quiet_home / "search/optimization_results.yaml").read_text())
    assert found["name"] == "optuna"
    for solution in found["solutions"]:
        accuracy, macs = solution["values"]
        assert 0 <= accuracy <= 1
        assert 0 < macs < 1
        assert set(solution["params"]) == {"criterion", "allocation", "compensate", "amounts"}
    tables = [pd.read_parquet(path) for path in (quiet_home / "search").glob("*/sweep.parquet")]
    assert len(tables) == 3
    front = {tuple(solution["values"]) for solution in found["solutions"]}
    assert front <= {(float(t["val_accuracy"].iloc[0]), float(t["macs_share"].iloc[0])) for t in tables}
