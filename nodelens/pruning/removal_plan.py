"""Which units are removed: a plan that can be saved, compared and applied again."""

import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nodelens.messages import shown
from nodelens.results.files import plain, read_json, write_json

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
        """Writes the plan, with further keys, to a JSON file; ``digests`` has a hash of each field."""
        path = Path(path)
        content = plain({"schema": SCHEMA, "key": self.key, "removed": self.removed, "about": self.about, **more})
        write_json(path, content | {"digests": digests(content)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> "RemovalPlan":
        """Reads a plan. Raises ValueError for a file that is not a plan, or whose fields were changed after it was saved."""
        return cls.read(read_json(Path(path)), str(path))

    @classmethod
    def read(cls, content: Any, where: str) -> "RemovalPlan":
        """A plan from the content of its file; raises as ``load``."""
        if not isinstance(content, dict) or not isinstance(content.get("removed"), dict):
            raise ValueError(f"{where} is no removal plan: it has no units by group under 'removed'")
        if type(content.get("schema")) is not int or content["schema"] != SCHEMA:
            raise ValueError(f"{where}: schema is {shown(content.get('schema'))}, this version reads {SCHEMA}")
        if "digests" in content or "config" in content:  # versions before 0.2 wrote neither
            check_digests({k: v for k, v in content.items() if k != "digests"}, content.get("digests"), where)
        for group, units in content["removed"].items():
            if not _are_units(units):
                raise ValueError(
                    f"{where}: removed.{group} is {shown(units)}; it must be a list of different unit numbers, from 0 on"
                )
        about = content.get("about", {})
        if not isinstance(about, dict):
            raise ValueError(f"{where}: about is {shown(about)}; it must be a dictionary of options")
        plan = cls(content["removed"], about)
        if content.get("key") != plan.key:
            raise ValueError(
                f"{where} was changed: its units have the hash {plan.key}, it was saved with {shown(content.get('key'))}"
            )
        return plan


def digests(content: Mapping[str, Any]) -> dict[str, str]:
    """{field: hash of its value} of plain content."""
    texts = {name: json.dumps(value, sort_keys=True) for name, value in content.items()}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def check_digests(content: Mapping[str, Any], stored: Any, where: str) -> None:
    """Raises ValueError that names the first field which is missing, was added, or does not have the hash it was stored with."""
    if not isinstance(stored, dict):
        raise ValueError(f"{where}: digests is {shown(stored)}; it must be a hash of each field")
    now = digests(content)
    for name in dict.fromkeys([*stored, *now]):
        if now.get(name) != stored.get(name):
            what = "is missing" if name not in now else "was added" if name not in stored else "was changed"
            raise ValueError(f"{where}: {shown(name)} {what} after the file was saved: save the pruned model again")


def _are_units(units: Any) -> bool:
    """Whether a value is a sorted list of different integers from 0 on."""
    plain_integers = isinstance(units, list) and all(type(unit) is int for unit in units)
    return plain_integers and all(unit >= 0 for unit in units[:1]) and all(map(operator.lt, units, units[1:]))


def check_removal(amount: float, mode: str) -> None:
    """Raises ValueError for an amount outside [0, 1) or an unknown mode."""
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount < 1:
        raise ValueError(f"amount is {amount}: a share to remove, from 0 up to but not including 1")
    if mode not in ("low", "high", "random"):
        raise ValueError(f"mode is {mode!r}: low removes the smallest scores, high the largest, random any")
