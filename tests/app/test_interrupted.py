"""Runs that are stopped, and runs that meet another one in their folder."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pandas as pd
import pytest
from command import command
from pandas.testing import assert_frame_equal

import nodelens as nl

ANALYZE = ("metrics=[rq,redundancy]", "dataset.calibration=200", "dataset.batch_size=20", "logger=none")
PRUNE = ("criterion=[taylor,magnitude]", "amounts=[0.25]", "dataset.calibration=200", "dataset.batch_size=20", "latency.batches=[]")
PRUNE = (*PRUNE, "logger=none")


@pytest.fixture
def signal_after(monkeypatch):
    """Sends a signal to this process when a model has run on some batches."""

    def install(number, batches):
        from nodelens.engine.driver import Driver

        forward, calls = Driver._forward, []

        def counted(self, *args):
            calls.append(1)
            if len(calls) == batches:
                os.kill(os.getpid(), number)
            return forward(self, *args)

        monkeypatch.setattr(Driver, "_forward", counted)

    return install


@pytest.mark.parametrize("name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGUSR1", "SIGHUP"))])
def test_an_analysis_that_gets_a_signal_saves_its_sums_and_continues(name, quiet_home, signal_after):
    assert command("analyze", *ANALYZE, "hydra.run.dir=whole").code == 0
    signal_after(getattr(signal, name), 4)
    ended = command("analyze", *ANALYZE, "hydra.run.dir=run")
    assert ended.code == 1
    (line,) = ended.err.strip().splitlines()
    assert f"stopped by {name}: the sums of 4 batches of this reading of the data are saved in" in line
    assert line.endswith(f"the same command with hydra.run.dir={quiet_home / 'run'} continues the run")
    assert (quiet_home / "run/sums").is_dir()
    assert command("analyze", *ANALYZE, "save_minutes=1", "hydra.run.dir=run").code == 0, "how often it saves is no other run"
    assert not (quiet_home / "run/sums").exists()
    one, two = nl.load("run"), nl.load("whole")
    assert_frame_equal(one.units, two.units, check_exact=True)
    assert one.metadata["evaluation"] == two.metadata["evaluation"]


def test_a_scoring_that_gets_a_signal_saves_its_sums_and_continues(quiet_home, signal_after):
    assert command("prune", *PRUNE, "hydra.run.dir=whole").code == 0
    signal_after(signal.SIGTERM, 4)
    ended = command("prune", *PRUNE, "hydra.run.dir=run")
    assert "stopped by SIGTERM: the sums of 4 batches" in ended.err
    assert command("prune", *PRUNE, "hydra.run.dir=run").code == 0
    assert not (quiet_home / "run/sums").exists()
    assert_frame_equal(nl.load("run").units, nl.load("whole").units, check_exact=True)
    tables = [pd.read_parquet(f"{run}/sweep.parquet")[["name", "plan", "accuracy", "loss"]] for run in ("run", "whole")]
    assert_frame_equal(*tables, check_exact=True)


def test_a_stopped_pass_continues_with_the_same_weights_only(quiet_home, signal_after):
    signal_after(signal.SIGTERM, 4)
    command("analyze", *ANALYZE, "hydra.run.dir=run")
    ended = command("analyze", *ANALYZE, "seed=3", "hydra.run.dir=run")
    assert "run holds a run with" in ended.err
    assert (quiet_home / "run/sums").is_dir()


@pytest.mark.slow
def test_several_processes_stop_and_continue_together(quiet_home):
    words = (*ANALYZE, "trainer=ddp", "dataset.calibration=2000")
    assert command("analyze", *words, "hydra.run.dir=whole").code == 0
    slow = (
        "import os, signal, sys, threading, time; from nodelens.app import cli; from nodelens.engine.driver import Driver\n"
        "forward, home = Driver._forward, os.getpid()\n"
        "def slow(self, *args):\n"
        "    time.sleep(0.02)\n"
        "    if os.getpid() != home and not os.path.exists('sent'):\n"
        "        open('sent', 'w').close(); os.kill(home, signal.SIGTERM)\n"
        "    return forward(self, *args)\n"
        "Driver._forward = slow\n"
        "sys.argv[0] = 'analyze.py'; cli.main('analyze')\n"
    )
    ended = subprocess.run([sys.executable, "-c", slow, *words, "hydra.run.dir=run"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, ended.stderr
    assert "stopped by SIGTERM, as were its 2 processes; the same command" in ended.stderr.strip().splitlines()[-1]
    assert len(list((quiet_home / "run/sums").rglob("*.pt"))) == 2
    assert command("analyze", *words, "hydra.run.dir=run").code == 0
    assert_frame_equal(nl.load("run").units, nl.load("whole").units, check_exact=True)


def _hold(folder, told):
    from nodelens.app.tasks.run_lock import locked

    with locked(folder):
        told.send("held")
        time.sleep(60)


@pytest.fixture
def held(tmp_path):
    """A folder in which another process runs, and that process."""
    context = multiprocessing.get_context("fork")  # a new interpreter would import for seconds
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(tmp_path / "run", theirs))
    process.start()
    assert ours.recv() == "held"
    yield tmp_path / "run", process
    process.kill()
    process.join()


def test_two_runs_do_not_share_a_folder(held, quiet_home):
    folder, process = held
    before = sorted(p.name for p in folder.iterdir())
    for words in (ANALYZE, (*ANALYZE, "seed=1")):
        ended = command("analyze", *words, f"hydra.run.dir={folder}")
        assert ended.code == 1
        (line,) = ended.err.strip().splitlines()
        assert f"{folder} is in use by process {process.pid} on {socket.gethostname()}, since 20" in line
        assert line.endswith("wait until that run ends, stop it, or choose another folder (hydra.run.dir=)")
    assert sorted(p.name for p in folder.iterdir()) == before
    cfg = nl.load_config("analyze", [*ANALYZE, f"paths.output_dir={folder}"])
    with pytest.raises(ValueError, match="is in use by process"):
        nl.run(cfg)


def test_the_lock_of_a_dead_process_is_taken_over(held, quiet_home):
    folder, process = held
    process.kill()
    process.join()
    part = folder / f".units.parquet.{process.pid}@{socket.gethostname()}.part"
    part.touch()
    assert (folder / ".lock.json").is_file()
    assert command("analyze", *ANALYZE, f"hydra.run.dir={folder}").code == 0
    assert not (folder / ".lock.json").exists()
    assert not part.exists(), "and so are its temporary files"


def test_other_processes_of_the_same_run_do_not_lock(held, monkeypatch):
    from nodelens.app.tasks.run_lock import locked

    folder, _ = held
    monkeypatch.setenv("RANK", "1")
    with locked(folder):
        pass
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="is in use by"), locked(folder):
        pass


def test_a_file_system_without_locks_stays_usable(tmp_path, monkeypatch):
    from nodelens.app.tasks.run_lock import locked

    def none(self, *args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr("filelock.FileLock.acquire", none)
    with locked(tmp_path):
        assert not (tmp_path / ".lock.json").exists()


def test_names_with_brackets_are_printed_as_they_are(capsys):
    from rich.table import Table

    from nodelens.app.tasks.progress import console, print_line

    names = ["blocks[0].mlp", "x[bold]", "[/red]", "[link=a]b", ":smile:"]
    table = Table(title="of [bold] names")
    table.add_column("layer [red]")
    for name in names:
        table.add_row(name)
        console().print(f"missing at {name}")
        print_line(name)
    console().print(table)
    out = capsys.readouterr().out
    for name in ("of [bold] names", "layer [red]", *names):
        assert name in out
    assert all(out.count(name) == 3 for name in names)
