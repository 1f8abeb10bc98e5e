"""Loads trained weights of transformers from a local folder, the cache or the hub, and checks them against the config."""

import logging
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from nodelens.messages import either, setting

from .trusted import check_implementations, refuse_code

_log = logging.getLogger(__name__)
_NAMES = {"num_channels": "channels", "image_size": "size", "patch_size": "patch"}


def stored_config(path: str, kind: type[PretrainedConfig]) -> PretrainedConfig:
    """The config stored at `path` (a folder or a hub id).

    Raises: OSError if it is not available; ValueError if it belongs to another model type, needs code of its own, or names a
    kernel of the hub.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        refuse_code(path)
        if not Path(path).is_dir() and hub_is_reachable():
            try:
                config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            except (OSError, ValueError) as refused:
                refuse_code(path)
                raise _not_here(path, "the hub has no such model, or it needs a login") from refused
        else:
            raise _not_here(path, why_missing(path)) from error
    if config.model_type != kind.model_type:
        raise ValueError(
            f"'{path}' holds a model of type {config.model_type}, but {kind.model_type} is needed; "
            f"choose another model, or another {setting('model.net.path')}"
        )
    check_implementations(config, f"'{path}'")
    return config


def load_stored(
    model: type[PreTrainedModel], path: str, config: PretrainedConfig, classes: int, wanted: dict[str, Any]
) -> PreTrainedModel:
    """The model at `path` with a head of `classes`; `wanted` holds values that its stored config must have.

    Raises: ValueError if a value, or a weight outside the head, differs; OSError without safetensors weights.
    """
    for name, value in wanted.items():
        found = getattr(config, name, "imagenet" if name == "stem" else None)
        if found != value:
            what = _NAMES.get(name, name)
            raise ValueError(
                f"'{path}' was stored with {what} {found}, but {what} {value} is needed; change the "
                f"{either('argument', 'model or dataset config')} to the stored value, or {_from_scratch()}"
            )
    if config.num_labels != classes:
        _log.info("'%s' has a head of %d classes; it is replaced by a new one of %d", path, config.num_labels, classes)
    same = config.num_labels == classes
    with quiet():
        if not same:
            config.num_labels = classes
        net, info = _from_pretrained(model, path, config, lenient=not same)
    unfit = sorted(str(k) for k in [*info["missing_keys"], *(k[0] for k in info["mismatched_keys"])])
    unfit = [name for name in unfit if not name.startswith("classifier")]
    if unfit:
        raise ValueError(
            f"the weights at '{path}' do not fit their own config: {len(unfit)} are missing or of "
            f"another shape ({', '.join(unfit[:3])}); save them again with model.save_pretrained(folder)"
        )
    if same and info["missing_keys"]:
        _log.info("'%s' has no head; a new one of %d classes is added", path, classes)
    return net


def _from_pretrained(
    model: type[PreTrainedModel], path: str, config: PretrainedConfig, lenient: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    options: dict[str, Any] = {"config": config, "ignore_mismatched_sizes": lenient, "output_loading_info": True}
    options["use_safetensors"] = True  # never a pickle
    options["local_files_only"] = Path(path).is_dir() or not hub_is_reachable()
    load: Any = model.from_pretrained  # its annotation does not know of output_loading_info
    try:
        return load(path, **options)
    except OSError as error:
        raise _not_here(path, "it has a config.json and no model.safetensors") from error
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the weights at '{path}' cannot be read, or do not fit its config.json; "
            f"save them again with model.save_pretrained(folder)"
        ) from error


def _not_here(path: str, why: str) -> OSError:
    return OSError(
        f"no model to load at '{path}': {why}; give a local folder written by save_pretrained as "
        f"{setting('model.net.path')}, or {_from_scratch()}"
    )


def _from_scratch() -> str:
    return f"{setting('model.net.path', None)} to start from scratch"


def why_missing(path: str) -> str:
    """The reason why there is no config at a path."""
    if Path(path).is_dir():
        return "the folder holds no readable config.json"
    return "it is not a local folder, it is not in the cache, and the hub cannot be reached"


def hub_is_reachable() -> bool:
    """Whether the hub answers within 5 seconds; its own client would retry for 23 seconds without a network."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False
    return True


@contextmanager
def quiet() -> Iterator[None]:
    """Context without the loading report and progress bar of transformers, as the checks here replace the report.

    Downloads from the hub keep their bars, with rate and time left, on a terminal.
    """
    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if sys.stderr.isatty() and not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()  # of downloads, which transformers disables with its own
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()
