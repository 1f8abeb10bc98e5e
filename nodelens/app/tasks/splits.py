"""The splits that a task measures and evaluates on."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from nodelens.app.config import recorded, resolved

_FREE = {"batch_size", "workers", "classes", "channels", "size", "mean", "std", "select", "special", "cache", "_target_"}
_UNRESOLVED = "${oc.env:"  # a place that only the environment of the training knows


def splits(cfg: DictConfig, data: Any, trained_by: dict | None) -> tuple[str, str]:
    """The split to measure and the split to evaluate.

    The defaults are calibration and test, which are disjoint. A single unsplit file serves as both, unless the weights were
    trained on it by nodelens.
    """
    chosen = cfg.get("split")
    then = (trained_by or {}).get("dataset") or {}
    here = trained_by is not None and (then.get("path") == cfg.dataset.get("path") or _UNRESOLVED in str(then.get("path")))
    if here:
        _check_same_cut([recorded(cfg)["dataset"], resolved(cfg)["dataset"]], then)
    whole = data.unsplit and not here
    if chosen is None:
        return ("all", "all") if whole else ("calibration", "test")
    return chosen, chosen if chosen in ("all", "val", "train") else "test"


def _check_same_cut(now: Sequence[dict[str, Any]], then: dict[str, Any]) -> None:
    """Raises ValueError if the data are split differently than in training: training samples would be in the test set.

    now: the settings with values of environment variables unresolved, as training stores them, and with these values.
    """
    free = _FREE | ({"path"} if _UNRESOLVED in str(then.get("path")) else set())
    for key in sorted(then.keys() - free):
        if all(each.get(key) != then[key] for each in now):
            raise ValueError(
                f"the weights were trained on this data set with dataset.{key}={then[key]}, here it is {now[0].get(key)}: training "
                "samples would be in the test set; give the same value"
            )
