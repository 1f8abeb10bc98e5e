"""Runs a telling subset of the tests in the environments of ordinary users, and prints a table of counts.

``python tests/environments.py`` runs all environments, ``python tests/environments.py srun locale`` some of them.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/app/test_environment.py",
    "tests/app/test_wandb.py::test_an_offline_run_holds_the_curves_and_the_table",
    "tests/app/test_tasks.py::test_a_training_leaves_its_checkpoints_curves_and_epochs",
    "tests/app/test_tasks.py::test_what_was_trained_is_analysed",
    "tests/app/test_tasks.py::test_a_config_of_ones_own_joins_the_group",
    "tests/report/test_report.py",
    "tests/training/test_finetune.py",
    "tests/training/test_checkpoints.py",
)
ABSENT = """
import importlib.metadata as packages, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

NAMES, of = {names!r}, packages.Distribution.from_name.__func__

def from_name(cls, name):
    if name in NAMES:
        raise packages.PackageNotFoundError(name)
    return of(cls, name)

packages.Distribution.from_name = classmethod(from_name)
sys.meta_path.insert(0, Absent())
"""
Change = Callable[[Path], dict[str, str]]  # what an environment adds to the variables, given a folder of its own


def program(folder: Path, name: str) -> str:
    """A PATH on which a program is found that fails when it is called."""
    (folder / name).write_text("#!/bin/sh\nexit 1\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def without_compiler(folder: Path) -> dict[str, str]:
    """A PATH with links to all programs but compilers."""
    compiler = re.compile(r"(\w+-)*(cc|gcc|g\+\+|c\+\+|clang|clang\+\+|cpp|tcc|nvcc)(-\d+)?$")
    for place in map(Path, os.environ["PATH"].split(":")):
        for path in place.glob("*"):
            if not compiler.match(path.name) and not (folder / path.name).is_symlink():
                (folder / path.name).symlink_to(path)
    return {"PATH": str(folder), "CC": "", "CXX": ""}


def without(*names: str) -> Change:
    """Packages that are not installed: pytest imports the plugin ``absent`` first."""

    def change(folder: Path) -> dict[str, str]:
        (folder / "absent.py").write_text(ABSENT.format(names=names))
        return {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}", "PYTEST_ADDOPTS": "-p absent"}

    return change


LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ENVIRONMENTS: dict[str, tuple[str, Change]] = {
    "plain": ("nothing is changed", lambda folder: {}),
    "srun": ("srun is on the PATH, as on the login node of a cluster", lambda folder: {"PATH": program(folder, "srun")}),
    "slurm": (
        "within an allocation of four tasks",
        lambda folder: {"PATH": program(folder, "srun"), "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job"},
    ),
    "wandb": (
        "logged in to W&B, and online",
        lambda folder: {"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online", "WANDB_PROJECT": "other", "WANDB_RUN_ID": "abc"},
    ),
    "tensorboard": ("without tensorboard", without("tensorboard")),
    "submitit": ("without submitit and its launcher", without("submitit", "hydra_plugins")),
    "locale": ("LC_ALL=C, and no UTF-8 mode", lambda folder: LOCALE),
    "one-core": ("one core, one thread", lambda folder: {"OMP_NUM_THREADS": "1", "CORES": "1"}),
    "threads": ("eight threads, however many cores", lambda folder: {"OMP_NUM_THREADS": "8", "MKL_NUM_THREADS": "8"}),
    "compiler": ("no C compiler", without_compiler),
    "terminal": ("a narrow terminal with colours", lambda folder: {"COLUMNS": "60", "FORCE_COLOR": "1", "TERM": "xterm-256color"}),
    "tmpdir": ("TMPDIR on another file system", lambda folder: {"TMPDIR": tempfile.mkdtemp(dir="/dev/shm")}),
}


def run(name: str) -> dict[str, int]:
    """The counts of pytest in one environment: passed, failed, errors, skipped; and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        changed = ENVIRONMENTS[name][1](Path(folder))
        cores = int(changed.pop("CORES", 0))
        env = {"OMP_NUM_THREADS": "1"} | os.environ | changed
        pin = (lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])) if cores else None
        words = [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-m",
            "not slow",
            "-p",
            "no:cacheprovider",
            "--durations=0",
            *TESTS,
        ]
        started = time.perf_counter()
        ended = subprocess.run(
            words, cwd=ROOT, env=env, capture_output=True, text=True, errors="replace", check=False, preexec_fn=pin
        )
        if (changed.get("TMPDIR") or "").startswith("/dev/shm/"):
            shutil.rmtree(changed["TMPDIR"])
    lines = ended.stdout.splitlines()
    for line in [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-5:] * (ended.returncode > 0):
        print(f"  {name}: {line}", flush=True)
    last = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error|skipped).* in [\d.]+s", line)), "")
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", last)}
    return counts | {"seconds": round(time.perf_counter() - started)}


def main(names: list[str]) -> int:
    """Prints one line for each environment; returns 1 if a test failed in one."""
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        sys.exit(f"no environment is called {unknown[0]!r}; there are {', '.join(ENVIRONMENTS)}")
    found = {name: run(name) for name in names or ENVIRONMENTS}
    columns = ("passed", "failed", "error", "skipped", "seconds")
    print(f"{'environment':<12}" + "".join(f"{column:>9}" for column in columns) + "  what is changed")
    for name, counts in found.items():
        print(f"{name:<12}" + "".join(f"{counts.get(column, 0):>9}" for column in columns) + f"  {ENVIRONMENTS[name][0]}")
    return int(any(counts.get("failed") or counts.get("error") or not counts.get("passed") for counts in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
