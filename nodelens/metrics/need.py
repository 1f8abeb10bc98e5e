"""What a metric needs from a pass over the data: a statistic of the rows at a port."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from nodelens.network.layers import ASSOCIATION
from nodelens.statistics import Statistic

View = Literal["positions", "samples"]
Target = str | Callable[..., Tensor]  # a name in targets.py, or a function of (logits, labels)


class Other(NamedTuple):
    """Rows of another layer as a target: a plan replaces ``input`` and ``next`` by it."""

    layer: str
    port: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.port}"


class Units(NamedTuple):
    """What a random score needs: the name of a layer or group, its number of units, and the seed."""

    layer: str
    units: int
    seed: int


class Need(NamedTuple):
    """A statistic of the rows at a port, in a view, paired with a target.

    port: ``input``, ``output``, ``activated`` (the output behind the activation that follows, or the output where none does),
    ``projection`` (inputs times weights: the output without a bias), ``grad``, ``output*grad``, ``weight*grad``,
    ``change`` (inputs times the change of the weights) or ``next``, the output of the next layer. A suffix
    ``/tokens`` divides gradients by the predicted tokens of the sample. For pruning groups: ``output*grad`` where the units are
    read, summed over places and consumers first; ``made*grad`` where they are produced; ``consumed``, the input of each consumer, a
    list of statistics; ``maps``, the input of the first two-dimensional convolution that reads them; ``load``, 1 where a token
    is routed to an expert; ``association``, a ``Derivative``; ``model``, sums over the whole model, built with ``options``.
    view: ``positions``, ``samples``, or ``whole``: one row per sample for images, per token for language models. A plan replaces
    it by ``tokens`` where there is one target per token: the tokens that have one, also for needs without a target.
    target: a name or function of ``targets.py``, several names joined by +, or another port with paired rows.
    """

    statistic: type[Statistic]
    port: str
    view: str = "positions"
    target: Target | Other | None = None
    options: tuple[Any, ...] = ()  # for sums over the whole model, or the Derivative of an association

    def __str__(self) -> str:
        paired = f" with {getattr(self.target, '__name__', self.target)}" if self.target else ""
        options = "".join(f", {option}" for option in self.options) if self.port.startswith(ASSOCIATION) else ""
        return f"{self.statistic.__name__}({self.port}, {self.view}{paired}{options})"
