"""The task of a model, and what its forward method takes, by its class and its config."""

import contextlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn

Task = Literal["classification", "multilabel", "regression", "token_classification", "masked_lm", "causal_lm", "seq2seq", "none"]
TASKS = get_args(Task)
BY_TOKEN = ("token_classification", "masked_lm", "causal_lm", "seq2seq")
BY_VALUE = ("multilabel", "regression")
# endings of transformers' class names, the first match counts
_HEADS = {
    "ForTokenClassification": "token_classification",
    "ForMaskedLM": "masked_lm",
    "WithLMHeadModel": "masked_lm",  # XLM and FlauBERT do not shift
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "DoubleHeadsModel": "causal_lm",
    "ForMultipleChoice": "classification",
    "ForNextSentencePrediction": "classification",
    "ForSemanticSegmentation": "classification",
}
_CLASSIFIERS = ("SequenceClassification", "ImageClassification", "AudioClassification", "VideoClassification")
_PROBLEMS = {
    "regression": "regression",
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
}


def task_of(model: nn.Module) -> str:
    """The task of a transformers model, by its class and config; "" where only labels can tell, and for any other model."""
    if not is_pretrained(model):
        return ""
    config: Any = model.config
    for name in (kind.__name__ for kind in type(model).__mro__):
        if any(part in name for part in _CLASSIFIERS):
            problem = getattr(config, "problem_type", None)
            return _PROBLEMS.get(str(problem), "regression" if getattr(config, "num_labels", 2) == 1 else "")
        if found := next((task for ending, task in _HEADS.items() if name.endswith(ending)), None):
            return found
        if name.endswith(("ForConditionalGeneration", "MTModel", "Seq2Seq")):
            return "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal_lm"
    return ""


def required_inputs(model: nn.Module) -> frozenset[str]:
    """The names of the arguments of a model's forward that have no default, and x if it is passed by name only."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a traced module has no signature
        return frozenset()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return frozenset(p.name for p in named if p.default is p.empty or (p.name == "x" and p.kind is p.KEYWORD_ONLY))


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is one of transformers, also inside an adapter."""
    return any(kind.__name__ in ("PreTrainedModel", "PeftModel") for kind in type(model).__mro__)


def takes(model: nn.Module, argument: str) -> bool:
    """Whether a transformers model's forward has an argument of that name."""
    with contextlib.suppress(ValueError):  # a traced module has no signature
        return is_pretrained(model) and argument in inspect.signature(model.forward).parameters
    return False


def decoder_shift(model: Any) -> Callable[[Tensor], Tensor] | None:
    """The function from labels to the inputs of a decoder: the model's own, else that of its module, with the config's tokens."""
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    shift = getattr(sys.modules[type(model).__module__], "shift_tokens_right", None)
    if own is not None or shift is None:
        return own
    config: Any = getattr(model, "config", None)
    tokens = {name: getattr(config, name, None) for name in ("pad_token_id", "decoder_start_token_id")}
    return partial(shift, **{name: tokens.get(name) for name in list(inspect.signature(shift).parameters)[1:]})


def is_classifier(model: nn.Module) -> bool:
    """Whether a model classifies whole samples: with float labels it has several labels per sample, as transformers decides."""
    return is_pretrained(model) and any(part in kind.__name__ for kind in type(model).__mro__ for part in _CLASSIFIERS)


def unwrapped(model: Any) -> Any:
    """The user's model inside ``torch.compile``, parallel wrappers and adapters."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
            inner = model.module
        elif inner is None and any(kind.__name__ == "PeftModel" for kind in type(model).__mro__):
            inner = model.get_base_model()
        if inner is None:
            return model
        model = inner
