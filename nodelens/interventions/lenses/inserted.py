"""States that are inserted behind a soft prompt: what the model predicts there, and some tokens later."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from nodelens.interventions.applying import applied
from nodelens.interventions.cells import TOKENS
from nodelens.interventions.edit_value import Edit
from nodelens.interventions.prompts import TokenizedPrompt, token_text
from nodelens.interventions.token_model import TokenModel
from nodelens.network.layers import Layer
from nodelens.statistics.sample_hash import generator

from .future import shifted
from .lens_pass import PredictingRows, run_lens
from .patchscope import grid_rows
from .scores import TokenMeans, row_scores
from .soft_prompts import SoftPrompts


@dataclass(frozen=True, eq=False)
class FollowedRows:
    """Tokens of a batch that have predicting tokens at each of the distances ``ahead``.

    now (n,): rows of ``rows``; later: {distance: rows that many positions later (n,)}; tokens (n, most): the true tokens in
    between; source (n,): rows whose states are inserted, None for the tokens' own
    """

    rows: PredictingRows
    now: Tensor
    later: Mapping[int, Tensor]
    tokens: Tensor
    source: Tensor | None = None

    @property
    def states_of(self) -> Tensor:
        """The rows whose states are inserted, (n,)."""
        return self.now if self.source is None else self.source

    @classmethod
    def of(cls, rows: PredictingRows, ahead: Sequence[int]) -> "FollowedRows":
        """All tokens that have a predicting token at every distance up to the largest one."""
        most = max(ahead)
        pairs = [shifted(rows, n) for n in range(most + 1)]
        kept = torch.ones(len(rows.sample), dtype=torch.bool, device=rows.sample.device)
        place = torch.zeros(most + 1, len(kept), dtype=torch.int64, device=kept.device)
        for n, (now, later) in enumerate(pairs):
            place[n, now] = later
            kept &= torch.zeros_like(kept).index_fill(0, now, True)
        now = kept.nonzero()[:, 0]
        tokens = torch.stack([rows.following[place[n, now]] for n in range(most)], 1) if most else now[:, None][:, :0]
        return cls(rows, now, {n: place[n, now] for n in ahead}, tokens)

    def some(self, chosen: Tensor) -> "FollowedRows":
        """Some of them, by index."""
        later = {n: places[chosen] for n, places in self.later.items()}
        source = None if self.source is None else self.source[chosen]
        return FollowedRows(self.rows, self.now[chosen], later, self.tokens[chosen], source)

    def drawn(self, count: int | None, rng: torch.Generator) -> "FollowedRows":
        """``count`` of them at random; None: all."""
        if count is None or len(self.now) <= count:
            return self
        return self.some(torch.randperm(len(self.now), generator=rng)[:count].to(self.now.device))

    def parts(self, length: int) -> Iterator["FollowedRows"]:
        """Parts whose passes behind a prompt have at most 4,096 tokens, and at most 2^24 logits."""
        each = length + self.tokens.shape[1]
        logits = (self.tokens.shape[1] + 1) * self.rows.logits.shape[-1]
        size = max(1, min(TOKENS // each, 2**24 // logits))
        for part in torch.arange(len(self.now), device=self.now.device).split(size) if len(self.now) else ():
            yield self.some(part)

    def exchanged(self) -> "FollowedRows":
        """The same tokens, each with the state of the one before it, and the first with that of the last."""
        return replace(self, source=self.now.roll(1))


def inserted_logits(model: TokenModel, layer: Layer, prompt: Tensor, states: Tensor, tokens: Tensor) -> Tensor:
    """Logits (n, m + 1, V) of a soft prompt and m tokens, from the last position of the prompt on, with states inserted there.

    layer: the output of a block; prompt (length, d): embeddings; states (n, d): one per row of the batch; tokens (n, m) int64
    Source: Pal et al. 2023, Future Lens, 2311.04897, section 2.4
    """
    width, count = tokens.shape[1] + 1, len(states)
    embedded = prompt.to(model.embeddings.weight.dtype).expand(count, *prompt.shape)
    embedded = torch.cat([embedded, model.embeddings(tokens.to(embedded.device))], 1)
    insertion = Edit(layer.name, "set", positions=len(prompt) - 1, value=states[:, None])
    with applied(model.model, [insertion]):
        return model.logits_of(embedded, width)[:, -width:]


def score_inserted(
    model: nn.Module,
    data: Iterable[Any],
    layers: Mapping[int, Layer],
    prompts: SoftPrompts,
    ahead: Sequence[int],
    ks: Sequence[int],
    *,
    shuffled: bool = False,
    states: int | None = None,
    seed: int = 0,
    output: Any = None,
) -> dict[int, TokenMeans]:
    """{ahead: scores of each block} of states inserted behind the soft prompts, read where ``ahead`` true tokens have followed.

    shuffled: each token gets the state of another one of its batch: what the prompt and the tokens say by themselves. A batch
              with fewer than two such tokens is left out
    states:   the number of tokens of each batch, drawn from the seed; None: all
    """
    means, known, rng = {n: TokenMeans() for n in ahead}, TokenModel(model), generator(seed, "inserted states")

    def see(rows: PredictingRows) -> None:
        followed = FollowedRows.of(rows, ahead).drawn(states, rng)
        if shuffled and len(followed.now) < 2:
            return
        followed = followed.exchanged() if shuffled else followed
        for block, layer in layers.items():
            prompt = prompts.of(block)
            for part in followed.parts(len(prompt)):
                logits = inserted_logits(known, layer, prompt, rows.states(block)[part.states_of], part.tokens)
                for n in ahead:
                    own, true = rows.final()[part.later[n]], rows.following[part.later[n]]
                    means[n].add(block, row_scores(logits[:, n], own, true, ks), rows.sample[part.now], len(rows.logits))

    with torch.no_grad():
        run_lens(model, data, layers, see, output=output)
    return means


def decode_inserted(
    model: TokenModel, sources: Iterable[TokenizedPrompt], layers: Mapping[int, Layer], prompts: SoftPrompts, k: int, count: int
) -> dict[str, pd.DataFrame]:
    """What the model goes on with, ``count`` tokens, each the likeliest, when a state of a source is inserted behind a soft prompt.

    Tables ``predictions`` and ``positions`` as in ``patchscope_grid``.
    """
    predictions, positions = list[dict[str, Any]](), list[dict[str, Any]]()
    with model.running():
        for sample, source in enumerate(sources):
            shown, final = model.read(source.ids[None], layers.values())
            for block, layer in layers.items():
                states = shown[layer.name][0]
                logits, tokens = _greedy(model, layer, prompts.of(block), states, count)
                where = [(block, position) for position in range(len(states))]
                found = grid_rows(logits, final[0].float(), where, source, layers, sample, k)
                predictions += found[0]
                for at, row in zip(found[1], tokens.tolist(), strict=True):
                    positions.append(at | {"continuation": "".join(token_text(i, source.tokenizer) for i in row)})
    return {"predictions": pd.DataFrame(predictions), "positions": pd.DataFrame(positions)}


def _greedy(model: TokenModel, layer: Layer, prompt: Tensor, states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The logits (n, V) of the first token, and the likeliest tokens (n, count)."""
    firsts, every = [], []
    for part in states.split(max(1, TOKENS // (len(prompt) + count))):
        tokens = torch.zeros(len(part), 0, dtype=torch.int64, device=part.device)
        for step in range(count):
            logits = inserted_logits(model, layer, prompt, part, tokens)[:, -1].float()
            firsts += [logits] if step == 0 else []
            tokens = torch.cat([tokens, logits.argmax(1, keepdim=True)], 1)
        every.append(tokens)
    return torch.cat(firsts), torch.cat(every)
