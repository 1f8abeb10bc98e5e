"""What the units of a layer send to those of the next one: influence, the halo of a cluster, and flow between clusters."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

BATCH = 2**24  # entries of a product of all permutations at once


@dataclass(frozen=True)
class CrossLayerHaloAnalysis:
    """Finds the receivers in the next layer that get most of their input from a cluster of units: the halo of the cluster.

    percentile: receivers whose share of input from the cluster is at or above this percentile of all shares are the halo, so that
    its size is given: judge a halo by the null (``halo_null``), not by its size. use_activation_weight: weigh the sizes of weights
    with the standard deviations of the units.

    >>> halo = CrossLayerHaloAnalysis(percentile=50, use_activation_weight=False)
    >>> influence = halo.compute_influence([[3.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    >>> indices, share = halo.find_halo(influence, [0])
    >>> indices.tolist(), share.tolist()
    ([0, 1], [0.75, 0.5, 0.0])
    """

    percentile: float = 90.0
    use_activation_weight: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}; it is a number from 0 to 100")

    def compute_influence(self, weights: Any, activations: Any = None) -> np.ndarray:
        """The influence of each unit on each receiver, (receivers, units) float64.

        Formula: I_ji = sum over the kernel of |W_ji| sd(a_i), sd with ddof 0; without use_activation_weight the sum of |W_ji|

        weights: (receivers, units) of a linear layer, or (receivers, units, *kernel) of a convolution. activations: what the next
        layer reads, (rows, units), or maps (samples, units, *positions), each position a row. If a linear layer reads flattened
        maps, so that it has one weight for each unit and position, the influence is summed over the positions of a unit.

        Raises ValueError for activations that are missing or do not fit the weights.
        """
        sizes = np.abs(_array(weights, "weights"))
        if sizes.ndim < 2:
            raise ValueError(f"weights have the shape {sizes.shape}: give (receivers, units), or (receivers, units, *kernel)")
        if not self.use_activation_weight:
            return sizes.reshape(*sizes.shape[:2], -1).sum(2)
        if activations is None:
            raise ValueError("use_activation_weight=True needs activations=, what the next layer reads; or set it to False")
        rows = _array(activations, "activations")
        if rows.ndim < 2 or len(rows) == 0:
            raise ValueError(f"activations have the shape {rows.shape}: give (rows, units), or (samples, units, *positions)")
        units, positions = rows.shape[1], math.prod(rows.shape[2:])
        if sizes.ndim == 2 and positions > 1 and sizes.shape[1] == units * positions:  # flattened maps
            return (sizes * rows.reshape(len(rows), -1).std(0)).reshape(len(sizes), units, positions).sum(2)
        if sizes.shape[1] != units:
            raise ValueError(
                f"the weights read {sizes.shape[1]} units and the activations have {units}: give what that layer reads"
            )
        deviations = np.moveaxis(rows, 1, -1).reshape(-1, units).std(0)
        return sizes.reshape(*sizes.shape[:2], -1).sum(2) * deviations

    def find_halo(self, influence: Any, cluster_indices: Any) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the receivers in the halo, (halo,) int64, and the share of their input from the cluster, (receivers,).

        Formula: share_j = sum over i in the cluster of I_ji / sum over i of I_ji; NaN for a receiver without input, which is in no
        halo.

        influence: (receivers, units). cluster_indices: numbers of units, or a bool per unit. Raises ValueError for an empty
        cluster, and for units that do not exist.
        """
        matrix = _matrix(influence)
        chosen = _chosen(cluster_indices, matrix.shape[1])
        share = shares(matrix, chosen[:, None])[:, 0]
        return np.flatnonzero(_halo_of(share[:, None], self.percentile)[:, 0]), share

    def compute_cluster_to_cluster_flow(
        self,
        influence: Any,
        source_labels: Any,
        target_labels: Any,
        source_types: Mapping[Any, str] | None = None,
        target_types: Mapping[Any, str] | None = None,
    ) -> dict[str, dict[str, float]]:
        """{cluster: {cluster of the next layer: share of the influence that leaves the one and enters the other}}.

        The shares of a cluster sum to 1 over all clusters of the next layer. source_labels (units,), target_labels (receivers,);
        types: {label: name}. Clusters of the same name count together. NaN for a cluster without influence. Raises ValueError for
        labels that do not fit the influence.
        """
        rows, columns = _named(source_labels, source_types), _named(target_labels, target_types)
        table = flow(influence, rows, columns)
        return {str(s): {str(t): float(table.at[s, t]) for t in table} for s in table.index}


def shares(influence: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Share of each receiver's input that comes from each set of units, (receivers, units) and (units, sets) -> (receivers, sets).

    NaN for a receiver without input.
    """
    total = influence.sum(1, keepdims=True)
    return influence @ members.astype(np.float64) / np.where(total > 0, total, np.nan)


def flow(influence: Any, source_labels: Any, target_labels: Any) -> pd.DataFrame:
    """Share of the influence leaving each cluster that enters each cluster of the next layer; rows sum to 1.

    Index: labels of the units; columns: labels of the receivers. NaN for a cluster without influence.
    """
    matrix, sources, targets = _labelled(influence, source_labels, target_labels)
    rows, columns = _labels(sources), _labels(targets)
    mass = _onehot(sources, rows).T @ matrix.T @ _onehot(targets, columns)
    total = mass.sum(1, keepdims=True)
    return pd.DataFrame(mass / np.where(total > 0, total, np.nan), index=rows, columns=columns)


def flow_null(influence: Any, source_labels: Any, target_labels: Any, permutations: int = 1000, seed: int = 0) -> pd.DataFrame:
    """The flow between clusters, compared with clusters of the same sizes whose units are drawn at random.

    One row per pair of clusters: source, target, flow, null (mean), null_sd, z, and p, one-sided, that units drawn at random send
    at least as much: (1 + number of permutations with at least this flow) / (1 + permutations) (Phipson & Smyth 2010). The labels
    of the units are shuffled, those of the receivers stay.
    """
    matrix, sources, targets = _labelled(influence, source_labels, target_labels)
    own = flow(matrix, sources, targets)
    received = _onehot(targets, own.columns).T @ matrix  # (targets, units)
    member = _onehot(sources, own.index)
    chance = np.random.default_rng(seed)
    drawn = np.empty((permutations, *own.shape))
    for k in range(permutations):
        mass = member[chance.permutation(len(member))].T @ received.T
        total = mass.sum(1, keepdims=True)
        drawn[k] = mass / np.where(total > 0, total, np.nan)
    rows = []
    for i, source in enumerate(own.index):
        for j, target in enumerate(own.columns):
            rows.append({"source": source, "target": target, "flow": own.iat[i, j], **against(own.iat[i, j], drawn[:, i, j])})
    return pd.DataFrame(rows)


def halo_null(influence: Any, cluster_indices: Any, percentile: float, permutations: int = 1000, seed: int = 0) -> dict[str, float]:
    """The mean share of the halo's input that comes from the cluster, compared with sets of as many units drawn at random.

    Keys: share, null (mean), null_sd, z, and p as in ``flow_null``. Each random set has a halo of its own.
    """
    matrix = _matrix(influence)
    chosen = _chosen(cluster_indices, matrix.shape[1])
    chance = np.random.default_rng(seed)
    own = _halo_share(matrix, chosen[:, None], percentile)[0]
    drawn = np.empty(permutations)
    at_once = max(1, BATCH // max(matrix.shape))
    for start in range(0, permutations, at_once):
        sets = np.stack([chance.permutation(chosen) for _ in range(min(at_once, permutations - start))], 1)
        drawn[start : start + sets.shape[1]] = _halo_share(matrix, sets, percentile)
    return {"share": float(own), **against(own, drawn)}


def against(value: float, drawn: np.ndarray) -> dict[str, float]:
    """A value compared with those of permutations: null (mean), null_sd, z, and one-sided p with the +1."""
    known = drawn[~np.isnan(drawn)]
    if np.isnan(value) or not len(known):
        return {"null": np.nan, "null_sd": np.nan, "z": np.nan, "p": np.nan}
    mean, sd = float(known.mean()), float(known.std(ddof=1)) if len(known) > 1 else np.nan
    rounding = 1e-12 * max(abs(value), abs(mean))
    z = (value - mean) / sd if sd > rounding else np.nan
    return {"null": mean, "null_sd": sd, "z": float(z), "p": (1 + int((known >= value - rounding).sum())) / (1 + len(known))}


def _halo_of(share: np.ndarray, percentile: float) -> np.ndarray:
    """Which receivers are at or above the percentile of the shares of each set, (receivers, sets) bool."""
    known = ~np.isnan(share).any(1)
    if not known.any():
        return np.zeros(share.shape, dtype=bool)
    edge = np.percentile(share[known], percentile, axis=0)
    return (share >= edge) & known[:, None]


def _halo_share(influence: np.ndarray, members: np.ndarray, percentile: float) -> np.ndarray:
    """The mean share of the halo of each set of units, (sets,)."""
    share = shares(influence, members)
    halo = _halo_of(share, percentile)
    with np.errstate(invalid="ignore"):
        return np.where(halo, share, 0.0).sum(0) / halo.sum(0)


def _onehot(labels: np.ndarray, values: Any) -> np.ndarray:
    return (labels[:, None] == np.asarray(values, dtype=labels.dtype)[None, :]).astype(np.float64)


def _labels(labels: np.ndarray) -> list[Any]:
    """The labels that occur, sorted where they can be."""
    return sorted(set(labels.tolist()), key=lambda label: (isinstance(label, str), label))


def _named(labels: Any, names: Mapping[Any, str] | None) -> np.ndarray:
    given = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    return given if names is None else np.array([names.get(label, label) for label in given.tolist()], dtype=object)


def _labelled(influence: Any, sources: Any, targets: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Influence and labels as arrays. Raises ValueError for another number of labels than units or receivers."""
    matrix = _matrix(influence)
    found = [np.asarray(labels, dtype=object) for labels in (sources, targets)]
    for labels, n, what in zip(found, matrix.shape[::-1], ("units", "receivers"), strict=True):
        if labels.shape != (n,):
            raise ValueError(f"there are {len(labels)} labels for {n} {what}: give one label for each")
    return matrix, found[0], found[1]


def _matrix(influence: Any) -> np.ndarray:
    matrix = _array(influence, "influence")
    if matrix.ndim != 2:
        raise ValueError(f"influence has the shape {matrix.shape}: give (receivers, units), as compute_influence returns it")
    return matrix


def _chosen(cluster: Any, units: int) -> np.ndarray:
    """A bool per unit. Raises ValueError for an empty cluster, and units that do not exist."""
    given = np.asarray(cluster.detach().cpu() if isinstance(cluster, Tensor) else cluster)
    if given.dtype == bool and given.shape == (units,):
        chosen = given
    else:
        numbers = given.astype(np.int64) if given.size else np.empty(0, dtype=np.int64)
        if numbers.ndim != 1 or ((numbers < 0) | (numbers >= units)).any() or (given.size and (given != numbers).any()):
            raise ValueError(f"cluster_indices is {cluster}: give numbers of units from 0 to {units - 1}, or one bool per unit")
        chosen = np.zeros(units, dtype=bool)
        chosen[numbers] = True
    if not chosen.any():
        raise ValueError("cluster_indices is empty: a halo belongs to one unit or more")
    return chosen


def _array(given: Any, what: str) -> np.ndarray:
    given = given.detach().cpu().double().numpy() if isinstance(given, Tensor) else given
    try:
        return np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{what} are no array of numbers, but {type(given).__name__}") from None
