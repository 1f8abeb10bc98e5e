"""The learned prompt: a soft prompt, trained by Lightning, behind which the model says what an inserted state holds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from nodelens.analysis.base import Analysis, AnalysisCall
from nodelens.analysis.lenses.future_lens import check_ahead, future_lines, future_table
from nodelens.engine.driver import device_of
from nodelens.interventions.lenses.inserted import FollowedRows, decode_inserted, inserted_logits, score_inserted
from nodelens.interventions.lenses.lens import LENS, about
from nodelens.interventions.lenses.lens_pass import PredictingRows, blocks_to_read
from nodelens.interventions.lenses.scores import kl
from nodelens.interventions.lenses.soft_prompts import SoftPrompts
from nodelens.interventions.prompts import read_prompts
from nodelens.interventions.token_model import TokenModel
from nodelens.network.layers import Layer
from nodelens.results.findings import Findings
from nodelens.statistics.sample_hash import generator

from .lens_training import LensTraining, fit_lens


@dataclass(frozen=True)
class LearnedPrompt(Analysis):
    """Trains a soft prompt per block so that the model, with a state inserted at the prompt's end, predicts as it did at the state.

    layers:    blocks whose states are read, and inserted at the same block
    length:    number of embeddings of a prompt; at first those of random tokens
    ahead:     distances after the next token at which predictions are compared; 0 is the next token itself
    states:    number of tokens of each batch, drawn at random, for training and for the tables; None: all
    epochs, lr: passes over the data, and Adam's learning rate, which falls linearly to 0
    ks:        precision and agreement are measured at each of these numbers of tokens
    save_to:   a safetensors file for the prompts; load_from: one to use instead of training. ``future_lens`` reads it, too
    prompts, tokenizer, k: texts whose states are decoded; k tokens are listed, and ``generate`` tokens are decoded from each state

    The loss is KL(model || model behind the prompt), the mean over tokens and ``ahead``; between two predictions the true tokens
    are read. The table ``layers`` has the columns of ``future_lens``, measured on the evaluation split with standard errors over
    samples. The table ``control`` has the same with the state of another token inserted: what prompt and true tokens predict by
    themselves. For prompts, ``predictions`` and ``positions`` as in ``patchscope``.
    Source: Pal et al. 2023, Future Lens, 2311.04897, section 2.4 (learned prompt causal intervention)
    """

    layers: str | int | Sequence[int] = "all"
    length: int = 10
    ahead: Sequence[int] = (0, 1, 2, 3)
    states: int | None = 128
    epochs: int = 1
    lr: float = 1e-2
    ks: Sequence[int] = (1, 5, 10)
    save_to: str | None = None
    load_from: str | None = None
    prompts: str | Sequence[str] | None = None
    tokenizer: Any | None = None
    k: int = 5
    generate: int = 4

    def __post_init__(self) -> None:
        check_ahead("learned_prompt", self.ahead, self.ks)
        counts = {"length": self.length, "epochs": self.epochs, "k": self.k, "generate": self.generate}
        counts |= {} if self.states is None else {"states": self.states}
        small = next((name for name, value in counts.items() if not isinstance(value, int) or value < 1), None)
        if small is not None:
            raise ValueError(f"learned_prompt: {small} is {counts[small]!r}; it is a number, 1 or more")
        if self.states == 1:
            raise ValueError("learned_prompt: states is 1; it is 2 or more, because the control exchanges the states of a batch")
        if self.lr <= 0:
            raise ValueError(f"learned_prompt: lr is {self.lr}; it is positive")

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> Findings:
        """Trains on data and measures on evaluation (default: data), twice. The model itself does not change.

        Raises ValueError for a model that takes no embeddings, and for samples with too few tokens for ``ahead``.
        """
        known, layers, output = TokenModel(model), blocks_to_read(model, self.layers), call.objective.get("output")
        trained = self._prompts(model, data, layers, call.seed, output)
        frames = {}
        for name in ("layers", "control"):
            means = score_inserted(
                model,
                call.evaluation,
                layers,
                trained,
                self.ahead,
                self.ks,
                shuffled=name == "control",
                states=self.states,
                seed=call.seed,
                output=output,
            )
            frames[name] = future_table(means, layers, device_of(model))
        if self.prompts is not None:
            frames |= decode_inserted(known, read_prompts(self.prompts, self.tokenizer), layers, trained, self.k, self.generate)
        if self.save_to is not None:
            trained.save(self.save_to)
        loaded = self.load_from is not None
        trained_with = {"epochs": None if loaded else self.epochs, "lr": None if loaded else self.lr, "loaded": self.load_from}
        length = len(next(iter(trained.parameters())))
        chosen = {"length": length, **trained_with, "states": self.states, "ahead": list(self.ahead)}
        metadata = about(known) | {"lens": "learned prompt", "seed": call.seed, "soft_prompts": self.save_to} | chosen
        return Findings(LENS, frames, _lines(frames["layers"], frames["control"]), metadata=metadata)

    def _prompts(self, model: nn.Module, data: Iterable[Any], layers: Mapping[int, Layer], seed: int, output: Any) -> SoftPrompts:
        if self.load_from is not None:
            return SoftPrompts.load(self.load_from).check(TokenModel(model)).to(device_of(model))
        module = _Training(model, layers, self, seed, output)
        fit_lens(module, data, self.epochs, device_of(model), seed, "learned_prompt")
        return module.prompts.requires_grad_(False).to(device_of(model))


class _Training(LensTraining):
    """Minimises KL(model || model behind the prompt)."""

    def __init__(self, model: nn.Module, layers: Mapping[int, Layer], options: LearnedPrompt, seed: int, output: Any):
        known = TokenModel(model)
        super().__init__(known.model, layers, options.lr, output)
        self.known, self.options = known, options
        self.rng = generator(seed, "learned prompt")
        self.prompts = SoftPrompts.of_tokens(self.known, list(layers), options.length, self.rng)

    def add_gradients(self, rows: PredictingRows) -> None:
        followed = FollowedRows.of(rows, self.options.ahead).drawn(self.options.states, self.rng)
        count = max(1, len(followed.now)) * len(self.options.ahead)
        for block, layer in self.read["layers"].items():
            for part in followed.parts(self.options.length):
                with torch.enable_grad():
                    prompt, states = self.prompts.of(block), rows.states(block)[part.now]
                    logs = inserted_logits(self.known, layer, prompt, states, part.tokens).float().log_softmax(2)
                    every = [kl(rows.final()[later].float().log_softmax(1), logs[:, n]).sum() for n, later in part.later.items()]
                    self.manual_backward(torch.stack(every).sum() / count)


def _lines(table: pd.DataFrame, control: pd.DataFrame) -> list[str]:
    """For each distance the best layer, and the KL with the state and with that of another token."""
    lines = future_lines(table)
    for k, (ahead, rows) in enumerate(table.groupby("ahead")):
        other = control[control["ahead"] == ahead]["kl"].mean()
        lines[k] += f"; KL {rows['kl'].mean():.3g} nats, mean over layers, {other:.3g} with the state of another token"
    return lines
