"""Which units are removed: a plan that can be saved, compared and applied again."""

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
    """Removed units by group, sorted; groups that lose none are absent. ``about``: the options and what the plan achieves."""

    removed: Mapping[str, Sequence[int]]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A hash of the removed units; equal plans have equal keys."""
        text = json.dumps({k: list(v) for k, v in sorted(self.removed.items())})
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def count(self) -> int:
        return sum(len(units) for units in self.removed.values())

    def kept(self, units: Mapping[str, int]) -> dict[str, int]:
        """{group: number of kept units} of {group: number of units}."""
        return {name: n - len(self.removed.get(name, ())) for name, n in units.items()}

    def save(self, path: str | Path, **more: Any) -> Path:
        """Writes the plan, with further keys, to a JSON file."""
        path = Path(path)
        write_json(path, {"schema": SCHEMA, "key": self.key, "removed": self.removed, "about": self.about, **more})
        return path

    @classmethod
    def load(cls, path: str | Path) -> "RemovalPlan":
        """Reads a plan. Raises ValueError for a file that is not a plan, or whose units were changed after it was saved."""
        return cls.read(read_json(Path(path)), str(path))

    @classmethod
    def read(cls, content: Any, where: str) -> "RemovalPlan":
        """A plan from the content of its file; raises as ``load``."""
        if not isinstance(content, dict) or not isinstance(content.get("removed"), dict):
            raise ValueError(f"{where} is no removal plan: it has no units by group under 'removed'")
        removed = {str(group): [int(u) for u in units] for group, units in content["removed"].items()}
        plan = cls(removed, content.get("about") or {})
        if content.get("key") != plan.key:
            raise ValueError(f"{where} was changed: its units have the hash {plan.key}, it was saved with {content.get('key')}")
        return plan


def check_removal(amount: float, mode: str) -> None:
    """Raises ValueError for an amount outside [0, 1) or an unknown mode."""
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount < 1:
        raise ValueError(f"amount is {amount}: a share to remove, from 0 up to but not including 1")
    if mode not in ("low", "high", "random"):
        raise ValueError(f"mode is {mode!r}: low removes the smallest scores, high the largest, random any")
