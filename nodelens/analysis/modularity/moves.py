"""Moves of single units between modules that increase the sum of a modularity matrix within modules."""

import numpy as np

from .graph import compact, one_hot

TOLERANCE = 1e-12  # a smaller gain is rounding: the entries of a modularity matrix sum to at most 2 in absolute value
CANDIDATES = 256  # units that may move in a pass of ``refine``: those that lose least
PATIENCE = 64  # exchanges without a new best sum, after which a pass of ``refine`` ends


class Partition:
    """Labels, and the sum of the modularity matrix between each unit and each module, kept up to date over moves.

    matrix: (units, units), symmetric
    labels: (units,), 0..modules-1
    sums:   (modules + 1, units); the last module is empty
    """

    def __init__(self, matrix: np.ndarray, labels: np.ndarray):
        self.matrix, self.labels, self.units = matrix, compact(labels), np.arange(len(matrix))
        self.own = matrix.diagonal().copy()
        single = len(matrix) == self.labels.max() + 1
        empty = np.zeros((1, len(matrix)))
        self.sums = np.concatenate([matrix[np.argsort(self.labels)] if single else one_hot(self.labels).T @ matrix, empty])

    @classmethod
    def part(cls, whole: "Partition", units: np.ndarray) -> "Partition":
        """The same modules, of which only some units can move."""
        part = cls.__new__(cls)
        part.matrix, part.labels, part.units = whole.matrix[np.ix_(units, units)], whole.labels[units], np.arange(len(units))
        part.own, part.sums = whole.own[units], whole.sums[:, units]
        return part

    def move(self, unit: int, module: int) -> None:
        """Moves one unit, and keeps one module empty."""
        row = self.matrix[unit]
        self.sums[self.labels[unit]] -= row
        self.sums[module] += row
        self.labels[unit] = module
        if module == len(self.sums) - 1:
            self.sums = np.concatenate([self.sums, np.zeros((1, len(row)))])

    def sums_of(self, unit: int) -> np.ndarray:
        """The sums of one unit, (modules + 1,): a long column is slower to read than a row of the matrix is to add up."""
        if 8 * len(self.sums) < len(self.units):
            return self.sums[:, unit].copy()
        return np.bincount(self.labels, self.matrix[unit], len(self.sums))

    def gains(self) -> np.ndarray:
        """Half of what each move would add to the sum within modules, (modules + 1, units); -inf where a unit is already."""
        gains = self.sums - (self.sums[self.labels, self.units] - self.own)
        gains[self.labels, self.units] = -np.inf
        return gains

    def drop_empty(self) -> None:
        """Renumbers the modules without the empty ones."""
        used = np.bincount(self.labels, minlength=len(self.sums)) > 0
        self.labels = (np.cumsum(used) - 1)[self.labels]
        self.sums = np.concatenate([self.sums[used], np.zeros((1, len(self.units)))])


def move_locally(state: Partition, rng: np.random.Generator) -> bool:
    """Moves single units, in random order, each to its best module, until no move helps. Returns whether any was made."""
    moved = False
    while True:
        movable = np.flatnonzero(state.gains().max(0) > TOLERANCE)
        if not len(movable):
            return moved
        for unit in rng.permutation(movable):
            sums, label = state.sums_of(unit), state.labels[unit]
            sums[label] -= state.own[unit]
            best = int(sums.argmax())
            if sums[best] - sums[label] > TOLERANCE:
                state.move(unit, best)
                moved = True
        state.drop_empty()


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
    trial = Partition.part(state, near)
    total, best, kept, made = 0.0, TOLERANCE, 0, list[tuple[int, int]]()
    while len(made) < len(near) and len(made) - kept < PATIENCE:
        gains = trial.gains()
        module, unit = divmod(int(gains.argmax()), len(near))
        total += gains[module, unit]
        made.append((int(near[unit]), module))
        trial.move(unit, module)
        trial.own[unit] = -np.inf  # a unit moves once in a pass
        if total > best:
            best, kept = total, len(made)
    for unit, module in made[:kept]:
        state.move(unit, module)
    state.drop_empty()
    return kept > 0
