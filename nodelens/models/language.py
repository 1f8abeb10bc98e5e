"""Causal language models from a folder, the hub or a config, and the Lightning module that trains them."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from nodelens.messages import either, first_line, setting

from .classifier import Classifier, logits_of
from .stored import hub_is_reachable, quiet, why_missing
from .trusted import check_implementations, refuse_code, without_code

BYTES = 259  # vocabulary size of the byte-level tokenizer
_IGNORE = -100  # a label that does not count, as in cross_entropy
_NOT_INPUTS = ("labels", "ids", "bytes", "select")  # entries of a batch that are not inputs of the model


class LanguageModel(Classifier):
    """Next-token training of any network that takes tokens.

    net:   called with the entries of a batch except labels, ids, bytes and select (input_ids (B, T), attention_mask,
           position_ids); returns logits (B, T, V), or an output with `.logits`
    path:  the origin of the net, so that a config names it only once
    optimizer, scheduler, weights, config: as in ``Classifier``

    A batch is a dict with labels (B, T): the token ids (which they are if there are none), or -100 for tokens not to be
    predicted. Logs, once per epoch,
    {train,val,test}/loss, in nats per predicted token, and /acc, the share of predicted tokens that are the most likely one.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        weights: str | None = None,
        path: str | None = None,
    ):
        super().__init__(net, optimizer, scheduler, weights)
        self.path = path

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits, (B, T, V)."""
        return logits_of(self.net(**{name: value for name, value in batch.items() if name not in _NOT_INPUTS}))

    def on_fit_start(self) -> None:
        self.net.train()  # stored models are loaded in eval mode, with dropout off

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch)

    def _step(self, batch: Any, stage: str) -> Tensor:
        if not isinstance(batch, Mapping) or not {"labels", "input_ids"} & batch.keys():
            raise TypeError(f"a batch is {type(batch).__name__}; expected a dict with input_ids and labels")
        following = next_tokens(batch)
        known = following != _IGNORE
        logits, y = self(batch)[:, :-1][known], following[known]
        loss = functional.cross_entropy(logits.float(), y, reduction="sum") / max(1, len(y))
        if len(y):
            self._log(stage, loss, logits, y)
        return loss


def next_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """The next token of each but the last, (B, T - 1); -100 if it is not to be predicted or either of the two is padding."""
    following, mask = batch["labels" if "labels" in batch else "input_ids"][:, 1:], batch.get("attention_mask")
    return following if mask is None else following.where(mask[:, 1:].bool() & mask[:, :-1].bool(), _IGNORE)


def causal_lm(
    path: str | None = None,
    model_type: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    attention: str | None = None,
    revision: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    quantization: Literal["8bit", "4bit"] | None = None,
) -> PreTrainedModel:
    """Any causal language model of transformers.

    path:       a folder written by save_pretrained, or a hub id; safetensors only, and no code in the folder is run.
                None: random weights of a `model_type`, such as llama, with `config`
    config:     values that override the stored (or default) config
    dtype:      auto: as stored
    attention:  transformers' attn_implementation: eager, sdpa, flex_attention, flash_attention_2 or _3; None: its default
    revision:   of a hub id; device_map: devices of the parts (needs `accelerate`)
    quantization: weights of all linear layers except the head in 8 or 4 bits (needs `bitsandbytes` and `accelerate`)
    Raises: OSError, in one line, if `path` is not available; ValueError for options or weights that do not fit.
    """
    found = language_config(path, model_type, config, revision, attention)
    options: dict[str, Any] = {} if dtype in (None, "auto") else {"dtype": dtype}
    name = repr(path or model_type)
    if quantization is not None:
        options["quantization_config"] = _quantized(quantization, path)
    try:
        with quiet():
            if path is None:
                return AutoModelForCausalLM.from_config(found, trust_remote_code=False, **options)
            return _stored(path, found, {"dtype": dtype, "revision": revision, "device_map": device_map, **options})
    except (ImportError, ValueError, KeyError) as error:  # KeyError: a device_map that lacks a part
        raise ValueError(f"{name} cannot be built: {_first_sentence(error)}") from error
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the weights at {name} cannot be read, or do not fit its config; save them again with model.save_pretrained(folder)"
        ) from error


def language_config(
    path: str | None = None,
    model_type: str | None = None,
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    attention: str | None = None,
) -> PretrainedConfig:
    """The config of ``causal_lm``, without reading weights. Raises the same errors."""
    changes = without_code(config or {}, f"'{path or model_type}'")
    if (path is None) == (model_type is None):
        raise ValueError(f"give {setting('model.path')}, or {setting('model.net.model_type')} for random weights: one of the two")
    try:
        if model_type is not None:
            found = AutoConfig.for_model(model_type, **changes)
        elif path is not None:
            found = _read_config(path, {"revision": revision, **changes, "trust_remote_code": False})
    except (ValueError, TypeError, StrictDataclassError) as error:
        refuse_code(path or "")
        cause = (isinstance(error, StrictDataclassError) and error.__cause__) or error
        raise ValueError(f"'{path or model_type}' cannot be built: {_first_sentence(cause)}") from error
    if type(found) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"'{path or model_type}' has the model type {found.model_type}, which is not a causal language model")
    if attention is not None:
        found._attn_implementation = attention
    check_implementations(found, f"'{path or model_type}'")
    return found


def tiny_lm(
    classes: int | None = None,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    mlp: int = 352,
    length: int = 2048,
) -> LlamaForCausalLM:
    """A small Llama with random weights, for texts of at most `length` tokens.

    classes: vocabulary size; None: 259, that of the byte-level tokenizer. mlp: hidden units of each gated FFN.
    Raises: ValueError for heads that do not divide the width, or kv_heads that do not divide the heads.
    """
    if width % heads or heads % kv_heads or (width // heads) % 2:
        raise ValueError(
            f"tiny_lm: width {width}, {heads} heads, {kv_heads} kv_heads; heads must divide the width into parts of even "
            "size, and kv_heads must divide the heads"
        )
    no_tokens: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=BYTES if classes is None else classes,
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=length,
            **no_tokens,
        )
    )


def _quantized(bits: str, path: str | None) -> BitsAndBytesConfig:
    """The quantization config. Raises ValueError for other bits, random weights, or a missing library."""
    if bits not in ("8bit", "4bit"):
        raise ValueError(f"{setting('model.net.quantization')} is {bits!r}; it is 8bit, 4bit or {either('None', 'null')}")
    if path is None:
        raise ValueError(f"{setting('model.net.quantization', bits)} is for stored weights: give {setting('model.path')}")
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{setting('model.net.quantization', bits)} needs {' and '.join(missing)}: pip install nodelens[quantized]"
        )
    return BitsAndBytesConfig(load_in_8bit=bits == "8bit", load_in_4bit=bits == "4bit")


def check_vocabulary(net: nn.Module, classes: int) -> None:
    """Raises ValueError if a language model has fewer embeddings than the vocabulary of the data, ``classes``."""
    try:
        table = net.get_input_embeddings() if isinstance(net, PreTrainedModel) else None
    except NotImplementedError:  # a model of images
        table = None
    size = getattr(table, "num_embeddings", None)
    if isinstance(size, int) and size < classes:
        raise ValueError(
            f"the data's tokenizer has {classes} ids, but {type(net).__name__} has {size}; set {setting('dataset.tokenizer')} to "
            "the model's own, or the model's classes"
        )


def _read_config(path: str, options: dict[str, Any]) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, **options)
    except OSError as error:
        if Path(path).is_dir() or not hub_is_reachable():
            raise _not_here(path, why_missing(path)) from error
    try:
        return AutoConfig.from_pretrained(path, **options)
    except OSError as error:
        raise _not_here(path, "the hub has no such model, or it needs a login") from error


def _stored(path: str, config: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    safe: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    safe["local_files_only"] = Path(path).is_dir() or not hub_is_reachable()
    load: Any = AutoModelForCausalLM.from_pretrained  # its annotation does not know of output_loading_info
    try:
        net, info = load(path, config=config, **safe, **options)
    except OSError as error:
        raise _not_here(path, "it has a config.json and no model.safetensors") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} of its weights are missing ({', '.join(missing[:3])}); save it again")
    return net


def _not_here(path: str, why: str) -> OSError:
    return OSError(
        f"no model to load at '{path}': {why}; give a folder written by save_pretrained, or a hub id, as {setting('model.path')}, "
        f"or take {either('nodelens.models.tiny_lm', 'model=tiny_lm')}"
    )


def _first_sentence(error: BaseException) -> str:
    """The first sentence of an error message, because some messages list all known models."""
    return first_line(error).partition(". ")[0].strip(" .:'\"")
