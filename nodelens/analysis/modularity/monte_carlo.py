"""Monte-Carlo search for modules: random moves of single units, at a temperature that keeps the choice nearly certain."""

import numpy as np

from .graph import quality
from .moves import Partition, move_locally

_TEMPERATURES = np.geomspace(1e-4, 1e3, 141)  # as multiples of the range of gains


def monte_carlo_matrix(
    matrix: np.ndarray, labels: np.ndarray, rng: np.random.Generator, steps: int, target_entropy: float = 0.15
) -> np.ndarray:
    """The best labels on a random walk from a partition, (units,).

    Each step takes a unit at random and draws its module, an empty one included, with probabilities proportional to exp(Q/T). T is
    set in each step so that this choice has ``target_entropy`` nats. Source: Lange, Rolnick & Kording 2022, TMLR.
    """
    state = Partition(matrix, labels)
    score = best_score = quality(matrix, state.labels)
    best = state.labels.copy()
    for unit in rng.integers(0, len(matrix), steps):
        sums, label = state.sums_of(unit), state.labels[unit]
        sums[label] -= state.own[unit]
        chances = np.cumsum(choice(2 * sums, target_entropy))
        module = min(int(np.searchsorted(chances, rng.random() * chances[-1], side="right")), len(sums) - 1)
        if module == label:
            continue
        score += 2 * float(sums[module] - sums[label])
        state.move(unit, module)
        if state.options > 2 * state.labels.max() + 8:
            state.drop_empty()
        if score > best_score:
            best, best_score = state.labels.copy(), score
    last = Partition(matrix, best)
    move_locally(last, rng)
    return last.labels


def choice(scores: np.ndarray, target_entropy: float) -> np.ndarray:
    """Probabilities proportional to exp(scores/T), (options,), with T such that their entropy is the target, in nats.

    If several options tie for the best, so that the entropy is never that low, they share the probability.
    """
    below = scores - scores.max()
    spread = -below.min()
    if spread <= 0:
        return np.full(len(scores), 1 / len(scores))
    logits = below / (_TEMPERATURES[:, None] * spread)
    weights = np.exp(logits)
    total = weights.sum(1)
    entropies = np.log(total) - (weights * logits).sum(1) / total
    at = np.interp(target_entropy, entropies, np.log(_TEMPERATURES))
    weights = np.exp(below / (np.exp(at) * spread))
    return weights / weights.sum()
