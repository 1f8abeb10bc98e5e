"""Which units go: a plan that can be read, compared and replayed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nodelens.results.files import read_json, write_json

SCHEMA = 1


@dataclass(frozen=True)
class RemovalPlan:
    """Removed units by group, sorted; groups that lose none are absent. ``about``: where it comes from and what it achieves."""

    removed: Mapping[str, Sequence[int]]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A hash of the units: equal plans, equal key."""
        text = json.dumps({k: list(v) for k, v in sorted(self.removed.items())})
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def count(self) -> int:
        return sum(len(units) for units in self.removed.values())

    def kept(self, units: Mapping[str, int]) -> dict[str, int]:
        """{group: kept units} of {group: units}."""
        return {name: n - len(self.removed.get(name, ())) for name, n in units.items()}

    def save(self, path: str | Path, **more: Any) -> Path:
        """A JSON file, with more beside the plan."""
        path = Path(path)
        write_json(path, {"schema": SCHEMA, "key": self.key, "removed": self.removed, "about": self.about, **more})
        return path

    @classmethod
    def load(cls, path: str | Path) -> "RemovalPlan":
        """Raises ValueError for a file that is no plan, or whose units are not those it was saved with."""
        return cls.read(read_json(Path(path)), str(path))

    @classmethod
    def read(cls, found: Any, where: str) -> "RemovalPlan":
        """A plan from what its file holds; raises as ``load``."""
        if not isinstance(found, dict) or not isinstance(found.get("removed"), dict):
            raise ValueError(f"{where} is no removal plan: it has no units by group under 'removed'")
        removed = {str(group): [int(u) for u in units] for group, units in found["removed"].items()}
        plan = cls(removed, found.get("about") or {})
        if found.get("key") != plan.key:
            raise ValueError(f"{where}: its units have the hash {plan.key}, it was saved with {found.get('key')}: it was changed")
        return plan


def check_removal(amount: float, mode: str) -> None:
    """Raises ValueError for an amount outside [0, 1) or an unknown mode."""
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount < 1:
        raise ValueError(f"amount is {amount}: a share to remove, from 0 up to but not including 1")
    if mode not in ("low", "high", "random"):
        raise ValueError(f"mode is {mode!r}: low removes the smallest scores, high the largest, random any")
