"""What the training of lenses shares: the steps, Adam, and Lightning without its output."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from nodelens.interventions.lenses.lens_pass import PredictingRows, run_lens
from nodelens.network.layers import Layer
from nodelens.statistics.processes import world
from nodelens.statistics.seeding import seeded

from .quiet_trainer import quiet_trainer


class LensTraining(LightningModule):
    """Minimises the divergence of each block. The model is not part of the module: it does not move and is not trained.

    steps: the number of batches of the whole training, where it is known
    """

    automatic_optimization = False  # the gradient of a part of the tokens is added at once, which bounds the memory

    def __init__(self, model: nn.Module, layers: Mapping[int, Layer], lr: float, output: Any):
        super().__init__()
        self.read: dict[str, Any] = {"model": model, "layers": layers}
        self.lr, self.output = lr, output
        self.steps: int | None = None

    def add_gradients(self, rows: PredictingRows) -> None:
        """Adds the gradients of a batch to the parameters."""
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        """Adam, with a rate that falls linearly to 0 where the number of steps is known."""
        optimizer, steps = torch.optim.Adam(self.parameters(), self.lr), self.steps
        fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 if not steps else max(0.0, 1 - k / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": fall, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        optimizer.zero_grad()
        run_lens(self.read["model"], [batch], self.read["layers"], self.add_gradients, output=self.output)
        optimizer.step()
        schedule.step()


def fit_lens(module: LensTraining, data: Iterable[Any], epochs: int, device: torch.device, *key: int | str) -> None:
    """Trains a module on one device, without files and progress bars. key: a seed, and the name of the analysis.

    Raises ValueError in a run of several processes, each of which would train a module of its own.
    """
    if world()[1] > 1:
        raise ValueError(
            f"{key[-1]} is trained by one process, and this run has {world()[1]}: train it in a run of one, with "
            "save_to=, and give load_from= here"
        )
    module.steps = epochs * len(data) if isinstance(data, Sized) else None
    with seeded(*key), quiet_trainer(epochs, device) as trainer:
        trainer.fit(module, train_dataloaders=_Batches(data))


class _Batches:
    """Data as Lightning reads them: any iterable that can be read again."""

    def __init__(self, data: Iterable[Any]):
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)
