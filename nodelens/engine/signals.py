"""Signals that end a process: what has to be saved is saved first, and one line says so."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT")  # SIGUSR2 where it has a handler, such as submitit's


class StoppedError(KeyboardInterrupt):
    """The process was told to stop. Like Ctrl-C, it is no error that a caller repairs."""


class Signals:
    """The signals that arrived and were not obeyed yet."""

    def __init__(self) -> None:
        self.arrived: list[int] = []
        self.former: dict[int, Any] = {}

    def note(self, number: int, frame: FrameType | None) -> None:
        """Notes a signal. A second Ctrl-C stops at once, but for a child process, whose parent sends another one when it ends."""
        if number == signal.SIGINT and number in self.arrived and multiprocessing.parent_process() is None:
            raise KeyboardInterrupt
        self.arrived.append(number)

    def obey(self, line: str) -> None:
        """Does what the signals that arrived would have done: calls their former handlers, or raises StoppedError with a line."""
        while self.arrived:
            number = self.arrived.pop(0)
            former = self.former.get(number)
            if not callable(former) or former in (signal.default_int_handler, stop):
                raise StoppedError(f"stopped by {signal.Signals(number).name}: {line}")
            former(number, None)  # such as submitit's, which requeues the job, or ignores the signal


@contextmanager
def noted() -> Iterator[Signals]:
    """Notes signals as long as the block lasts, in the main thread. Ignored signals stay ignored, as under nohup.

    Those that nobody obeyed inside arrive again after it, for those who handled signals before, such as a training.
    """
    signals = Signals()
    try:
        with _handled(signals.note, lambda former: callable(former) or former == signal.SIG_DFL) as signals.former:
            yield signals
    except StoppedError:
        signals.arrived.clear()  # the process ends by the first one
        raise
    finally:
        for number in dict.fromkeys(signals.arrived):
            signal.raise_signal(number)


@contextmanager
def stopping() -> Iterator[None]:
    """Raises StoppedError for a signal that would end the process without a word."""
    with _handled(stop, lambda former: former in (signal.SIG_DFL, pass_on)):
        yield


@contextmanager
def passing_on() -> Iterator[None]:
    """For a process that waits for its children: passes signals on to them, and raises StoppedError when they have ended."""
    with _handled(pass_on, lambda former: former == signal.SIG_DFL):
        yield


def stop(number: int, frame: FrameType | None) -> None:
    """A handler: raises StoppedError."""
    raise StoppedError(f"stopped by {signal.Signals(number).name}")


def pass_on(number: int, frame: FrameType | None) -> None:
    """A handler: passes the signal on to the child processes, waits for them, and raises StoppedError."""
    children = multiprocessing.active_children()
    for child in children:
        if child.pid is not None:
            os.kill(child.pid, number)
    for child in children:
        child.join()
    raise StoppedError(f"stopped by {signal.Signals(number).name}, as were its {len(children)} processes")


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], replaces: Callable[[Any], bool]) -> Iterator[dict[int, Any]]:
    """Installs a handler where ``replaces`` accepts the former one; yields the former ones, which return after the block."""
    former: dict[int, Any] = {}
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    main = threading.current_thread() is threading.main_thread()
    for number in numbers if main else ():
        found = signal.getsignal(number)
        unset = found == signal.SIG_DFL and number == getattr(signal, "SIGUSR2", None)
        if found is not None and replaces(found) and not unset:
            former[number] = signal.signal(number, handler)
    try:
        yield former
    finally:
        for number, each in former.items():
            signal.signal(number, each)
