"""The splits that a task measures and evaluates on."""

from typing import Any

from omegaconf import DictConfig

from nodelens.app.config import resolved

_FREE = {"batch_size", "workers", "classes", "channels", "size", "mean", "std", "select", "special", "cache", "_target_"}


def splits(cfg: DictConfig, data: Any, trained_by: dict | None) -> tuple[str, str]:
    """The split to measure and the split to evaluate.

    The defaults are calibration and test, which are disjoint. A single unsplit file serves as both, unless the weights were
    trained on it by nodelens.
    """
    chosen = cfg.get("split")
    here = trained_by is not None and (trained_by.get("dataset") or {}).get("path") == cfg.dataset.get("path")
    if here:
        _check_same_cut(resolved(cfg)["dataset"], trained_by["dataset"])  # type: ignore[index]
    whole = data.unsplit and not here
    if chosen is None:
        return ("all", "all") if whole else ("calibration", "test")
    return chosen, chosen if chosen in ("all", "val", "train") else "test"


def _check_same_cut(now: dict[str, Any], then: dict[str, Any]) -> None:
    """Raises ValueError if the data are split differently than in training: training samples would be in the test set."""
    for key in sorted((now.keys() | then.keys()) - _FREE):
        if key in then and now.get(key) != then[key]:
            raise ValueError(
                f"the weights were trained on this data set with dataset.{key}={then[key]}, here it is {now.get(key)}: training "
                "samples would be in the test set; give the same value"
            )
