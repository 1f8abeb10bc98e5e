"""Direct logit attribution: a logit as a sum over what each component of the model added to the residual stream."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from nodelens.interventions.lenses.lens import about
from nodelens.interventions.lenses.tail import Tail, tail_of
from nodelens.interventions.prompts import TokenizedPrompt, token_text
from nodelens.interventions.token_model import TokenModel
from nodelens.interventions.token_positions import Positions
from nodelens.network.layers import Layer
from nodelens.results.findings import Findings

from .grid import GridOptions, grid_sites
from .pairs import check_answers, check_distinct
from .patch import PATCHING

_FAR = 1e-3  # of the largest entry, that a sum may differ from what it explains
Row = dict[str, Any]


class Part(NamedTuple):
    """What a component added to the stream at each position, (T, d)."""

    component: str
    layer: int | None
    head: int | None
    added: Tensor


@dataclass(frozen=True)
class Direction:
    """The logit of a token, or the difference of two, as a linear function of the stream with the norm's scale frozen.

    vector (d,): logit = stream . vector + bias; value: the logit that the tail gives
    """

    vector: Tensor
    bias: float
    value: float

    @classmethod
    def of(cls, tail: Tail, state: Tensor, token: int, wrong: int | None) -> "Direction":
        """At one state (d,), before a cap of the logits. Raises ValueError for a norm that is no scaled, shifted stream."""
        gain, shift, centred = frozen(tail.norm, state)
        with torch.enable_grad():
            normed = tail.normed(state).detach().requires_grad_()
            logits = tail.uncapped(normed)
            value = logits[token] - (0 if wrong is None else logits[wrong])
            slope = torch.autograd.grad(value, normed)[0].double()
        vector = gain * slope
        constant = float(value.detach()) - float(slope @ normed.detach().double())
        return cls(vector - vector.mean() if centred else vector, float(slope @ shift) + constant, float(value.detach()))


def frozen(norm: nn.Module | None, state: Tensor) -> tuple[Tensor, Tensor, bool]:
    """A norm at one state (d,) as ``gain * x + shift``, gain and shift (d,); x centred where the flag says so.

    Right for layer norms and root-mean-square norms of any parametrisation. Raises ValueError for other modules.
    """
    ones = torch.ones_like(state)
    if norm is None:
        return ones.double(), 0 * ones.double(), False
    probe = ones.clone()  # of mean 0, without a 0
    probe[1::2] = -1
    if len(probe) % 2:
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0])
    shift = norm(0 * state).double()
    weight = (norm(probe).double() - shift) / probe.double()
    centred = bool(torch.allclose(norm(probe + 1), norm(probe), rtol=1e-3, atol=1e-5))
    x, y = state.double(), norm(state).double() - shift
    x = x - x.mean() if centred else x
    scale = (y @ (weight * x)) / (weight * x).square().sum()
    if (scale * weight * x - y).abs().max() > _FAR * y.abs().max():
        raise ValueError(f"{type(norm).__name__} is neither a layer norm nor a root-mean-square norm: its scale cannot be frozen")
    return scale * weight, shift, centred


def attribute_logits(
    model: TokenModel,
    prompts: list[TokenizedPrompt],
    answer: str | int | None = None,
    wrong: str | int | None = None,
    position: Positions = -1,
    heads: bool = True,
) -> Findings:
    """The logit of a token (default: the first choice), or its difference to another one, by component.

    The parts add up: the table ``components`` has what the embedding, each attention (or each of its heads), each MLP, the biases
    contribute with the scale of the final norm as it is in this run; ``runs`` has their sum and the model's logit (before a cap).
    What attention and MLP put out counts as the block adds it, with the multiplier of the config. Where a block adds something
    else, as with a norm behind the attention, it is one part, and a row under ``missing`` says so.

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; Wang et al. 2022, 2211.00593
    """
    rows, runs, missing = list[Row](), list[Row](), list[dict[str, str]]()
    with model.running():
        for k, prompt in enumerate(prompts):
            places = prompt.positions(position)
            parts, tail, states, logits, gaps = _parts_of(model, prompt, heads)
            missing = gaps
            for place in places:
                token = int(logits[place].argmax()) if answer is None else prompt.next_token(answer)
                other = None if wrong is None else prompt.next_token(wrong)
                check_answers(logits.shape[-1], token, other)
                check_distinct(None if answer is None else token, other)
                line = Direction.of(tail, states[place], token, other)
                where: Row = {"sample": k, "position": place, "token": prompt.tokens[place]}
                own = [_row(where, part, float(part.added[place].double() @ line.vector)) for part in parts]
                own.append(where | {"component": "bias", "layer": None, "head": None, "contribution": line.bias})
                total = sum(row["contribution"] for row in own)
                texts = {
                    "answer": token_text(token, prompt.tokenizer),
                    "wrong": None if other is None else token_text(other, prompt.tokenizer),
                }
                rows += own
                runs.append(where | texts | {"logit": line.value, "sum": total})
    table = pd.DataFrame(rows).astype({"layer": "Int64", "head": "Int64"})
    return Findings(
        PATCHING, {"components": table, "runs": pd.DataFrame(runs)}, _lines(table), metadata=about(model) | {"missing": missing}
    )


def _row(where: Row, part: Part, contribution: float) -> Row:
    return where | {"component": part.component, "layer": part.layer, "head": part.head, "contribution": contribution}


def _parts_of(
    model: TokenModel, prompt: TokenizedPrompt, heads: bool
) -> tuple[list[Part], Tail, Tensor, Tensor, list[dict[str, str]]]:
    """The parts of the last state, the tail, the last states (T, d), the logits (T, V), and what cannot be told apart."""
    blocks, missing = range(len(model.roles.blocks)), list[dict[str, str]]()
    wanted = {(k, name): found for k in blocks for name in ("attention", "mlp", "heads") if (found := _layer(model, k, name))}
    stream = {k: model.part(k, "output") for k in blocks}
    first = model.part(0, "input")
    layers = {layer.name: layer for layer in (first, *stream.values(), *wanted.values())}
    shown, logits = model.read(prompt.ids[None], layers.values())
    before, parts = shown[first.name][0], [Part("embedding", None, None, shown[first.name][0])]
    for k in blocks:
        after = shown[stream[k].name][0]
        own = {name: shown[layer.name][0] for (block, name), layer in wanted.items() if block == k}
        added = _added(k, after - before, own)
        if len(added) == 1:
            reason = "attention and MLP do not add up to what the block adds: a norm or a gate lies between"
            missing.append({"layer": stream[k].name, "what": "attention, mlp", "reason": reason})
        for part in added:
            split = heads and part.component == "attention" and (k, "heads") in wanted
            parts += list(_heads(model, part, wanted[k, "heads"], own["heads"], own["attention"])) if split else [part]
        before = after
    return parts, tail_of(model.model, before, logits[0]), before, logits[0], missing


def _layer(model: TokenModel, block: int, part: str) -> Layer | None:
    found = model.roles.blocks[block].parts[part]
    return found if isinstance(found, Layer) else None


def _added(block: int, change: Tensor, own: dict[str, Tensor]) -> list[Part]:
    """What attention and MLP added, with the multiplier of each by least squares; the whole block where they do not explain it."""
    names = [name for name in ("attention", "mlp") if name in own]
    if len(names) == 2:
        columns = torch.stack([own[name].double().flatten() for name in names], 1)
        scales = torch.linalg.lstsq(columns, change.double().flatten()[:, None]).solution[:, 0]
        if (columns @ scales - change.double().flatten()).abs().max() <= _FAR * change.abs().max():
            return [Part(name, block, None, own[name].double() * scale) for name, scale in zip(names, scales, strict=True)]
    return [Part("block", block, None, change)]


def _heads(model: TokenModel, whole: Part, layer: Layer, read: Tensor, put_out: Tensor) -> Iterator[Part]:
    """The heads of an attention and the bias of its output projection; the whole where they do not add up to it."""
    assert whole.layer is not None
    try:
        sites, _ = grid_sites(model, GridOptions("heads", whole.layer))
    except ValueError:
        yield whole
        return
    columns = [span for span in sites[0].columns.values() if span is not None]
    alone = torch.zeros(len(columns) + 1, *read.shape, dtype=read.dtype, device=read.device)
    for head, (start, end) in enumerate(columns):
        alone[head, :, start:end] = read[:, start:end]
    written = layer.module(alone).double()
    by_head, bias = written[:-1] - written[-1], written[-1]
    if (by_head.sum(0) + bias - put_out.double()).abs().max() > _FAR * put_out.abs().max():
        yield whole
        return
    scale = float((whole.added * put_out.double()).sum() / put_out.double().square().sum())  # the block's multiplier
    yield from (Part("head", whole.layer, head, added * scale) for head, added in enumerate(by_head))
    if bias.any():
        yield Part("attention_bias", whole.layer, None, bias * scale)


def _lines(table: pd.DataFrame) -> list[str]:
    """The three largest contributions, on average over prompts and positions."""
    means = table.groupby(["component", "layer", "head"], dropna=False)["contribution"].mean()
    best = means.reindex(means.abs().sort_values(ascending=False).index)[:3]
    names = [_name(*key) for key in best.index]
    return [f"largest contributions: {', '.join(f'{name} {value:+.3g}' for name, value in zip(names, best, strict=True))}"]


def _name(component: str, layer: Any, head: Any) -> str:
    """Head 2 of layer 4, mlp of layer 0, embedding."""
    numbered = component if pd.isna(head) else f"{component} {head}"
    return numbered if pd.isna(layer) else f"{numbered} of layer {layer}"
