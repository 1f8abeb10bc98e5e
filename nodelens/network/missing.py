"""Samples without a target: labels that do not count, and given targets that are not finite."""

from typing import Any

from torch import Tensor

IGNORE = -100  # label of a token or sample without a target, as in cross_entropy


def which_count(labels: Tensor, task: str = "") -> Tensor:
    """Which labels count, bool in their shape: a class or a label of ``multilabel`` that is not -100, a number that is finite."""
    found = labels.isfinite()
    ignores = task == "multilabel" or not (labels.is_floating_point() or task == "regression")
    return found & (labels != IGNORE) if ignores else found


def with_label(labels: Tensor | None, task: str = "") -> Tensor | None:
    """Which samples have a label that counts, (B,) bool; None if all of them do, or if there are no labels.

    A sample of several labels, such as a text, is without a label if none of them counts. The first label of a text is not
    predicted by a causal language model, and does not count.
    """
    if labels is None or not labels.ndim:
        return None
    labels = labels[:, 1:] if task == "causal_lm" and labels.ndim > 1 else labels
    found = which_count(labels, task).reshape(len(labels), -1).any(1)
    return None if bool(found.all()) else found


def with_target(name: Any, target: Tensor) -> Tensor:
    """Which samples have a target, (n,) bool, for the target ``name`` (n,) or (n, t): every column is finite, a class 0 or more."""
    found = target.isfinite().reshape(len(target), -1).all(1)
    return found & (target >= 0) if name == "label" and target.ndim == 1 and not target.is_floating_point() else found
