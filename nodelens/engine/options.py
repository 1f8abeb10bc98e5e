"""The options of ``nl.analyze``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from nodelens.messages import as_seed, check_folder, check_names, kind_of, with_new_names
from nodelens.network.loss_scale import Loss
from nodelens.network.outputs import Output

from .covariance import LIMIT
from .layout import Reduce


@dataclass(frozen=True)
class AnalyzeOptions:
    """How units are measured. Each field is also a keyword of ``nl.analyze``.

    seed:       seed of everything drawn: rows, permutations, and groups of samples without ids
    groups:     number of groups of samples, for the jackknife
    positions:  how many positions of each image pair statistics read. None: all
    precision:  of products, float32 or float64; float64 rows stay float64
    kernels:    what forms sums, histograms and products of rows: torch, compiled (loops for the CPU, which the C compiler compiles
                once and which stay on disk) or auto (compiled where a CPU reads 256 MB of rows or more)
    pairs:      layer pairs that edge metrics compare: consecutive, all, or a list of name pairs
    bias:       whether to add a column ``<metric>_bias``, the jackknife's estimate; nothing is subtracted
    task:       what the model predicts: classification, multilabel, regression, token_classification, masked_lm, causal_lm, seq2seq
                or none. None: told by the model's class and the labels
    output:     which part of the model's output holds its predictions: a name, an index or a function. None: the only one
    loss:       function of (predictions, labels) that sums over the batch. A mean over samples or labels is multiplied by their
                number, and a loss that is neither is used as it is, both with a warning. None: that of the task
    reduce:     combines the values of a pruning group's unit at several places: sum, mean, max, prod, first
    covariance: for layers of more than ``width`` units of which a metric needs products: diagonal, sample:<count> or
                sketch:<count>, as in ``nodelens.engine.covariance``. None: an error that lists the choices
    budget:     bytes that the sums may take, such as 8GB; None: no limit
    max_passes: how often the data may be read, for a part of the layers each time, so that the sums fit
    save_to:    folder for the sums of an unfinished pass. The same call with the same folder continues the pass, and its result is
                the same to the bit. Delete the folder when the result is saved. None: an unfinished pass starts again
    save_minutes: how often the sums are saved. They are also saved before SIGTERM, SIGUSR1, SIGHUP or Ctrl-C ends the process

    Raises ValueError for an unknown ``reduce``, fewer than one group, a negative seed or negative ``save_minutes``.
    """

    seed: int = 0
    groups: int = 8
    positions: int | None = None
    precision: str = "float32"
    kernels: str = "auto"
    pairs: str | Sequence[Sequence[str]] = "consecutive"
    bias: bool = False
    task: str | None = None
    output: Output = None
    loss: Loss | None = None
    reduce: Reduce = "sum"
    covariance: str | None = None
    width: int = LIMIT
    budget: float | str | None = "8GB"
    max_passes: int = 1
    save_to: str | Path | None = None
    save_minutes: float = 10.0

    def __post_init__(self) -> None:
        if not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(f"groups is {self.groups!r}; it must be 1 or more: groups of samples, for the jackknife")
        if self.positions is not None and (not isinstance(self.positions, int) or self.positions < 1):
            raise ValueError(f"positions is {self.positions!r}; it must be 1 or more, or None for all positions of an image")
        object.__setattr__(self, "seed", as_seed(self.seed))
        if self.save_to is not None:
            check_folder("save_to", self.save_to)
        if self.reduce not in get_args(Reduce):
            raise ValueError(f"reduce is {self.reduce!r}; it is {', '.join(get_args(Reduce))}")
        if not isinstance(self.bias, bool):
            raise TypeError(f"bias is {self.bias!r}; it is True or False")
        if not isinstance(self.pairs, (str, Sequence)):
            raise TypeError(f"pairs is {kind_of(self.pairs)}; it is consecutive, all, or a list of pairs of layer names")
        if not self.save_minutes >= 0:
            raise ValueError(f"save_minutes is {self.save_minutes}; it is 0 (after every batch) or more")

    def with_named(self, named: Mapping[str, Any], call: str, own: Sequence[str] = ()) -> "AnalyzeOptions":
        """A copy with some options replaced; deprecated names work too. own: further keywords of the call, for the error message.

        Raises TypeError for an unknown name, and suggests the nearest one.
        """
        named = with_new_names(call, named)
        check_names(call, named, [*(field.name for field in fields(self)), *own])
        return replace(self, **named)


def check_kind(call: str, options: Any, kind: type) -> None:
    """Raises TypeError for an options object of another kind."""
    if options is not None and not isinstance(options, kind):
        raise TypeError(
            f"{call} takes options of the class {kind.__name__}, not {type(options).__name__}; give a dict as **options"
        )
