"""One pass of a language model over tokens, with a lens at each of its blocks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.engine.driver import Driver, Progress, opened
from nodelens.interventions.token_model import TokenModel
from nodelens.network.batch import Batch
from nodelens.network.hooks import Capture, Site
from nodelens.network.layers import Layer
from nodelens.network.missing import IGNORE
from nodelens.network.objective import Objective
from nodelens.network.outputs import Output

from .tail import CHECKED, Tail, last_block, tail_of


@dataclass(frozen=True, eq=False)
class PredictingRows:
    """The tokens of a batch that predict another one, n of them.

    Shapes: stream: {block: (B, T, d)}, the residual stream after it; logits (B, T, V), the model's own; following (n,) int64, the
            true next tokens; sample, column (n,) int64, where the tokens stand in the batch
    """

    stream: Mapping[int, Tensor]
    logits: Tensor
    following: Tensor
    sample: Tensor
    column: Tensor
    tail: Tail

    def states(self, block: int, part: slice = slice(None)) -> Tensor:
        """The residual stream after a block, (n, d)."""
        return self.stream[block][self.sample[part], self.column[part]]

    def final(self, part: slice = slice(None)) -> Tensor:
        """The model's logits, (n, V)."""
        return self.logits[self.sample[part], self.column[part]]


See = Callable[[PredictingRows], None]


@dataclass
class _Rows:
    """Hands the rows of each batch to whoever measures."""

    model: nn.Module
    layers: Mapping[int, Layer]
    see: See
    shown: dict[str, Tensor] = field(default_factory=dict)
    tail: Tail | None = None
    batch: Batch | None = None

    def keep(self, site: Site, tensor: Tensor) -> None:
        self.shown[site.layer.name] = tensor.clone()

    def begin(self, batch: Batch) -> None:
        self.batch = batch
        self.shown.clear()

    def end(self, predictions: Tensor | None) -> None:
        batch, last = self.batch, last_block(self.model)
        assert batch is not None
        labels = batch.labels
        if predictions is None or labels is None or labels.ndim != 2 or predictions.shape[:2] != labels.shape:
            shape = None if predictions is None else tuple(predictions.shape)
            raise ValueError(
                f"a lens needs a causal language model: {type(self.model).__name__} puts out {shape} for {batch.describe()}, not "
                "logits (B, T, V) for token ids (B, T)"
            )
        predicts = nn.functional.pad(labels[:, 1:] != IGNORE, (0, 1))
        real = torch.ones_like(predicts) if batch.mask is None else batch.mask
        sample, column = (predicts & real).nonzero(as_tuple=True)
        if len(sample):
            stream = {k: self.shown[layer.name] for k, layer in self.layers.items()}
            if self.tail is None:
                few = sample[:CHECKED], column[:CHECKED]
                self.tail = tail_of(self.model, self.shown[last.name][few], predictions[few])
            self.see(PredictingRows(stream, predictions, labels[sample, column + 1], sample, column, self.tail))


def run_lens(
    model: nn.Module,
    data: Iterable[Any],
    layers: Mapping[int, Layer],
    see: See,
    *,
    output: Output = None,
    progress: Progress = iter,
) -> None:
    """Shows the rows of each batch: the states after each of the blocks, the model's logits and the next tokens.

    Padding, on either side, and tokens whose next one is not predicted are left out. The model runs in evaluation mode and is
    restored. Raises ValueError for a model whose logits are not head(norm(h)), and for data without predictions.
    """
    objective, whole = opened(model, data, Objective.of(model, output, "causal_lm"))
    rows = _Rows(model, layers, see)
    sites = {layer.name: Site(layer, "output") for layer in (*layers.values(), last_block(model))}
    Driver(model, objective, progress=progress).run(whole, rows, Capture(sites.values(), rows.keep))
    if rows.tail is None:
        raise ValueError("the data have no token that predicts another one: give token ids (B, T) of two tokens or more")


def blocks_to_read(model: nn.Module, layers: str | int | Sequence[int]) -> dict[int, Layer]:
    """{index: output} of the chosen blocks. Raises ValueError for an expression or an index out of range."""
    known = TokenModel(model)
    return dict(known.stream(known.blocks(layers)))
