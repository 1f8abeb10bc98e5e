"""The tokens of a pass: which of them count, an exact limit on their number, and a sample that does not depend on batching."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor

from nodelens.engine.saved_work import Rest
from nodelens.network.batch import Batch
from nodelens.network.hooks import Site
from nodelens.statistics.processes import reduce_tensor, world
from nodelens.statistics.sample_hash import content_hashes, mix

_LAST = torch.iinfo(torch.int64).max  # sorts after every key
_NUMBERED = {"ids", "sample_ids"}


@dataclass(frozen=True)
class TokenBatch:
    """A batch of B samples of T tokens.

    Shapes: inputs: arguments of the model by name, ``x`` for one without a name, and select (B, T) if the batch has it;
            mask (B, T) bool, true where a token counts; keys (B, T) int64, a hash of the token that does not depend on batching,
            order or padding
    """

    inputs: dict[str, Any]
    mask: Tensor
    keys: Tensor

    @classmethod
    def of(cls, raw: Any, takes: Mapping[str, Any]) -> Self:
        """Reads what ``Batch.of`` reads, without labels. ``takes``: further arguments of the model by name, and their values.

        Left padding is moved to the right, so that positions count from the first token in every model, with or without
        position_ids. Raises ValueError for a batch without tokens (B, T), or with a mask of another shape.
        """
        batch = Batch.of(raw)
        tokens = batch.args[0] if batch.args else batch.kwargs.get("input_ids", batch.kwargs.get("inputs_embeds"))
        if not isinstance(tokens, Tensor) or tokens.ndim != (3 if tokens.is_floating_point() else 2):
            raise ValueError(
                f"a batch has {batch.describe()}; the geometry of a language model is measured on tokens, input_ids (B, T). "
                "Use nl.analyze for other networks"
            )
        shape = tokens.shape[:2]
        given = batch.kwargs.get("attention_mask")
        real = torch.ones(shape, dtype=torch.bool) if given is None else given.bool().cpu()
        if real.shape != shape:
            raise ValueError(f"the attention_mask is {tuple(real.shape)}, the tokens are {tuple(shape)}: give one value per token")
        mask = real if batch.mask is None else batch.mask.cpu()
        place = real.cumsum(1) - 1
        named = isinstance(raw, Mapping) and not _NUMBERED.isdisjoint(raw)
        numbered = named or getattr(raw, "ids", None) is not None
        sample = batch.hashes if numbered else _content(tokens.cpu(), real, place)
        first = {"input_ids" if "input_ids" in takes else "x": tokens} if batch.args else {}
        extra = {name: value for name, value in takes.items() if value is not None}
        chosen = {"select": mask} if isinstance(raw, Mapping) and "select" in raw else {}
        return cls(extra | batch.kwargs | first | chosen, mask, mix(sample[:, None], place))._left_aligned(real)

    def _left_aligned(self, real: Tensor) -> Self:
        """Moves the padding before the first token of each sample to its end."""
        lead = real.long().argmax(1, keepdim=True)
        if not bool(lead.any()):
            return self
        rows, length = torch.arange(len(lead))[:, None], self.mask.shape[1]
        turn = (torch.arange(length) + lead) % length

        def shift(value: Any) -> Any:
            fits = isinstance(value, Tensor) and value.shape[:2] == self.mask.shape
            return value[rows.to(value.device), turn.to(value.device)] if fits else value

        return type(self)({k: shift(v) for k, v in self.inputs.items()}, shift(self.mask), shift(self.keys))

    @property
    def hashes(self) -> Tensor:
        """One hash per sample, (B,) int64, of its tokens that count."""
        return self.keys.where(self.mask, 0).sum(1)  # wraps around

    def __len__(self) -> int:
        """Number of tokens that count."""
        return int(self.mask.sum())

    def take(self, rows: slice, places: slice = slice(None)) -> Self:
        """The batch restricted to some samples and positions."""
        shape = self.mask.shape

        def part(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.ndim or len(value) != shape[0]:
                return value
            return value[rows, places] if value.shape[:2] == shape else value[rows]

        return type(self)({k: part(v) for k, v in self.inputs.items()}, self.mask[rows, places], self.keys[rows, places])

    def beginning(self, tokens: int) -> Self | None:
        """The first positions of every sample; None if there are no more, or if an input has something else than one value each."""
        every = [value for value in self.inputs.values() if isinstance(value, Tensor)]
        cut = self.mask.shape[1] > tokens and all(value.shape[:2] == self.mask.shape for value in every)
        return self.take(slice(None), slice(tokens)) if cut else None

    def first(self, count: int) -> list[Self]:
        """The first ``count`` tokens that count: a batch of whole samples, and the sample in which they end, cut there."""
        ends = self.mask.sum(1).cumsum(0)
        whole = int((ends <= count).sum())
        left = count - (int(ends[whole - 1]) if whole else 0)
        parts = [self.take(slice(whole))] if whole else []
        if left:
            last = int((self.mask[whole].cumsum(0) < left).sum())
            parts.append(self.take(slice(whole, whole + 1), slice(last + 1)))
        return parts


def _content(tokens: Tensor, mask: Tensor, place: Tensor) -> Tensor:
    """One key per sample, (B,): a hash of its unpadded tokens and their order."""
    ids = content_hashes(tokens.flatten(0, 1)).reshape(mask.shape) if tokens.is_floating_point() else tokens.long()
    return mix(mix(ids, place).where(mask, 0).sum(1))


class TokenReader:
    """The batches of a loader up to exactly ``limit`` tokens; None for all of them.

    The last sample is cut after the last token that counts. In a causal model this changes no earlier token, so the result does
    not depend on the batch size. Batches that are not needed are not loaded.
    """

    def __init__(self, data: Iterable[Any], takes: Mapping[str, Any], limit: int | None = None):
        self.tokens = self.batches = 0  # read so far
        self.limit = math.inf if limit is None else limit
        self._remaining = _up_to(data, takes, self.limit)

    def head(self) -> TokenBatch | None:
        """The first batch, without consuming it; None if there are no tokens."""
        head = next(self._remaining, None)
        if head is not None:
            self._remaining = chain([head], self._remaining)
        return head

    def iterate(self, *listeners: Callable[[TokenBatch], None], rest: Rest = iter) -> Iterator[dict[str, Any]]:
        """The model inputs of each batch. The listeners get each batch first. rest: picks the batches that are still to be read."""
        for batch in rest(self._remaining):
            self.tokens += len(batch)
            self.batches += 1
            for listener in listeners:
                listener(batch)
            yield batch.inputs


def _up_to(data: Iterable[Any], takes: Mapping[str, Any], left: float) -> Iterator[TokenBatch]:
    for raw in data if left > 0 else ():
        batch = TokenBatch.of(raw, takes)
        if len(batch) >= left:
            yield from batch.first(int(left))
            return
        left -= len(batch)
        if len(batch):
            yield batch


class TokenSample:
    """Rows of the same tokens at every site: those with the ``limit`` smallest keys. Of tokens with equal keys, one is kept."""

    def __init__(self, limit: int):
        self.limit = limit
        self.keys = torch.empty(0, dtype=torch.int64)
        self.rows: dict[str, Tensor] = {}  # by layer, (r, width), in the order of the keys
        self._stay = self._place = torch.empty(0, dtype=torch.int64)
        self._samples = 0

    def state_dict(self) -> dict[str, Any]:
        """The sample after a batch has ended."""
        return {"keys": self.keys, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what ``state_dict`` returned."""
        self.keys, self.rows = state["keys"], state["rows"]

    def begin(self, batch: TokenBatch) -> None:
        """Decides, before the model runs, which tokens of a batch enter the sample and which leave it."""
        place = batch.mask.flatten().nonzero()[:, 0]
        if len(self.keys) == self.limit:
            place = place[batch.keys.flatten()[place] < self.keys.max()]
        keys = torch.cat([self.keys, batch.keys.flatten()[place]])
        order = _smallest(keys, self.limit).sort().values
        held = len(self.keys)
        self.keys, self._stay, self._place = keys[order], order[order < held], place[order[order >= held] - held]
        self._samples = len(batch.mask)

    def see(self, site: Site, tensor: Tensor) -> None:
        """Adds the rows of a site to the sample."""
        raw = site.layer.rows(tensor, self._samples).raw  # (B, width, T)
        fresh = raw.transpose(1, 2).reshape(-1, raw.shape[1])[self._place.to(raw.device)]
        held = self.rows.get(site.layer.name)
        self.rows[site.layer.name] = fresh if held is None else torch.cat([held[self._stay.to(raw.device)], fresh])

    def gathered(self, widths: Mapping[str, int], device: torch.device) -> dict[str, Tensor]:
        """{layer: (r, width)}, the sample over all processes, in the order of the keys. Collective."""
        keys = _gather(_padded(self.keys, self.limit, _LAST), device)
        order = _smallest(keys, self.limit)
        order = order[keys[order] != _LAST]
        found = {}
        for name, width in widths.items():
            own = self.rows.get(name, torch.empty(0, width)).cpu()
            own = own.double() if world()[1] > 1 else own  # one dtype, also in a process without rows
            found[name] = _gather(_padded(own, self.limit, 0), device)[order]
        return found


def _smallest(keys: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` smallest distinct keys, ascending."""
    order = torch.argsort(keys, stable=True)
    fresh = torch.ones_like(order, dtype=torch.bool)
    fresh[1:] = keys[order][1:] != keys[order][:-1]
    return order[fresh][:count]


def _padded(tensor: Tensor, length: int, value: int) -> Tensor:
    rest = tensor.new_full((length - len(tensor), *tensor.shape[1:]), value)
    return torch.cat([tensor, rest])


def _gather(tensor: Tensor, device: torch.device) -> Tensor:
    """The rows of every process, concatenated, on the CPU. An all-reduce in which each process fills its own slot."""
    rank, processes = world()
    every = tensor.new_zeros(processes, *tensor.shape)
    every[rank] = tensor
    return reduce_tensor(every.to(device)).cpu().flatten(0, 1)
