"""A loss or a perplexity that is infinite or not a number is a result: it is shown as such, and runs can be shown again."""

import io
import json
import math

import numpy as np
import pandas as pd
import pytest
from command import command
from rich.console import Console

from nodelens.app.tasks.common import format_score, main_score
from nodelens.app.tasks.show_pruning import show_sweep
from nodelens.pruning.sweep.ranking import areas, curves
from nodelens.report import pruning_figures
from nodelens.report.headline import scores
from nodelens.report.pruning_page import means_by_amount
from nodelens.results.files import read_json, write_json
from nodelens.training.finetune import _rank

DIVERGES = ("model.optimizer.lr=1e30", "trainer.max_epochs=3", "dataset.calibration=64", "metrics=[rq]", "logger=csv")


@pytest.mark.filterwarnings("ignore:.* are not finite and were left out")
def test_a_training_that_diverges_ends_and_is_shown_again(quiet_home):
    words = (*DIVERGES, "callbacks=[default,measure,early_stopping]", "hydra.run.dir=run")
    ended = command("train", *words)
    assert ended.code == 0, ended.err
    assert "(loss nan) on 359 samples" in " ".join(ended.out.split())
    assert json.loads((quiet_home / "run/result.json").read_text())["loss"] is None
    (quiet_home / "run/result.json").unlink()  # as if the run had been stopped before its test
    again = command("train", *words)
    assert again.code == 0, again.err
    assert "(loss nan)" in again.out
    assert "already finished" in command("train", *words).out
    more = ("ckpt_path=run/checkpoints/last.ckpt", "dataset.calibration=64", "metrics=[activation_mean]", "logger=none")
    for _ in range(2):
        ended = command("analyze", *more, "hydra.run.dir=after")
        assert ended.code == 0, ended.err
        assert "(loss nan)" in ended.out
    assert "already finished" in ended.out


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_scores_in_words(value):
    shown = "inf" if value == math.inf else "nan"
    about = {"samples": 3, "split": "test"}
    assert format_score({"loss": value, **about}) == f"loss {shown} on 3 samples"
    assert format_score({"accuracy": 0.5, "loss": value, **about}) == f"accuracy 50.00 % (loss {shown}) on 3 samples"
    text = {"accuracy": 0.5, "loss": value, "perplexity": value, "tokens": 7, **about}
    assert format_score(text).startswith(f"perplexity {shown} ({shown} nats per token)")
    on = "3 samples of the split test"
    assert scores({"loss": value, **about}) == {f"loss, {on}": shown}
    assert scores(text) == {f"next-token accuracy, {on}": "50.00 %", f"perplexity, {on}": shown}
    assert main_score({"accuracy": 0.5, "loss": value}) == 0.5
    assert str(main_score({"loss": value})) == {"nan": "nan", "inf": "-inf"}[shown]


def test_files_tell_infinities_from_nan(tmp_path):
    path = tmp_path / "score.json"
    write_json(path, {"a": math.inf, "b": [-math.inf, 1.5], "c": math.nan, "d": "Inf", "e": 3})
    assert json.loads(path.read_text()) == {"a": "Infinity", "b": ["-Infinity", 1.5], "c": None, "d": "Inf", "e": 3}
    assert read_json(path) == {"a": math.inf, "b": [-math.inf, 1.5], "c": None, "d": "Inf", "e": 3}


def sweep(**perplexities):
    """A table of criteria with a perplexity for each amount and seed, or None for an infeasible cell."""
    rows = []
    for criterion, by_amount in perplexities.items():
        for k, seeds in enumerate(by_amount, start=1):
            for seed, value in enumerate(seeds):
                status = "infeasible" if value is None else "done"
                row = {"criterion": criterion, "amount": k / 4, "seed": seed, "status": status, "perplexity": value}
                rows.append(row | {"name": f"{criterion}-{k}", "error": "no room" if value is None else None})
    same = {"allocation": "uniform", "compensate": "none", "mode": "low", "dense_perplexity": 5.0, "units": 8}
    table = pd.DataFrame(rows).assign(**same)
    return table.assign(perplexity=table["perplexity"].astype(float), macs_share=1 - table["amount"], units_removed=2)


def shown(table):
    console = Console(file=io.StringIO(), width=140)
    show_sweep(console, table)
    return console.file.getvalue()


def test_a_criterion_that_diverges_is_the_worst_and_not_infeasible():
    nan, inf = math.nan, math.inf
    table = sweep(late=[[6], [7], [inf]], good=[[6], [7], [8]], once=[[6, 6], [7, nan], [8, 9]], never=[[6], [7], [None]])
    area = areas(table)["area"].droplevel(["allocation", "compensate", "mode"])
    assert list(area.index[-1:]) == ["once"]
    assert area["good"] == area["never"] == pytest.approx((5.5 * 0.25 + 6.5 * 0.25) / 0.5)
    assert math.isnan(area["once"])
    assert area["late"] == area["good"], "up to the share that every curve reaches"
    assert math.isnan(curves(table)["mean"].xs(("once", 0.5), level=("criterion", "amount")).item())
    printed = shown(table)
    assert printed.count("infeasible") == 2, "one cell of the table, and the line with its reason"
    assert {"inf", "nan"} <= set(printed.replace("│", " ").split())
    means = means_by_amount(table).to_numpy()
    assert np.isinf(means).sum() == 1
    assert np.isnan(means).sum() == 3, "a mean of which a seed is not a number, its area, and a cell that is infeasible"


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_makes_the_area_so(at, value):
    values = [[6.0], [7.0], [8.0]]
    values[at] = [value]
    table = sweep(bad=values, good=[[6], [7], [8]])
    assert str(areas(table)["area"].xs("bad").item()) == str(value)
    assert areas(table).index[0][0] == "good"


@pytest.mark.parametrize(
    "table",
    [sweep(a=[[6], [math.inf]], b=[[math.nan], [7]]), sweep(a=[[math.inf], [math.nan]]).assign(dense_perplexity=math.inf)],
    ids=["some", "all"],
)
def test_the_curves_are_drawn_with_a_cross(table):
    figure = pruning_figures.curves(table).figure
    crosses = sum(len(trace.x) for trace in figure.data if trace.marker.symbol == "x")
    assert crosses == (2 if table["dense_perplexity"].iloc[0] == 5 else 3), "the dense model is a point, too"


def test_finetuning_prefers_a_loss_that_is_a_number():
    assert _rank({"loss": 3.0}) > _rank({"loss": math.inf}) >= _rank({"loss": math.nan})
    assert _rank({"accuracy": 0.5, "loss": math.nan}) < _rank({"accuracy": 0.5, "loss": 9.0})
