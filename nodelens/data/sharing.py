"""Work on the same list that the processes of a group share, such as the tokenising of documents."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import TypeVar

from nodelens.statistics.processes import gathered, world

Item = TypeVar("Item")
Found = TypeVar("Found")


def shared(work: Callable[[Item], Found], items: Iterator[Item]) -> Iterator[Found]:
    """What the work makes of each item, in order, in every process. Collective, unless there is one process.

    Of each round of as many items as there are processes, a process does one and gets the others' results, so that no process does
    the work of another. Every process has to read the same items, and as many results. Raises in every process what one raises,
    also while it reads items.
    """
    rank, ranks = world()
    while True:
        some = _tried(lambda: list(islice(items, ranks)))
        read = [] if isinstance(some, Exception) else some
        own = _tried(partial(work, read[rank])) if rank < len(read) else None
        every = gathered(some if isinstance(some, Exception) else own)
        for failed in every:
            if isinstance(failed, Exception):
                raise failed
        if not read:
            return
        yield from every[: len(read)]


def _tried(work: Callable[[], Found]) -> Found | Exception:
    try:
        return work()
    except Exception as error:  # raised by every process, since the others wait for the result
        return error
