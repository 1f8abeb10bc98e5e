"""The tuned lens: affine translators of each block's states, trained by Lightning to give the model's own predictions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from nodelens.analysis.base import Analysis, AnalysisCall
from nodelens.analysis.lenses.logit_lens import lens_table
from nodelens.engine.driver import device_of
from nodelens.interventions.lenses.lens import LENS, about, read_lens
from nodelens.interventions.lenses.lens_pass import PredictingRows, blocks_to_read
from nodelens.interventions.lenses.scores import kl
from nodelens.interventions.lenses.translators import Translators
from nodelens.interventions.prompts import read_prompts
from nodelens.interventions.token_model import TokenModel
from nodelens.network.layers import Layer
from nodelens.results.findings import Findings

from .lens_training import LensTraining, fit_lens


@dataclass(frozen=True)
class TunedLens(Analysis):
    """Trains an affine translator per block, and compares the lens with and without it.

    layers:    blocks to translate: all, indices, or an expression; the last block needs none
    epochs, lr: passes over the data, and Adam's learning rate, which falls linearly to 0
    ks:        precision and agreement are measured at each of these numbers of tokens
    save_to:   a safetensors file for the translators; load_from: one to use instead of training
    prompts, tokenizer, k: as in ``LogitLens``; the tables are of the tuned lens

    The table ``layers`` has a row per lens (logit, tuned) and block, measured on the evaluation split, with standard errors. The
    loss is the mean KL(model || lens) over tokens.
    Source: Belrose et al. 2023, Eliciting Latent Predictions from Transformers with the Tuned Lens, 2303.08112
    """

    layers: str | int | Sequence[int] = "all"
    epochs: int = 1
    lr: float = 1e-3
    ks: Sequence[int] = (1, 5, 10)
    save_to: str | None = None
    load_from: str | None = None
    prompts: str | Sequence[str] | None = None
    tokenizer: Any | None = None
    k: int = 5

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.lr <= 0:
            raise ValueError(f"tuned_lens: epochs is {self.epochs} and lr is {self.lr}; both are positive")

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> Findings:
        """Trains on data and measures on evaluation (default: data). The model itself does not change."""
        output, seed = call.objective.get("output"), call.seed
        known, layers = TokenModel(model), blocks_to_read(model, self.layers)
        last = len(known.roles.blocks) - 1
        trained = self._translators(model, data, {k: v for k, v in layers.items() if k != last}, seed, output)
        tables = {
            name: lens_table(model, call.evaluation, self.layers, self.ks, maps, output=output)
            for name, maps in (("logit", None), ("tuned", trained))
        }
        table = pd.concat([found.assign(lens=name) for name, found in tables.items()], ignore_index=True)
        frames = {"layers": table}
        if self.prompts is not None:
            frames |= read_lens(known, read_prompts(self.prompts, self.tokenizer), list(layers), self.k, trained).frames
        if self.save_to is not None:
            trained.save(self.save_to)
        metadata = about(known) | {"lens": "tuned", "epochs": self.epochs, "lr": self.lr, "seed": seed, "translators": self.save_to}
        return Findings(LENS, frames, _lines(tables["logit"], tables["tuned"]), metadata=metadata)

    def _translators(
        self, model: nn.Module, data: Iterable[Any], layers: Mapping[int, Layer], seed: int, output: Any
    ) -> Translators:
        if self.load_from is not None:
            return Translators.load(Path(self.load_from)).to(device_of(model))
        return train_translators(model, data, layers, self.epochs, self.lr, seed, output)


def train_translators(
    model: nn.Module, data: Iterable[Any], layers: Mapping[int, Layer], epochs: int, lr: float, seed: int = 0, output: Any = None
) -> Translators:
    """Translators of the states after some blocks, trained to the model's own logits. Raises ValueError without blocks."""
    if not layers:
        raise ValueError("a tuned lens translates the blocks before the last one: choose others with layers=")
    module = _Training(model, layers, lr, output)
    fit_lens(module, data, epochs, device_of(model), seed, "tuned_lens")
    return module.translators.requires_grad_(False).to(device_of(model))


class _Training(LensTraining):
    """Minimises KL(model || lens)."""

    def __init__(self, model: nn.Module, layers: Mapping[int, Layer], lr: float, output: Any):
        super().__init__(model, layers, lr, output)
        self.translators = Translators(list(layers), _width(model))

    def add_gradients(self, rows: PredictingRows) -> None:
        for block in self.read["layers"]:
            for part in rows.tail.parts(len(rows.sample)):
                states = rows.states(block, part)
                with torch.enable_grad():
                    logs = rows.tail(self.translators(block, states)).float().log_softmax(1)
                    loss = kl(rows.final(part).float().log_softmax(1), logs).sum() / len(rows.sample)
                    self.manual_backward(loss)


def _width(model: nn.Module) -> int:
    """The width of the residual stream, from the head or the config."""
    head = TokenModel(model).roles.single.get("final_norm")
    weight = getattr(getattr(head, "module", None), "weight", None)
    config = getattr(model, "config", None)
    found = getattr(config, "hidden_size", None) or (weight.numel() if isinstance(weight, Tensor) else None)
    if not isinstance(found, int):
        raise ValueError(
            f"the width of the residual stream of {type(model).__name__} is not known: give it a config with hidden_size"
        )
    return found


def _lines(before: pd.DataFrame, after: pd.DataFrame) -> list[str]:
    inner = slice(None, -1) if len(before) > 1 else slice(None)
    mean = {name: table["kl"][inner].mean() for name, table in (("logit", before), ("tuned", after))}
    first = f"layer {before['layer'].iloc[0]}: {before['kl'].iloc[0]:.3g} to {after['kl'].iloc[0]:.3g}"
    shown = f"{mean['logit']:.3g} nats with the logit lens, {mean['tuned']:.3g} tuned"
    return [f"KL to the model's logits, mean over layers: {shown} ({first})"]
