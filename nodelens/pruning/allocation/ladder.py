"""The counts that groups can have: multiples, between floors and caps, the same for groups that belong together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nodelens.network.groups import PruningGroup, listed

from .densities import numbered
from .selection import Rules


@dataclass(frozen=True, eq=False)
class Ladder:
    """The counts that groups can have; those that belong together are one rung_group, with the same count each.

    Rung 0 is what there is now, rung 1 the largest multiple below it, and so on down to what floors and caps allow.
    Shapes: names, n and rung_group (groups,), rung_group the number of the group's rung group;
    the others (rung groups,), int64: members, groups in it;
            width, units of each; gone, units of each that an earlier plan removed; step, the multiple; rungs, how many below 0
    """

    names: tuple[str, ...]
    n: np.ndarray
    rung_group: np.ndarray
    members: np.ndarray
    width: np.ndarray
    gone: np.ndarray
    step: np.ndarray
    rungs: np.ndarray

    @classmethod
    def of(cls, groups: Sequence[PruningGroup], rules: Rules, min_keep: int, max_remove: float, multiple: int | None) -> "Ladder":
        """Raises ValueError for groups that belong together and differ in width, or have lost more than they may."""
        names, n = tuple(group.name for group in groups), np.array([group.n for group in groups])
        rung_group = numbered([group.equal_count or (group.name,) for group in groups])
        width = n[np.unique(rung_group, return_index=True)[1]]
        most, gone, step = width.copy(), np.zeros_like(width), np.ones_like(width)
        spared = np.maximum(
            [max(min_keep, group.min_keep) for group in groups], n - np.floor(max_remove * n + 1e-9).astype(np.int64)
        )
        spared = np.maximum(spared, [len(rules.protected.get(name, ())) for name in names])
        np.minimum.at(most, rung_group, np.maximum(0, n - spared))
        np.maximum.at(gone, rung_group, [len(rules.removed.get(name, ())) for name in names])
        np.lcm.at(step, rung_group, [multiple or group.multiple for group in groups])
        _check_groups(groups, n != width[rung_group], (gone > most)[rung_group])
        top = (width - gone - 1) // step * step
        return cls(
            names, n, rung_group, np.bincount(rung_group), width, gone, step, np.maximum(0, (top - width + most) // step + 1)
        )

    @property
    def top(self) -> np.ndarray:
        """Units that stay on rung 1."""
        return (self.width - self.gone - 1) // self.step * self.step

    def lost(self, rungs: np.ndarray) -> np.ndarray:
        """Units that each group of a rung_group loses, (groups,)."""
        return np.where(rungs == 0, self.gone, self.width - self.top + (rungs - 1) * self.step)

    def left(self, rungs: np.ndarray) -> float:
        """Units that stay in all groups."""
        return float(self.n.sum() - self.members @ self.lost(rungs))

    def kept(self, rungs: np.ndarray) -> dict[str, int]:
        """{group: units that stay}."""
        return dict(zip(self.names, (self.width - self.lost(rungs))[self.rung_group].tolist(), strict=True))

    def mean(self, lost: np.ndarray) -> np.ndarray:
        """(groups,) -> (groups,)."""
        return np.bincount(self.rung_group, weights=lost) / self.members

    def nearest(self, lost: np.ndarray) -> np.ndarray:
        """The rung next to the mean of what a rung group would lose, (groups,) -> (rung groups,); of two, the lower count."""
        lost, second = self.mean(lost), self.width - self.top
        below = np.clip(np.floor((lost - second) / self.step + 0.5).astype(np.int64) + 1, 1, np.maximum(1, self.rungs))
        return np.where((self.rungs > 0) & (lost >= (self.gone + second) / 2), below, 0)

    def rounded(self, lost: np.ndarray, min_keep: int) -> np.ndarray:
        """floor(x + 1/2) of each rung_group's mean, and ``min_keep`` stay or the multiple above it, (groups,) -> (groups,)."""
        least = -(-min_keep // self.step) * self.step
        return np.minimum(np.floor(self.mean(lost) + 0.5), np.maximum(0, self.width - least)).astype(np.int64)

    def unmet(self, rungs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Whether a rung is further from what is wanted than rounding explains, (groups,) bool."""
        return np.abs(self.lost(rungs) - wanted) > self.step // 2


def _check_groups(groups: Sequence[PruningGroup], uneven: np.ndarray, over: np.ndarray) -> None:
    if uneven.any():
        together = groups[int(uneven.argmax())].equal_count
        members = [f"{group.name} {group.n}" for group in groups if group.equal_count == together]
        raise ValueError(f"groups that belong together ({together}) differ in width: {listed(members)}")
    if over.any():
        raise ValueError(f"group {groups[int(over.argmax())].name!r} has lost more units already than floors and caps now allow")
