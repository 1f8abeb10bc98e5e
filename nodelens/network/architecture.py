"""Finds the parts of a transformer by the module names of known families, otherwise by structure; runs nothing."""

import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from torch import nn

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_ATTENTION = (
    "self_attn",
    "self_attention",
    "attn",
    "attention",
    "linear_attn",
    "multi_head_attention",
    "rel_attn",
    "SelfAttention",
)
_ATTENTION_WRITERS = ("o_proj", "out_proj", "dense", "c_proj", "Wo", "wo", "out_lin", "o")
_MLP = ("mlp", "ffn", "feed_forward", "ff", "mlp_block", "DenseReluDense", "block_sparse_moe", "shared_mlp", "moe")
_SPLIT_MLP = ("experts", "mlps")  # in Gemma 4 and LongCat, where the FFN is more than one module
_MLP_WRITERS = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "output_linear", "output_dense", "wo", "Wo")
_PAIRS = (("fc1", "fc2"), ("linear1", "linear2"), ("lin1", "lin2"), ("intermediate.dense", "output.dense"))
_NORMS = ("final_layer_norm", "final_layernorm", "final_norm", "ln_f", "norm_f", "ln_out", "embedding_norm", "emb_layer_norm_after")
_HEADS = ("lm_head", "embed_out", "output_projection", "proj_out", "classifier", "score", "head", "heads", "fc")
_WIDTHS = ("v_head_dim", "head_v_dim", "head_dim", "head_size", "attention_head_size")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_STREAMS = ("altup", "attn_hc")  # Gemma 3n; hyper-connections
_A_NORM = re.compile(r"norm(\d\w)?$", re.IGNORECASE)


class UnclearError(Exception):
    """The reason why a module is not found or ambiguous."""


def config_of(model: nn.Module) -> Any:
    """The config of the text model if there are several, otherwise the only one; None if the model has none."""
    config: Any = getattr(model, "config", None)
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # several text models
        return config


def list_of_blocks(model: nn.Module, config: Any) -> Sequence[nn.Module]:
    """The shallowest module list of the length in the config; without a config, the longest that is not inside another.

    Its items must have submodules: a list of plain layers is no list of blocks, unless it is a ModuleList in a model that has no
    other list. Raises UnclearError for none or several.
    """
    lists: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) and all(len(m._modules) for m in module)
    } or {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1}
    depths = [depth for key in _DEPTHS if isinstance(depth := getattr(config, key, None), int)]
    if depths:
        fits = next((fit for depth in depths if (fit := [name for name, part in lists.items() if len(part) == depth])), [])
        if not fits:
            shown = ", ".join(f"{name} of {len(part)}" for name, part in list(lists.items())[:6])
            raise UnclearError(f"its config says {depths[0]} blocks, but no list of modules has that length: {shown or 'none'}")
    else:
        outer = [name for name in lists if not any(_below(name, other) for other in lists)]
        fits = [name for name in outer if len(lists[name]) == max(len(lists[other]) for other in outer)]
    if not fits:
        raise UnclearError("it contains no list of modules that have submodules")
    found: Any = _only({name: lists[name] for name in fits})
    return found


def width_of(block: nn.Module, config: Any) -> int | None:
    """The width of the residual stream, from the config, otherwise from a norm of the block; None if neither is there."""
    norms: list[Any] = [m for m in block.children() if _is_norm(m) and isinstance(getattr(m, "weight", None), nn.Parameter)]
    return getattr(config, "hidden_size", None) or (norms[0].weight.numel() if norms else None)


def stream_of(block: nn.Module) -> nn.Module:
    """The block itself. Raises UnclearError if it does not carry a single residual stream."""
    if any(name in block._modules for name in _STREAMS):
        raise UnclearError("it carries several parallel residual streams")
    return block


def attention_of(block: nn.Module) -> nn.Module:
    """The self-attention module of a block. Raises UnclearError for none or several."""
    return _named(block, _ATTENTION, ("attention", "attn")) or _not_found(block, "an attention")


def attention_writer(attention: nn.Module, width: int | None) -> nn.Module:
    """The output projection of the heads to the residual stream. Raises UnclearError for none or several."""
    if isinstance(attention, nn.MultiheadAttention):
        raise UnclearError("torch's MultiheadAttention uses the weight of out_proj without calling the module")
    return _writer(attention, _ATTENTION_WRITERS, width)


def heads_of(attention: nn.Module, writer: nn.Module, config: Any) -> int | None:
    """The number of heads, from the head width or count of the attention module, otherwise the config; None if unknown."""
    inputs, _ = _sizes(writer)
    for keys, holders in ((_WIDTHS, [*attention.modules()]), (_COUNTS, [*attention.modules(), config])):
        for n in (getattr(holder, key, None) for holder in holders for key in keys):
            if inputs and isinstance(n, int) and n > 0 and inputs % n == 0:
                return inputs // n if keys is _WIDTHS else n
    return None


def mlp_of(block: nn.Module, attention: nn.Module | None) -> nn.Module:
    """The FFN module; the block itself if it holds the linear layers directly, as in OPT and BERT.

    Without a known name, it is the only other part with weights besides the attention. Raises UnclearError for none or several.
    """
    if not any(name in block._modules for name in _MLP) and _pair(block) is not None:
        return block
    found = _named(block, (*_MLP, *_SPLIT_MLP), ("mlp", "feedforward", "ffn", "moe"))
    if found is not None and (attention is None or found not in set(attention.modules())):
        return found
    others = {name: m for name, m in block.named_children() if _holds_weights(m) and attention not in set(m.modules())}
    return _only(others) if attention is not None and others else _not_found(block, "an FFN")


def mlp_writer(mlp: nn.Module, width: int | None) -> nn.Module:
    """The linear layer from the hidden units to the residual stream. Raises UnclearError for none, several, or experts."""
    stacked = stacked_tensors(mlp)
    experts = [name for name, _ in mlp.named_children() if "expert" in name and "shared" not in name]
    if stacked or experts:
        shared = list(shared_writers(mlp))
        raise UnclearError(
            (f"its experts share one tensor, {stacked[0]}" if stacked else f"it has experts, {experts[0]}")
            + (f"; {shared[0]} belongs to a shared expert, which every token passes, and is not the whole FFN" if shared else "")
        )
    return _pair(mlp) or _writer(mlp, _MLP_WRITERS, width)


def stacked_tensors(mlp: nn.Module) -> list[str]:
    """Names of the parameters that stack the weights of several experts."""
    convolved = {id(m.weight) for m in mlp.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    return [name for name, weight in mlp.named_parameters() if weight.ndim == 3 and len(weight) > 1 and id(weight) not in convolved]


def shared_writers(mlp: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of shared experts that write to the residual stream, by name."""
    named = {name: m for name, m in mlp.named_modules() if "shared" in name}
    return {name: m for name, m in named.items() if name.rpartition(".")[2] in _MLP_WRITERS and _is_linear(m)}


def output_module(module: nn.Module, writer: nn.Module | str, block: nn.Module) -> nn.Module:
    """The module whose output is that of attention or FFN alone: ``module``, or its writer if ``module`` may add the residual.

    ``writer`` may be the reason why none was found. Raises UnclearError if the writer is needed but missing.
    """
    path = [module] if isinstance(writer, str) else [m for m in module.modules() if m is not writer and writer in set(m.modules())]
    if module is not block and not any(map(_adds_residual, path)):
        return module
    if isinstance(writer, str):
        raise UnclearError(f"the output of {type(module).__name__} may include the residual, and {writer}")
    return writer


def embedding_of(model: Any) -> nn.Module:
    """The input embedding according to the model, otherwise its first embedding. Raises UnclearError for none."""
    try:
        found = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:
        found = None
    found = found or next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    return found or _not_found(model, "an embedding")


def final_norm_of(model: nn.Module, blocks: str) -> nn.Module:
    """The norm after the list of blocks at a path, by name, otherwise the only norm that follows it at its level or above.

    Raises UnclearError for none (as in BERT, whose blocks end in a norm themselves) or several.
    """
    levels = blocks.split(".") if blocks else []  # the model may be the list
    for k in reversed(range(len(levels))):
        siblings = model.get_submodule(".".join(levels[:k]))._modules
        norms = {name: m for name, m in siblings.items() if m is not None and _is_norm(m)}
        later = list(siblings)[list(siblings).index(levels[k]) :] if k >= len(levels) - 2 else []
        following = {name: m for name, m in norms.items() if name in later and "emb" not in name}
        if found := {name: m for name, m in norms.items() if name in _NORMS} or following:
            return found["norm"] if "norm" in found else _only(found)
    return _not_found(model, "a norm after its blocks")


def head_of(model: Any, blocks: str) -> nn.Module:
    """The model's output embedding, otherwise the only linear layer outside the blocks (with the name of a head, if any).

    Raises UnclearError for none or several.
    """
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if found is not None:
        return found
    outside = {name: m for name, m in model.named_modules() if _is_linear(m) and not _below(name, blocks)}
    named = {name: m for name, m in outside.items() if name.partition(".")[0] in _HEADS}
    return _only(named or outside) if outside else _not_found(model, "a head")


def _writer(module: nn.Module, names: Sequence[str], width: int | None) -> nn.Module:
    """The linear layer with one of the names, otherwise the only one (in a Sequential the last) with the stream's width."""
    named = _search(module, lambda name, _: name in names, range(1, 3))
    if named is not None:
        return named
    wide = {name: m for name, m in module.named_modules() if _is_linear(m) and _sizes(m)[1] == width}
    if isinstance(module, nn.Sequential) and wide:
        return list(wide.values())[-1]
    return _only(wide) if wide else _not_found(module, "a linear layer that writes to the residual stream")


def _pair(module: nn.Module) -> nn.Module | None:
    """The second of two linear layers whose names mark them as an FFN; None if there are none."""
    inside = dict(module.named_modules())
    return next((inside[last] for first, last in _PAIRS if first in inside and last in inside), None)


def _adds_residual(module: nn.Module) -> bool:
    """Whether it takes the residual, or holds a norm other than of queries, keys or values, as post-norm modules do."""
    arguments = inspect.signature(type(module).forward).parameters
    norms = [name for name, m in module.named_children() if _is_norm(m) and name[0] not in "qkv"]
    return bool(norms) or not {"residual", "input_tensor"}.isdisjoint(arguments)


def _named(block: nn.Module, names: Sequence[str], words: Sequence[str]) -> nn.Module | None:
    """The part of a block with one of the names, otherwise one of the words in its class name; children first."""
    for depths in (range(1, 2), range(2, 4)):
        found = _search(block, lambda name, module: name in names and not _is_linear(module), depths)
        found = found or _search(block, lambda _, module: _is_inner(module, words), depths)
        if isinstance(found, (nn.ModuleList, nn.ModuleDict)):  # a module list is never called itself
            raise UnclearError(f"it may be any of a list of {len(found)}")
        if found is not None:
            return found
    return None


def _search(owner: nn.Module, fits: Callable[[str, nn.Module], bool], depths: range) -> nn.Module | None:
    """The shallowest submodule that fits and has weights; None if none does. Raises UnclearError for several."""
    found = {
        name: module
        for name, module in owner.named_modules()
        if _depth(name) in depths and fits(name.rpartition(".")[2], module) and _holds_weights(module)
    }
    return _only(found) if found else None


def _only(found: Mapping[str, nn.Module]) -> nn.Module:
    """The shallowest module. Raises UnclearError if there are several."""
    least = min(map(_depth, found))
    shallowest = [name for name in found if _depth(name) == least]
    if len(shallowest) > 1:
        raise UnclearError(f"it may be {' or '.join(shallowest[:6])}")
    return found[shallowest[0]]


def _not_found(owner: nn.Module, what: str) -> NoReturn:
    parts = ", ".join(f"{name} ({type(m).__name__})" for name, m in owner.named_children())
    raise UnclearError(f"none of {parts or 'its parts'} is known as {what}")


def _is_inner(module: nn.Module, words: Sequence[str]) -> bool:
    """Whether the class name has one of the words, and none that marks a whole layer, cross-attention or a norm."""
    name = type(module).__name__.lower()
    return any(word in name for word in words) and not any(word in name for word in ("layer", "block", "residual", "cross", "norm"))


def _is_norm(module: nn.Module) -> bool:
    return _A_NORM.search(type(module).__name__) is not None


def _is_linear(module: nn.Module) -> bool:
    return all(_sizes(module))


def _sizes(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer of any class, including GPT-2's ``Conv1D``; zeros for any other module."""
    inputs, outputs = ("nx", "nf") if hasattr(module, "nf") else ("in_features", "out_features")
    sizes = getattr(module, inputs, 0), getattr(module, outputs, 0)
    return sizes if all(isinstance(n, int) for n in sizes) else (0, 0)


def _holds_weights(module: nn.Module) -> bool:
    return any(tensor.ndim > 1 for tensor in itertools.chain(module.parameters(), module.buffers()))


def _depth(name: str) -> int:
    return len(name.split(".")) if name else 0


def _below(name: str, other: str) -> bool:
    """Whether a path lies below another."""
    return name != other and (not other or name.startswith(f"{other}."))
