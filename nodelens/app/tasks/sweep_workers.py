"""Cells of a sweep in several processes, each of which opens the model and the data for itself."""

import copy
import io
import multiprocessing
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nodelens.messages import config_words
from nodelens.pruning.sweep.sweep import Cell, Sweep
from nodelens.results.files import write_json
from nodelens.results.result import load

from .common import to_device
from .progress import be_quiet, progress_bar
from .run_folder import open_inputs
from .sweep_evaluator import SweepEvaluator
from .sweep_setup import context_of, requested_cells, sweep_of

_MISTAKES = (ValueError, OSError, MemoryError)  # errors that end a run with one line


@dataclass(eq=False)
class Worker:
    """A process that runs one cell at a time. cell: the one that it runs now."""

    process: BaseProcess
    line: Connection
    cell: str | None = None

    def give(self, cell: str | None) -> None:
        self.cell = cell
        with suppress(BrokenPipeError):  # it ended, which its next answer says
            self.line.send(cell)

    def answer(self) -> None:
        """Waits until the cell is finished. Raises ValueError or RuntimeError, with its name, if it failed."""
        try:
            error = self.line.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise ValueError(
                f"the process that ran cell {self.cell} ended with exit code {self.process.exitcode}, as it does when memory is "
                "short: the same command, with fewer sweep.workers=, runs the cells that are left"
            ) from None
        if error is not None:
            mistake, text = error
            raise (ValueError if mistake else RuntimeError)(f"cell {self.cell}: {text}")


def check_workers(cfg: DictConfig, processes: int = 1) -> None:
    """Raises ValueError for a number of workers below 1, and for workers beside several processes of the trainer."""
    workers = cfg.sweep.workers
    if workers < 1:
        raise ValueError(f"sweep.workers is {workers}; it is a number of processes, 1 or more")
    if workers > 1 and processes > 1:
        raise ValueError(
            f"sweep.workers={workers}, and the trainer has {processes} processes, which share each cell: "
            "give sweep.workers=1, or a trainer of one process, such as trainer=cpu"
        )


def run_in_workers(cfg: DictConfig, sweep: Sweep, requested: Sequence[Cell], device: torch.device) -> None:
    """Runs the cells that no file has, one of each outcome, in ``cfg.sweep.workers`` processes; each writes its own file.

    Scores have to be in the folder. Raises the first error of a cell, with its name; other cells that run then are given up. The
    processes end with this one.
    """
    names = [cell.name for cell in sweep.pending(requested)]
    if not names:
        return
    with _workers(cfg, sweep.folder, device, min(cfg.sweep.workers, len(names))) as workers:
        for _ in progress_bar("sweep", len(names), True)(_finished(workers, names)):
            pass


def add_latency(sweep: Sweep, requested: Sequence[Cell], evaluator: SweepEvaluator) -> None:
    """Measures the latency of finished cells without one, which workers leave out because they would disturb each other."""
    for cell in requested if evaluator.batches else ():
        if not sweep.path(cell).is_file():
            continue
        row = sweep.finished([cell])[cell.name]
        if row["status"] == "done" and not any(name.startswith("latency_") for name in row["result"]):
            row["result"] |= evaluator.latency_of(sweep.without(row["removed"]), row["removed"])
            write_json(sweep.path(cell), row)


def _finished(workers: Sequence[Worker], names: Sequence[str]) -> Iterator[str]:
    """The names of cells in the order in which they end."""
    left = iter(names)
    for worker in workers:
        worker.give(next(left))
    running = {worker.line: worker for worker in workers}
    while running:
        for line in wait(list(running)):
            worker = running[line]  # type: ignore[index]
            worker.answer()
            yield str(worker.cell)
            worker.give(next(left, None))
            if worker.cell is None:
                del running[worker.line]


@contextmanager
def _workers(cfg: DictConfig, folder: Path, device: torch.device, count: int) -> Iterator[list[Worker]]:
    """Processes, started anew and not forked, that end with the block."""
    start, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // count)
    cfg, workers = _own(cfg), list[Worker]()
    try:
        for k in range(count):
            here, there = start.Pipe()
            place = f"cuda:{k % torch.cuda.device_count()}" if device.type == "cuda" else str(device)
            process = start.Process(target=_work, args=(there, cfg, folder, place, threads))
            process.start()
            there.close()  # so that the end of the process is the end of the line
            workers.append(Worker(process, here))
        yield workers
    finally:
        for worker in workers:
            worker.line.close()
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _own(cfg: DictConfig) -> DictConfig:
    """The config for a worker: without references to this process, and without latency, see ``add_latency``."""
    own = copy.deepcopy(cfg)
    with open_dict(own):
        OmegaConf.resolve(own)
        own.latency.batches = []
    return own


def _work(line: Connection, cfg: DictConfig, folder: Path, device: str, threads: int) -> None:
    """Runs the cells whose names arrive; sends None for each, or (whether it is a user's mistake, the text of an error)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    torch.set_num_threads(threads)
    sweep: Sweep | None = None
    cells: dict[str, Cell] = {}
    while (name := _next(line)) is not None:
        try:
            with config_words():
                if sweep is None:
                    cells = {cell.name: cell for cell in requested_cells(cfg)}
                    sweep = _opened(cfg, folder, torch.device(device))
                sweep.run_cell(cells[name])
            line.send(None)
        except _MISTAKES as error:
            line.send((True, str(error)))
        except Exception:
            line.send((False, traceback.format_exc()))


def _next(line: Connection) -> str | None:
    """The name of the next cell; None when there is none, or nobody who asks for it."""
    try:
        return line.recv()
    except (EOFError, ConnectionError):
        return None


def _opened(cfg: DictConfig, folder: Path, device: torch.device) -> Sweep:
    """The sweep, from the files of the run folder; what is printed on the way has been printed by the first process."""
    be_quiet(True)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        data, module, _ = open_inputs(cfg, folder)
        context = context_of(cfg, to_device(module.net, device).eval(), data)
        return sweep_of(cfg, folder, context, data, load(folder), SweepEvaluator(cfg, context, data))
