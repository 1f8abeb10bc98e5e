"""Units of four planted types in the space of Rayleigh quotient, redundancy and synergy."""

import numpy as np

TYPES = np.array(["critical", "redundant", "synergistic", "background"])
MEANS = {"critical": (4.0, 0.05, 0.3), "redundant": (0.6, 0.9, 0.06), "synergistic": (1.0, 0.3, 0.8), "background": (0.2, 0.2, 0.1)}


def planted(n=12, noise=0.05, seed=0):
    """(rq, redundancy, synergy) of four groups of units in a random order, and the type of each."""
    chance = np.random.default_rng(seed)
    kinds = chance.permutation(np.repeat(TYPES, n))
    means = np.array([MEANS[kind] for kind in kinds])
    values = means * (1 + noise * chance.standard_normal(means.shape)) + 0.2 * noise * chance.standard_normal(means.shape)
    return np.abs(values).T, kinds
