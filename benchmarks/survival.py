"""What survives: runs that are killed at every single write, full disks, signals at every batch, damaged files. Prints counts.

    python benchmarks/survival.py                         # everything, about 10 minutes on two idle cores
    python benchmarks/survival.py --rounds 3              # three places per kind, spread evenly
    python benchmarks/survival.py --only disks signals    # some kinds
    python benchmarks/survival.py --tasks analyze

Each trial is a process of its own, forked from this one, which has imported everything before. A run that was stopped is started
again and has to end with the numbers of an undisturbed run, to the bit. Each kind prints its count when it is done; a table of
all kinds follows at the end.
"""

import argparse
import contextlib
import errno
import io
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import nodelens as nl
from nodelens.app import cli
from nodelens.engine.driver import Driver
from nodelens.results import files

RUNS = {
    "analyze": ("metrics=[rq,redundancy,linear_cka]", "dataset.calibration=100", "dataset.batch_size=20", "logger=none"),
    "prune": (
        *("criterion=[taylor,random]", "amounts=[0.25,0.5]", "dataset.calibration=100", "dataset.batch_size=20"),
        *("latency.batches=[]", "logger=none"),
    ),
}
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGHUP")
SECTIONS = ("kills", "disks", "signals", "damages")
BATCHES = 5  # of the pass of a run
KILLED, REFUSED = -signal.SIGKILL, 1


class Survival:
    """Counts of trials by kind: how many there were, and those that did not end as they have to.

    rounds: how many places of a kind are tried, spread evenly; None for all.
    """

    def __init__(self, home: Path, rounds: int | None = None):
        self.home, self.rounds = home, rounds
        self.counts: dict[str, int] = {}
        self.failures: list[str] = []

    def check(self, kind: str, what: str, right: bool, said: str = "") -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if not right:
            self.failures.append(f"{kind}: {what}{': ' if said else ''}{said.strip()[-300:]}")

    def survived(self, kind: str) -> str:
        count = self.counts.get(kind, 0)
        return f"{count - sum(line.startswith(f'{kind}: ') for line in self.failures)} of {count}"

    def places(self, number: int) -> list[int]:
        """Places numbered from 1: all, or ``rounds`` of them, the first and the last among them."""
        rounds = min(number, self.rounds or number)
        return sorted({1 + round(k * (number - 1) / max(1, rounds - 1)) for k in range(rounds)})

    @contextlib.contextmanager
    def kind(self, kind: str) -> Iterator[str]:
        """Prints the count of a kind of trial, its time and its failures as soon as it is done."""
        start = time.monotonic()
        yield kind
        print(f"{kind:32} {self.survived(kind):>10} {time.monotonic() - start:6.0f} s", flush=True)
        for line in self.failures:
            if line.startswith(f"{kind}: "):
                print(f"    {line}", flush=True)

    def kills(self, task: str, whole: dict[str, pd.DataFrame], finished: Path) -> None:
        """A kill before, within and after every write; the next start ends equal."""
        writes = self.writes(task)
        for when in ("before", "within", "after"):
            with self.kind(f"{task}: kill {when} a write") as kind:
                for place in self.places(writes):
                    folder = self.fresh()
                    code, _ = started(task, folder, lambda when=when, place=place: at_write(place, when, kill))
                    right = code == KILLED and all_readable(folder)
                    code, said = started(task, folder)
                    self.check(kind, f"write {place}", right and code == 0 and equal(folder, whole), said)

    def disks(self, task: str, whole: dict[str, pd.DataFrame], finished: Path) -> None:
        """A full disk at every write: one line that names a file, nothing lost, and the next start ends equal."""
        with self.kind(f"{task}: full disk") as kind:
            for place in self.places(self.writes(task)):
                folder = self.fresh()
                code, said = started(task, folder, lambda place=place: at_write(place, "within", full_disk))
                right = code == REFUSED and "No space left on device" in said and str(folder) in said and all_readable(folder)
                code, again = started(task, folder)
                self.check(kind, f"write {place}", right and code == 0 and equal(folder, whole), said + again)

    def signals(self, task: str, whole: dict[str, pd.DataFrame], finished: Path) -> None:
        """A signal at every batch of the pass: the sums are saved, a line says how to continue, the next start ends equal."""
        for name in SIGNALS:
            with self.kind(f"{task}: {name} in the pass") as kind:
                for place in self.places(BATCHES):
                    folder = self.fresh()
                    code, said = started(task, folder, lambda name=name, place=place: at_batch(place, getattr(signal, name)))
                    right = code == REFUSED and f"stopped by {name}" in said and "continues the run" in said
                    code, again = started(task, folder)
                    self.check(kind, f"batch {place}", right and code == 0 and equal(folder, whole), said + again)

    def damages(self, task: str, whole: dict[str, pd.DataFrame], finished: Path) -> None:
        """A bit flipped, or the end cut off, in every file that a load or a second start reads: an error that names the file."""
        read = sorted(read_again(task, finished))
        for how, change in (("flipped", flipped), ("cut off", cut)):
            with self.kind(f"{task}: file {how}") as kind:
                for file in (read[place - 1] for place in self.places(len(read))):
                    folder = self.fresh()
                    shutil.copytree(finished, folder)
                    (folder / file).write_bytes(change((folder / file).read_bytes()))
                    if task == "prune" and file.parts[0] in ("cells", "dense.json"):
                        (folder / "sweep.parquet").unlink()  # as if the run had been stopped before its end
                    code, said = started(task, folder)
                    self.check(kind, str(file), code == REFUSED and file.name in said, f"exit code {code}: {said}")

    def writes(self, task: str) -> int:
        """How many files a run writes, one after another."""
        folder, seen = self.fresh(), self.home / "writes"
        started(task, folder, lambda: at_write(0, "before", lambda path: None, count=seen))
        return int(seen.read_text(encoding="utf-8"))

    def fresh(self) -> Path:
        folder = self.home / "run"
        shutil.rmtree(folder, ignore_errors=True)
        return folder


def started(task: str, folder: Path, disturb: Callable[[], object] = lambda: None) -> tuple[int, str]:
    """Runs a task in a forked process. Returns its exit code, negative for a signal, and what it printed to stderr."""
    said = folder.with_name("said")
    child = os.fork()
    if not child:
        code = 70
        try:
            _quiet(said)
            torch.set_num_threads(1)  # threads of the parent are not there
            disturb()
            sys.argv = [f"{task}.py", *RUNS[task], f"hydra.run.dir={folder}"]
            code = 0
            cli.main(task)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            print(end.code, file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, said.read_text(encoding="utf-8")


def imported(task: str, folder: Path) -> None:
    """Runs a task in this process, so that forked ones have every import and cache. Raises RuntimeError if it fails."""
    sys.argv = [f"{task}.py", *RUNS[task], f"hydra.run.dir={folder}"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cli.main(task)
    except SystemExit as end:
        raise RuntimeError(f"{task} fails even undisturbed: {end.code}") from end


def at_write(place: int, when: str, disturb: Callable[[Path], object], count: Path | None = None) -> None:
    """Disturbs the process at one of its writes, numbered from 1."""
    write, number = files.write, [0]

    def disturbed(path: Path, fill: Callable[[Path], Any]) -> None:
        number[0] += 1
        if count is not None:
            count.write_text(str(number[0]), encoding="utf-8")
        here = number[0] == place
        if here and when == "before":
            disturb(path)

        def filled(temporary: Path) -> None:
            fill(temporary)
            if here and when == "within":
                os.truncate(temporary, temporary.stat().st_size // 2)
                disturb(path)

        write(path, filled)
        if here and when == "after":
            disturb(path)

    for module in list(sys.modules.values()):
        if getattr(module, "write", None) is write:
            module.write = disturbed  # type: ignore[attr-defined]


def at_batch(place: int, number: int) -> None:
    """Sends this process a signal at one of its batches, numbered from 1."""
    forward, calls = Driver._forward, [0]

    def counted(self: Driver, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == place:
            os.kill(os.getpid(), number)
        return forward(self, *args)

    Driver._forward = counted  # type: ignore[method-assign]


def kill(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def flipped(content: bytes) -> bytes:
    """The content with one bit of its middle byte changed."""
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def all_readable(folder: Path) -> bool:
    """Whether every file that has its final name is the one that was written."""
    for file in folder.rglob("*"):
        if file.is_file() and not file.name.endswith(".part"):
            files.checked(file)
    return True


def read_again(task: str, folder: Path) -> list[Path]:
    """The files that a finished run, started again, or a sweep that goes on, reads."""
    names = {
        "analyze": ["settings.json", "identity.json", "metadata.json", "*.parquet", "*.safetensors"],
        "prune": ["settings.json", "identity.json", "metadata.json", "sweep.parquet", "dense.json", "cells/*.json"],
    }
    return [file.relative_to(folder) for name in names[task] for file in folder.glob(name)]


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The numbers of a run, without times."""
    result = nl.load(folder)
    found = {"units": result.units, "layers": result.layers, "edges": result.edges}
    if (folder / "sweep.parquet").is_file():
        sweep = pd.read_parquet(folder / "sweep.parquet")
        found["sweep"] = sweep[[c for c in sweep if not c.endswith("_s") and c != "seconds"]]
    return found


def equal(folder: Path, whole: dict[str, pd.DataFrame]) -> bool:
    """Whether a run has the numbers of another one, to the bit, and left no temporary files."""
    found = tables(folder)
    same = found.keys() == whole.keys() and all(table.equals(whole[name]) for name, table in found.items())
    return same and not list(folder.rglob("*.part")) and not (folder / "sums").exists()


def _quiet(said: Path) -> None:
    """Sends stdout nowhere and stderr to a file."""
    for number, target in ((1, os.devnull), (2, said)):
        file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False, encoding="utf-8") for number in (1, 2))  # pytest has its own


def survive(
    home: Path, rounds: int | None = None, tasks: tuple[str, ...] = tuple(RUNS), sections: tuple[str, ...] = SECTIONS
) -> Survival:
    """The trials in a folder, with ``rounds`` places of each kind at most."""
    found = Survival(home, rounds)
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, and the forked runs would ignore it, too
    for task in tasks:
        finished = home / f"whole_{task}"
        imported(task, finished)
        whole = tables(finished)
        for section in sections:
            getattr(found, section)(task, whole, finished)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="places tried per kind, spread evenly; all without it")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="kinds of trials")
    parser.add_argument("--tasks", nargs="+", choices=tuple(RUNS), default=tuple(RUNS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        found = survive(Path(home), options.rounds, tuple(options.tasks), tuple(options.only))
    print("\n| trial | survived |\n|---|---|")
    for kind in found.counts:
        print(f"| {kind} | {found.survived(kind)} |")
    print(f"| all | {sum(found.counts.values()) - len(found.failures)} of {sum(found.counts.values())} |")
    sys.exit(bool(found.failures))


if __name__ == "__main__":
    main()
