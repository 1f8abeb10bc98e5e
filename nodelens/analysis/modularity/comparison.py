"""How alike two partitions of the same units are, and two associations of them."""

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from .graph import Graph, as_labels, modularity
from .moves import TOLERANCE
from .significance import Significance


def overlap(a: Any, b: Any) -> np.ndarray:
    """Number of units in each module of a and of b, (modules of a, modules of b). Raises ValueError for other numbers of units."""
    first, second = _pair(a, b)
    both = (first >= 0) & (second >= 0)
    table = np.zeros((first.max(initial=-1) + 1, second.max(initial=-1) + 1), np.int64)
    np.add.at(table, (first[both], second[both]), 1)
    return table


def alignment_score(a: Any, b: Any) -> float:
    """Number of units in modules that match, divided by the number of units in modules, the smaller one of the two.

    Modules of a are matched one to one with modules of b, so that the number of common units is largest (Hungarian method, Kuhn
    1955). The numbers of modules may differ.

    a, b: (units,) integers; -1: in no module

    In (0, 1]; equal partitions: 1, whatever the names of the modules; overlaps [[5, 4], [4, 0]]: 8/13. NaN if one has no units in
    modules. Source: Lange, Rolnick & Kording 2022, TMLR, who match greedily. Raises ValueError for other numbers of units.
    """
    first, second = _pair(a, b)
    smaller = min((first >= 0).sum(), (second >= 0).sum())
    if not smaller:
        return float("nan")
    table = overlap(first, second)
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / smaller)


def alignment_significance(a: Any, b: Any, shuffles: int = 1000, seed: int | np.random.Generator = 0) -> Significance:
    """The alignment score beside those of shuffled units: mean, standard deviation, z and p.

    Units with a module in both partitions exchange their modules in b at random, so sizes of modules stay. p is at least
    1 / (shuffles + 1).
    """
    first, second = _pair(a, b)
    rng, both = np.random.default_rng(seed), np.flatnonzero((first >= 0) & (second >= 0))

    def shuffled() -> float:
        drawn = second.copy()
        drawn[both] = rng.permutation(drawn[both])
        return alignment_score(first, drawn)

    return Significance.of(alignment_score(first, second), (shuffled() for _ in range(shuffles)))


def ami(a: Any, b: Any) -> float:
    """Adjusted mutual information of two partitions, over units with a module in both: 1 if equal, about 0 by chance.

    Source: Vinh, Epps & Bailey 2010, JMLR 11:2837; computed by scikit-learn. NaN without such units.
    """
    from sklearn.metrics import adjusted_mutual_info_score

    first, second = _common(a, b)
    return float(adjusted_mutual_info_score(first, second)) if len(first) else float("nan")


def ari(a: Any, b: Any) -> float:
    """Adjusted Rand index of two partitions, over units with a module in both: 1 if equal, about 0 by chance.

    Source: Hubert & Arabie 1985, J. Classif. 2:193; computed by scikit-learn. NaN without such units.
    """
    from sklearn.metrics import adjusted_rand_score

    first, second = _common(a, b)
    return float(adjusted_rand_score(first, second)) if len(first) else float("nan")


def variation_of_information(a: Any, b: Any) -> float:
    """H(a) + H(b) - 2 I(a, b) in nats, over units with a module in both: 0 if equal, at most the log of their number.

    Source: Meila 2007, J. Multivar. Anal. 98:873. NaN without such units.
    """
    first, second = _common(a, b)
    if not len(first):
        return float("nan")
    joint = overlap(first, second) / len(first)
    return max(0.0, 2 * _entropy(joint) - _entropy(joint.sum(1)) - _entropy(joint.sum(0)))


def element_similarity(a: Any, b: Any) -> float:
    """Element-centric similarity of two partitions, over units with a module in both: 1 if equal, above 0.

    Mean over units i of 1 - sum_j |1(j in a(i))/|a(i)| - 1(j in b(i))/|b(i)|| / 2, a(i) the module of i in a. It compares, for each
    unit, with whom it is. Source: Gates et al. 2019, Sci. Rep. 9:8574. NaN without such units.
    """
    first, second = _common(a, b)
    if not len(first):
        return float("nan")
    table = overlap(first, second)
    inside, in_a, in_b = table[first, second], table.sum(1)[first], table.sum(0)[second]
    apart = inside * np.abs(1 / in_a - 1 / in_b) + (in_a - inside) / in_a + (in_b - inside) / in_b
    return float(1 - apart.mean() / 2)


def transfer_modularity(association: Any, labels: Any, own: Any = None, *, absolute: bool = True, gamma: float = 1.0) -> float:
    """Modularity of one association with the modules of another, Q(A_a, c_b).

    own: the modules of the association itself. With them, the value is Q(A_a, c_b) / Q(A_a, c_a): 1 if the other modules are as
    good. NaN where Q(A_a, c_a) is not above 0, and without an edge. Source: Lange, Rolnick & Kording 2022, TMLR.
    """
    graph = Graph.of(association, absolute)
    other = modularity(graph.weights, as_labels(labels)[graph.live], gamma)
    if own is None:
        return other
    reached = modularity(graph.weights, as_labels(own)[graph.live], gamma)
    return other / reached if reached > TOLERANCE else float("nan")


def adj_spearman(a: Any, b: Any, absolute: bool = True) -> float:
    """Spearman correlation of two associations over the pairs i < j of units that are live in both.

    In [-1, 1]; NaN where either does not vary. Raises ValueError for other numbers of units, and for matrices that are no graph.
    """
    from scipy.stats import rankdata

    first, second = (Graph.of(each, absolute, signed=True) for each in (a, b))
    if len(first.live) != len(second.live):
        raise ValueError(f"the associations have {len(first.live)} and {len(second.live)} units: compare those of the same layer")
    both = first.live & second.live
    if both.sum() < 2:
        return float("nan")
    ranks = []
    for graph in (first, second):
        chosen = both[graph.live]
        inner = graph.weights[np.ix_(chosen, chosen)]
        ranks.append(rankdata(inner[np.triu_indices(len(inner), 1)]))
    if any(np.ptp(rank) == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def matched(labels: Any, reference: Any, unused: int | None = None) -> np.ndarray:
    """Labels renamed after the modules of a reference that they match best, (units,); -1 stays.

    unused: the first label for modules without a match. None: one more than the largest of the reference
    """
    found, given = _pair(labels, reference)
    table = overlap(found, given)
    names = np.full(len(table), -1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    chosen = table[rows, columns] > 0
    names[rows[chosen]] = columns[chosen]
    new = (names < 0) & np.isin(np.arange(len(table)), found)
    names[new] = (table.shape[1] if unused is None else unused) + np.arange(int(new.sum()))
    return np.where(found >= 0, np.append(names, -1)[found], -1)


def _pair(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = as_labels(a), as_labels(b)
    if len(first) != len(second):
        raise ValueError(f"the partitions have {len(first)} and {len(second)} units: compare modules of the same units")
    return first, second


def _common(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = _pair(a, b)
    both = (first >= 0) & (second >= 0)
    return first[both], second[both]


def _entropy(shares: np.ndarray) -> float:
    found = shares[shares > 0]
    return float(-(found * np.log(found)).sum())
