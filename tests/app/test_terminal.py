"""What stands on a terminal: tables of 80 columns, names as text, and nothing with --quiet."""

import io
import re
import sys

import pandas as pd
import pytest
import torch
from command import command

import nodelens as nl
from nodelens.app import cli
from nodelens.app.tasks import progress
from nodelens.app.tasks.progress import _LoggedConsole, as_printed
from nodelens.app.tasks.show import show_plan, show_result
from nodelens.app.tasks.show_pruning import show_groups, show_sweep
from nodelens.network.objective import Objective
from nodelens.pruning.context import PruningContext

HOSTILE = ("<script>alert(1)</script>", "=cmd('x')", "é漢", 'a "quoted" [bold]name[/bold]', "esc\x1b[2J\x1b[31m", "bidi\u202egnp")
SMALL = ("metrics=[rq]", "dataset.calibration=64", "hydra.run.dir=run")


@pytest.fixture
def narrow():
    """A terminal of 80 columns."""
    return _LoggedConsole(file=io.StringIO(), width=80, force_terminal=True, color_system=None)


def lines_of(console):
    return console.file.getvalue().splitlines()


def sweep():
    rows = [
        {
            "criterion": f"a_criterion_of_a_long_name_{c}",
            "allocation": a,
            "compensate": k,
            "mode": "low",
            "amount": n / 10,
            "seed": s,
        }
        for c in range(2)
        for a in ("uniform", "global")
        for k in ("none", "batch_norm")
        for n in range(1, 9)
        for s in range(2)
    ]
    table = pd.DataFrame(rows)
    table = table.assign(accuracy=0.9 - 0.01 * table["seed"], macs_share=1 - table["amount"], units_removed=2, units=8)
    return table.assign(status="done", error=None, name="cell", dense_accuracy=0.95)


def test_tables_fit_80_columns_and_keep_every_number(narrow):
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    metrics = ["magnitude", "rq", "activation_mean", "activation_variance", "activation_kurtosis"]
    found = nl.analyze(net, [torch.randn(9, 4)], metrics, task="none", on_plan=lambda plan: show_plan(narrow, plan))
    found.metadata |= {"evaluation": None}
    show_result(narrow, found)
    show_groups(narrow, PruningContext.of(net, Objective.of(net, task="none").batch(torch.ones(2, 4))))
    show_sweep(narrow, sweep())
    assert max(map(len, lines_of(narrow))) <= 80
    text = narrow.file.getvalue()
    assert text.count("0.8950 (0.0071)") == 8 * 8, "8 curves of 8 amounts"
    for metric in ("activation_variance", "activation_kurtosis"):
        assert metric in text


def test_hostile_names_are_text(narrow):
    net = torch.nn.Sequential()
    for name in HOSTILE:
        net.add_module(name, torch.nn.Linear(3, 3))
    found = nl.analyze(net, [torch.randn(8, 3)], ["magnitude"], task="none")
    found.metadata |= {"evaluation": None}
    wide = _LoggedConsole(file=io.StringIO(), width=140, force_terminal=True, color_system=None)
    show_result(wide, found)
    text = wide.file.getvalue()
    for name in HOSTILE:
        assert as_printed(name) in text
    assert "\x1b[2J" not in text
    assert "\u202e" not in text
    assert "esc\\x1b[2J" in text


def test_off_a_terminal_tables_are_plain_lines(quiet_home):
    ended = command("analyze", *SMALL)
    assert ended.code == 0, ended.err
    assert not set(ended.out) & set("┏━┃│─└\x1b")
    assert re.search(r"^ *fc1 +64 ", ended.out, re.MULTILINE), ended.out


@pytest.mark.parametrize("task", [pytest.param("train", marks=pytest.mark.slow), "analyze", "prune"])
def test_quiet_runs_say_warnings_only(task, quiet_home):
    own = {"train": ("trainer.max_epochs=1",), "prune": ("criterion=l1", "amounts=[0.5]", "latency.batches=[]")}.get(task, ())
    ended = command(task, "--quiet", *(word for word in SMALL if task != "prune" or "metrics" not in word), *own)
    assert ended.code == 0, ended.err
    assert ended.out == ""
    expected = [] if task == "train" else ["warning: the weights of MLP are random; pass ckpt_path=... to measure a trained model"]
    assert ended.err.splitlines() == expected
    assert "[INFO]" in (quiet_home / f"run/{task}.log").read_text()
    assert command("analyze", *SMALL[:2], "hydra.run.dir=loud").out, "the next run is as usual"


def test_errors_of_a_quiet_run_are_said(quiet_home):
    ended = command("analyze", "--quiet", "metrics=[rqq]")
    assert ended.code == 1
    assert "no option 'rqq'" in ended.err


@pytest.mark.parametrize("words", [["--quiet", "analyze"], ["analyze", "--quiet"]])
def test_the_console_script_takes_quiet_before_and_after_the_task(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nodelens", *words, "seed=1"])
    seen = []
    monkeypatch.setattr(cli, "main", lambda task: seen.append((task, sys.argv[1:])))
    cli.script()
    assert seen == [("analyze", ["--quiet", "seed=1"])]


def test_a_bar_shows_rate_and_time_left(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    columns = []
    monkeypatch.setattr(progress, "Progress", lambda *given, **options: columns.extend(given) or Bar())
    assert list(progress.progress_bar("measuring", 3, True)([1, 2, 3])) == [1, 2, 3]
    assert [type(column).__name__ for column in columns][-2:] == ["_Rate", "TimeRemainingColumn"]
    assert [progress._rate(rate) for rate in (0, 0.5, 1234.56)] == ["", "30.0/min", "1,234.6/s"]


class Bar:
    """A progress that shows nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def track(self, items, **_):
        return items
