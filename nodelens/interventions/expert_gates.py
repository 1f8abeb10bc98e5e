"""Gates of units in tensors that several experts share: their columns are multiplied, because no module of theirs can be hooked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nodelens.network.groups import GroupSlice


@contextmanager
def multiplied(model: nn.Module, pairs: Sequence[tuple[GroupSlice, Tensor]]) -> Iterator[None]:
    """Inside the context, an expert's columns are multiplied by gates (units,); on exit they are restored exactly."""
    before = [(piece, piece.of(model).clone()) for piece, _ in pairs]
    try:
        with torch.no_grad():
            for piece, gate in pairs:
                multiply(piece, piece.of(model), gate.detach())
        yield
    finally:
        with torch.no_grad():
            for piece, old in before:
                piece.of(model).copy_(old)


def multiply(piece: GroupSlice, tensor: Tensor, gate: Tensor) -> None:
    """Multiplies the part of each unit by its gate, in place."""
    dim = piece.dim - (piece.entry is not None)
    factors = tensor.new_ones(tensor.shape[dim])
    factors[piece.index.flatten()] = gate.to(tensor)[:, None].expand(piece.index.shape).flatten()
    tensor.mul_(factors.reshape([-1] + [1] * (tensor.ndim - 1 - dim)))
