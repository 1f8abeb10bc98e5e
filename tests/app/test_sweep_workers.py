"""Cells of a sweep in several processes."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from command import command, snapshot
from pandas.testing import assert_frame_equal

import nodelens as nl
from nodelens.app.tasks import sweep_workers
from nodelens.app.tasks.progress import be_quiet
from nodelens.app.tasks.sweep_workers import Worker, check_workers
from nodelens.results.files import read_json

ROOT = Path(__file__).parents[2]
SWEEP = ("criterion=[rq,random]", "amounts=[0,0.5,0.999]", "seeds=[0,1]", "dataset.calibration=64", "logger=none")
SWEEP = (*SWEEP, "latency.repeats=3", "+model.net.hidden=[8,1]")


def timeless(folder):
    """The table without durations."""
    table = pd.read_parquet(folder / "sweep.parquet")
    assert (table["latency_batch1_ms"] > 0)[table["status"] == "done"].all(), "also of cells that a worker ran"
    return table[[c for c in table if "latency" not in c and not c.endswith("_s") and c != "seconds"]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert command("prune", *SWEEP, f"hydra.run.dir={folder}").code == 0
    return folder


@pytest.mark.slow
def test_two_workers_fill_the_table_that_one_fills(alone, tmp_path):
    ended = command("prune", *SWEEP, "sweep.workers=2", f"hydra.run.dir={tmp_path}/run")
    assert ended.code == 0, ended.err
    assert not ended.err.strip(), "nothing is said twice"
    assert_frame_equal(timeless(tmp_path / "run"), timeless(alone))
    assert "already finished" in command("prune", *SWEEP, f"hydra.run.dir={tmp_path}/run").out, "workers are no setting of a result"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGKILL, -9)])
def test_a_sweep_that_is_stopped_ends_its_workers_and_continues(number, code, alone, tmp_path):
    words = [sys.executable, str(ROOT / "prune.py"), *SWEEP, "sweep.workers=2", f"hydra.run.dir={tmp_path}/run"]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'nodelens.app.tasks.sweep_workers':\n"
        "            sys.meta_path.remove(self)\n"
        "            import nodelens.pruning.sweep.sweep as s; once = s.Sweep.run_cell\n"
        "            s.Sweep.run_cell = lambda *a: (once(*a), time.sleep(1))[0]\n"
        "sys.meta_path.insert(0, Slow())\n"
    )
    started = subprocess.Popen(words, env=env, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (done := list(tmp_path.glob("run/cells/[!.]*.json"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = _children(started.pid)
    assert done
    assert len(workers) >= 2
    started.send_signal(number)
    error = started.communicate(timeout=60)[1]
    assert started.returncode == code
    if number == signal.SIGINT:
        assert error.strip().splitlines()[-1].endswith(f"the same command with hydra.run.dir={tmp_path / 'run'} continues the run")
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    before = snapshot(tmp_path / "run/cells")
    ended = command("prune", *SWEEP, f"hydra.run.dir={tmp_path}/run")
    assert ended.code == 0, ended.err
    assert len(before) < len(snapshot(tmp_path / "run/cells"))
    assert_frame_equal(timeless(tmp_path / "run").drop(columns="carried_out_as"), timeless(alone).drop(columns="carried_out_as"))


@pytest.mark.slow
def test_an_error_names_its_cell(quiet_home, monkeypatch):
    Path("broken.py").write_text("def loss(z, y):\n    raise OSError('no loss today')\n")
    monkeypatch.syspath_prepend(str(quiet_home))
    monkeypatch.setattr(sweep_workers, "_own", _with_a_loss(sweep_workers._own))
    ended = command("prune", *SWEEP, "sweep.workers=2", "hydra.run.dir=run")
    assert ended.code == 1
    (line,) = ended.err.strip().splitlines()
    assert line.startswith("nodelens: cell rq-uniform-none-low-0") or line.startswith("nodelens: cell random-uniform-none-low-0")
    assert line.endswith("no loss today")


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_with_its_cell_and_a_way_out(quiet_home, monkeypatch):
    Path("deadly.py").write_text("import os\ndef loss(z, y):\n    os._exit(9)\n")
    monkeypatch.syspath_prepend(str(quiet_home))
    monkeypatch.setattr(sweep_workers, "_own", _with_a_loss(sweep_workers._own, "deadly.loss"))
    ended = command("prune", *SWEEP, "sweep.workers=2", "hydra.run.dir=run")
    assert "nodelens: the process that ran cell r" in ended.err
    assert "ended with exit code 9, as it does when memory is short: the same command, with fewer sweep.workers=" in ended.err


def test_a_worker_writes_the_row_of_each_cell_that_it_is_sent(alone, tmp_path, monkeypatch):
    folder = shutil.copytree(alone, tmp_path / "run")
    name, wrong = "rq-uniform-none-low-0.5-0", "rq-uniform-none-low-0.5-7"
    before = read_json(folder / f"cells/{name}.json")
    (folder / f"cells/{name}.json").unlink()
    monkeypatch.setattr(sweep_workers.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sweep_workers.torch, "set_num_threads", lambda _: None)
    here, there = multiprocessing.Pipe()
    for each in (name, wrong, None):
        here.send(each)
    cfg = nl.load_config("prune", [*SWEEP, f"paths.output_dir={folder}"])
    try:
        sweep_workers._work(there, sweep_workers._own(cfg), folder, "cpu", 1)
    finally:
        be_quiet(False)
    assert here.recv() is None
    mistake, text = here.recv()
    assert not mistake
    assert f"KeyError: '{wrong}'" in text
    after = read_json(folder / f"cells/{name}.json")
    assert [row.pop("seconds") > 0 and row.pop("clock").keys() for row in (before, after)]
    assert {k: v for k, v in before["result"].items() if "latency" not in k} == after["result"], "the first process adds latency"
    assert before | {"result": None} == after | {"result": None}


@pytest.mark.parametrize(
    ("answer", "kind", "error"),
    [
        ((True, "no space"), ValueError, "cell a: no space"),
        ((False, "KeyError: 'b'"), RuntimeError, "cell a: KeyError: 'b'"),
        (None, ValueError, "the process that ran cell a ended with exit code 9, as it does when memory is short: the same command"),
    ],
)
def test_an_answer_that_is_an_error_names_the_cell(answer, kind, error):
    here, there = multiprocessing.Pipe()
    worker = Worker(SimpleNamespace(exitcode=9, join=lambda: None), here, "a")
    if answer:
        there.send(answer)
    there.close()
    with pytest.raises(kind, match=error):
        worker.answer()


@pytest.mark.parametrize(
    ("workers", "processes", "error"),
    [
        (0, 1, "sweep.workers is 0; it is a number of processes, 1 or more"),
        (2, 4, "sweep.workers=2, and the trainer has 4 processes"),
    ],
)
def test_workers_that_cannot_be_had_are_refused(workers, processes, error):
    with pytest.raises(ValueError, match=error):
        check_workers(nl.load_config("prune", [f"sweep.workers={workers}"]), processes)


def test_workers_beside_the_processes_of_a_trainer_are_refused(quiet_home):
    ended = command("prune", *SWEEP, "sweep.workers=2", "trainer=ddp", "trainer.accelerator=cpu", "hydra.run.dir=run")
    assert ended.code == 1
    assert "sweep.workers=2, and the trainer has 2 processes, which share each cell: give sweep.workers=1" in ended.err


def _children(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        if int(text.rpartition(")")[2].split()[1]) == pid:
            found.append(int(path.parent.name))
    return found


def _with_a_loss(own, name="broken.loss"):
    """Workers whose evaluation fails, where the first process succeeds."""

    def changed(cfg):
        found = own(cfg)
        found.objective.loss = name
        return found

    return changed
