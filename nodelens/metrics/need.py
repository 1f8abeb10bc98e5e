"""What a metric asks a pass for: a statistic of the rows at a port."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from nodelens.statistics import Statistic

View = Literal["positions", "samples"]
Target = str | Callable[..., Tensor]  # a name of targets.py, or a function of (logits, labels)


class Other(NamedTuple):
    """Rows of another site, as a target: a plan puts them in the place of ``input`` and ``next``."""

    layer: str
    port: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.port}"


class Units(NamedTuple):
    """What a score that is drawn needs to know: the name of a layer or group, its units, and the seed."""

    layer: str
    units: int
    seed: int


class Need(NamedTuple):
    """A statistic of the rows at a port, in a view, with the target that stands beside them.

    port: ``input``, ``output``, ``projection`` (what the weights make of the inputs: the output, but for a bias), ``grad``,
    ``output*grad``, ``weight*grad``, ``change`` (what the weights' change would put out) or ``next``, the next layer's output;
    ``/tokens`` behind a gradient divides it by the sample's predicted tokens. Of pruning groups: ``output*grad`` where the units
    are read, added over places and readers before anything is made of it; ``made*grad`` where they are made; ``consumed``, what
    each reader reads, a list of statistics; ``maps`` of the first two-dimensional convolution that reads them; ``load``, 1 where
    a token goes to a whole expert; ``model``: sums over the whole model, made with ``options``.
    view: ``positions``, ``samples``, or ``whole``: samples for images, a token a row for language models. A plan makes
    ``tokens`` of it where the target is one a token: the tokens that have it, also for what stands alone.
    target: a name or function of ``targets.py``, several names joined by +, or another port, whose rows stand beside.
    """

    statistic: type[Statistic]
    port: str
    view: str = "positions"
    target: Target | Other | None = None
    options: tuple[Any, ...] = ()  # of sums over the whole model

    def __str__(self) -> str:
        beside = f" with {getattr(self.target, '__name__', self.target)}" if self.target else ""
        return f"{self.statistic.__name__}({self.port}, {self.view}{beside})"
