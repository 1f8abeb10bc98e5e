"""Models and batches on the meta device: shapes without values, which take no memory and no time."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def meta_lm(
    path: str | None = None,
    model_type: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    attention: str | None = None,
    revision: str | None = None,
    **stored: Any,
) -> nn.Module:
    """A causal language model as ``causal_lm`` builds it, from its config alone; no other file is read.

    dtype ``auto``: that of the config, else float32; stored: options of how weights are stored (device_map, quantization). They
    change no shape and are ignored; bytes are those of the dtype. Raises OSError and ValueError as ``causal_lm`` does.
    """
    from nodelens.models import language_config  # transformers costs seconds

    return model_from_config(language_config(path, model_type, config, revision, attention), dtype)


def model_from_config(config: Any, dtype: str | torch.dtype = "auto") -> nn.Module:
    """The causal language model of a transformers config, on the meta device.

    Experts use the batched implementation, which does not read the values of expert ids: only their number per token is known.
    Raises ValueError for a config that names a kernel of the hub.
    """
    from transformers import AutoModelForCausalLM

    from nodelens.models.trusted import check_implementations

    check_implementations(config, type(config).__name__)
    chosen = config.dtype if dtype == "auto" else dtype
    options: dict[str, Any] = {"trust_remote_code": False} | ({} if chosen is None else {"dtype": chosen})
    return meta_model(lambda: AutoModelForCausalLM.from_config(config, experts_implementation="batched_mm", **options))


def meta_model(build: Callable[[], nn.Module]) -> nn.Module:
    """The model that ``build`` returns, with parameters and buffers on the meta device, in eval mode; the random state is kept."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build().eval()


def token_batch(samples: int, length: int, device: torch.device | str = "meta") -> dict[str, Any]:
    """A batch of texts of equal length, (samples, length), with placeholder tokens; every token but the first is predicted."""
    ids = torch.zeros(samples, length, dtype=torch.long, device=device)
    return {"input_ids": ids, "labels": ids.clone(), "ids": torch.arange(samples)}


def image_batch(samples: int, channels: int, size: int) -> dict[str, Tensor]:
    """A batch of images, (samples, channels, size, size), on the meta device."""
    x = torch.empty(samples, channels, size, size, device="meta")
    return {"x": x, "labels": torch.zeros(samples, dtype=torch.long, device="meta"), "ids": torch.arange(samples)}
