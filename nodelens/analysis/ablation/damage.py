"""Damage: the change of the loss under lesions, in one reading of the data."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nodelens.engine.driver import Driver, device_of
from nodelens.engine.in_turn import InTurn
from nodelens.engine.saved_work import SavedWork, reading
from nodelens.interventions.replay import RecordedCall, Recording, largest_output
from nodelens.network.batch import Batch
from nodelens.network.batch_forms import read
from nodelens.network.eval_mode import eval_mode
from nodelens.network.objective import Objective
from nodelens.statistics.kernels import WORTH
from nodelens.statistics.processes import gathered, reduce_tensor

from . import winograd
from .folding import Folds
from .lesions import Lesion
from .losses import loss_by_sample
from .passes import Base, LesionSite, Replay
from .replacement import Replacement

Progress = Callable[[Iterable[Any]], Iterable[Any]]
_CACHE = 1 << 20  # bytes of the largest tensor of a pass on a CPU, per thread: they should stay in a core's cache
_MEMORY = 1 << 28  # on other devices, and the most on a CPU
_MOST_COPIES = 32
_CHOICES = ("whole", "checked", "given", "long", "alone")  # how lesions run, as the first batch showed


@dataclass(frozen=True)
class Damage:
    """The change of the loss per prediction under each lesion, its standard error, and the loss of the whole model.

    Shapes: change, error (lesions,) float64; contrast, contrast_error (contrasts,) float64, sums of changes times coefficients.
    whole: numbers of the lesions for which the whole model ran. kernels: compiled where some convolutions ran in compiled loops.
    """

    change: np.ndarray
    error: np.ndarray
    loss: float
    predictions: int
    samples: int
    whole: tuple[int, ...] = ()
    kernels: str = "torch"
    contrast: np.ndarray = field(default_factory=lambda: np.zeros(0))
    contrast_error: np.ndarray = field(default_factory=lambda: np.zeros(0))


@torch.inference_mode(False)
def damage_of(
    model: nn.Module,
    data: Iterable[Any],
    lesions: Sequence[Lesion],
    values: Replacement,
    *,
    objective: Objective,
    contrasts: Sequence[Mapping[int, float]] = (),
    predictions: int | None = None,
    replay: bool = True,
    progress: Progress = iter,
    saved: SavedWork | None = None,
    what: Any = None,
) -> Damage:
    """Loss without the units of a lesion minus loss with them, per prediction, for each lesion.

    Data are read once, until all processes together have ``predictions`` (None: all), in whole samples, in the order of ``InTurn``.
    Standard errors are of the paired difference over samples. With ``replay`` the part of the model before a lesion's first place
    runs once per batch, and several lesions share a pass; the first batch shows whether that gives the numbers of the whole model,
    and where it does not, the whole model runs. contrasts: {number of a lesion: coefficient}, sums of changes that get errors of
    their own. saved: where the sums of an unfinished reading are kept; what: plain values that tell these lesions from others.
    Raises ValueError if there is nothing to predict.
    """
    sums = _Sums.of(len(lesions) + len(contrasts))
    passes = _Passes(model, objective, lesions, values, replay, contrasts)
    first = None if predictions is None else InTurn(predictions, partial(_predicted, objective))
    with eval_mode(model), torch.no_grad(), reading(saved, _Unfinished(sums, passes), objective.batch, what) as rest:
        driver = Driver(model, objective, progress=lambda given: rest(progress(given)))
        for batch in driver.batches(data if first is None else first.read(data)):
            whole = batch if first is None else batch.head(int((first.before < first.limit).sum()))
            passes.measure(whole, sums)
    whole_model = {number for own in gathered(sorted(passes.whole)) for number in own}  # a process without data has found none
    found = sums.reduced(device_of(model)).damage(tuple(sorted(whole_model)), len(lesions))
    return replace(found, kernels="compiled" if passes.folds.loops else "torch")


def _predicted(objective: Objective, given: Any) -> Tensor:
    """Number of predictions of each sample of a batch, (B,)."""
    return objective.batch(given, hashes=torch.zeros(len(read(given, objective.required).first), dtype=torch.int64)).predicted


@dataclass
class _Sums:
    """Sums over samples, of the whole model's loss and predictions, and for each lesion of d, d^2 and d t; d is the change."""

    total: Tensor  # (4,): loss, predictions t, samples, t^2
    each: Tensor  # (lesions, 3)

    @classmethod
    def of(cls, lesions: int) -> "_Sums":
        return cls(torch.zeros(4, dtype=torch.float64), torch.zeros(lesions, 3, dtype=torch.float64))

    def add(self, dense: Tensor, counts: Tensor) -> None:
        self.total += torch.stack([dense.sum(), counts.sum(), (counts > 0).double().sum(), counts @ counts])

    def add_changes(self, d: Tensor, counts: Tensor) -> None:
        """d: (lesions, B)."""
        self.each += torch.stack([d.sum(1), d.square().sum(1), d @ counts], 1)

    def reduced(self, device: torch.device) -> "_Sums":
        return _Sums(*(reduce_tensor(total.to(device)).cpu() for total in (self.total, self.each)))

    def damage(self, whole: tuple[int, ...], lesions: int) -> Damage:
        loss, predictions, samples, tt = self.total.tolist()
        if not predictions:
            raise ValueError("the evaluation data are empty: there is nothing to predict, so ablation cannot be measured")
        d, dd, dt = self.each.unbind(1)
        change = d / predictions
        spread = (dd - 2 * change * dt + change.square() * tt).clamp_min(0) * samples / max(samples - 1, 1)
        error = spread.sqrt() / predictions if samples > 1 else torch.full_like(change, torch.nan)
        (change, contrast), (error, contrast_error) = ((t.numpy()[:lesions], t.numpy()[lesions:]) for t in (change, error))
        found = Damage(change, error, loss / predictions, int(predictions), int(samples), whole)
        return replace(found, contrast=contrast, contrast_error=contrast_error)


@dataclass
class _Unfinished:
    """What a reading that continues needs."""

    sums: _Sums
    passes: "_Passes"

    def state_dict(self) -> dict[str, Any]:
        choices = {name: sorted(getattr(self.passes, name)) for name in _CHOICES}
        return {"total": self.sums.total, "each": self.sums.each, **choices}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.total, self.sums.each = state["total"], state["each"]
        for name in _CHOICES:
            setattr(self.passes, name, set(state[name]))


@dataclass
class _Passes:
    """Runs the lesions on one batch after another. whole: those that need the whole model; checked: those that were compared."""

    model: nn.Module
    objective: Objective
    lesions: Sequence[Lesion]
    values: Replacement
    replay: bool
    contrasts: Sequence[Mapping[int, float]] = ()
    whole: set[int] = field(default_factory=set)
    checked: set[int] = field(default_factory=set)
    given: set[int] = field(default_factory=set)  # first lesions of those whose maps have to keep their memory layout
    long: set[int] = field(default_factory=set)  # of those whose short passes do not agree with the whole model
    alone: set[int] = field(default_factory=set)  # and of those that cannot share a pass
    folds: Folds = field(default_factory=Folds)
    rows: int = 0  # samples in a pass of the whole model

    @cached_property
    def readers(self) -> set[nn.Module]:
        """The modules whose inputs tell whether a lesion changes anything: those that alone read its units."""
        return {module for lesion in self.lesions for module, side in lesion.places if side == "input" and len(lesion.places) == 1}

    def measure(self, batch: Batch, sums: _Sums) -> None:
        if not self.replay:
            self.whole = set(range(len(self.lesions)))
        for part in self._parts(batch):
            self.values.begin(part)
            recording = Recording.of(self.model, partial(self.objective.run, self.model, part), self.readers)
            if self.folds.loops is None and self._compiling_pays(recording):
                self.folds.loops = {}
            dense, counts = loss_by_sample(self.objective, recording.output, part)
            sums.add(dense, counts)
            base = Base(self.model, self.objective, self.values, part, recording, dense, counts)
            d = torch.zeros(len(self.lesions), len(part), dtype=torch.float64)
            for site, numbers in self._by_site(recording):
                for some, nats in self._losses(base, site, numbers):
                    d[some] = nats - dense
            more = [torch.stack([d[k] * c for k, c in contrast.items()]).sum(0) for contrast in self.contrasts]
            sums.add_changes(torch.cat([d, torch.stack(more)]) if more else d, counts)

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """The batch in parts whose tensors stay in the cache."""
        if not len(batch):
            yield batch
            return
        if not self.rows:
            first = batch.head(1)
            recording = Recording.of(self.model, partial(self.objective.run, self.model, first))
            self.rows = self._fitting(recording.calls)
        for start in range(0, len(batch), self.rows):
            yield batch.map(lambda t, start=start: t[start : start + self.rows])

    def _compiling_pays(self, recording: Recording) -> bool:
        """Whether convolutions for the loops of ``winograd`` read enough for a compilation, and there is a compiler."""
        maps = [call.output for call in self.folds.pairs(recording.calls) if winograd.fits(call.module)]
        return len(self.lesions) * sum(each.nbytes for each in maps if isinstance(each, Tensor)) >= WORTH and winograd.available()

    def _fitting(self, calls: Sequence[RecordedCall], samples: int = 1) -> int:
        """How many samples fit into a pass, at least one."""
        cache = _CACHE * torch.get_num_threads() if device_of(self.model).type == "cpu" else _MEMORY
        limit = min(cache, _MEMORY)
        return max(1, limit * samples // max(1, largest_output(calls)))

    def _by_site(self, recording: Recording) -> Iterator[tuple[LesionSite, list[int]]]:
        """Lesions with the same places, by numbers, and the site where they begin; the last site first.

        In that order nothing that a lesion leaves behind in a module can pass a later replay. Lesions without a call are left out.
        """
        first = {call.module: call for call in reversed(recording.calls)}
        found: dict[tuple, list[int]] = {}
        sites: dict[tuple, LesionSite] = {}
        for number, lesion in enumerate(self.lesions):
            key = (frozenset(lesion.places), tuple(target.name for target, _ in lesion.weights))
            met = [(first[module], side) for module, side in lesion.places if module in first]
            if met:
                sites[key] = min((LesionSite(call, side) for call, side in met), key=lambda site: site.time)
                found.setdefault(key, []).append(number)
        for key in sorted(found, key=lambda key: -sites[key].time):
            yield sites[key], found[key]

    def _losses(self, base: Base, site: LesionSite, numbers: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Numbers of lesions and the losses of the samples under each, (lesions, B); without lesions that change nothing."""
        after, samples = [call for call in base.recording.calls if call.end > site.time], len(base.batch)
        short = numbers[0] not in self.long
        replay = Replay(base, site, self.folds, short, short and numbers[0] not in self.given and any(map(_faster_last, after)))
        alone = bool(self.lesions[numbers[0]].weights) or numbers[0] in self.alone
        copies = 1 if alone else max(1, min(_MOST_COPIES, self._fitting(after, samples) // samples))
        if numbers[0] not in self.checked:
            self.checked.add(numbers[0])
            if numbers[0] not in self.whole:
                replay, copies = self._agreed(replay, numbers, copies)
        numbers = [number for number in numbers if not replay.idle(self.lesions[number])]
        for start in range(0, len(numbers), copies):
            some = numbers[start : start + copies]
            if some[0] in self.whole:
                yield from (([number], base.whole(self.lesions[number])[None]) for number in some)
                continue
            found = replay.shared_or_alone([self.lesions[number] for number in some])
            lost = (~found.isfinite() & base.dense.isfinite()).any(1)  # what a replay adds to an infinite activation may be NaN
            for k in lost.nonzero()[:, 0].tolist():
                found[k] = base.whole(self.lesions[some[k]])
            yield some, found

    def _agreed(self, replay: Replay, numbers: list[int], copies: int) -> tuple[Replay, int]:
        """A replay that gives the numbers of the whole model, and how many lesions share its passes; else all are in ``whole``."""
        key, given, long = numbers[0], replace(replay, last=False), replace(replay, short=False, last=False)
        for each, count in ((replay, copies), (given, copies), (long, copies), (long, 1)):
            if each.agrees([self.lesions[number] for number in numbers[:count]]):
                self.given.update([key] if each is given else [])
                self.long.update([key] if each is long else [])
                self.alone.update([key] if count < copies else [])
                return each, count
        self.whole.update(numbers)
        return replay, 1


def _faster_last(call: RecordedCall) -> bool:
    """Whether a call is a convolution that oneDNN runs on the CPU, which reads maps faster where their channels lie last."""
    module = call.module
    if not isinstance(module, nn.Conv2d) or module.weight.device.type != "cpu":
        return False
    return module.weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
