"""A tensor that passes in a model, with its place in the graph of derivatives."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Traced(NamedTuple):
    """A captured tensor with its place in the graph, which stays that of this value if a later operation overwrites it."""

    value: Tensor
    edge: GradientEdge | None  # None where no graph is recorded
    leaf: Tensor | None = None  # the tensor, if the graph begins at it because of this capture

    @classmethod
    def of(cls, tensor: Tensor) -> "Traced":
        """Where the graph does not reach the tensor, it begins there."""
        begins = torch.is_grad_enabled() and not tensor.requires_grad and tensor.is_floating_point()
        if begins:
            tensor.requires_grad_()
        return cls(tensor.detach(), get_gradient_edge(tensor) if tensor.requires_grad else None, tensor if begins else None)
