"""Fine-tuning of a pruned network with Lightning: removed units stay removed, the best epoch on validation data is kept."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from nodelens.engine.driver import device_of
from nodelens.evaluation.evaluate import evaluate
from nodelens.messages import as_seed, kind_of
from nodelens.network.batch_forms import with_samples
from nodelens.network.eval_mode import one_at_a_time
from nodelens.network.groups import PruningGroup
from nodelens.network.loss_scale import Loss, as_sum
from nodelens.network.objective import Objective
from nodelens.network.outputs import Output
from nodelens.pruning.criteria.type_rules import TypeRules
from nodelens.statistics.seeding import seed_of, seeded

from .loader_order import seeded_order, set_epoch
from .quiet_trainer import quiet_trainer
from .unit_rates import Factors, scaled_updates, update_factors


class Finetune:
    """Fine-tunes a model in place: ``Finetune(train, val, epochs=5)`` is what ``nl.prune(finetune=...)`` takes.

    train, val: batches in any form that ``nl.analyze`` takes. optimizer: called with the parameters; default: SGD with momentum 0.9
    and ``lr``, with cosine decay over the epochs. The loss is the mean of a batch, whether ``loss`` sums or averages. After every
    step removed units are set to zero again, so that momentum and weight decay cannot change them. After every epoch the model is
    evaluated on ``val``; the best weights are kept, which may be those before training. seed: of the order in which a shuffled
    loader reads ``train``, of dropout and of random transforms. None: that of the pruning; outside of it, torch's. Global random
    states and those of the loader are restored afterwards. task, output, loss: as in ``AnalyzeOptions``.
    types: learning rates by the type of a unit, {units: a run with analysis=[clusters] or a table, column: unit_type, rates: {type:
    factor}}: the updates of the parameters that make a unit, and of its norms, are multiplied by the factor of its type.
    """

    def __init__(
        self,
        train: Iterable[Any],
        val: Iterable[Any],
        epochs: int = 5,
        lr: float = 0.01,
        optimizer: Callable[..., Optimizer] | None = None,
        seed: int | None = None,
        task: str | None = None,
        output: Output = None,
        loss: Loss | None = None,
        types: TypeRules | Mapping[str, Any] | None = None,
    ):
        for name, given in (("train", train), ("val", val)):
            if not (hasattr(given, "__iter__") or hasattr(given, "__getitem__")):
                raise ValueError(f"fine-tuning takes batches as {name}, a loader or a list, and not {kind_of(given)}")
            if isinstance(given, Sized) and not len(given):
                raise ValueError(f"fine-tuning has no batch to read: {name} is empty")
        if epochs < 1 or lr <= 0:
            raise ValueError(f"fine-tuning takes at least 1 epoch and a positive lr, not {epochs} and {lr}")
        self.train, self.val, self.epochs, self.lr = train, val, epochs, lr
        self.optimizer, self.seed = optimizer, None if seed is None else as_seed(seed)
        self.task, self.output, self.loss = task, output, None if loss is None else as_sum(loss)
        self.types = None if types is None else TypeRules.of("finetune", types)
        if self.types is not None and (self.types.protect or self.types.first or not self.types.rates):
            raise ValueError(
                "fine-tuning reads units, column and rates of types: give rates, such as {critical: 0.1}, and no others"
            )
        self.factors: Factors = {}

    def of_pruned(
        self, model: nn.Module, groups: Sequence[PruningGroup], removed: Mapping[str, Sequence[int]], sliced: bool
    ) -> "Finetune":
        """The same for a pruned model: with the learning rates of its units. Raises ValueError for units without a type."""
        found = copy.copy(self)
        if self.types is not None:
            found.factors = update_factors(model, groups, self.types, removed, sliced)
        return found

    @one_at_a_time
    def __call__(self, model: nn.Module, zeros: Callable[[nn.Module], None]) -> Mapping[str, Any]:
        """Trains, and returns the validation scores before and after, and the epoch that was kept.

        Raises ValueError for learning rates by type outside of a pruning, which knows the units.
        """
        if self.types is not None and not self.factors:
            raise ValueError("types= needs the units of a pruning: give Finetune(...) to nl.prune as finetune=")
        seed = torch.initial_seed() if self.seed is None else self.seed
        module = _Tuned(model, self, zeros)
        with seeded(seed, "finetune", "before"):  # a loader draws a seed whenever it is read
            module.keep_if_best(0)
        before, device = module.best_score, device_of(model)
        training = [(m, m.training) for m in model.modules()]
        order = seeded_order(self.train, seed_of(seed, "order"))
        with seeded(seed, "finetune"), order, quiet_trainer(self.epochs, device) as trainer:
            trainer.fit(module, train_dataloaders=_Batches(self.train))
        model.load_state_dict(module.best)
        model.to(device)
        for m, mode in training:
            m.training = mode
        return {"epochs": self.epochs, "best_epoch": module.best_epoch, "before": before, "after": module.best_score}


def _rank(score: Mapping[str, float]) -> tuple[float, float]:
    """Sorts scores: by accuracy where there is one, then by loss; one that is not a number comes last."""
    return score.get("accuracy", 0.0), -math.inf if math.isnan(score["loss"]) else -score["loss"]


class _Batches:
    """Wraps any iterable of batches, because Lightning treats a list as several loaders. Each iteration is one epoch."""

    def __init__(self, data: Iterable[Any]):
        self.data, self.epoch = data, 0

    def __iter__(self) -> Iterator[Any]:
        set_epoch(self.data, self.epoch)
        self.epoch += 1
        return with_samples(self.data)


class _Tuned(LightningModule):
    """A network and its optimiser. Removed units are kept at zero; the best weights are stored."""

    def __init__(self, net: nn.Module, how: Finetune, zeros: Callable[[nn.Module], None]):
        super().__init__()
        self.net, self.how, self.zeros = net, how, zeros
        self.best: dict[str, Tensor] = {}
        self.best_score: Mapping[str, float] = {}
        self.best_epoch = 0
        self.objective: Objective | None = None

    def on_fit_start(self) -> None:
        self.net.train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.objective is None:
            self.objective = Objective.of(self.net, self.how.output, self.how.task, self.how.loss).settled(self.net, batch)
        batch = self.objective.batch(batch).to(self.device)
        total = self.objective.summed(self.objective.run(self.net, batch), batch.labels)
        return total / batch.predicted.sum().clamp_min(1).to(self.device)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with scaled_updates(self.net, self.how.factors):
            super().optimizer_step(*args, **kwargs)
        self.zeros(self.net)

    def on_train_epoch_end(self) -> None:
        self.keep_if_best(self.current_epoch + 1)

    def keep_if_best(self, epoch: int) -> None:
        """Evaluates, and stores the weights if they are the best so far."""
        self.zeros(self.net)  # also running means of batch norms
        score = evaluate(self.net, self.how.val, task=self.how.task, output=self.how.output, loss=self.how.loss)
        if not self.best or _rank(score) > _rank(self.best_score):
            self.best = copy.deepcopy(self.net.state_dict())
            self.best_score, self.best_epoch = score, epoch

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        if self.how.optimizer is not None:
            return self.how.optimizer(parameters)
        optimizer = torch.optim.SGD(parameters, lr=self.how.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.how.epochs)]
