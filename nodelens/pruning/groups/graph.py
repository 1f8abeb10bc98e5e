"""The groups of convolution networks and multilayer perceptrons, from their exported graph."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import nn

from nodelens.network.batch import Batch, logits_of
from nodelens.network.eval_mode import eval_mode
from nodelens.network.groups import Frozen, PruningGroup, PruningGroups
from nodelens.pruning.surgery.mask import masked
from nodelens.pruning.surgery.slice import slice_units
from nodelens.statistics.linalg import exact_products

from .graph_ids import Ids
from .graph_rules import follow
from .graph_walk import Walk

_CLOSE = 0.01  # of the largest output: a wrong piece moves far more, a GPU's convolutions round to a thousandth


def graph_groups(model: nn.Module, batch: Batch) -> PruningGroups:
    """The groups that follow from the model's operations on two samples, and what has to stay, with the reason.

    Channels that meet in an addition, a norm or a depthwise filter are a unit; units of the same layers are a group. What no
    rule understands is frozen. Every group is tried on a copy: a slice has to give what a mask gives. The model is left as it is.
    Raises ValueError where torch.export cannot follow the forward pass.
    Source: Fang et al. 2023, DepGraph, arXiv:2301.12900 (which layers go together).
    """
    two = batch.head(2) if len(batch) > 1 else batch.map(lambda t: t.repeat_interleave(2, 0))
    two = replace(two, kwargs={name: value for name, value in two.kwargs.items() if name not in ("labels", "label")})
    with eval_mode(model), torch.no_grad(), exact_products():
        found = _walked(model, two).groups()
        exact, inexact = ([group for group in found if group.exact == kind] for kind in (True, False))
        failed = {f.what: f for f in chain(_failing(model, two, exact), _failing(model, two, inexact))}
    return PruningGroups(tuple(group for group in found if group.name not in failed), (*found.frozen, *failed.values()))


def _walked(model: nn.Module, batch: Batch) -> Ids:
    try:
        program = torch.export.export(model, batch.args, batch.kwargs)
    except Exception as error:  # whatever a forward pass may raise
        raise ValueError(
            f"torch.export cannot follow the forward pass of {type(model).__name__}: {_first_line(error)}; "
            "name its groups by hand (groups=), or prune a model or a part of one that exports"
        ) from error
    holders: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                holders.setdefault(id(tensor), []).append((path, name))
    signature = program.graph_signature
    parameters = {}
    for placeholder, full in chain(signature.inputs_to_parameters.items(), signature.inputs_to_buffers.items()):
        path, _, name = full.rpartition(".")
        parameters[placeholder] = holders[id(getattr(model.get_submodule(path), name))][0]
    shared = {names[0] for names in holders.values() if len(names) > 1}
    inputs = [name for name in signature.user_inputs if isinstance(name, str)]
    return follow(Walk(model, parameters, shared, inputs), program.graph.nodes).close()


def _failing(model: nn.Module, batch: Batch, groups: Sequence[PruningGroup]) -> list[Frozen]:
    """PruningGroups, all exact or all not, of which units cannot be cut out: all are tried at once, and halves where that fails."""
    why = _fault(model, batch, groups)
    if not why:
        return []
    if len(groups) == 1:
        return [Frozen(groups[0].name, f"{groups[0].n} units: {why}")]
    half = len(groups) // 2
    found = _failing(model, batch, groups[:half]) + _failing(model, batch, groups[half:])
    return found or [Frozen(group.name, f"{group.n} units: with others, {why}") for group in groups]


def _fault(model: nn.Module, batch: Batch, groups: Sequence[PruningGroup]) -> str:
    """What goes wrong on a copy without a part of each group, another one of each; "" if nothing does.

    A forward that runs proves nothing: it may hold numbers of its own, such as a width in a reshape or under a sum.
    """
    removed = {group.name: range(1, group.n, 2 + k % 3) for k, group in enumerate(groups) if group.n > 1}
    if not removed:
        return ""
    try:
        sliced = logits_of(batch.run(slice_units(copy.deepcopy(model), groups, removed)))
    except Exception as error:  # whatever a forward pass may raise
        return f"without some of them the model does not run: {_first_line(error)}"
    with masked(model, groups, removed):
        whole = logits_of(batch.run(model))
    if sliced.shape != whole.shape:
        return f"without some of them the output is {tuple(sliced.shape)}, not {tuple(whole.shape)}"
    size = float(whole.abs().nan_to_num(0, 0, 0).max())
    share = max(_CLOSE, math.sqrt(torch.finfo(whole.dtype).eps if whole.is_floating_point() else 0))
    close = sliced.allclose(whole, rtol=0, atol=share * size, equal_nan=True)
    if groups[0].exact and not close:
        return f"a slice differs from a mask by {float((sliced - whole).abs().max()):.2g} of {size:.2g}"
    return ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
