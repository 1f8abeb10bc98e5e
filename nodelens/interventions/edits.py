"""Edits: changes of what passes at a site of a running model; undone when their context ends."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from nodelens.network.arguments import check_arguments
from nodelens.network.eval_mode import eager, uncompiled
from nodelens.network.groups import PruningGroup

from .applying import applied
from .edit_value import Edit

__all__ = ["Edit", "edit"]


@contextmanager
def edit(
    model: nn.Module,
    edits: Edit | Iterable[Edit],
    *,
    groups: Sequence[PruningGroup] = (),
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
) -> Iterator[nn.Module]:
    """Inside the context, what passes at the sites of a model is changed, by all edits in the order given.

    Nothing is written into the model. Observers, such as ``nl.analyze``, see the edited values. Contexts may be nested: the outer
    one's edits come first. ``model.generate`` works inside, with and without a cache. On any exit the model runs as before.

    groups: pruning groups (``nl.find_groups``) that edits may name; their units are edited where they are read, as in ``nl.prune``
    tokenizer, texts: for positions by phrase or pattern; texts: the prompts of each batch, by default the decoded ids
    Raises: ValueError for a model in training mode, a site without a match, and, on exit, for a site that never ran although the
    model did, or an edit that changed no row. Within a call: for indices out of range, and values or texts that do not fit.
    """
    check_arguments("nl.edit", model)
    given, model = model, uncompiled(model)
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is in training mode, in which dropout and batch norms change values: call model.eval() first"
        )
    every = list(edits) if isinstance(edits, Iterable) else [edits]
    others = [each for each in every if not isinstance(each, Edit)]
    if others:
        raise TypeError(f"nl.edit takes edits, such as nl.Edit('fc1', 'zero'), and not {type(others[0]).__name__}")
    if any(not isinstance(group, PruningGroup) for group in groups):
        raise TypeError(
            "nl.edit takes pruning groups as groups=, such as nl.find_groups(model, batch), and edits name them by site"
        )
    with eager(given), applied(model, every, groups, tokenizer, texts) as check:
        yield model
        check()
