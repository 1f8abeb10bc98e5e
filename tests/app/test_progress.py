"""What a run shows off a terminal, and what its log file holds."""

import re
import warnings
from importlib import import_module

import pytest
from command import command

from nodelens.app.tasks import progress

SMALL = ("dataset.calibration=64", "dataset.batch_size=32", "hydra.run.dir=run")


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)


def test_without_a_terminal_a_line_per_interval_tells_how_far_it_is(always, quiet_home):
    ended = command("analyze", "metrics=[rq]", *SMALL)
    assert ended.code == 0, ended.err
    assert re.search(r"measuring: 1 of 2 after 0 s \([\d,.]+/s\), about 0 s left", ended.out), ended.out
    assert "evaluating: 1 of 12 after" in ended.out
    assert "\r" not in ended.out + ended.err


def test_training_tells_its_epoch_and_steps(always, quiet_home):
    ended = command("train", "trainer.max_epochs=2", "+trainer.limit_train_batches=3", *SMALL)
    assert ended.code == 0, ended.err
    assert "training, epoch 1, steps: 1 of 6 after" in ended.out
    assert "training, epoch 2, steps: 6 of 6 after" in ended.out


def test_a_short_run_has_no_line(quiet_home):
    assert " after " not in command("analyze", "metrics=[rq]", *SMALL).out


@pytest.mark.parametrize(
    ("seconds", "done", "total", "line"),
    [
        (61, 2, 8, "sweep: 2 of 8 after 61 s (2.0/min), about 3 min left"),
        (61, 2, None, "sweep: 2 after 61 s (2.0/min)"),
        (61, 2, float("inf"), "sweep: 2 after 61 s (2.0/min)"),
        (9000, 1500, 3000, "sweep: 1,500 of 3,000 after 2.5 h (10.0/min), about 2.5 h left"),
        (59, 2, 8, ""),
        (61, 0, 8, ""),
    ],
)
def test_a_line_says_what_is_done_and_left(seconds, done, total, line, monkeypatch, capsys):
    clock = iter([0.0, float(seconds)])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock, float(seconds)))
    progress.Pace("sweep").tell(done, total)
    assert capsys.readouterr().out.strip() == line


def test_the_log_of_a_run_holds_plan_steps_warnings_and_times(quiet_home, monkeypatch):
    task = import_module("nodelens.app.tasks.analyze")
    measure = task.measure

    def warned(*args, **named):
        warnings.warn("look here", UserWarning, stacklevel=1)
        return measure(*args, **named)

    monkeypatch.setattr(task, "measure", warned)
    with pytest.warns(UserWarning, match="look here"):
        ended = command("analyze", "metrics=[rq]", *SMALL)
    assert ended.code == 0, ended.err
    log = (quiet_home / "run/analyze.log").read_text()
    for part in ("plan of the", "[INFO] measuring ...", "[WARNING] UserWarning: look here", "[INFO] page: "):
        assert part in log, log
    assert re.search(r"\[INFO\] measuring: \d+\.\d s\n", log)
    (found,) = re.findall(r"from the command to the first batch: (.*) s \((.*) s\)\n", log)
    phases = dict(each.rsplit(" ", 1) for each in found[1].split(" s, "))
    assert [*phases] == ["settings and imports", "data and model", "plan", "first batch"]
    assert abs(float(found[0]) - sum(map(float, phases.values()))) < 0.26, "the phases are the whole, up to rounding"
