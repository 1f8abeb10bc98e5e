"""Moves of single units between modules that increase the sum of a modularity matrix within modules."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from .graph import compact

TOLERANCE = 1e-12  # a smaller gain is rounding: the entries of a modularity matrix sum to at most 2 in absolute value
CANDIDATES = 256  # units that may move in a pass of ``refine``: those that lose least
PATIENCE = 32  # exchanges without a new best sum, after which a pass of ``refine`` ends


class Partition:
    """Labels, and the sum of the modularity matrix between each unit and each module, kept up to date over moves once it is read.

    matrix:  (units, units), symmetric
    labels:  (units,), 0..options-2
    options: the number of modules that a unit can be in: those of the labels, and an empty one
    """

    def __init__(self, matrix: np.ndarray, labels: np.ndarray):
        self.matrix, self.labels, self.units = matrix, compact(labels), np.arange(len(matrix))
        self.own, self.options = matrix.diagonal().copy(), int(self.labels.max(initial=-1)) + 2

    @cached_property
    def sums(self) -> np.ndarray:
        """(options, units); the last module is empty."""
        return np.eye(self.options)[:, self.labels] @ self.matrix

    @property
    def many(self) -> bool:
        """Whether there are so many modules that a row of the matrix is added up faster than all sums are kept."""
        return 8 * self.options >= len(self.units)

    def move(self, unit: int, module: int) -> None:
        """Moves one unit, and keeps one module empty."""
        added = module == self.options - 1
        if "sums" in self.__dict__:
            row = self.matrix[unit]
            self.sums[self.labels[unit]] -= row
            self.sums[module] += row
            if added:
                self.sums = np.concatenate([self.sums, np.zeros((1, len(row)))])
        self.labels[unit] = module
        self.options += added

    def sums_of(self, unit: int) -> np.ndarray:
        """The sums of one unit, (options,)."""
        if "sums" in self.__dict__ and not self.many:
            return self.sums[:, unit].copy()
        return np.bincount(self.labels, self.matrix[unit], self.options)

    def gains(self) -> np.ndarray:
        """Half of what each move would add to the sum within modules, (options, units); -inf where a unit is already."""
        own = self.labels * len(self.units) + self.units
        gains = self.sums - (self.sums.reshape(-1)[own] - self.own)
        gains.reshape(-1)[own] = -np.inf
        return gains

    @property
    def between(self) -> np.ndarray:
        """Sums of the matrix between modules, none of which is empty, (modules, modules)."""
        return self.sums[:-1] @ np.eye(self.options - 1)[self.labels]

    def drop_empty(self) -> None:
        """Renumbers the modules without the empty ones."""
        used = np.bincount(self.labels, minlength=self.options) > 0
        if used[:-1].all():
            return
        self.labels = (np.cumsum(used) - 1)[self.labels]
        self.options = int(used.sum()) + 1
        if "sums" in self.__dict__:
            self.sums = np.concatenate([self.sums[used], np.zeros((1, len(self.units)))])


def move_locally(state: Partition, rng: np.random.Generator) -> bool:
    """Moves single units, in random order, each to its best module, until no move helps. Returns whether any was made."""
    moved, changed = False, True
    while changed:
        changed = False
        movable = state.units if state.many else np.flatnonzero(state.gains().max(0) > TOLERANCE)
        for unit in rng.permutation(movable).tolist():
            sums, label = state.sums_of(unit), state.labels[unit]
            sums[label] -= state.own[unit]
            best = int(sums.argmax())
            if sums[best] - sums[label] > TOLERANCE:
                state.move(unit, best)
                changed = moved = True
        state.drop_empty()
    return moved


def refine(state: Partition) -> bool:
    """Exchanges between modules (Kernighan & Lin 1970; Newman 2006): the best move of a unit that was not moved yet, even where it
    costs, then back to the best partition on the way, until a pass finds none. Returns whether any pass did.
    """
    improved = False
    while _one_pass(state):
        improved = True
    return improved


def _one_pass(state: Partition) -> bool:
    near = np.argsort(-state.gains().max(0), kind="stable")[:CANDIDATES]
    total, best, kept, made = 0.0, TOLERANCE, 0, list[tuple[int, int]]()
    for unit, module, gain in _exchanges(state, near):
        total += gain
        made.append((unit, module))
        if total > best:
            best, kept = total, len(made)
        elif len(made) - kept >= PATIENCE:
            break
    for unit, module in made[:kept]:
        state.move(unit, module)
    state.drop_empty()
    return kept > 0


def _exchanges(state: Partition, near: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """The best move among some units, (unit, module, gain), then the best of those not moved yet, and so on; ``state`` stays."""
    width, sums = len(near), np.take(state.sums, near, axis=1)  # in C order, so that its flattened form is a view
    own, places = state.own[near], state.labels[near] * width + np.arange(width)  # where each unit is in the flattened sums
    for _ in range(width):
        flat = sums.reshape(-1)
        gains = sums - (flat[places] - own)
        gains.reshape(-1)[places] = -np.inf
        module, k = divmod(int(gains.argmax()), width)
        yield int(near[k]), module, float(gains[module, k])
        row = state.matrix[near[k]][near]
        sums[places[k] // width] -= row
        sums[module] += row
        own[k], places[k] = -np.inf, module * width + k  # a unit moves once
        if module == len(sums) - 1:
            sums = np.concatenate([sums, np.zeros((1, width))])
