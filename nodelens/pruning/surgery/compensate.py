"""Compensation for removed units: by a bias, by least squares on the kept weights, or by new batch norm statistics."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nodelens.engine.driver import Driver
from nodelens.engine.dry_run import DryRun
from nodelens.network.batch import Batch
from nodelens.network.groups import GroupSlice, PruningGroup
from nodelens.network.layers import Layer
from nodelens.network.objective import Objective
from nodelens.statistics import Gram, Moments

from .mask import Removed

Compensate = Literal["none", "bias", "least_squares", "batch_norm"]
RIDGE = 1e-3  # of the mean variance of the kept inputs
NORMS = (nn.modules.batchnorm._BatchNorm,)


def check_compensate(compensate: str) -> None:
    """Raises ValueError for an unknown method."""
    if compensate not in get_args(Compensate):
        raise ValueError(f"compensate is {compensate!r}; it is {', '.join(get_args(Compensate))}")


def norms_behind(model: nn.Module, groups: Sequence[PruningGroup], batch: Batch) -> dict[str, str]:
    """{consumer: batch norm that reads its output}, by path."""
    paths = dict.fromkeys(piece.module for group in groups for piece in group.by_role("consumer") if piece.entry is None)
    layers = [Layer(path, model.get_submodule(path)) for path in paths]
    return DryRun.of(model, layers, batch).norms


@torch.no_grad()
def compensate_units(
    model: nn.Module,
    groups: Iterable[PruningGroup],
    removed: Removed,
    moments: Mapping[str, Moments | Gram],
    how: Compensate,
    norms: Mapping[str, str],
) -> list[str]:
    """Compensates the consumers of removed units, in place; returns the modules to which a bias was added.

    With removed set R, kept set K, and m and C the mean and covariance of the inputs of a consumer W. ``bias``: b' = b + W_R m_R;
    for a convolution W is summed over its kernel, which is exact away from padded borders. ``least_squares``, for Linear layers
    and 1x1 convolutions: B = C_RK (C_KK + l tr(C_KK) / k I)^-1, l = 1e-3, W_K' = W_K + W_R B, b' = b + W_R (m_R - B m_K). If a
    batch norm reads the consumer's output, the shift goes into its running mean. Raises ValueError for least squares at any other
    convolution, or without products in the moments.
    Source: bias An et al. 2024, 2312.11983 (FLAP); least squares He et al. 2017, 1707.06168
    """
    by_consumer: dict[str, list[tuple[GroupSlice, Sequence[int]]]] = {}
    for group in groups:
        units = removed.get(group.name, ())
        if not len(units):
            continue
        if group.router is not None:
            raise ValueError(f"{group.name!r}: whole experts cannot be compensated, their tokens go to others; use compensate=none")
        for piece in group.by_role("consumer"):
            if piece.entry is not None:
                raise ValueError(f"{group.name!r}: the inputs of its experts are not measured; use compensate=none or freeze= it")
            if piece.tensor != "weight":
                raise ValueError(
                    f"{group.name!r} is read by {piece.module}, a {type(model.get_submodule(piece.module)).__name__}, which is not "
                    "compensated; use compensate=none or freeze= it"
                )
            by_consumer.setdefault(piece.module, []).append((piece, units))
    added = []
    for path, slices in by_consumer.items():
        module = model.get_submodule(path)
        removed_inputs = torch.zeros(_width(module), dtype=torch.bool)
        for piece, units in slices:
            removed_inputs[piece.places[list(units)].flatten()] = True
        shift = _shift(path, module, removed_inputs, moments[path], how)
        added += [path] * _add_shift(model, path, shift, norms.get(path))
    return added


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, data: Iterable[Any]) -> None:
    """Estimates the running means and variances of all batch norms anew, as plain averages over the batches.

    The result depends on the batch size, as in training. Raises ValueError for a model without batch norms.
    """
    norms = [m for m in model.modules() if isinstance(m, NORMS) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch norm to re-estimate: use compensate=bias or least_squares")
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
        Driver(model, Objective.of(model), answers=False).run(data, _InTraining(norms))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class _InTraining:
    """Keeps modules in training mode while the model runs in eval mode."""

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = modules

    def begin(self, batch: Batch) -> None:
        for module in self.modules:
            module.train()

    def end(self, predictions: Tensor | None) -> None:
        pass


def _width(module: Any) -> int:
    """The number of input channels."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels
    return module.weight.shape[0 if hasattr(module, "nf") else 1]


def _shift(path: str, module: nn.Module, removed: Tensor, moments: Moments | Gram, how: str) -> Tensor:
    """The mean change of the output, to be added back; ``least_squares`` updates the kept weights first."""
    mean = moments.mean.cpu()
    weight = _matrix(module).double().cpu()  # (out, in) or, of a convolution, (out, in, kernel)
    if how == "least_squares":
        if not isinstance(moments, Gram):
            raise ValueError(
                f"{path or type(module).__name__!r} is no Linear layer or 1x1 convolution: least squares needs products of its "
                "inputs at one position; use compensate=bias or batch_norm"
            )
        kept, cov = ~removed, moments.covariance.cpu()
        ridge = RIDGE * cov[kept][:, kept].diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        inner = cov[kept][:, kept] + ridge * torch.eye(int(kept.sum()), dtype=torch.float64)
        b = torch.linalg.solve(inner, cov[kept][:, removed]).T  # (removed, kept)
        change = torch.zeros_like(weight)
        change[:, kept] = weight[:, removed] @ b
        _matrix(module).add_(change.to(_matrix(module)))
        return weight[:, removed] @ (mean[removed] - b @ mean[kept])
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        return _grouped_shift(module, removed, mean)
    return (weight.flatten(2).sum(2) if weight.ndim > 2 else weight)[:, removed] @ mean[removed]


def _grouped_shift(module: Any, removed: Tensor, mean: Tensor) -> Tensor:
    """The shift of a grouped convolution, whose groups of outputs read separate channels."""
    lost = (mean * removed).reshape(module.groups, -1)  # (groups, in / groups)
    weight = module.weight.detach().double().cpu().flatten(2).sum(2).reshape(module.groups, -1, lost.shape[1])
    return torch.einsum("goi,gi->go", weight, lost).flatten()


def _matrix(module: Any) -> Tensor:
    """A view of the weight as (out, in), or (out, in, *kernel) of a convolution that is not pointwise."""
    weight = module.weight.detach()
    if hasattr(module, "nf"):  # GPT-2 stores the transpose
        return weight.T
    return weight.flatten(1) if weight.ndim > 2 and weight[0, 0].numel() == 1 else weight


def _add_shift(model: nn.Module, path: str, shift: Tensor, norm: str | None) -> bool:
    """Adds a shift to a module's output; returns whether the module needed a new bias."""
    module: Any = model.get_submodule(path)
    if module.bias is not None:
        module.bias.add_(shift.to(module.bias))
    elif norm is not None:
        mean = model.get_submodule(norm).running_mean
        mean.sub_(shift.to(mean))  # type: ignore[arg-type, operator]
    else:
        module.bias = nn.Parameter(shift.to(module.weight))
        return True
    return False
