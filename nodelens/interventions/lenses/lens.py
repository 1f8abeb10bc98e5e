"""``nl.lens``: what a language model would predict after each of its blocks, for given prompts (the logit lens)."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from nodelens.interventions.prompts import TokenizedPrompt, read_prompts, token_text
from nodelens.interventions.token_model import TokenModel
from nodelens.network.eval_mode import one_at_a_time
from nodelens.results.findings import Findings

from .scores import row_scores
from .tail import Tail, tail_of
from .translators import Translators

LENS = "lens"  # the kind of these findings


@one_at_a_time
def lens(
    model: nn.Module,
    prompts: Any,
    tokenizer: Any = None,
    *,
    layers: str | int | Sequence[int] = "all",
    k: int = 5,
    translators: str | Path | None = None,
) -> Findings:
    """The logit lens: tokens that a language model would predict if it ended after each of its blocks.

    The residual stream after a block passes through the model's own final norm, once, and its head, with the scale or cap of its
    config. After the last block this is the model's own prediction, which is checked.

    prompts:   a text, token ids (T,) or (B, T), a batch with input_ids and attention_mask, or a list of texts or ids. Each prompt
               runs without padding, so that prompts may differ in length
    tokenizer: of transformers, ``ByteTokenizer``, or the path of one; needed for texts, otherwise tokens are shown as ``#<id>``
    layers:    blocks: all, an index, several, or an expression such as ``n//2:``
    k:         how many tokens are listed at each position
    translators: the file of a tuned lens, which the analysis tuned_lens wrote: states pass through its maps before the norm

    Returns the tables ``predictions`` (a row for each prompt, position, layer and rank: predicted, its id, probability) and
    ``positions`` (a row for each prompt, position and layer: the next token, its surprisal, which is NaN for the last position, KL
    from the model's own prediction, and entropy; in nats).

    Raises TypeError for what is no model; ValueError for a model in training mode or whose logits are not head(norm(h)), texts
    without a tokenizer, and a layer out of range.
    Source: nostalgebraist 2020, interpreting GPT: the logit lens
    """
    known = TokenModel.checked("nl.lens", model)
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}: it takes 1 or more, the number of tokens to list")
    tuned = None if translators is None else Translators.load(translators)
    return read_lens(known, read_prompts(prompts, tokenizer), known.blocks(layers), k, tuned)


def read_lens(
    model: TokenModel, prompts: Iterable[TokenizedPrompt], blocks: Sequence[int], k: int, translators: Translators | None = None
) -> Findings:
    """The lens of prompts; see ``lens``."""
    layers = model.stream(sorted({*blocks, len(model.roles.blocks) - 1}))
    last = layers[len(model.roles.blocks) - 1].name
    predictions, positions, tail = list[dict[str, Any]](), list[dict[str, Any]](), None
    with model.running():
        for sample, prompt in enumerate(prompts):
            shown, logits = model.read(prompt.ids[None], layers.values())
            tail = tail or tail_of(model.model, shown[last][0], logits[0])
            for block in blocks:
                where = {"sample": sample, "layer": block, "module": layers[block].name}
                states = shown[layers[block].name][0]
                states = states if translators is None else translated(model, translators, block, states)
                found = _at_layer(tail, states, logits[0], prompt, k)
                predictions += [where | row for row in found[0]]
                positions += [where | row for row in found[1]]
    frames = {"predictions": pd.DataFrame(predictions), "positions": pd.DataFrame(positions)}
    return Findings(LENS, frames, _lines(frames["positions"]), metadata=about(model) | {"k": k})


def translated(model: TokenModel, translators: Translators, block: int, states: Tensor) -> Tensor:
    """States (..., d) of a block in a tuned lens. Raises ValueError for translators of another model."""
    translators.check(states.shape[-1], len(model.roles.blocks))
    return translators.to(states.device)(block, states)


def about(model: TokenModel) -> dict[str, Any]:
    """What the findings of any lens or patch say of the model."""
    return {"model": model.name, "model_id": str(getattr(model.model, "name_or_path", "") or "")}


def top_tokens(logits: Tensor, k: int, prompt: TokenizedPrompt) -> list[dict[str, Any]]:
    """The k tokens of largest probability of logits (V,), the first first: rank, predicted, predicted_id, probability."""
    p, ids = logits.float().softmax(0).topk(min(k, len(logits)))
    return [
        {"rank": rank, "predicted": token_text(i, prompt.tokenizer), "predicted_id": i, "probability": value}
        for rank, (i, value) in enumerate(zip(ids.tolist(), p.tolist(), strict=True), 1)
    ]


def _at_layer(tail: Tail, states: Tensor, final: Tensor, prompt: TokenizedPrompt, k: int) -> tuple[list[dict], list[dict]]:
    """Rows of the two tables for one prompt and layer. states (T, d), final (T, V)."""
    following = torch.cat([prompt.ids[1:], prompt.ids[:1]]).to(final.device)  # the last position has no next token
    predictions, positions = list[dict[str, Any]](), list[dict[str, Any]]()
    for part in tail.parts(len(states)):
        logits = tail(states[part]).float()
        scores = row_scores(logits, final[part], following[part], (1,))
        for row, values in enumerate(logits):
            position = row + part.start
            where: dict[str, Any] = {"position": position, "token": prompt.tokens[position]}
            predictions += [where | each for each in top_tokens(values, k, prompt)]
            positions.append(where | _scores_at(scores, row, prompt, position))
    return predictions, positions


def _scores_at(scores: Mapping[str, Tensor], row: int, prompt: TokenizedPrompt, position: int) -> dict[str, Any]:
    ends = position + 1 == len(prompt)
    return {
        "next_token": None if ends else prompt.tokens[position + 1],
        "surprisal": float("nan") if ends else float(scores["surprisal"][row]),
        "kl": float(scores["kl"][row]),
        "entropy": float(scores["entropy"][row]),
        "agreement": bool(scores["agreement_at_1"][row]),
    }


def _lines(positions: pd.DataFrame) -> list[str]:
    """One line per layer: how far the lens is from the model's own predictions."""
    means = positions.groupby(["layer", "module"])[["agreement", "kl"]].mean()
    return [
        f"layer {layer} ({module}): the model's first choice at {row['agreement']:.0%} of the positions, KL {row['kl']:.3g} nats"
        for (layer, module), row in means.iterrows()
    ]
