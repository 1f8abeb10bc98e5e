"""The Lightning module of all image classifiers."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from nodelens.messages import either
from nodelens.network.sharded import is_sharded, shard

from .weights import load_weights

_KEY = "nodelens_config"
_PLAIN = (str, int, float, bool, type(None))


class Classifier(lightning.LightningModule):
    """Cross-entropy training of any network that takes images.

    net:        (B, C, H, W) -> (B, classes) logits, or an output with `.logits` (Hugging Face)
    optimizer:  called with the parameters; scheduler: called with the optimizer, stepped once per epoch
    weights:    a file or folder for `load_weights`
    name:       the name of the net, so that a config names it only once
    l1, l2:     weights of penalties in the training loss: l1 * sum |w| + l2 * sum w^2 over weight matrices and kernels, without
                biases and norms. The logged loss is the cross-entropy alone
    config:     a plain dict that the caller may set; stored in checkpoints as "nodelens_config"

    A batch has `.x` and `.y`, or is an (x, y, ...) tuple. Logs {train,val,test}/loss (nats) and /acc once per epoch.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        weights: str | None = None,
        name: str | None = None,
        l1: float = 0.0,
        l2: float = 0.0,
    ):
        super().__init__()
        self.l1, self.l2 = l1, l2
        self.name = name
        self.net, self.make_optimizer, self.make_scheduler = net, optimizer, scheduler
        # micro: counts of correct predictions, which add over batches and processes and need no number of classes
        self.train_acc, self.val_acc, self.test_acc = (MulticlassAccuracy(average="micro") for _ in range(3))
        self.config: dict[str, Any] | None = load_weights(net, weights) if weights else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, classes)."""
        return logits_of(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "train") + self._penalty()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(_x_and_y(batch)[0])

    def configure_model(self) -> None:
        """Shards the net where the strategy of the trainer asks for it (``trainer=fsdp``). Raises ValueError with penalties."""
        if self._device_mesh is not None and not is_sharded(self.net):
            if self.l1 or self.l2:
                raise ValueError(
                    f"{either('l1= and l2=', 'model.l1= and model.l2=')} read all weights in each step, but they are sharded over "
                    "processes: use the weight decay of the optimizer, or train a copy of the model per process"
                )
            shard(self.net, self._device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        if self.make_optimizer is None:
            raise ValueError(
                "the model has no optimizer, so it cannot be trained; "
                + either(
                    "give optimizer=, as functools.partial(torch.optim.AdamW, lr=0.001)",
                    "set model.optimizer, as {_target_: torch.optim.AdamW, _partial_: true, lr: 0.001}",
                )
            )
        optimizer = self._optimizer(self.make_optimizer)
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "monitor": "val/loss"}}

    def _optimizer(self, make: Callable[..., Optimizer]) -> Optimizer:
        """The optimizer. Raises ValueError, with the key, for an option that its class refuses."""
        try:
            return make(p for p in self.net.parameters() if p.requires_grad)
        except ValueError as error:
            given = getattr(make, "keywords", {})
            refused = [name for name, value in given.items() if str(error).endswith(str(value))]
            key = f"model.optimizer.{refused[0]}" if refused else "model.optimizer"
            raise ValueError(f"{either(key.removeprefix('model.'), key)}: {error}") from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.config is not None:
            _check_plain(self.config, "config")
            checkpoint[_KEY] = self.config

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.config is None:  # a config set by the caller takes precedence
            self.config = checkpoint.get(_KEY)

    def _penalty(self) -> Tensor | float:
        """l1 * sum |w| + l2 * sum w^2 over the trained weights with two dimensions or more."""
        weights = [p for p in self.net.parameters() if p.requires_grad and p.ndim > 1]
        total: Tensor | float = 0.0
        if self.l1:
            total = total + self.l1 * sum(w.abs().sum() for w in weights)
        if self.l2:
            total = total + self.l2 * sum(w.square().sum() for w in weights)
        return total

    def _step(self, batch: Any, stage: str) -> Tensor:
        x, y = _x_and_y(batch)
        logits = self(x)
        loss = functional.cross_entropy(logits, y)
        self._log(stage, loss, logits, y)
        return loss

    def _log(self, stage: str, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        """Logs the loss and the accuracy of predictions; logits (n, classes), y (n,)."""
        accuracy = {"train": self.train_acc, "val": self.val_acc, "test": self.test_acc}[stage]
        accuracy.update(logits.detach(), y)
        log: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(y), "prog_bar": stage != "train"}
        self.log(f"{stage}/loss", loss.detach(), sync_dist=True, **log)
        self.log(f"{stage}/acc", accuracy, **log)


def logits_of(output: Any) -> Tensor:
    """The logits of a network output: the tensor itself, or its `.logits`.

    Raises: TypeError for anything else.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the network returned {type(output).__name__}; expected a tensor of logits (B, classes) "
            f"or an output with .logits: wrap the network so that it returns one of these"
        )
    return logits


def _x_and_y(batch: Any) -> tuple[Tensor, Tensor]:
    if hasattr(batch, "x") and hasattr(batch, "y"):
        return batch.x, batch.y
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], batch[1]
    raise TypeError(f"a batch is {type(batch).__name__}; expected .x and .y, or an (x, y) pair")


def _check_plain(value: Any, where: str) -> None:
    """Raises TypeError for values that torch.load(weights_only=True) would reject, before a checkpoint is written."""
    if type(value) in (dict, list, tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            _check_plain(item, f"{where}.{key}")
    elif type(value) not in _PLAIN:
        raise TypeError(
            f"{where} is {type(value).__name__}; a checkpoint holds plain dicts, lists, strings and "
            f"numbers only: convert it first, for instance with OmegaConf.to_container(config, resolve=True)"
        )
