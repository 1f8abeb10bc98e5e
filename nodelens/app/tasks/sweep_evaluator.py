"""How a sweep evaluates the pruned model of a cell."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from nodelens.evaluation.evaluate import evaluate
from nodelens.pruning.context import PruningContext
from nodelens.pruning.prune import Pruned
from nodelens.pruning.surgery.mask import Removed
from nodelens.pruning.sweep.latency import latency
from nodelens.statistics.processes import world

from .common import objective_of
from .progress import progress_bar


class SweepEvaluator:
    """Evaluates a pruned model: accuracy and loss on validation and test data, and latency."""

    def __init__(self, cfg: DictConfig, context: PruningContext, data: Any):
        rank, processes = world()
        self.rank, self.context = rank, context
        self.batches, self.repeats = list(cfg.latency.batches or []), cfg.latency.repeats
        self.loaders = {split: data.loader(split, rank=rank, world=processes) for split in ("test", "val")}
        self.has_val = len(data.loader("val")) > 0
        self.batch = context.objective.batch(next(iter(data.loader("calibration"))))
        self.objective = objective_of(cfg)
        self.timed: dict[tuple, Mapping[str, float]] = {}

    def __call__(self, pruned: Pruned) -> dict[str, Any]:
        found = self.of(pruned.model)
        before = pruned.finetuned.get("before")
        for key in ("accuracy", "loss"):
            found[f"val_pruned_{key}"] = before[key] if before else found[f"val_{key}"]
        return {**found, **self.latency_of(pruned.model, pruned.plan.removed)}

    def of(self, model: torch.nn.Module, prefix: str = "", what: str | None = None) -> dict[str, Any]:
        """Accuracy with standard error, loss and ece (texts: perplexity) on test data; accuracy and loss on validation data.

        what: named in a progress bar; None: none is shown.
        """
        show = progress_bar(what or "", None, what is not None and self.rank == 0)
        test = evaluate(model, show(self.loaders["test"]), **self.objective)
        val = evaluate(model, self.loaders["val"], **self.objective) if self.has_val else {"accuracy": math.nan, "loss": math.nan}
        for score in (test, val):
            score.setdefault("accuracy", math.nan)  # a task without classes
        test.setdefault("accuracy_se", math.sqrt(test["accuracy"] * (1 - test["accuracy"]) / test["samples"]))
        found = {f"{prefix}{k}": v for k, v in test.items() if k not in ("samples", "tokens")}
        found |= {f"val_{prefix}{k}": val[k] for k in ("accuracy", "loss")}
        return found if prefix else found | {"samples": test["samples"]}

    def latency_of(self, model: torch.nn.Module, removed: Removed) -> Mapping[str, float]:
        """Latency in ms of a model without these units, and of the dense one alongside; once for all models of the same widths."""
        if not self.batches or self.rank:
            return {}
        widths = tuple(sorted((k, len(v)) for k, v in removed.items()))
        if widths not in self.timed:
            models = {"": model, "dense_": self.context.model}
            found = latency(models, self.batch, self.batches, self.repeats)
            self.timed[widths] = {
                f"{which}{name.replace('median', 'ms')}": ms
                for which, times in (("latency_", found[""]), ("dense_latency_", found["dense_"]))
                for name, ms in times.items()
            }
        return self.timed[widths]
