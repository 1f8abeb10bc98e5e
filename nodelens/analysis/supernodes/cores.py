"""Several cores of a layer: supernodes that write to the same outputs, their halos, and redundancy within and between halos."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nodelens.metrics.supernode import connectivity

COLUMNS = ("layer", "core", "supernodes", "halo", "within", "between", "halo_redundancy", "to_core", "to_other_cores")
Redundancy = Callable[[Tensor, Tensor], Tensor]  # (units, others) ids -> (units, others) nats


def check_cores(name: str, supernodes: int, count: int) -> None:
    """Raises ValueError if a group has fewer supernodes than cores."""
    if count > supernodes:
        raise ValueError(
            f"group {name!r} has {supernodes} {'supernode' if supernodes == 1 else 'supernodes'}, too few for {count} cores: set "
            f"cores to {supernodes}, raise supernode_fraction or top_k, or leave the group out (scope)"
        )


def cores_of(name: str, columns: Tensor, supernodes: Tensor, count: int, seed: int = 0) -> Tensor:
    """The core of each supernode of a group, (supernodes,): k-means on its outgoing weights, scaled to length 1, best of 10 starts.

    columns (width, units): the weights that read the units. Cores are numbered by size, largest first. Raises ValueError for more
    cores than supernodes of different directions.
    """
    from sklearn.cluster import KMeans

    directions = torch.nn.functional.normalize(columns[:, supernodes].double(), dim=0).T.numpy()
    different = len(np.unique(directions.round(9), axis=0))
    if count > different:
        raise ValueError(
            f"group {name!r} has {len(supernodes)} supernodes of {different} different directions, too few for {count} cores: set "
            f"cores to {different}, raise supernode_fraction or top_k, or leave the group out (scope)"
        )
    labels = KMeans(count, n_init=10, random_state=seed).fit_predict(directions)
    order = np.argsort(-np.bincount(labels, minlength=count), kind="stable")
    return torch.from_numpy(np.argsort(order)[labels]).long()


def halos_of(columns: Tensor, supernodes: Tensor, cores: Tensor, halo: Tensor, topk: int, mass: float | None) -> Tensor:
    """The core of each unit of the halo, (halo,) int64: the one to whose outputs it writes the largest share of its weight."""
    shares = [connectivity(columns, supernodes[cores == k], topk, mass)[halo] for k in range(int(cores.max()) + 1)]
    return torch.stack(shares).argmax(0)


def core_rows(
    name: str, supernodes: Tensor, cores: Tensor, halo: Tensor, own: Tensor, redundancy: Redundancy
) -> list[dict[str, Any]]:
    """One row per core: numbers of supernodes and halo units, and the mean redundancy of its halo's units, in nats.

    within: of two of its units; between: of one of them and one of another halo; halo_redundancy: within / between; to_core,
    to_other_cores: of one of them and a supernode. NaN where there is no such pair.
    """
    rows = []
    for k in range(int(cores.max()) + 1):
        inside, outside = halo[own == k], halo[own != k]
        among = redundancy(inside, inside)
        pairs = among[~torch.eye(len(inside), dtype=torch.bool)]
        within, between = _mean(pairs), _mean(redundancy(inside, outside))
        rows.append(
            {
                "layer": name,
                "core": k,
                "supernodes": int((cores == k).sum()),
                "halo": len(inside),
                "within": within,
                "between": between,
                "halo_redundancy": within / between if between > 0 else float("nan"),
                "to_core": _mean(redundancy(inside, supernodes[cores == k])),
                "to_other_cores": _mean(redundancy(inside, supernodes[cores != k])),
            }
        )
    return rows


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else float("nan")
