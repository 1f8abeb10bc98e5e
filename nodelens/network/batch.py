"""The Batch: inputs, labels, row mask, sample hashes and jackknife groups of one batch."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.statistics.group_slices import group_slices, sorting
from nodelens.statistics.sample_hash import content_hashes, groups_of, mix

from .batch_forms import read
from .missing import IGNORE, with_label
from .positions import warn_of_masks


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of B samples.

    Shapes: labels (B,) or (B, T) or None; targets (B,) or (B, t) or None, given by the user;
            mask (B, T) bool, true for tokens that count as rows, or None for all;
            hashes (B,) int64, the same for a sample in any batch, order or process; group (B,) int64 in [0, G);
            bytes (B,) int64 or None, number of UTF-8 bytes of the predicted tokens of each sample;
            decoder_mask (B, T) bool or None, the mask of the rows in the decoder of an encoder-decoder;
            decoder: the sites with one row per token of the decoder, as ``<module>.input`` or ``<module>.output``;
            task: which labels are predicted, see ``Objective``; "" if the labels are not read
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None
    mask: Tensor | None
    hashes: Tensor
    group: Tensor
    targets: Tensor | None = None
    bytes: Tensor | None = None
    decoder_mask: Tensor | None = None
    decoder: frozenset[str] = frozenset()
    has_ids: bool = False  # whether the hashes are of ids, not of contents
    task: str = ""

    @classmethod
    def of(
        cls,
        batch: Any,
        groups: int = 1,
        seed: int = 0,
        cuts: Tensor | None = None,
        task: str = "",
        shift: Callable[[Tensor], Tensor] | None = None,
        required: Collection[str] = (),
        hashes: Tensor | None = None,
    ) -> "Batch":
        """From a tensor, an (x, y) pair, a tuple with ``ids``, or a dict with input_ids / pixel_values, labels, targets, masks.

        Arrays of NumPy will do, too. In a pair, x may be a tuple of several inputs. ``required``: names that the model cannot run
        without, which are inputs even if they are called y, labels or ids.

        Token labels are aligned with the tokens. Labels of padding are ignored and, for a causal language model, also those of
        tokens right after padding, so padding takes part in no loss. ``shift`` makes the inputs of a decoder from the labels,
        if the batch has none. ``select`` (B, T) bool in a dict says which real tokens count as rows; it changes neither the
        loss nor the model's inputs. ``token_mask`` (B, T), 1 for real tokens, takes the place of ``attention_mask`` for a model
        that has its mask under another name. All other entries of a dict, except labels, targets, ids and bytes, are passed to
        the model. The labels of a causal language model are its tokens if the batch has none.

        Sample hashes are made of ``ids`` if the batch has them, otherwise of the content of the samples, so that groups do
        not depend on batching or padding. ``cuts`` (of ``balanced_cuts``) divide them into groups of
        equal size. ``hashes`` (B,) are those of an earlier call, which need not be computed again. Raises ValueError for any other
        form of batch.
        """
        given = read(batch, required)
        args, kwargs, labels, ids, targets, size = given
        mask, select = kwargs.pop("token_mask", kwargs.get("attention_mask")), kwargs.pop("select", None)
        first = given.first
        if mask is None and select is None:
            warn_of_masks(kwargs, first)
        if labels is None and task == "causal_lm":
            labels = _token_ids(args, kwargs)
        if labels is not None and len(labels) != len(first):
            raise ValueError(f"a batch has {len(first)} samples and {len(labels)} labels: give one label per sample")
        labels = _as_classes(labels, first)
        decoder_mask, labels = _decoder_mask(kwargs, labels, task, shift), _without_padding(labels, mask, task)
        if hashes is None:
            hashes = _content_hashes(first, mask) if ids is None else mix(ids.reshape(-1).long().cpu())
        rows, group = _row_mask(mask, select, first), groups_of(hashes, groups, seed, cuts)
        return cls(args, kwargs, labels, rows, hashes, group, targets, size, decoder_mask, has_ids=ids is not None, task=task)

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def predicted(self) -> Tensor:
        """Number of predictions of each sample, (B,): the labels that count.

        Without labels that are classes, and for one label per sample, it is 1, or 0 for a sample without a label.
        """
        labels = self.labels
        one = labels is None or labels.ndim < 2 or labels.is_floating_point() or self.task in ("multilabel", "regression", "none")
        if one or labels is None:
            return torch.ones(len(self)) if self.labelled is None else self.labelled.float()
        labels = labels[:, 1:] if self.task == "causal_lm" else labels
        return (labels != IGNORE).flatten(1).sum(1)

    @property
    def predicting(self) -> Tensor | None:
        """The mask of the rows from which labels are predicted: the decoder's in an encoder-decoder."""
        return self.decoder_mask if self.task == "seq2seq" else self.mask

    def mask_at(self, site: str) -> Tensor | None:
        """The mask of the rows at a site: the decoder's where the site shows the decoder's tokens."""
        return self.decoder_mask if site in self.decoder else self.mask

    @cached_property
    def by_group(self) -> tuple[Tensor | None, list[tuple[int, int, int]]]:
        """The order that sorts samples by group, None if they are sorted, and (group, first, end) of each group in it."""
        order = sorting(self.group)
        return order, group_slices(self.group if order is None else self.group[order])

    @cached_property
    def labelled(self) -> Tensor | None:
        """Which samples have a label that counts, (B,) bool; None if all of them do, or if there are no labels."""
        return with_label(self.labels, self.task)

    def map(self, change: Any) -> "Batch":
        """The batch with a function applied to each tensor with one row per sample."""
        samples = len(self)

        def each(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) and value.shape[:1] == (samples,) else value

        return replace(
            self,
            args=tuple(map(each, self.args)),
            kwargs={k: each(v) for k, v in self.kwargs.items()},
            labels=each(self.labels),
            mask=each(self.mask),
            hashes=each(self.hashes),
            group=each(self.group),
            targets=each(self.targets),
            bytes=each(self.bytes),
            decoder_mask=each(self.decoder_mask),
        )

    @property
    def named(self) -> dict[str, Any]:
        """The inputs by name; those without one are ``input 0``, ``input 1`` ..."""
        return {**{f"input {k}": value for k, value in enumerate(self.args)}, **self.kwargs}

    @property
    def coincident(self) -> list[str]:
        """The names of inputs that may have as many rows as there are samples by chance, as a table that all samples share.

        These are all but the first, and but those that have an entry for each of its tokens or positions.
        """
        own = {k: v for k, v in self.named.items() if isinstance(v, Tensor) and v.ndim and len(v) == len(self)}
        first = next(iter(own.values()), None)
        return [k for k, v in own.items() if first is not None and (v.ndim < 2 or v.shape[:2] != first.shape[:2])]

    def contents(self) -> Tensor:
        """A hash of all inputs of each sample without padding, (B,) int64 on the CPU, whatever its id."""
        mask = self.kwargs.get("attention_mask")
        every = [*self.args, *(v for k, v in self.kwargs.items() if k != "position_ids")]  # made only where padding needs them
        own = [t for t in every if isinstance(t, Tensor) and t is not mask and t.ndim and len(t) == len(self)]
        return mix(*(_content_hashes(t, mask) for t in own)) if own else self.hashes

    def head(self, samples: int) -> "Batch":
        """The first samples only."""
        return self.map(lambda t: t[:samples])

    def to(self, device: torch.device) -> "Batch":
        """Inputs, labels and mask on the model's device; hashes and groups stay on the CPU."""
        moved = self.map(lambda t: t.to(device, non_blocking=True))
        return replace(moved, hashes=self.hashes, group=self.group)

    def copied(self) -> "Batch":
        """The batch with copies of all inputs."""
        args, kwargs = tuple(map(_copy, self.args)), {name: _copy(value) for name, value in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs)

    def run(self, model: nn.Module) -> Any:
        """The model's output for this batch. The model gets copies, because it may write into its inputs."""
        own = self.copied()
        return model(*own.args, **own.kwargs)

    def wrong_dtype(self, model: nn.Module, error: Exception) -> str:
        """What is wrong with the inputs if an error of the model is about their dtype; empty for other errors."""
        if not any(word in str(error) for word in ("type", "implemented for", "without a tensor")):
            return ""
        weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        for name, value in self.named.items():
            kind = value.dtype if isinstance(value, Tensor) else weights
            numbers = kind is not None and kind.is_floating_point
            if weights is not None and kind != weights and (numbers or kind == torch.uint8):
                given, own = (str(dtype).removeprefix("torch.") for dtype in (kind, weights))
                way_out = f"to {own}" if numbers else "to what the model was trained on, such as x.float() / 255"
                shown = f"{name} {tuple(value.shape)} is {given}, the weights of {type(model).__name__} are {own}"
                return f"{shown}: convert the input {way_out}"
        return ""

    def describe(self) -> str:
        """A description of the inputs: names, shapes and dtypes."""
        tensors = {name: value for name, value in self.named.items() if isinstance(value, Tensor)}
        return ", ".join(f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in tensors.items())


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def tensor_of(value: Any) -> Tensor | None:
    """The tensor in a model output: itself, a known field, otherwise the first floating-point tensor; None if there is none."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        for name in ("logits", "last_hidden_state", "hidden_states"):
            if isinstance(value.get(name), Tensor):
                return value[name]
        value = tuple(value.values())
    elif hasattr(value, "logits"):
        return value.logits
    if isinstance(value, (tuple, list)):
        return next((v for v in value if isinstance(v, Tensor) and v.is_floating_point()), None)
    return None


def _content_hashes(first: Tensor, mask: Any) -> Tensor:
    """Hashes of the content of the samples without padding, (B,) int64 on the CPU; their numbers where the content is on meta."""
    if first.is_meta:
        return mix(torch.arange(len(first)))
    if not isinstance(mask, Tensor) or mask.shape != first.shape or bool(mask.all()):
        return content_hashes(first).cpu()
    rows = zip(first.cpu(), mask.bool().cpu(), strict=True)
    return torch.cat([content_hashes(row[keep][None]) for row, keep in rows])


def _row_mask(mask: Tensor | None, select: Tensor | None, first: Tensor) -> Tensor | None:
    """The mask of tokens that are selected and not padding; None if the batch has neither mask."""
    if select is None:
        return None if mask is None else mask.bool()
    shape = first.shape[:2] if mask is None else mask.shape
    if select.shape != shape:
        raise ValueError(f"select is {tuple(select.shape)}, but the tokens are {tuple(shape)}: give one bool per token")
    return select.bool() if mask is None else mask.bool() & select.to(mask.device).bool()


def _as_classes(labels: Tensor | None, first: Tensor) -> Tensor | None:
    """Integer labels as int64, and a column of them, (B, 1), as (B,); one label of each of the tokens (B, 1) stays a column."""
    if labels is None or labels.is_floating_point() or labels.is_complex():
        return labels
    column = labels.ndim == 2 and labels.shape[1] == 1 and first.shape != labels.shape
    return (labels[:, 0] if column else labels).long()


def _token_ids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The token ids (B, T) that a model is called with; None if it is called with something else."""
    ids = args[0] if args else kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.is_complex():
        return None
    return ids.long()


def _without_padding(labels: Tensor | None, mask: Any, task: str) -> Tensor | None:
    """Labels of one token each, with IGNORE where there is no prediction of it: at padding and, for next tokens, right after it."""
    by_token = task in ("causal_lm", "token_classification", "masked_lm", "classification")
    if labels is None or not by_token or not isinstance(mask, Tensor) or labels.shape != mask.shape:
        return labels
    return labels.where(_follows_token(mask.bool()) if task == "causal_lm" else mask.bool(), IGNORE)


def _decoder_mask(
    kwargs: dict[str, Any], labels: Tensor | None, task: str, shift: Callable[[Tensor], Tensor] | None
) -> Tensor | None:
    """The mask of the decoder's rows; adds the decoder's inputs if only the labels are given."""
    given = kwargs.get("decoder_attention_mask")
    if task != "seq2seq":
        return given if given is None else given.bool()
    if shift is not None and labels is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & kwargs.keys():
        kwargs["decoder_input_ids"] = shift(labels)
        given = labels != IGNORE if given is None else given
    return None if given is None else given.bool()


def _follows_token(mask: Tensor) -> Tensor:
    """(B, T) bool: true for tokens that are not padding and, except for the first, do not follow padding."""
    before = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], 1)
    return mask & before
