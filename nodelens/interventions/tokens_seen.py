"""Which tokens a forward pass sees: the prompt's and generated ones, counted under padding and with a cache."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.network.hooks import announced

_INPUTS = ("input_ids", "inputs_embeds", "inputs")
_CACHES = ("past_key_values", "cache_params", "past_key_value", "state")


@dataclass(frozen=True, eq=False)
class Prompt:
    """The columns of a batch's prompt. Shapes: real (B, L) bool, false at padding; ids (B, L) int64, or None if unknown."""

    real: Tensor
    ids: Tensor | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.real)

    @property
    def columns(self) -> int:
        return self.real.shape[1]

    def places(self, sample: int) -> list[int]:
        """The columns of a sample's real tokens, in order."""
        return self.real[sample].nonzero()[:, 0].tolist()


@dataclass(eq=False)
class TokensSeen:
    """Follows the calls of a model: ``prompt``, the number of columns ``before`` this call (in a cache), and ``now`` in it.

    A call without tokens before it starts a new prompt. Inside ``generate`` the prompt is what ``generate`` was given, and every
    call continues it. ``started`` counts prompts, ``calls`` the calls of the model.
    """

    prompt: Prompt | None = None
    before: int = 0
    now: int = 0
    samples: int = 0
    started: int = 0
    tokens: bool = False  # whether the model reads token ids, or embeddings in their place
    calls: int = 0
    given: Mapping[str, Any] | None = field(default=None, repr=False)  # the arguments of generate, while it runs
    mask: Tensor | None = field(default=None, repr=False)
    own: Prompt | None = field(default=None, repr=False)  # positions of a site that shows no tokens
    counted: int = 0  # columns of the call before

    @contextmanager
    def following(self, model: nn.Module, generation: bool = True) -> Iterator[None]:
        """Inside, calls of the model are followed; with ``generation``, also of ``generate``, its own or an inner model's."""
        inside = [module for module in model.modules() if generation and callable(getattr(module, "generate", None))]
        with announced(dict.fromkeys([model, *inside]), self.see), ExitStack() as stack:
            for module in inside:
                stack.enter_context(_generating(module, self))
            yield
        self.prompt = self.mask = None

    def see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Reads the arguments of one call."""
        self.calls += 1
        shown = _tokens(args, kwargs)
        self.samples = len(shown) if shown is not None and shown.ndim else 0
        self.tokens = shown is not None and (
            (shown.ndim == 2 and not shown.is_floating_point()) or shown is kwargs.get("inputs_embeds")
        )
        self.counted = self.now
        self.now = shown.shape[1] if shown is not None and (self.tokens or shown.ndim == 3) else 0
        self.mask = _mask(kwargs, self.samples, self.now)
        given = {} if self.given is None or kwargs.get("decoder_input_ids") is not None else self.given
        self.before = self._cached(kwargs)
        if self.before == 0 and (self.given is None or self.prompt is None):
            self._start(shown, given)
        elif self.prompt is None:  # it was read before the block was entered
            columns = self.before if self.given is None else self.before + self.now
            self._start(None, given, columns)

    def _cached(self, kwargs: Mapping[str, Any]) -> int:
        """The number of columns that a cache holds. Without a cache that tells, they are counted."""
        cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        if self.mask is not None and self.mask.shape[1] > self.now and cache is not None:
            return self.mask.shape[1] - self.now
        if cache is None:
            return 0
        length = _length(cache)
        if length is not None:
            return length
        state = getattr(cache, "has_previous_state", False)
        continues = self.given is not None or (state() if callable(state) else state)
        return self.before + self.counted if continues and self.prompt is not None else 0

    def _start(self, shown: Tensor | None, given: Mapping[str, Any], columns: int | None = None) -> None:
        ids = next((given[k] for k in _INPUTS if isinstance(given.get(k), Tensor)), shown)
        real = given.get("attention_mask", self.mask)
        width = (ids.shape[1] if ids is not None and ids.ndim > 1 else self.now) if columns is None else columns
        samples = self.samples if ids is None else len(ids)
        fits = isinstance(real, Tensor) and real.ndim == 2 and len(real) == samples and real.shape[1] >= width
        real = real[:, :width].bool().cpu() if fits and real is not None else torch.ones(samples, width, dtype=torch.bool)
        known = ids is not None and ids.ndim == 2 and not ids.is_floating_point() and columns is None
        self.prompt = Prompt(real, ids.cpu() if known and ids is not None else None)
        self.started += 1

    @property
    def repeats(self) -> int:
        """Rows of this call per sample of the prompt: the number of beams or returned sequences."""
        return self.samples // len(self.prompt) if self.prompt is not None and len(self.prompt) else 1

    def turned(self, x: Tensor) -> bool:
        """Whether a tensor has its tokens before its samples, (T, B, ...)."""
        return self.tokens and x.ndim == 3 and x.shape[:2] == (self.now, self.samples) != (self.samples, self.now)

    def at(self, samples: int, positions: int) -> "TokensSeen":
        """What passes at a site that shows (samples, positions) rows: the tokens, or positions of its own where there are none.

        Raises ValueError where the call has tokens, and the site another number of rows.
        """
        if self.prompt is not None and (self.samples, self.now) == (samples, positions):
            return self
        if self.prompt is None:
            raise ValueError("positions count the tokens of a call: call the model that nl.edit was given, or its generate")
        if self.tokens:
            raise ValueError(
                f"it shows {samples} x {positions} rows, the call has {self.samples} samples of {self.now} tokens: leave out "
                "positions and phase, or name a site with one row per token"
            )
        return self.rows_of(samples, positions)

    def rows_of(self, samples: int, positions: int) -> "TokensSeen":
        """What passes at a site that shows (samples, positions) rows, which need not be tokens."""
        if self.prompt is not None and (self.samples, self.now) == (samples, positions):
            return self
        if self.own is None or self.own.real.shape != (samples // self.repeats, positions):
            self.own = Prompt(torch.ones(samples // self.repeats, positions, dtype=torch.bool))
        return TokensSeen(self.own, 0, positions, samples, self.started)


def _length(cache: Any) -> int | None:
    """The number of columns in a cache; None for one that does not tell, such as that of recurrent states."""
    length = getattr(cache, "get_seq_length", None)
    if callable(length):
        try:
            return int(length())
        except ValueError:  # no layer of attention
            return None
    return int(cache[0][0].shape[-2]) if isinstance(cache, (tuple, list)) else None


def _tokens(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """What has one row per sample and, for language models, one column per token: the decoder's, where there is one."""
    if isinstance(decoder := kwargs.get("decoder_input_ids"), Tensor):
        return decoder
    named = (kwargs.get(name) for name in ("input_ids", "inputs_embeds"))
    return next((v for v in itertools.chain(args[:1], named, kwargs.values()) if isinstance(v, Tensor)), None)


def _mask(kwargs: Mapping[str, Any], samples: int, now: int) -> Tensor | None:
    mask = kwargs.get("attention_mask" if kwargs.get("decoder_input_ids") is None else "decoder_attention_mask")
    fits = isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == samples and mask.shape[1] >= now > 0
    return mask if fits else None


@contextmanager
def _generating(model: nn.Module, seen: TokensSeen) -> Iterator[None]:
    """Inside, ``model.generate`` tells what it was given, so that prompt and generated tokens can be told apart."""
    original: Callable = getattr(model, "generate")  # noqa: B009  an attribute that modules need not have
    own = model.__dict__.get("generate")

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        outer = seen.given
        seen.given, seen.prompt, seen.samples = dict(zip(("inputs",), args, strict=False)) | kwargs, None, 0
        try:
            return original(*args, **kwargs)
        finally:
            seen.given, seen.prompt = outer, None

    model.__dict__["generate"] = generate
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["generate"]
        else:
            model.__dict__["generate"] = own
