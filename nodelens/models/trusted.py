"""What a stored config may ask for: no code from its folder or the hub, and only known implementations of attention and experts."""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
EXPERTS = ("eager", "batched_mm", "grouped_mm")  # the others fetch kernels from the hub
NO_CODE = (
    "{} needs code of its own (auto_map in config.json), which is never run: load the model yourself, and give the model instead "
    "of its path"
)
_PACKAGES = {
    "flash_attention_2": ("flash-attn", is_flash_attn_2_available),
    "flash_attention_3": ("flash-attn-3", is_flash_attn_3_available),
}


def without_code(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Options of a config without ``trust_remote_code``. Raises ValueError where it is true."""
    if options.get("trust_remote_code"):
        raise ValueError(f"trust_remote_code=True: {NO_CODE.format(name)}")
    return {key: value for key, value in options.items() if key != "trust_remote_code"}


def refuse_code(path: str) -> None:
    """Raises ValueError if the config at a path names code of its own for a model type that transformers does not have."""
    try:
        stored, _ = PretrainedConfig.get_config_dict(path, local_files_only=True)
    except (OSError, ValueError):
        return
    if "auto_map" in stored and stored.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(NO_CODE.format(f"'{path}'"))


def check_implementations(config: PretrainedConfig, name: str, kind: type | None = None) -> None:
    """Raises ValueError where a config, or a part of it, names another implementation than ``ATTENTION`` and ``EXPERTS`` list.

    Any other name would be a kernel that transformers downloads from the hub and runs, and so would FlashAttention be where its
    package is not installed. kind: the class of the model.
    """
    for part, where in _parts(config, name):
        attention, experts = part._attn_implementation, part._experts_implementation
        _check(where, "attention", attention, ATTENTION)
        _check(where, "experts", experts, EXPERTS)
        package, installed = _PACKAGES.get(str(attention), ("", None))
        if installed is not None and not installed():
            raise ValueError(f"{where}: attention {attention!r} needs the package {package}: install it, or choose sdpa or eager")
        known = getattr(kind or _class_of(part), "_compatible_flash_implementations", None)
        if installed is not None and known and attention not in known:
            raise ValueError(
                f"{where}: {attention!r} does not fit this model, whose own is a kernel of the hub: choose sdpa or eager"
            )


def _check(where: str, what: str, given: Any, known: tuple[str, ...]) -> None:
    if given is not None and given not in known:
        raise ValueError(f"{where}: {what} {given!r} is not allowed (no kernels of the hub are run): choose {', '.join(known)}")


def _class_of(config: PretrainedConfig) -> Any:
    return AutoModelForCausalLM._model_mapping.get(type(config), None)


def _parts(config: PretrainedConfig, name: str) -> Iterator[tuple[PretrainedConfig, str]]:
    """The config and those inside it, with their names."""
    yield config, name
    for key in config.sub_configs:
        inner = getattr(config, key, None)
        if isinstance(inner, PretrainedConfig):
            yield from _parts(inner, f"{name}, {key}")
