"""Published pruning criteria, scored on the units of groups; high means keep."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import pandas as pd
import torch
from torch import nn

from nodelens.network.groups import PruningGroup
from nodelens.network.targets import summed_loss

from . import gates, gradients, load, maps, reads, scar, training, weights
from .base import Baseline, Found
from .passes import Loss, Progress, collect

BASELINES: tuple[type[Baseline], ...] = (
    *weights.BASELINES,
    *reads.BASELINES,
    *maps.BASELINES,
    *gates.BASELINES,
    *load.BASELINES,
    *gradients.BASELINES,
    *training.BASELINES,
    *scar.BASELINES,
)
_BY_NAME: dict[str, tuple[type[Baseline], Mapping[str, Any]]] = {
    name: (kind, kind.presets.get(name, {})) for kind in BASELINES for name in (*kind.names, *kind.presets)
}


def names() -> list[str]:
    """Every name that ``baseline`` takes."""
    return sorted(_BY_NAME)


def baseline(name: str, **options: Any) -> Baseline:
    """The criterion of a name, with options.

    >>> baseline("magnitude", p=2) == baseline("l2")
    True

    Raises ValueError for an unknown name or option, with the nearest one.
    """
    if name not in _BY_NAME:
        raise ValueError(f"no baseline is called {name!r}{_nearest(name, _BY_NAME)}; there are {', '.join(names())}")
    kind, preset = _BY_NAME[name]
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}{_nearest(option, known)}; it takes {', '.join(known) or 'none'}")
    return kind(**{**preset, **options})


@torch.inference_mode(False)
def baseline_scores(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    chosen: Mapping[str, Baseline],
    data: Iterable[Any] | None = None,
    seed: int = 0,
    loss: Loss = summed_loss,
    progress: Progress = iter,
) -> pd.DataFrame:
    """A row a unit, index (group, unit), a column a chosen criterion: float64, high means keep.

    data: batches as ``nl.analyze`` takes them, read once (``movement`` with several epochs reads them again); under a process
    group each process gives its own share. loss: of (logits, labels), summed over the batch. The model is looked at in eval mode
    and is afterwards as it was. Raises ValueError where data are missing or empty, or a criterion cannot see the units of a group.
    """
    for name, criterion in chosen.items():
        criterion.check(name, groups, data)
    needs = [need for criterion in chosen.values() for need in criterion.sums()]
    found = Found(model, seed, collect(model, groups, needs, () if data is None else data, seed, loss, progress))
    index = pd.MultiIndex.from_tuples([(group.name, unit) for group in groups for unit in range(group.n)], names=["group", "unit"])
    columns = {name: torch.cat([criterion(group, found) for group in groups]).numpy() for name, criterion in chosen.items()}
    return pd.DataFrame(columns, index=index, dtype=float)


def _nearest(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


__all__ = ["BASELINES", "Baseline", "Found", "baseline", "baseline_scores", "names"]
