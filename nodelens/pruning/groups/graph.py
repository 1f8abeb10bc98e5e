"""The pruning groups of convolutional networks and multilayer perceptrons, from their exported graph."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from nodelens.messages import first_line
from nodelens.network.adapters import MERGE, has_adapters
from nodelens.network.batch import Batch
from nodelens.network.eval_mode import copy_of, eval_mode, training_mode
from nodelens.network.failed_forward import check_forward
from nodelens.network.groups import Frozen, PruningGroup, PruningGroups
from nodelens.network.outputs import tensors_of
from nodelens.pruning.surgery.mask import masked
from nodelens.pruning.surgery.slice import slice_units
from nodelens.statistics.linalg import exact_products

from .adapters import freeze_ranks, tie_idle
from .graph_ids import Ids
from .graph_products import settle
from .graph_rules import follow
from .graph_walk import Walk
from .off_path import freeze_unread, unread
from .recorded import Operations, operations, why_unclear

WAY_OUT = "give its groups yourself (custom_groups=), or prune a submodule that can be exported"
_CLOSE = 0.01  # of the largest output: a wrong slice changes far more, rounding on a GPU about a thousandth


def graph_groups(model: nn.Module, batch: Batch) -> PruningGroups:
    """The groups that follow from the model's operations on two samples, and what is frozen, with the reason.

    Channels coupled by an addition, a norm or a depthwise filter form one unit; units of the same layers form one group.
    Operations without a rule freeze their channels. Training is traced, too, where it reads parameters that evaluation does not,
    such as those of an auxiliary head; what neither reads is frozen, and so are the channels that it may read. Every group is
    tested on a copy of the model: slicing must give the same output as masking, and must not stop training. The model itself is
    not changed. Raises ValueError if torch.export cannot trace the forward pass.
    Source: Fang et al. 2023, DepGraph, arXiv:2301.12900 (which layers are coupled).
    """
    two = batch.head(2) if len(batch) > 1 else batch.map(lambda t: t.repeat_interleave(2, 0))
    with eval_mode(model), torch.no_grad(), exact_products():
        ids = _traced(model, two)
        settled = settle(ids).groups()
        found = _tested(model, two, settled)
        failed = {f.what for f in found.frozen}
        stuck = {piece.module for group in settled if group.name in failed for piece in group.slices}
        kinds = {
            type(model.get_submodule(p.module))
            for p in ids.products
            if any(f"{path}.".startswith(f"{p.module}.") for path in stuck)
        }
        if kinds:
            alike = {path for path, module in model.named_modules() if type(module) in kinds}
            again = _tested(model, two, settle(ids, alike).groups())
            found = max(found, again, key=lambda groups: groups.coverage(model))
    return found


def _tested(model: nn.Module, batch: Batch, found: PruningGroups) -> PruningGroups:
    """The groups without which the model runs as it should; the others are frozen."""
    exact, approximate = ([group for group in found if group.exact == kind] for kind in (True, False))
    failed = {f.what: f for f in chain(_failing(model, batch, exact), _failing(model, batch, approximate))}
    return PruningGroups(tuple(group for group in found if group.name not in failed), (*found.frozen, *failed.values()))


def _traced(model: nn.Module, batch: Batch) -> Ids:
    """The channels in evaluation and, if it reads more parameters, in training; frozen are those that other parameters may read."""
    ids, read = Ids(), set[int]()
    try:
        _follow(model, operations(model, batch), ids, read)
    except Exception as error:  # a forward pass may raise anything, and sizes may depend on values
        check_forward(model, batch)
        if wrong := batch.wrong_dtype(model, error):
            raise ValueError(wrong) from error
        why = why_unclear(model, batch) or first_line(error)
        raise ValueError(
            f"torch.export cannot trace the forward pass of {type(model).__name__}: {why}; "
            f"{MERGE if has_adapters(model) else WAY_OUT}"
        ) from error
    read |= tie_idle(ids, model, read)
    if unread(model, read):
        ids.evaluated = frozenset(ids.places)
        why = ""
        copied = copy_of(model)  # norms change their statistics
        try:
            with training_mode(copied):
                found = operations(copied, batch)
        except Exception as error:  # a forward pass may raise anything
            why = f", and training cannot be traced ({first_line(error)})"
        else:
            _follow(model, found, ids, read)
        freeze_unread(ids, model, unread(model, read), why)
    freeze_ranks(ids, model)
    return ids


def _follow(model: nn.Module, found: Operations, ids: Ids, read: set[int]) -> None:
    """Adds operations to the ids, and the parameters that they read."""
    holders, modules = dict[int, list[tuple[str, str]]](), dict(model.named_modules(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                holders.setdefault(id(tensor), []).append((path, name))
    used = {node.name for node in found.nodes if node.users}
    parameters = {}
    for placeholder, full in found.stored.items():
        path, _, name = full.rpartition(".")
        tensor = getattr(modules[path], name)
        parameters[placeholder] = holders[id(tensor)][0]
        read |= {id(tensor)} if placeholder in used else set()
    shared = {names[0] for names in holders.values() if len(names) > 1}
    follow(Walk(model, parameters, shared, found.inputs, ids), found.nodes).close()


def _failing(model: nn.Module, batch: Batch, groups: Sequence[PruningGroup]) -> list[Frozen]:
    """The groups whose units cannot be sliced away: all are tested at once, then, if that fails, the suspects and the others.

    The groups given are all exact or all not exact. Suspects are the groups of the module that failed, or else the first half.
    """
    why, where = _failure(model, batch, groups)
    if not why:
        return []
    if len(groups) == 1:
        return [Frozen(groups[0].name, f"{groups[0].n} units: {why}")]
    suspects = [g for g in groups if where and any(f"{p.module}.".startswith(f"{where}.") for p in g.slices)]
    if not 0 < len(suspects) < len(groups):
        suspects = list(groups[: len(groups) // 2])
    others = [group for group in groups if group not in suspects]
    failing = _failing(model, batch, suspects) + _failing(model, batch, others)
    return failing or [Frozen(group.name, f"{group.n} units: sliced with other groups, {why}") for group in groups]


def _failure(model: nn.Module, batch: Batch, groups: Sequence[PruningGroup]) -> tuple[str, str]:
    """What fails on a copy without some units of each group, and in which module if that is known; "" if nothing does.

    A forward pass that runs is not enough: it may contain constants such as a width in a reshape or as a divisor.
    """
    removed = {group.name: range(1, group.n, 2 + k % 3) for k, group in enumerate(groups) if group.n > 1}
    if not removed:
        return "", ""
    copied = _copy(model)
    try:
        sliced = tensors_of(batch.run(slice_units(copied, groups, removed)))
    except Exception as error:  # a forward pass may raise anything
        return f"without some of them the model does not run: {first_line(error)}", _raised_in(copied, error)
    with masked(model, groups, removed):
        expected = tensors_of(batch.run(model))
    differing = (_difference(a, b, groups[0].exact) for a, b in zip(sliced, expected, strict=True))
    if why := next((why for why in differing if why), ""):
        return why, ""
    if (why := _failure_with_cache(copied, batch)) and not _failure_with_cache(model, batch):
        return f"without some of them the model does not run with its cache: {why}", ""
    if why := _untrainable(copied, batch):
        return ("", "") if _untrainable(_copy(model), batch) else (f"without some of them training does not run: {why}", "")
    return "", ""


def _copy(model: nn.Module) -> nn.Module:
    """A copy with the same parameters, which slicing replaces, and with buffers of its own, which training changes."""
    return copy_of(model, model.parameters())


def _raised_in(model: nn.Module, error: BaseException) -> str:
    """The path of the innermost module whose method raised an error; "" if it is the model itself or not known."""
    paths, found = {id(module): path for path, module in model.named_modules()}, ""
    trace = error.__traceback__
    while trace is not None:
        found = paths.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found


def _difference(sliced: Tensor, expected: Tensor, exact: bool) -> str:
    """How an output of the sliced model differs from that of the masked one; "" if it does not."""
    if sliced.shape != expected.shape:
        return f"without some of them the output is {tuple(sliced.shape)}, not {tuple(expected.shape)}"
    size = float(expected.abs().nan_to_num(0, 0, 0).max())
    share = max(_CLOSE, math.sqrt(torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0))
    close = sliced.allclose(expected, rtol=0, atol=share * size, equal_nan=True)
    if exact and not close:
        return f"slicing and masking differ by {float((sliced - expected).abs().max()):.2g}; the largest output is {size:.2g}"
    return ""


def _failure_with_cache(model: nn.Module, batch: Batch) -> str:
    """What fails if a model keeps a cache of past tokens, which the batch tells it not to; "" if nothing does."""
    if "use_cache" not in batch.kwargs:
        return ""
    try:
        replace(batch, kwargs={name: value for name, value in batch.kwargs.items() if name != "use_cache"}).run(model)
    except Exception as error:  # a forward pass may raise anything
        return first_line(error)
    return ""


def _untrainable(model: nn.Module, batch: Batch) -> str:
    """What fails in a forward pass of a copy in training mode; "" if nothing does."""
    try:
        with training_mode(model):
            batch.run(model)
    except Exception as error:  # a forward pass may raise anything
        return first_line(error)
    return ""
