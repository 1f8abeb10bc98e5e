"""Random graphs with the weights and the degrees of a given one."""

from collections.abc import Iterator

import numpy as np

EXCHANGES = 3  # expected number of exchanges of each weight between a graph and a shuffled one
MEMORY = 2**23  # entries of the graphs that are shuffled together
_MOST_STEPS = 20_000


def shuffled(weights: np.ndarray, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Draws graphs with the same weights between other pairs of units, in which each unit keeps its degree, (units, units) each.

    One step takes four units i, j, k, l, and exchanges A_ij with A_il and A_kl with A_kj. It is refused if the degree of j or l
    then differs from its own by more than the standard deviation of the weights (of a binary graph: if it differs at all), or by
    more than half of it. At last, each weight is multiplied by a factor of each of its two units that makes the degrees equal,
    where there are such factors.

    All graphs drawn, and the given one, are the same number of steps away from one random graph. So a statistic of the given
    graph has a uniform rank among theirs, however many steps there are, if all placements of its weights with its degrees are
    equally likely. Source of the design: Besag & Clifford 1989, Biometrika 76:633; of the steps: Maslov & Sneppen 2002, Science
    296:910, here with weights.
    """
    degrees, window = weights.sum(1), _window(weights)
    steps = _steps(weights, window, rng)
    start = _walk(weights[None].copy(), degrees, window, steps, rng)[0]
    size = max(1, MEMORY // weights.size)
    for begin in range(0, count, size):
        for found in _walk(np.repeat(start[None], min(size, count - begin), 0), degrees, window, steps, rng):
            yield scaled(found, degrees)


def _window(weights: np.ndarray) -> np.ndarray:
    """How far the degree of each unit may go astray, (units,)."""
    spread = weights[np.triu_indices(len(weights), 1)].std()
    return np.minimum(spread, weights.sum(1) / 2) * (1 + 1e-9)


def _steps(weights: np.ndarray, window: np.ndarray, rng: np.random.Generator) -> int:
    """Enough steps for the expected number of exchanges, from the weights alone and not from their places."""
    pairs = weights[np.triu_indices(len(weights), 1)]
    one, two, three, four = rng.choice(pairs, (4, 4096))
    moved = np.abs(one - three)  # exchanges of equal weights move nothing, those of large ones move most
    allowed = moved[np.abs(one + two - three - four) <= window.max()].sum() / max(moved.sum(), 1e-300)
    return int(min(_MOST_STEPS, EXCHANGES * len(weights) / (2 * max(allowed, 1e-9))))


def _walk(graphs: np.ndarray, degrees: np.ndarray, window: np.ndarray, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Takes steps from several graphs at once, in place, (graphs, units, units). One step moves units / 4 disjoint quadruples."""
    count, units = graphs.shape[:2]
    quarter = units // 4
    if not quarter:
        return graphs
    astray = graphs.sum(2) - degrees
    places, g = np.tile(np.arange(units), (count, 1)), np.arange(count)[:, None]
    for _ in range(steps):
        rng.permuted(places, axis=1, out=places)
        i, j, k, m = (places[:, n * quarter : (n + 1) * quarter] for n in range(4))
        ij, kl, il, kj = graphs[g, i, j], graphs[g, k, m], graphs[g, i, m], graphs[g, k, j]
        change = il + kl - ij - kj
        at_j, at_l = astray[g, j] + change, astray[g, m] - change
        allowed = (np.abs(at_j) <= window[j]) & (np.abs(at_l) <= window[m])
        which, _ = np.nonzero(allowed)
        i, j, k, m, ij, kl, il, kj = (each[allowed] for each in (i, j, k, m, ij, kl, il, kj))
        graphs[which, i, j] = graphs[which, j, i] = il
        graphs[which, i, m] = graphs[which, m, i] = ij
        graphs[which, k, m] = graphs[which, m, k] = kj
        graphs[which, k, j] = graphs[which, j, k] = kl
        astray[which, j], astray[which, m] = at_j[allowed], at_l[allowed]
    return graphs


def scaled(weights: np.ndarray, degrees: np.ndarray, rounds: int = 200) -> np.ndarray:
    """A graph with weights A_ij f_i f_j, where the factors f give each unit its degree to 1e-12, or come as near as they can."""
    factors = np.ones(len(degrees))
    for _ in range(rounds):
        found = factors * (weights @ factors)
        if np.allclose(found, degrees, rtol=1e-12, atol=0):
            break
        factors *= np.sqrt(degrees / np.where(found > 0, found, degrees))
    return weights * np.outer(factors, factors)
