"""Models without weights and batches without data: shapes alone, on the meta device, where nothing takes memory or time."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def hollow_lm(
    path: str | None = None,
    model_type: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    attention: str | None = None,
    revision: str | None = None,
    **stored: Any,
) -> nn.Module:
    """A causal language model as ``causal_lm`` builds it, of its config alone: no other file of a folder is read.

    dtype ``auto``: the config's own, else float32; stored: where and how weights are kept (device_map, quantization), which changes
    no shape: bytes are those of the dtype. Raises OSError and ValueError as ``causal_lm`` does.
    """
    from nodelens.models import language_config  # transformers costs seconds

    return of_config(language_config(path, model_type, config, revision), dtype, attention)


def of_config(config: Any, dtype: str | torch.dtype = "auto", attention: str | None = None) -> nn.Module:
    """The causal language model of a config of transformers.

    Experts go by the implementation that asks for no value: which of them a token goes to is not known, how many is.
    """
    from transformers import AutoModelForCausalLM

    chosen = {"dtype": config.dtype if dtype == "auto" else dtype, "attn_implementation": attention}
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    return hollow(lambda: AutoModelForCausalLM.from_config(config, experts_implementation="batched_mm", **options))


def hollow(build: Callable[[], nn.Module]) -> nn.Module:
    """What a function builds, its parameters and buffers on the meta device, in eval mode; the random state stays as it is."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build().eval()


def token_batch(samples: int, length: int, device: torch.device | str = "meta") -> dict[str, Any]:
    """Texts of a length, (samples, length), without tokens, every token predicted but the first."""
    ids = torch.zeros(samples, length, dtype=torch.long, device=device)
    return {"input_ids": ids, "labels": ids.clone(), "ids": torch.arange(samples)}


def image_batch(samples: int, channels: int, size: int) -> dict[str, Tensor]:
    """Images, (samples, channels, size, size), without pixels."""
    x = torch.empty(samples, channels, size, size, device="meta")
    return {"x": x, "labels": torch.zeros(samples, dtype=torch.long, device="meta"), "ids": torch.arange(samples)}
