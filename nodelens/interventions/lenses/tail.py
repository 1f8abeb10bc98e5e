"""The tail of a language model, from the residual stream to the logits, through its own final norm and head."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.network.architecture import config_of
from nodelens.network.layers import Layer
from nodelens.network.roles import Roles, roles_of

_TIMES = ("logit_scale", "lm_head_multiplier")  # config keys of families that multiply their logits
_OVER = ("logits_scaling",)  # of those that divide them, or what the head reads, which is the same without a bias
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FAR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # rounding, of the largest logit
CHECKED = 4  # rows on which the tail is compared with the model
_CELLS = 2**24  # logits that are held at a time


@dataclass(frozen=True, eq=False)
class Tail:
    """Logits of hidden states: ``cap * tanh(scale * head(norm(h)) / cap)``, where a model has no norm, scale or cap without it.

    norm, head: the model's own modules. between: modules that run between them (OPT's ``project_out``).
    """

    norm: nn.Module | None
    head: nn.Module
    between: tuple[nn.Module, ...] = ()
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """Logits (..., V) of states of the residual stream (..., d), normalised exactly once."""
        logits = self.uncapped(self.normed(states))
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def normed(self, states: Tensor) -> Tensor:
        """What the final norm puts out, (..., d)."""
        return states if self.norm is None else self.norm(states)

    def uncapped(self, normed: Tensor) -> Tensor:
        """Logits (..., V) before the cap, of states that are normalised."""
        for module in self.between:
            normed = module(normed)
        logits = self.head(normed)
        return logits if self.scale == 1.0 else logits * self.scale

    def parts(self, count: int) -> Iterator[slice]:
        """Slices of ``count`` rows whose logits are at most 2^24 numbers each, which bounds the memory of a lens."""
        size = max(1, _CELLS // self.vocabulary)
        yield from (slice(start, start + size) for start in range(0, count, size))

    @property
    def vocabulary(self) -> int:
        """The number of logits of a row."""
        weight: Any = self.head.weight
        return int(getattr(self.head, "nf", None) or getattr(self.head, "out_features", None) or len(weight))


def tail_of(model: nn.Module, states: Tensor, logits: Tensor) -> Tail:
    """The tail of a model, chosen and checked by what the model itself does.

    states (n, d): rows of the last block's output; logits (n, V): the model's logits of these rows. Scales and caps of the config
    (Cohere, Granite, Falcon-H1, Gemma) are part of the tail if the model applies them.

    Raises ValueError if no head is found, or if no tail gives the model's logits to rounding.
    """
    roles, states, wanted = roles_of(model), states[:CHECKED], logits[:CHECKED].float()
    name, best = type(model).__name__, float("inf")
    for tail in _candidates(model, roles):
        with torch.no_grad():
            try:
                found = tail(states).float()
            except RuntimeError:  # modules that do not fit each other
                continue
        if found.shape != wanted.shape:
            continue
        off = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
        if off <= _FAR.get(states.dtype, 1e-4):
            return tail
        best = min(best, off)
    missing = [f"no {role}: {why}" for role in ("final_norm", "head") if isinstance(why := roles.single.get(role), str)]
    without = f"{'; '.join(missing)}; " if missing else ""
    raise ValueError(
        f"{name}: the final norm and the head, applied to the last block's output, give other logits than the model (the largest "
        f"difference is {best:.1e} of the largest logit, allowed is {_FAR.get(states.dtype, 1e-4):.0e}): {without}a lens needs a "
        "causal language model whose logits are head(norm(h)), with a scale or a cap of its config"
    )


def last_block(model: nn.Module) -> Layer:
    """The output of the last block. Raises ValueError for a model without blocks."""
    return roles_of(model).layers("blocks[-1]")[0]


def _candidates(model: nn.Module, roles: Roles) -> Iterator[Tail]:
    """Tails to try, the likeliest first."""
    norm, head = roles.single.get("final_norm"), roles.single.get("head")
    if not isinstance(head, Layer):
        return
    config = config_of(model)
    numbers = {key: value for key in (*_TIMES, *_OVER, *_CAPS) if isinstance(value := getattr(config, key, None), (int, float))}
    scales = [float(numbers[key]) for key in _TIMES if key in numbers] + [1 / numbers[key] for key in _OVER if numbers.get(key)]
    caps: list[float | None] = [float(numbers[key]) for key in _CAPS if key in numbers]
    norms = [norm.module, None] if isinstance(norm, Layer) else [None]
    project = next((module for name, module in model.named_modules() if name.rpartition(".")[2] == "project_out"), None)
    betweens = [(project,), ()] if project is not None else [()]
    for each, between, scale, cap in itertools.product(norms, betweens, [*scales, 1.0], [*caps, None]):
        yield Tail(each, head.module, between, scale, cap)
