"""Where the graph of derivatives starts: the inputs of the model, or the output of a Linear that alone reads them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from nodelens.metrics.derivative import Derivative
from nodelens.network.batch import Batch
from nodelens.network.derivatives import Place, Roots
from nodelens.network.random_vectors import rows_of_tokens, signs
from nodelens.network.tail import linear_entry


@dataclass(frozen=True)
class GraphStart:
    """What layers are differentiated with respect to.

    places: the tensors, (B, ...) each; shapes: of one sample; basis: (r, units), where the place is the output of a Linear with
    weight W, the rows R with R'R = WW', so that vectors R'e_k have the same products as the inputs' own basis; gram: WW', (units,
    units) float64; both None elsewhere
    """

    places: list[Place]
    shapes: list[torch.Size]
    like: Tensor
    basis: Tensor | None = None
    gram: Tensor | None = None

    @classmethod
    def of(
        cls, edges: Sequence[GradientEdge], embedded: Sequence[Tensor], batch: Batch, roots: Roots | None = None
    ) -> "GraphStart | None":
        """The floating-point inputs of a batch or, without any, the output of the first embedding; None if there is neither."""
        named = [v for k, v in batch.kwargs.items() if not k.endswith("mask")]
        leaves = [v for v in (*batch.args, *named) if isinstance(v, Tensor) and v.requires_grad and len(v) == len(batch)]
        leaves = leaves or list(embedded[:1])
        if not leaves:
            return None
        entry = linear_entry(edges, leaves[0]) if len(leaves) == 1 and leaves[0].is_leaf else None
        if entry is not None and leaves[0][0].numel() == entry[1].shape[0] > entry[1].shape[1]:  # it reads a sample whole
            r, gram = (roots or Roots()).of(entry[1])
            return cls([entry[0]], [r.shape[1:]], leaves[0].detach(), r.to(leaves[0]), gram)
        return cls(list(leaves), [leaf.shape[1:] for leaf in leaves], leaves[0].detach())

    @property
    def count(self) -> int:
        """Number of vectors of a basis."""
        return sum(shape.numel() for shape in self.shapes) if self.basis is None else len(self.basis)

    def vectors(self, derivative: Derivative, batch: Batch, seed: int, size: int) -> Iterator[tuple[int, list[Tensor]]]:
        """Vectors (k, B, *shape) for each place, at most ``size`` at once, with the fold that they belong to."""
        if derivative.method != "probes":
            for a in range(0, self.count, size):
                unit = torch.eye(self.count, dtype=self.like.dtype, device=self.like.device)[a : a + size, None]
                yield 0, [part.expand(-1, len(batch), *part.shape[2:]) for part in self._shaped(unit)]
            return
        m = derivative.vectors
        for fold in range(derivative.folds):
            every = range(fold, m, derivative.folds)
            for a in range(0, len(every), size):
                yield fold, self._shaped(self._signs(batch, every[a : a + size], seed) / m**0.5)

    def weighted(self, slopes: list[Tensor]) -> list[Tensor]:
        """Vectors from slopes at the places, so that the product of both is that at the inputs."""
        return slopes if self.gram is None else [slopes[0] @ self.gram.to(slopes[0])]

    def _signs(self, batch: Batch, numbers: range, seed: int) -> Tensor:
        """Random signs, (k, B, count); of tokens, by their number without padding."""
        tokens = self.basis is None and len(self.shapes) == 1 and batch.mask is not None and len(self.shapes[0]) == 2
        if tokens and batch.mask is not None and batch.mask.shape[1] == self.shapes[0][0]:
            rows = rows_of_tokens(batch.mask, *batch.mask.shape)
            return signs(batch.hashes, rows, self.shapes[0][1], numbers, seed, "inputs", self.like).flatten(2)
        first = torch.zeros(len(batch), 1, dtype=torch.int64)
        return signs(batch.hashes, first, self.count, numbers, seed, "inputs", self.like)[:, :, 0]

    def _shaped(self, flat: Tensor) -> list[Tensor]:
        if self.basis is not None:
            return [flat @ self.basis]
        parts = flat.split([shape.numel() for shape in self.shapes], 2)
        return [part.reshape(*part.shape[:2], *shape) for part, shape in zip(parts, self.shapes, strict=True)]
