"""Single-unit ablation: what the loss truly becomes when one unit is zero where it is read."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from nodelens.engine.analyze import device_of
from nodelens.network.batch import Batch, logits_of
from nodelens.network.eval_mode import eval_mode
from nodelens.network.groups import PruningGroup
from nodelens.network.hooks import observed
from nodelens.network.roles import roles_of
from nodelens.network.targets import IGNORE, predictions
from nodelens.pruning.surgery.mask import masked
from nodelens.statistics.processes import reduce_tensor, world
from nodelens.statistics.sample_hash import generator

Progress = Callable[[Iterable[Any]], Iterable[Any]]
_CHUNK = 1 << 22  # logits that are in float64 at once: 32 MB


def sampled(groups: Iterable[PruningGroup], count: int | str, seed: int = 0) -> dict[str, list[int]]:
    """{group: ids} of ``all`` units, or of so many of each group, drawn uniformly without replacement by a generator of its own.

    Raises ValueError for anything but "all" or a number from 0 on.
    """
    if count != "all" and (isinstance(count, (bool, str)) or count < 0):
        raise ValueError(f"ablate is {count!r}; it is 0 for none, a number of units of each group, or all")
    found = {}
    for group in groups:
        order = torch.randperm(group.n, generator=generator(seed, "ablate", group.name))
        found[group.name] = sorted(order[: group.n if isinstance(count, str) else count].tolist())
    return found


@torch.inference_mode(False)
def ablate(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    data: Iterable[Any],
    units: Mapping[str, Sequence[int]],
    *,
    tokens: int | None = 16_384,
    cached: bool = True,
    progress: Progress = iter,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A row a unit, index (layer, unit): ``change``, loss without it less loss with it, nats a prediction; its standard error.

    Samples are read until they hold so many predictions (``tokens``, over processes shared out; None: all) and kept. With
    ``cached`` the blocks before a unit's own do not run again: what the last of them put out is kept, and is used where the
    dense loss comes out the same, sample by sample. change_se: over samples, of the paired difference. Also what it was taken on:
    dense loss, predictions, samples, groups that ran from a block on. Raises ValueError where there is nothing to predict.
    """
    with eval_mode(model), torch.no_grad():
        held = _Held(model, data, tokens)
        rows = [held.changes(group, units[group.name], cached, progress) for group in groups if len(units[group.name])]
    about = {"loss": held.loss, "predictions": held.predictions, "samples": held.samples, "from_block": held.shortened}
    if not rows:
        empty = pd.MultiIndex.from_tuples([], names=["layer", "unit"])
        return pd.DataFrame(columns=["change", "change_se"], index=empty, dtype=float), about
    return pd.concat(rows), about


class _Held:
    """Batches in hand, the dense loss of their samples, and what one block put out for each."""

    def __init__(self, model: nn.Module, data: Iterable[Any], tokens: int | None):
        self.model, self.device = model, device_of(model)
        self.frames: list[Batch] = []
        self.blocks = [model.get_submodule(block.name) for block in roles_of(model).blocks]
        self.names = [block.name for block in roles_of(model).blocks]
        self.at, self.outputs = 0, list[Any]()  # blocks before this one stand still; what the last of them puts out
        self.shortened: list[str] = []
        left = math.inf if tokens is None else math.ceil(tokens / world()[1])
        for batch in data if left > 0 else ():
            batch = Batch.of(batch).to(self.device)
            ends = batch.tokens.cumsum(0)
            whole = batch.head(int((ends < left).sum()) + 1)  # the sample that meets the number is the last
            self.frames.append(whole)
            left -= int(whole.tokens.sum())
            if left <= 0:
                break
        every = [self._run(k, 0) for k in range(len(self.frames))]
        self.dense = torch.cat([nats for nats, _ in every]) if every else torch.zeros(0, dtype=torch.float64)
        self.counts = torch.cat([count for _, count in every]) if every else torch.zeros(0, dtype=torch.float64)
        sums = reduce_tensor(torch.stack([self.dense.sum(), self.counts.sum(), (self.counts > 0).double().sum()]).to(self.device))
        nats, predicted, samples = sums.tolist()
        if not predicted:
            raise ValueError("the evaluation data are empty: nothing to predict, and no loss that a unit could change")
        self.loss, self.predictions, self.samples = nats / predicted, int(predicted), int(samples)

    def changes(self, group: PruningGroup, units: Sequence[int], cached: bool, progress: Progress) -> pd.DataFrame:
        start = self._start(group) if cached else 0
        sums = torch.zeros(len(units), 3, dtype=torch.float64)  # of d, d^2, d t over samples
        for row, unit in enumerate(progress(units)):
            with masked(self.model, [group], {group.name: [unit]}):
                d = torch.cat([self._run(k, start)[0] for k in range(len(self.frames))] or [self.dense]) - self.dense
            sums[row] = torch.stack([d.sum(), d @ d, d @ self.counts])
        d, dd, dt = reduce_tensor(sums.to(self.device)).cpu().unbind(1)
        tt = float(reduce_tensor((self.counts @ self.counts).reshape(1).to(self.device)))
        change = d / self.predictions
        spread = (dd - 2 * change * dt + change.square() * tt).clamp_min(0) * self.samples / max(self.samples - 1, 1)
        error = spread.sqrt() / self.predictions if self.samples > 1 else torch.full_like(change, torch.nan)
        index = pd.MultiIndex.from_product([[group.name], units], names=["layer", "unit"])
        return pd.DataFrame({"change": change.numpy(), "change_se": error.numpy()}, index=index)

    def _start(self, group: PruningGroup) -> int:
        """The block that holds all that reads a group, from which on the model may run; 0 where it runs whole."""
        paths = {piece.module for piece in group.by_role("consumer")}
        at = next((k for k, name in enumerate(self.names) if all(path.startswith(f"{name}.") for path in paths)), 0)
        if at and at != self.at and not self._kept_before(at):
            return 0
        if at:
            self.shortened.append(group.name)
        return at

    def _kept_before(self, at: int) -> bool:
        """Keeps what the block before ``at`` puts out; whether the dense loss is the same when the model runs from there."""
        start = self.at if 0 < self.at < at else 0
        outputs, calls = [], 0
        for k in range(len(self.frames)):
            seen: list[Any] = []

            def see(module: nn.Module, args: tuple, kwargs: dict, output: Any, seen: list[Any] = seen) -> None:
                seen.append(_copy(output))

            with observed([self.blocks[at - 1]], see):
                self._run(k, start)
            calls = max(calls, len(seen))
            outputs.append(seen[-1] if seen else None)
        self.at, self.outputs = at, outputs
        if calls == 1 and all(output is not None for output in outputs):
            again = [self._run(k, at)[0] for k in range(len(self.frames))]
            if torch.allclose(torch.cat(again), self.dense, rtol=1e-9, atol=1e-9):
                return True
        self.at, self.outputs = 0, []
        return False

    def _run(self, k: int, start: int) -> tuple[Tensor, Tensor]:
        """Nats and predictions of each sample of a batch, (B,) float64 on the CPU."""
        batch = self.frames[k]
        with standing_still(self.blocks[:start], self.outputs[k] if start else None):
            logits = logits_of(batch.run(self.model))
        return nats(logits, batch.labels)


def nats(logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over each sample's predictions, and how many there are, (B,) float64 on the CPU.

    Raises ValueError for labels that do not fit the logits, or none.
    """
    z, y = predictions(logits, labels)
    found = torch.zeros(2, len(y), dtype=torch.float64)
    for where in (y != IGNORE).nonzero().split(max(1, _CHUNK // z.shape[-1])):
        place = where.unbind(1)
        own = z[place].double()
        value = own.logsumexp(-1) - own.gather(-1, y[place][:, None])[:, 0]
        found.index_add_(1, place[0].cpu(), torch.stack([value, torch.ones_like(value)]).cpu())
    return found[0], found[1]


@contextmanager
def standing_still(modules: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Inside, modules put out a copy of ``output`` without being run; whatever calls them does not see the difference."""
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.__dict__["forward"] = lambda *args, **kwargs: _copy(output)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def _copy(output: Any) -> Any:
    """What a block put out, in tensors of its own: the stream may be added to in place. None where it is not understood."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return tuple(value.clone() if isinstance(value, Tensor) else value for value in output)
    return None
