"""The numbers of units that groups can keep: multiples, within floors and caps, equal for groups with one ``equal_count``."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nodelens.messages import listed
from nodelens.network.groups import PruningGroup

from .densities import numbered
from .selection import Rules


@dataclass(frozen=True, eq=False)
class Ladder:
    """The numbers of units that groups can keep. A bundle is one group, or all groups with the same ``equal_count``.

    Rung 0 is the present number, rung 1 the largest multiple below it, and so on down to what floors and caps allow.
    Shapes: names, n and bundle (groups,), where bundle is the index of the group's bundle;
    the others (bundles,), int64: members, groups of the bundle;
            width, units per group; removed, units per group in an earlier plan; step, the multiple; rungs, number below 0
    """

    names: tuple[str, ...]
    n: np.ndarray
    bundle: np.ndarray
    members: np.ndarray
    width: np.ndarray
    removed: np.ndarray
    step: np.ndarray
    rungs: np.ndarray

    @classmethod
    def of(cls, groups: Sequence[PruningGroup], rules: Rules, min_keep: int, max_remove: float, multiple: int | None) -> "Ladder":
        """Raises ValueError for groups of one bundle that differ in width, or that have lost more units than allowed."""
        names, n = tuple(group.name for group in groups), np.array([group.n for group in groups])
        bundle = numbered([group.equal_count or (group.name,) for group in groups])
        width = n[np.unique(bundle, return_index=True)[1]]
        most, removed, step = width.copy(), np.zeros_like(width), np.ones_like(width)
        floors = np.array([max(min_keep, group.min_keep, len(rules.protected.get(group.name, ()))) for group in groups])
        floors = np.maximum(floors, n - np.floor(max_remove * n + 1e-9).astype(np.int64))
        np.minimum.at(most, bundle, np.maximum(0, n - floors))
        np.maximum.at(removed, bundle, [len(rules.removed.get(name, ())) for name in names])
        np.lcm.at(step, bundle, [multiple or group.multiple for group in groups])
        _check_groups(groups, n != width[bundle], (removed > most)[bundle])
        top = (width - removed - 1) // step * step
        return cls(names, n, bundle, np.bincount(bundle), width, removed, step, np.maximum(0, (top - width + most) // step + 1))

    @property
    def top(self) -> np.ndarray:
        """Units kept on rung 1, (bundles,)."""
        return (self.width - self.removed - 1) // self.step * self.step

    def lost(self, rungs: np.ndarray) -> np.ndarray:
        """Units that each group of a bundle loses, (bundles,)."""
        return np.where(rungs == 0, self.removed, self.width - self.top + (rungs - 1) * self.step)

    def left(self, rungs: np.ndarray) -> float:
        """Units kept in all groups."""
        return float(self.n.sum() - self.members @ self.lost(rungs))

    def kept(self, rungs: np.ndarray) -> dict[str, int]:
        """{group: kept units}."""
        return dict(zip(self.names, (self.width - self.lost(rungs))[self.bundle].tolist(), strict=True))

    def mean(self, lost: np.ndarray) -> np.ndarray:
        """The mean over the groups of each bundle, (groups,) -> (bundles,)."""
        return np.bincount(self.bundle, weights=lost) / self.members

    def nearest(self, lost: np.ndarray) -> np.ndarray:
        """The rung nearest to the mean loss of a bundle, (groups,) -> (bundles,); the lower count of two equally near."""
        lost, second = self.mean(lost), self.width - self.top
        below = np.clip(np.floor((lost - second) / self.step + 0.5).astype(np.int64) + 1, 1, np.maximum(1, self.rungs))
        return np.where((self.rungs > 0) & (lost >= (self.removed + second) / 2), below, 0)

    def rounded(self, lost: np.ndarray, min_keep: int) -> np.ndarray:
        """floor(mean + 1/2) of each bundle, capped to keep ``min_keep`` or the next multiple above, (groups,) -> (bundles,)."""
        least = -(-min_keep // self.step) * self.step
        return np.minimum(np.floor(self.mean(lost) + 0.5), np.maximum(0, self.width - least)).astype(np.int64)

    def unmet(self, rungs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Whether a rung differs from the wanted loss by more than rounding, (bundles,) bool."""
        return np.abs(self.lost(rungs) - wanted) > self.step // 2


def _check_groups(groups: Sequence[PruningGroup], uneven: np.ndarray, over: np.ndarray) -> None:
    if uneven.any():
        label = groups[int(uneven.argmax())].equal_count
        members = [f"{group.name} {group.n}" for group in groups if group.equal_count == label]
        raise ValueError(f"the groups of {label} have to keep equal counts and differ in width: {listed(members)}")
    if over.any():
        name = groups[int(over.argmax())].name
        raise ValueError(f"group {name!r} has already lost more units than min_keep, max_remove and protected units allow")
