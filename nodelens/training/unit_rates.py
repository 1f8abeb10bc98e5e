"""Learning rates by the type of a unit: the updates of the parameters that make a unit are scaled."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nodelens.network.groups import GroupSlice, PruningGroup
from nodelens.pruning.criteria.type_rules import TypeRules

Factors = Mapping[str, Tensor]  # {name of a parameter: factor of its updates, broadcast to its shape}


def update_factors(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    rules: TypeRules,
    removed: Mapping[str, Sequence[int]],
    sliced: bool,
) -> dict[str, Tensor]:
    """The factors of the parameters that make the units of each group, and of the norms tied to them.

    groups: of the dense model. sliced: whether the removed units are gone from the tensors. Raises ValueError as ``TypeRules``.
    """
    parameters = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for group in groups:
        labels = rules.labels([group])[group.name]
        rates = torch.tensor([float(rules.rates.get(label, 1.0)) for label in labels])
        gone = removed.get(group.name, ()) if sliced else ()
        for piece in group.by_role("producer", "tied"):
            if piece.name in parameters and piece.entry is None:
                factor = _along(piece, rates, gone, parameters[piece.name])
                found[piece.name] = found[piece.name] * factor if piece.name in found else factor
    return found


@contextmanager
def scaled_updates(model: nn.Module, factors: Factors) -> Iterator[None]:
    """Within it, a step of an optimiser changes parameters by its update times their factor.

    This equals a learning rate times the factor, for any optimiser whose update is proportional to it, such as SGD and Adam.
    """
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in factors}
    yield
    with torch.no_grad():
        for name, factor in factors.items():
            parameter = parameters[name]
            parameter.copy_(torch.lerp(before[name], parameter, factor.to(parameter).expand_as(parameter)))


def _along(piece: GroupSlice, rates: Tensor, gone: Sequence[int], parameter: Tensor) -> Tensor:
    """The rates of the units along the dimension of a slice, 1 for other entries, shaped to broadcast."""
    kept = [unit for unit in range(len(rates)) if unit not in set(gone)]
    lost = piece.index[list(gone)].flatten() if len(gone) else torch.empty(0, dtype=torch.int64)
    whole = torch.ones(parameter.shape[piece.dim] + len(lost))
    whole[piece.index[kept].flatten()] = rates[kept].repeat_interleave(piece.index.shape[1])
    stays = torch.ones(len(whole), dtype=torch.bool)
    stays[lost] = False
    shape = [1] * parameter.ndim
    shape[piece.dim] = -1
    return whole[stays].reshape(shape)
