"""The part of a model's output that holds its predictions."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from nodelens.messages import option

Output = str | int | Callable[[Any], Tensor] | None


def answer_of(output: Any, which: Output = None, model: str = "the model") -> Tensor:
    """The tensor of predictions in a model's output, (B, ...).

    which: name, attribute or index of the tensor, or a function of the output. None: the tensor itself, the entry ``logits``, or
           the only floating-point tensor with an axis of samples; a loss, which is a single number, does not count

    Raises ValueError if there is no such tensor or, without ``which``, several.
    """
    if which is not None:
        return _chosen(output, which, model)
    if isinstance(output, Tensor):
        return output
    found = {name: value for name, value in parts_of(output).items() if _is_answer(value)}
    if "logits" in found:
        return found["logits"]
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        kind = type(output).__name__
        raise ValueError(
            f"{model} returns {kind} without a floating-point tensor to use as predictions: give {option('output')}=, a function "
            "of it"
        )
    listed = ", ".join(f"{name} {tuple(value.shape)}" for name, value in found.items())
    raise ValueError(
        f"{model} returns several tensors, {listed}: say which one holds the predictions, as {option('output')}={_quoted(found)}"
    )


def parts_of(output: Any) -> dict[str | int, Any]:
    """The parts of an output by name, or by index if they have no names; empty for any other output."""
    if isinstance(output, Mapping):
        return dict(output)
    if hasattr(output, "_fields"):
        return dict(zip(output._fields, output, strict=True))
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    if is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    logits = getattr(output, "logits", None)
    return {} if logits is None else {"logits": logits}


def tensors_of(output: Any) -> list[Tensor]:
    """Every floating-point tensor among the parts of an output."""
    parts = [output] if isinstance(output, Tensor) else parts_of(output).values()
    return [value for value in parts if isinstance(value, Tensor) and value.is_floating_point()]


def _chosen(output: Any, which: Any, model: str) -> Tensor:
    if callable(which):
        value, named = which(output), getattr(which, "__name__", str(which))
    else:
        parts: Mapping[str | int, Any] = {0: output} if isinstance(output, Tensor) else parts_of(output)
        listed = list(parts.values())
        by_index = isinstance(which, int) and which not in parts and -len(listed) <= which < len(listed)
        value, named = listed[which] if by_index else parts.get(which), repr(which)
        if value is None:
            raise ValueError(f"{option('output')}={named}: {model} returns {_instead(output, parts)}")
    if not isinstance(value, Tensor) or not value.ndim:
        shown = "a single number" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{option('output')}={named} gives {shown}; predictions are a tensor (B, ...)")
    return value


def _instead(output: Any, parts: Mapping[str | int, Any]) -> str:
    """What a model returns in place of the part that was asked for, and how to choose."""
    if isinstance(output, Tensor):
        return f"one tensor {tuple(output.shape)}, without parts: leave {option('output')} out, or give a function of it"
    if not parts:
        return f"{type(output).__name__}, whose parts have no names: give a function of it"
    listed = ", ".join(f"{name} {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}" for name, v in parts.items())
    return f"{listed}: give {option('output')}={_quoted({name: v for name, v in parts.items() if isinstance(v, Tensor)} or parts)}"


def _is_answer(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def _quoted(found: Mapping[str | int, Any]) -> str:
    return " or ".join(map(repr, found))
