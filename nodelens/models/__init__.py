"""Classifiers, language models and the small networks behind `model=`, independent of the rest of the package.

Names are imported on first use, because importing Lightning takes seconds that plain networks do not need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classifier import Classifier, logits_of
    from .hf import resnet, vit
    from .language import LanguageModel, causal_lm, check_vocabulary, language_config, tiny_lm
    from .plain import CNN, MLP, cnn, mlp
    from .weights import find_weights, load_weights, training_state
    from .zoo import timm_model, torchvision_model

__all__ = [
    "CNN",
    "MLP",
    "Classifier",
    "LanguageModel",
    "causal_lm",
    "check_vocabulary",
    "cnn",
    "find_weights",
    "language_config",
    "load_weights",
    "logits_of",
    "mlp",
    "resnet",
    "timm_model",
    "tiny_lm",
    "torchvision_model",
    "training_state",
    "vit",
]

_HOME = {"Classifier": "classifier", "logits_of": "classifier", "load_weights": "weights", "resnet": "hf", "vit": "hf"}
_HOME |= dict.fromkeys(("find_weights", "training_state"), "weights") | dict.fromkeys(("timm_model", "torchvision_model"), "zoo")
_HOME |= dict.fromkeys(("CNN", "MLP", "cnn", "mlp"), "plain")
_HOME |= dict.fromkeys(("LanguageModel", "causal_lm", "check_vocabulary", "language_config", "tiny_lm"), "language")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
