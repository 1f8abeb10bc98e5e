"""Single-unit ablation: the change of the loss when one unit is set to zero where it is read."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from nodelens.engine.driver import Driver, device_of, opened
from nodelens.network.batch import Batch
from nodelens.network.eval_mode import eval_mode
from nodelens.network.groups import PruningGroup
from nodelens.network.hooks import observed
from nodelens.network.missing import IGNORE
from nodelens.network.objective import Objective
from nodelens.network.roles import roles_of
from nodelens.pruning.surgery.mask import masked
from nodelens.statistics.processes import reduce_tensor, world
from nodelens.statistics.sample_hash import generator

Progress = Callable[[Iterable[Any]], Iterable[Any]]
_CHUNK = 1 << 22  # logits in float64 at a time: 32 MB


def sample_units(groups: Iterable[PruningGroup], count: int | str, seed: int = 0) -> dict[str, list[int]]:
    """{group: ids} of ``all`` units, or of ``count`` units per group, drawn uniformly without replacement from the seed.

    Raises ValueError for a count that is neither "all" nor a number >= 0.
    """
    if count != "all" and (isinstance(count, (bool, str)) or count < 0):
        raise ValueError(f"ablate is {count!r}; it must be 0 (no ablation), a number of units per group, or all")
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
    objective: Objective | None = None,
    tokens: int | None = 16_384,
    cached: bool = True,
    progress: Progress = iter,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """One row per unit, index (layer, unit): ``change``, loss without minus loss with the unit, in nats per prediction; its error.

    Samples are read until they have ``tokens`` predictions (divided over processes; None: all) and are kept in memory. With
    ``cached`` the blocks before the unit's block do not run again: the output of the last of them is cached. The cache is used
    only if it reproduces the dense loss of every sample. objective: what the model predicts; None: as the model tells. change_se:
    standard error over samples of the paired difference. Also returns the dense loss, predictions, samples and cached groups.
    Raises ValueError if there is nothing to predict.
    """
    with eval_mode(model), torch.no_grad():
        held = _HeldBatches(model, data, objective or Objective.of(model), tokens)
        rows = [held.changes(group, units[group.name], cached, progress) for group in groups if len(units[group.name])]
    about = {"loss": held.loss, "predictions": held.predictions, "samples": held.samples, "from_block": held.shortened}
    if not rows:
        empty = pd.MultiIndex.from_tuples([], names=["layer", "unit"])
        return pd.DataFrame(columns=["change", "change_se"], index=empty, dtype=float), about
    return pd.concat(rows), about


class _HeldBatches:
    """The evaluation batches, the dense loss of their samples, and the cached output of one block for each."""

    def __init__(self, model: nn.Module, data: Iterable[Any], objective: Objective, tokens: int | None):
        self.model, self.device = model, device_of(model)
        self.batches: list[Batch] = []
        self.blocks = [model.get_submodule(block.name) for block in roles_of(model).blocks]
        self.names = [block.name for block in roles_of(model).blocks]
        self.at, self.outputs = 0, list[Any]()  # first block that runs; cached outputs of the block before it
        self.shortened: list[str] = []
        left = math.inf if tokens is None else math.ceil(tokens / world()[1])
        self.objective, data = opened(model, data if left > 0 else (), objective)
        for batch in Driver(model, self.objective).batches(data):
            ends = batch.predicted.cumsum(0)
            whole = batch.head(int((ends < left).sum()) + 1)  # up to the sample that reaches the limit
            self.batches.append(whole)
            left -= int(whole.predicted.sum())
            if left <= 0:
                break
        every = [self._run(k, 0) for k in range(len(self.batches))]
        self.dense = torch.cat([nats for nats, _ in every]) if every else torch.zeros(0, dtype=torch.float64)
        self.counts = torch.cat([count for _, count in every]) if every else torch.zeros(0, dtype=torch.float64)
        sums = reduce_tensor(torch.stack([self.dense.sum(), self.counts.sum(), (self.counts > 0).double().sum()]).to(self.device))
        nats, predicted, samples = sums.tolist()
        if not predicted:
            raise ValueError("the evaluation data are empty: there is nothing to predict, so ablation cannot be measured")
        self.loss, self.predictions, self.samples = nats / predicted, int(predicted), int(samples)

    def changes(self, group: PruningGroup, units: Sequence[int], cached: bool, progress: Progress) -> pd.DataFrame:
        start = self._start(group) if cached else 0
        sums = torch.zeros(len(units), 3, dtype=torch.float64)  # of d, d^2, d t over samples
        for row, unit in enumerate(progress(units)):
            with masked(self.model, [group], {group.name: [unit]}):
                d = torch.cat([self._run(k, start)[0] for k in range(len(self.batches))] or [self.dense]) - self.dense
            sums[row] = torch.stack([d.sum(), d @ d, d @ self.counts])
        d, dd, dt = reduce_tensor(sums.to(self.device)).cpu().unbind(1)
        tt = float(reduce_tensor((self.counts @ self.counts).reshape(1).to(self.device)))
        change = d / self.predictions
        spread = (dd - 2 * change * dt + change.square() * tt).clamp_min(0) * self.samples / max(self.samples - 1, 1)
        error = spread.sqrt() / self.predictions if self.samples > 1 else torch.full_like(change, torch.nan)
        index = pd.MultiIndex.from_product([[group.name], units], names=["layer", "unit"])
        return pd.DataFrame({"change": change.numpy(), "change_se": error.numpy()}, index=index)

    def _start(self, group: PruningGroup) -> int:
        """The block with all readers of a group, from which the model may run; 0 if the whole model must run."""
        paths = {piece.module for piece in group.by_role("consumer")}
        at = next((k for k, name in enumerate(self.names) if all(path.startswith(f"{name}.") for path in paths)), 0)
        if at and at != self.at and not self._kept_before(at):
            return 0
        if at:
            self.shortened.append(group.name)
        return at

    def _kept_before(self, at: int) -> bool:
        """Caches the output of the block before ``at``; returns whether running from there reproduces the dense loss."""
        start = self.at if 0 < self.at < at else 0
        outputs, calls = [], 0
        for k in range(len(self.batches)):
            seen: list[Any] = []

            def see(module: nn.Module, args: tuple, kwargs: dict, output: Any, seen: list[Any] = seen) -> None:
                seen.append(_copy(output))

            with observed([self.blocks[at - 1]], see):
                self._run(k, start)
            calls = max(calls, len(seen))
            outputs.append(seen[-1] if seen else None)
        self.at, self.outputs = at, outputs
        if calls == 1 and all(output is not None for output in outputs):
            again = [self._run(k, at)[0] for k in range(len(self.batches))]
            if torch.allclose(torch.cat(again), self.dense, rtol=1e-9, atol=1e-9):
                return True
        self.at, self.outputs = 0, []
        return False

    def _run(self, k: int, start: int) -> tuple[Tensor, Tensor]:
        """Summed loss in nats and number of predictions per sample of batch k, (B,) float64 on the CPU."""
        batch = self.batches[k]
        with constant_outputs(self.blocks[:start], self.outputs[k] if start else None):
            z = self.objective.run(self.model, batch)
        return nats(*self.objective.predictions(z, batch.labels))


def nats(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the predictions of each sample, and their number, (B,) float64 on the CPU.

    Shapes: z (B, ..., K) logits; y (B, ...) the labels they predict, IGNORE for those that do not count
    """
    found = torch.zeros(2, len(y), dtype=torch.float64)
    for where in (y != IGNORE).nonzero().split(max(1, _CHUNK // z.shape[-1])):
        place = where.unbind(1)
        own = z[place].double()
        value = own.logsumexp(-1) - own.gather(-1, y[place][:, None])[:, 0]
        found.index_add_(1, place[0].cpu(), torch.stack([value, torch.ones_like(value)]).cpu())
    return found[0], found[1]


@contextmanager
def constant_outputs(modules: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Inside, the modules return a copy of ``output`` instead of running."""
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
    """A copy of a block's output, because later blocks may modify it in place. None for an unknown kind of output."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return tuple(value.clone() if isinstance(value, Tensor) else value for value in output)
    return None
