"""Runs a model on a context: states are loaded as edits, and saved from what passes."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.data.tokens import as_tokenizer
from nodelens.network.architecture import config_of, width_of
from nodelens.network.hooks import Capture, Site
from nodelens.network.layers import Layer
from nodelens.network.roles import Roles, roles_of

from .edit_value import Edit
from .edits import edit
from .representation_context import RepresentationContext
from .states import StateManager
from .token_positions import find_text, indices, searches_text

_NAMES = "embed, layer, layer_<k>, lm_head"
_LAYER = re.compile(r"layer_(\d+)")


@dataclass(frozen=True, eq=False)
class Encoded:
    """Prompts of B rows and T columns, padded on the left. Shapes: real (B, T) bool; ids (B, T), or embeddings (B, T, width)."""

    inputs: dict[str, Tensor]
    real: Tensor
    texts: list[str] | None
    tokenizer: Any = None

    def places(self, position: Any) -> Tensor:
        """The columns of positions, (B, P). Raises ValueError for texts not found, and for numbers P that differ."""
        found = [self._places(position, k) for k in range(len(self.real))]
        other = next((k for k, own in enumerate(found) if len(own) != len(found[0])), None)
        if other is not None:
            raise ValueError(
                f"position {position!r} selects {len(found[0])} tokens of prompt 0, and {len(found[other])} of prompt {other}: "
                "states have the same number for all; give other positions, or run the prompts one by one"
            )
        return torch.tensor(found)

    def _places(self, position: Any, k: int) -> list[int]:
        columns = self.real[k].nonzero()[:, 0].tolist()
        if not searches_text(position):
            return [columns[i] for i in indices(position, len(columns), "position")]
        if self.texts is None:
            raise ValueError(f"position {position!r} is searched in a text, and the prompt is soft: give indices")
        ids = self.inputs["input_ids"][k].cpu()
        return [columns[i] for i in find_text(position, ids, self.real[k], self.tokenizer, self.texts[k])]

    def among_real(self, columns: Tensor) -> Tensor:
        """Columns (B, P) as indices among the real tokens."""
        return (self.real.long().cumsum(1) - 1).gather(1, columns)


@torch.no_grad()
def run_context(model: nn.Module, tokenizer: Any, context: RepresentationContext, states: StateManager) -> Any:
    """The model's output for a context; states are loaded and saved as the config of the manager says.

    Raises ValueError for names of states that are unknown or not saved, positions or layers out of range, a text without a
    tokenizer, and states that do not fit. Nothing is saved then.
    """
    roles, config = roles_of(model), states.config
    prompt = encoded(model, tokenizer, context)
    if not roles.blocks:
        roles.layers("blocks[all]")  # raises with the reason
    layers = indices(context.layer, len(roles.blocks), "layer")
    places = prompt.places(context.position)
    edits = [each for name in config.load_states for each in _loads(model, roles, name, layers, prompt, places, states)]
    sites = {key: layer for name in config.save_states for key, layer in _sites(roles, name, layers).items()}
    shown: dict[str, Tensor] = {}
    names = {Site(layer, "output"): key for key, layer in sites.items()}

    def see(site: Site, tensor: Tensor) -> None:
        key = names[site]
        rows, tensor = prompt.places("all") if key == "embed" else places, _by_prompt(site, tensor, prompt.real)
        shown[key] = tensor[torch.arange(len(rows), device=tensor.device)[:, None], rows.to(tensor.device)]

    with edit(model, edits), Capture(names, see) as capture:
        capture.gate = True
        output = model(**_arguments(model, prompt))
    if missing := [key for key in sites if key not in shown]:
        raise ValueError(
            f"state {missing[0]!r} is not saved: {sites[missing[0]].name} was never called by {type(model).__name__}.forward"
        )
    states.save_all(shown)
    return output


def _by_prompt(site: Site, tensor: Tensor, real: Tensor) -> Tensor:
    """What a site shows, one row per prompt and token. Raises ValueError for anything else."""
    if tensor.ndim == 3 and tensor.shape[:2] == real.shape[::-1] != real.shape:  # tokens before samples
        return tensor.transpose(0, 1)
    if tensor.shape[:2] != real.shape:
        raise ValueError(
            f"{site.layer.name} shows {tuple(tensor.shape)} for {len(real)} prompts of {real.shape[1]} tokens: a state needs one "
            "row per token"
        )
    return tensor


def encoded(model: nn.Module, tokenizer: Any, context: RepresentationContext) -> Encoded:
    """The prompts of a context as the inputs of a model, on its device. Raises ValueError as ``run_context`` does."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    prompt = context.prompt
    if isinstance(prompt, Tensor):
        soft = prompt[None] if prompt.ndim == 2 else prompt
        if soft.ndim != 3 or not soft.is_floating_point():
            raise ValueError(f"a soft prompt is {tuple(prompt.shape)}: give embeddings (tokens, width) or (prompts, tokens, width)")
        table = getattr(model, "get_input_embeddings", lambda: None)()
        weight = getattr(table, "weight", None)
        if isinstance(weight, Tensor) and (soft.shape[-1] != weight.shape[-1] or soft.dtype != weight.dtype):
            given, own = (str(each.dtype).removeprefix("torch.") for each in (soft, weight))
            raise ValueError(
                f"a soft prompt has width {soft.shape[-1]} and {given}, the embeddings of {type(model).__name__} "
                f"{weight.shape[-1]} and {own}: give embeddings of this model"
            )
        return Encoded({"inputs_embeds": soft.to(device)}, torch.ones(soft.shape[:2], dtype=torch.bool), None)
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if tokenizer is None:
        raise ValueError(
            "the prompt is a text, and there is no tokenizer: give ModelWrapper(model, tokenizer=...), or embeddings as prompt"
        )
    rows = _ids(tokenizer, texts)
    width, lengths = max(map(len, rows), default=0), {len(row) for row in rows}
    if not width or 0 in lengths:
        raise ValueError("a prompt has no tokens: give a text that is not empty")
    pad = tokenizer.pad_token_id if hasattr(tokenizer, "pad_token_id") else as_tokenizer(tokenizer).pad
    if len(lengths) > 1 and pad is None:
        raise ValueError(
            f"the prompts have {min(lengths)} to {width} tokens, and the tokenizer has no padding token: set "
            "tokenizer.pad_token, or run them one by one"
        )
    ids = torch.tensor([[pad or 0] * (width - len(row)) + row for row in rows])
    real = torch.arange(width)[None] >= torch.tensor([width - len(row) for row in rows])[:, None]
    return Encoded({"input_ids": ids.to(device)}, real, texts, tokenizer)


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the special tokens that a tokenizer of transformers adds."""
    if callable(tokenizer):
        return [list(row) for row in tokenizer(list(texts))["input_ids"]]
    return [tokens.ids.tolist() for tokens in tokenizer.encode(texts)]


def _arguments(model: nn.Module, prompt: Encoded) -> dict[str, Any]:
    """The model's arguments: positions where padding needs them, and no cache."""
    takes = inspect.signature(model.forward).parameters
    given: dict[str, Any] = dict(prompt.inputs)
    real = prompt.real.to(next(iter(given.values())).device)
    if "attention_mask" in takes:
        given["attention_mask"] = real.long()
    if "position_ids" in takes and not bool(real.all()):
        given["position_ids"] = (real.long().cumsum(1) - 1).clamp_min(0)
    return given | ({"use_cache": False} if "use_cache" in takes else {})


def _sites(roles: Roles, name: str, layers: Sequence[int]) -> dict[str, Layer]:
    """{state: layer} that a name of ``save_states`` saves."""
    if name in ("embed", "lm_head"):
        return {name: roles.layers("embedding" if name == "embed" else "head")[0]}
    chosen = layers if name == "layer" else [_number(name, len(roles.blocks))]
    return {f"layer_{k}": roles.layers(f"blocks[{k}]")[0] for k in chosen}


def _number(name: str, n: int) -> int:
    match = _LAYER.fullmatch(name)
    if match is None or int(match[1]) >= n:
        raise ValueError(f"there is no state {name!r} of this model; states are {_NAMES} with k from 0 to {n - 1}")
    return int(match[1])


def _loads(
    model: nn.Module, roles: Roles, name: str, layers: Sequence[int], prompt: Encoded, places: Tensor, states: StateManager
) -> list[Edit]:
    """The edits that load one name of ``load_states``."""
    if name == "layer":
        return [each for k in layers for each in _loads(model, roles, f"layer_{k}", [k], prompt, places, states)]
    kind = name.removeprefix("mapped_")
    if kind not in ("embed", "lm_head"):
        _number(kind, 10**6)
    state = states.load(name)
    if state.ndim != 3 or len(state) not in (1, len(places)):
        raise ValueError(
            f"state {name!r} is {tuple(state.shape)}; for {len(places)} prompts it must be (1 or {len(places)}, positions, width)"
        )
    role = {"embed": "embedding", "lm_head": "head"}.get(kind)
    sites = [roles.layers(role)[0]] if role else [roles.layers(f"blocks[{k}]")[0] for k in layers]
    maps = states.config.position_maps
    source, target = _mapped(name, state, prompt, places, maps.get(name, maps.get(kind.partition("_")[0])))
    rows = state.expand(len(places), -1, -1)[torch.arange(len(places))[:, None], source]
    for site in sites:
        _check_fits(model, name, state, site, kind)
    return [Edit(site.name, "set", positions=target.tolist(), value=rows) for site in sites]


def _mapped(name: str, state: Tensor, prompt: Encoded, places: Tensor, given: Any) -> tuple[Tensor, Tensor]:
    """Positions of the state, and those of the prompt among its real tokens, (B, P) each."""
    n, samples = state.shape[1], len(places)
    if given is None:
        target = prompt.among_real(places)
        if n != places.shape[1] and n <= int(target.max()):
            raise ValueError(
                f"state {name!r} has {n} positions, the context selects {places.shape[1]} of the prompt: give position_maps="
                f"{{{name!r}: (source, target)}}"
            )
        source = torch.arange(n).expand(samples, -1) if n == places.shape[1] else target
        return source, target
    source = torch.tensor(indices(_unsliced(given[0], n), n, f"position_maps[{name!r}], source"))
    target = prompt.among_real(prompt.places(_unsliced(given[1], int(prompt.real.sum(1).min()))))
    if len(source) not in (1, target.shape[1]):
        raise ValueError(
            f"position_maps[{name!r}] maps {len(source)} positions of the state to {target.shape[1]} of the prompt: give as many"
        )
    return source.expand(target.shape), target


def _unsliced(position: Any, n: int) -> Any:
    """A slice as a list of indices."""
    return list(range(n))[position] if isinstance(position, slice) else position


def _check_fits(model: nn.Module, name: str, state: Tensor, site: Layer, kind: str) -> None:
    """Raises ValueError for a state of another width or dtype than what a site puts out."""
    weight = next((p for p in site.module.parameters() if p.is_floating_point()), None)
    if weight is None:
        return
    width = {"embed": weight.shape[-1], "lm_head": weight.shape[0]}.get(kind) or width_of(site.module, config_of(model))
    if state.shape[-1] == width and state.dtype == weight.dtype:
        return
    kinds = [f"{w} wide {str(d).removeprefix('torch.')}" for w, d in ((state.shape[-1], state.dtype), (width, weight.dtype))]
    raise ValueError(
        f"state {name!r} is {kinds[0]}, {site.name} of {type(model).__name__} puts out {kinds[1]}: load states of the same model, "
        "or map them with state_maps"
    )
