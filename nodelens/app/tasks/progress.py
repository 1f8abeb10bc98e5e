"""What a run shows on its way: a bar on a terminal, elsewhere a line per minute; its log file holds all lines, steps and times."""

import io
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nodelens.statistics.processes import world

EVERY = 60.0  # seconds between two lines of progress
_WIDTH = 140  # columns, where there is no terminal
_LOG = logging.getLogger("nodelens")


class _LoggedConsole(Console):
    """A console whose lines also go to the log of the run, without colours."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints as ``Console.print`` does."""
        super().print(*objects, **options)
        if _LOG.isEnabledFor(logging.INFO):
            text = io.StringIO()
            Console(file=text, width=_WIDTH, highlight=False, markup=False, emoji=False).print(*objects, **options)
            for line in filter(str.strip, text.getvalue().splitlines()):
                _LOG.info(line.rstrip())


def console() -> Console:
    """The console, as wide as the terminal, or 140 columns for output to a file. Names such as x[bold] are printed as they are."""
    return _LoggedConsole(
        width=None if sys.stdout.isatty() else _WIDTH, highlight=False, soft_wrap=False, markup=False, emoji=False
    )


def print_line(line: str) -> None:
    """Prints one line without markup."""
    console().print(line, markup=False)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Writes the start of a step to the log of the run, and how long it took."""
    first, start = world()[0] == 0, time.perf_counter()
    if first:
        _LOG.info("%s ...", what)
    yield
    if first:
        _LOG.info("%s: %.1f s", what, time.perf_counter() - start)


def progress_bar(what: str, total: int | None, show: bool) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Wraps an iterable in a progress bar on a terminal; elsewhere it prints a line per minute."""

    def wrap(items: Iterable[Any]) -> Iterable[Any]:
        count = len(items) if isinstance(items, Sized) else total
        if not show:
            yield from items
        elif sys.stderr.isatty():
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                yield from progress.track(items, total=count, description=what)
        else:
            pace = Pace(what)
            for done, item in enumerate(items):
                pace.tell(done, count)
                yield item

    return wrap


class Pace:
    """Prints a line of progress when a minute has passed since the last one."""

    def __init__(self, what: str):
        self.what, self.start = what, time.monotonic()
        self.last = self.start

    def tell(self, done: int, total: float | None) -> None:
        """done: how many of ``total`` are finished; None or infinite: the total is unknown."""
        now = time.monotonic()
        if done == 0 or now - self.last < EVERY:
            return
        self.last, passed = now, now - self.start
        known = total is not None and total < float("inf")
        left = f", about {_duration(passed / done * max(0, total - done))} left" if known else ""  # type: ignore[operator]
        print_line(f"{self.what}: {done:,}{f' of {int(total):,}' if known else ''} after {_duration(passed)}{left}")  # type: ignore[arg-type]


class ProgressLines(Callback):
    """Prints a line per minute while Lightning trains, with the step and the epoch."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.pace, self.before = Pace("training"), trainer.global_step
        self.total = trainer.estimated_stepping_batches

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            self.pace.what = f"training, epoch {trainer.current_epoch + 1}, steps"
            self.pace.tell(trainer.global_step - self.before, self.total - self.before)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 120 else f"{seconds / 3600:.1f} h"
