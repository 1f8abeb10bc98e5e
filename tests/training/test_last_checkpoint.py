"""last.ckpt is written every epoch, within epochs and at signals, and a training continues from it to the bit."""

import os
import signal
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from interrupted import BATCHES, StopHereError, fit
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from nodelens.training.checkpoints import to_resume_from
from nodelens.training.last_checkpoint import LastCheckpoint

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|number of training batches|ended before the epoch|is not empty)")


def keep(folder, **options):
    return LastCheckpoint(str(folder), **options)


def stopped(path):
    """(steps, epochs) that a checkpoint has."""
    found = torch.load(path, weights_only=True)
    return found["global_step"], found["epoch"]


PLATEAU = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="max", patience=0, factor=0.3)


@pytest.mark.parametrize(
    ("often", "options", "steps"),
    [
        ({}, {}, (9,)),
        pytest.param({}, {}, (15, 23), marks=pytest.mark.slow),
        ({"every_n_train_steps": 1}, {}, (8,)),
        pytest.param({"every_n_train_steps": 1}, {}, (2, 9), marks=pytest.mark.slow),
        ({"minutes": 1e-9}, {}, (13,)),
        ({"every_n_train_steps": 1}, {"accumulate_grad_batches": 3}, (2, 5)),
        ({"every_n_train_steps": 1}, {"val_check_interval": 3}, (4, 9)),
        pytest.param({"every_n_train_steps": 1}, {"val_check_interval": 3}, (3, 7, 12), marks=pytest.mark.slow),
        ({}, {"check_val_every_n_epoch": 2}, (9,)),
        pytest.param({}, {"check_val_every_n_epoch": 2}, (17,), marks=pytest.mark.slow),
        pytest.param({}, {"scheduler": PLATEAU}, (9, 17), marks=pytest.mark.slow),
        ({"every_n_train_steps": 1}, {"scheduler": PLATEAU}, (9,)),
        pytest.param({"every_n_train_steps": 1}, {"scheduler": PLATEAU}, (8, 18), marks=pytest.mark.slow),
    ],
    ids=[
        "epochs",
        "epochs, later",
        "steps",
        "steps, others",
        "minutes",
        "accumulated",
        "validated within",
        "validated within, others",
        "validated rarely",
        "validated rarely, later",
        "plateau",
        "plateau, steps",
        "plateau, other steps",
    ],
)
def test_a_training_continues_where_it_was_saved(often, options, steps, tmp_path):
    best = {"monitor": "val/acc", "mode": "max", "filename": "best", "enable_version_counter": False}

    def run(folder, step=None, resume=False):
        more = [ModelCheckpoint(folder, **best)]
        return *fit(folder, step, resume, keep=keep(folder, **often), more=more, **options), more[0].best_model_score

    whole, seen, score = run(tmp_path / "whole")
    for step in steps:
        folder = tmp_path / f"cut{step}"
        assert run(folder, step)[0] is None
        resumed, rest, found = run(folder, resume=True)
        assert torch.equal(resumed, whole), step
        assert rest == seen[-len(rest) :]
        assert found == score
        per_step = options.get("accumulate_grad_batches", 1)
        lost = len(rest) - (len(seen) - per_step * step)
        assert 0 <= lost <= (2 * per_step if often else BATCHES), "one step at most, or two if validation followed; else one epoch"


def test_a_schedule_that_watches_a_metric_is_lost_without_the_catching_up(tmp_path, monkeypatch):
    """What the case "plateau" above can see."""
    monkeypatch.setattr("nodelens.training.resume._watched", lambda _: [])
    whole, _ = fit(tmp_path / "whole", keep=keep(tmp_path / "whole"), scheduler=PLATEAU)
    fit(tmp_path / "cut", 9, keep=keep(tmp_path / "cut"), scheduler=PLATEAU)
    assert not torch.equal(fit(tmp_path / "cut", resume=True, keep=keep(tmp_path / "cut"), scheduler=PLATEAU)[0], whole)


def test_a_training_that_stopped_early_is_not_continued(tmp_path):
    def run(resume=False):
        early = EarlyStopping("val/acc", patience=1, mode="max", min_delta=1.0)
        return fit(tmp_path, resume=resume, keep=keep(tmp_path), more=[early], max_epochs=9)

    weights, seen = run()
    assert len(seen) == 2 * BATCHES
    again, more = run(resume=True)
    assert more == []
    assert torch.equal(again, weights)


@pytest.mark.parametrize(
    ("step", "signum"),
    [(3, signal.SIGTERM), (8, signal.SIGUSR2)]
    + [
        pytest.param(step, signum, marks=pytest.mark.slow)
        for step, signum in product((3, 7, 8), SIGNALS)
        if (step, signum) not in [(3, signal.SIGTERM), (8, signal.SIGUSR2)]
    ],
)
def test_a_signal_saves_the_step_in_progress_and_stops(signum, step, tmp_path):
    handlers = [signal.getsignal(s) for s in SIGNALS]
    whole, seen = fit(tmp_path / "whole", keep=keep(tmp_path / "whole"))
    assert fit(tmp_path, step, keep=keep(tmp_path), signum=signum)[0] is None
    assert stopped(tmp_path / "last.ckpt")[0] == step + 1, "step 8 is the last of an epoch, and saved after it"
    assert [signal.getsignal(s) for s in SIGNALS] == handlers
    resumed, rest = fit(tmp_path, resume=True, keep=keep(tmp_path))
    assert torch.equal(resumed, whole)
    assert len(rest) == len(seen) - step - 1
    assert not (tmp_path / "previous.ckpt").exists()


def test_a_signal_while_gradients_are_accumulated_waits_for_the_step(tmp_path):
    options = {"accumulate_grad_batches": 3}
    whole, _ = fit(tmp_path / "whole", keep=keep(tmp_path / "whole"), **options)
    assert fit(tmp_path, 1, keep=keep(tmp_path), signum=signal.SIGTERM, **options)[0] is None
    assert stopped(tmp_path / "last.ckpt")[0] == 2
    assert torch.equal(fit(tmp_path, resume=True, keep=keep(tmp_path), **options)[0], whole)


def test_the_handler_before_gets_the_signal_after_the_state_was_saved(tmp_path):
    """Submitit requeues the job in its handler, and ends the process."""
    got = []

    def requeue(signum, frame):
        got.append((signum, stopped(tmp_path / "last.ckpt")[0]))
        raise SystemExit

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        fit(tmp_path, 4, keep=keep(tmp_path), signum=signal.SIGUSR2)
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert got == [(signal.SIGUSR2, 5)]


def test_a_kill_at_any_renaming_loses_one_epoch_at_most(tmp_path, monkeypatch):
    """Three renamings for each checkpoint: the finished file, last.ckpt to previous.ckpt, the new one to last.ckpt."""
    whole, seen = fit(tmp_path / "whole", keep=keep(tmp_path / "whole"))
    for at in range(2, 9):
        folder, calls, rename = tmp_path / f"cut{at}", [], Path.replace

        def replace(path, target, at=at, calls=calls, rename=rename):
            calls.append(path)
            if len(calls) == at:
                raise StopHereError
            return rename(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            assert fit(folder, keep=keep(folder))[0] is None
        taken, damaged = to_resume_from(folder)
        assert not damaged
        resumed, rest = fit(folder, resume=taken or False, keep=keep(folder))
        assert torch.equal(resumed, whole)
        trained = BATCHES * (1 if at < 3 else 2 if at < 6 else 3)
        assert 0 <= trained - (len(seen) - len(rest)) <= BATCHES, at


@pytest.fixture
def in_slurm(tmp_path, monkeypatch):
    """The environment of a Slurm job, with a scontrol that notes its arguments."""
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    of_job = {"NTASKS": "1", "JOB_ID": "17", "JOB_NAME": "t", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in of_job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return scontrol


@pytest.mark.parametrize(
    ("signum", "array", "plugin", "asked"),
    [
        (signal.SIGUSR1, False, True, "requeue 17\n"),
        (signal.SIGUSR1, True, True, "requeue 12_3\n"),
        (signal.SIGTERM, False, True, None),
        (signal.SIGUSR1, False, False, None),
    ],
)
def test_slurm_is_asked_to_requeue_the_job_once(signum, array, plugin, asked, tmp_path, in_slurm, monkeypatch):
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    plugins = [] if plugin else [SLURMEnvironment(auto_requeue=False)]
    assert fit(tmp_path, 4, keep=keep(tmp_path), signum=signum, plugins=plugins)[0] is None
    assert stopped(tmp_path / "last.ckpt")[0] == 5
    assert (tmp_path / "asked").read_text() == asked if asked else not (tmp_path / "asked").exists()
    assert not list(tmp_path.glob("hpc_ckpt*")), "Lightning would save the state in the middle of a step"


@pytest.mark.parametrize("missing", [True, False])
def test_a_job_that_cannot_be_requeued_is_a_warning(missing, tmp_path, in_slurm, monkeypatch):
    in_slurm.write_text("#!/bin/sh\necho invalid job >&2\nexit 1\n")
    if missing:
        monkeypatch.setenv("PATH", str(tmp_path))
    said = "No such file" if missing else "invalid job"
    with pytest.warns(UserWarning, match=f"job 17 could not be requeued: .*{said}.*; submit it again to continue"):
        fit(tmp_path, 4, keep=keep(tmp_path), signum=signal.SIGUSR1)


@pytest.mark.parametrize("options", [{"minutes": 0}, {"every_n_train_steps": -1}])
def test_an_interval_is_positive(options, tmp_path):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be positive, or null"):
        keep(tmp_path, **options)


def test_signals_of_another_thread_are_left_alone(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    before = [signal.getsignal(s) for s in SIGNALS]
    with ThreadPoolExecutor(1) as pool:
        _, seen = pool.submit(fit, tmp_path, keep=keep(tmp_path), max_epochs=1).result()
    assert len(seen) == BATCHES
    assert stopped(tmp_path / "last.ckpt") == (BATCHES, 0)
    assert [signal.getsignal(s) for s in SIGNALS] == before
