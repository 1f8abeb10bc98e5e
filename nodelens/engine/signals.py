"""Signals that end a process: they are noted, and obeyed when what has to be saved is saved."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT")  # those that the system has; SIGUSR2 is submitit's


class StoppedError(KeyboardInterrupt):
    """The process was told to stop, and has saved its work. Like Ctrl-C, it is no error that a caller repairs."""


class Signals:
    """The signals that arrived and were not obeyed yet."""

    def __init__(self) -> None:
        self.arrived: list[int] = []
        self.former: dict[int, Any] = {}

    def note(self, number: int, frame: FrameType | None) -> None:
        """Notes a signal. A second Ctrl-C stops at once."""
        if number == signal.SIGINT and number in self.arrived:
            raise KeyboardInterrupt
        self.arrived.append(number)

    def obey(self, line: str) -> None:
        """Does what the signals that arrived would have done: calls their former handlers, or raises StoppedError with a line."""
        while self.arrived:
            number = self.arrived.pop(0)
            former = self.former.get(number)
            if not callable(former) or former is signal.default_int_handler:
                raise StoppedError(f"stopped by {signal.Signals(number).name}: {line}")
            former(number, None)  # such as submitit's, which requeues the job, or ignores the signal


@contextmanager
def noted() -> Iterator[Signals]:
    """Notes signals as long as the block lasts, in the main thread. Ignored signals stay ignored, as under nohup."""
    signals = Signals()
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    main = threading.current_thread() is threading.main_thread()
    for number in numbers if main else ():
        if _ends(number):
            signals.former[number] = signal.signal(number, signals.note)
    try:
        yield signals
    finally:
        for number, former in signals.former.items():
            signal.signal(number, former)


def _ends(number: int) -> bool:
    """Whether a signal has a handler of this process, or ends it."""
    former: Callable | int | None = signal.getsignal(number)
    own = number == getattr(signal, "SIGUSR2", None)
    return callable(former) or (former == signal.SIG_DFL and not own)
