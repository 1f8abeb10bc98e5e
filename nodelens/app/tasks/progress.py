"""What a run shows on its way: a bar on a terminal, elsewhere a line per minute; its log file holds all lines, steps and times.

With ``--quiet`` only warnings and errors are shown, on standard error; the log file is the same.
"""

import io
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from threading import Event
from typing import Any

from lightning.pytorch import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from nodelens.statistics.processes import world

EVERY = 60.0  # seconds between two lines of progress
_WIDTH = 140  # columns, where there is no terminal
_LOG = logging.getLogger("nodelens")
_quiet = Event()


class _PlainConsole(Console):
    """A console on which every text is shown as it is: no markup, and control characters as escapes."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, soft_wrap=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Renders a text without its control characters, which could move the cursor or reverse the order of letters."""
        return super().render_str(as_printed(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints as ``Console.print`` does; tables have lines on a terminal only."""
        for table in objects:
            if isinstance(table, Table) and not self.is_terminal:
                table.box = None
        super().print(*objects, **options)


class _LoggedConsole(_PlainConsole):
    """A console whose lines also go to the log of the run, without colours."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints as ``Console.print`` does; when quiet, warnings only, on standard error."""
        if not _quiet.is_set():
            super().print(*objects, **options)
        elif objects and str(objects[0]).startswith("warning"):
            _PlainConsole(stderr=True, width=self.width).print(*objects, **options)
        if _LOG.isEnabledFor(logging.INFO):
            text = io.StringIO()
            _PlainConsole(file=text, width=_WIDTH).print(*objects, **options)
            for line in filter(str.strip, text.getvalue().splitlines()):
                _LOG.info(line.rstrip())


def as_printed(text: str) -> str:
    r"""A text with escapes in place of characters that are not printable.

    >>> print(as_printed("layer" + chr(27) + "[2J"))
    layer\x1b[2J
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def be_quiet(quiet: bool) -> None:
    """Whether runs of this process show warnings and errors only."""
    (_quiet.set if quiet else _quiet.clear)()


def is_quiet() -> bool:
    """Whether ``be_quiet`` was asked for."""
    return _quiet.is_set()


def console() -> Console:
    """The console, as wide as the terminal, or 140 columns for output to a file. Names such as x[bold] are printed as they are."""
    return _LoggedConsole(width=None if sys.stdout.isatty() else _WIDTH)


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
        if not show or _quiet.is_set():
            yield from items
        elif sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                yield from progress.track(items, total=count, description=what)
        else:
            pace = Pace(what)
            for done, item in enumerate(items):
                pace.tell(done, count)
                yield item

    return wrap


class _Rate(ProgressColumn):
    """How many items are done per second, or per minute where they are slow."""

    def render(self, task: Task) -> Text:
        return Text(_rate(task.speed or 0.0), style="progress.data.speed")


def _rate(per_second: float) -> str:
    if per_second <= 0:
        return ""
    return f"{per_second:,.1f}/s" if per_second >= 1 else f"{60 * per_second:.1f}/min"


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
        rate = f" ({_rate(done / passed)})" if passed > 0 else ""
        print_line(f"{self.what}: {done:,}{f' of {int(total):,}' if known else ''} after {_duration(passed)}{rate}{left}")  # type: ignore[arg-type]


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
