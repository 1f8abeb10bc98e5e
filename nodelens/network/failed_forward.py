"""A forward pass that fails: one line with the model, the shapes of its inputs, the cause, and what to change."""

import inspect
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nodelens.messages import either

from .batch import Batch
from .eval_mode import eval_mode
from .sharded import class_name

_SHAPES = re.compile(
    r"cannot be multiplied|channel|image size|size mismatch|must match|[Ee]xpected .*(input|dim|[0-9]D)|too small|Kernel size|"
    r"kernel size|is invalid for input|normalized_shape|running_mean should|inconsistent tensor|divisible"
)


@torch.no_grad()
def check_forward(model: nn.Module, batch: Batch) -> None:
    """Raises ValueError, in one line that says what to change, if the model cannot take the first two samples of a batch."""
    whole, batch = batch, batch.head(2)
    try:
        with eval_mode(model):
            batch.run(model)
    except Exception as error:  # a forward pass may raise anything
        cause = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        told = isinstance(error, (RuntimeError, TypeError, ValueError, IndexError)) and cause
        cause = cause if told else f"{type(error).__name__} {cause}".rstrip()
        name = class_name(model)
        raise ValueError(
            f"{name} cannot take the data, {batch.describe()}: {cause}; {_shared(model, whole) or _advice(model, batch, error)}"
        ) from error


def _shared(model: nn.Module, whole: Batch) -> str:
    """What to change where the model takes a batch, but not two of its samples: an input may belong to no sample."""
    names = whole.coincident
    if not names or len(whole) < 3:
        return ""
    try:
        with eval_mode(model):
            whole.run(model)
    except Exception:  # it is not the cut
        return ""
    return (
        f"it takes all {len(whole)} samples: {' or '.join(names)} has {len(whole)} rows, too, and was cut as if each were of one "
        "sample; if it is shared by all samples, give batches of another size, or keep it in the model"
    )


def check_finite(batch: Batch) -> None:
    """Raises ValueError for inputs without one finite number: no value could be measured on them."""
    for name, value in batch.named.items():
        has_values = isinstance(value, Tensor) and value.is_floating_point() and value.numel() and not value.is_meta
        if has_values and not bool(value.isfinite().any()):
            raise ValueError(
                f"{name} of the first batch, {tuple(value.shape)}, has no finite number, only NaN or infinity: look at how the "
                "data are read and scaled, a division by a standard deviation of 0 for instance"
            )


def _advice(model: nn.Module, batch: Batch, error: Exception) -> str:
    """What to change, by the first kind of failure that fits."""
    kinds: tuple[Callable[[nn.Module, Batch, str], str], ...] = (_arguments, _devices, _ids, _dtypes, _channels_last, _shapes)
    found = (advice for kind in kinds if (advice := kind(model, batch, str(error))))
    if isinstance(error, torch.OutOfMemoryError):
        return "two samples do not fit into the memory: take a smaller model, or another device"
    return next(found, "") or either(
        "the forward pass itself fails: call the model on this batch to see where",
        "the forward pass itself fails: HYDRA_FULL_ERROR=1 shows where",
    )


def _arguments(model: nn.Module, batch: Batch, cause: str) -> str:
    if not re.match(rf"{re.escape(class_name(model))}\.forward\(\) (got an unexpected|got multiple|missing|takes)", cause):
        return ""
    names = ", ".join(inspect.signature(model.forward).parameters) or "nothing"
    given = f"the batch is a dict of {', '.join(batch.kwargs)}" if batch.kwargs else f"the batch has {len(batch.args)} input"
    return f"{given}, and forward takes {names}: give a dict with these names" + ("" if batch.args else ", or (x, y) pairs")


def _devices(model: nn.Module, batch: Batch, cause: str) -> str:
    if not re.search(r"device|meta tensor", cause):
        return ""
    places = sorted({str(p.device) for p in (*model.parameters(), *model.buffers())})
    if "meta" in places:
        return "its weights are on the meta device, without values: load them first"
    if len(places) > 1:
        return f"its weights are on {' and '.join(places)}: move all of it to one device, model.to({places[-1]!r})"
    return f"its weights are on {places[0] if places else 'no device'}: let forward make its tensors on the device of its inputs"


def _ids(model: nn.Module, batch: Batch, cause: str) -> str:
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if sizes and "indices" in cause and "scalar type" in cause:
        return "it reads token ids, which are integers: " + either("give input_ids", "choose texts, dataset=text")
    if not sizes or "index out of range" not in cause:
        return ""
    ids = [value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, Tensor) and not value.is_floating_point()]
    largest = max((int(value.max()) for value in ids if value.numel()), default=0)
    texts = either("the model's own tokenizer", "dataset.tokenizer= of the model")
    return f"the largest id is {largest}, its embeddings have {' and '.join(map(str, sizes))} rows: use {texts}, or shorter samples"


def _dtypes(model: nn.Module, batch: Batch, cause: str) -> str:
    if not re.search(r"dtype|scalar type|Input type|not implemented for", cause):
        return ""
    if wrong := batch.wrong_dtype(model, RuntimeError(cause)):
        return wrong
    weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    inputs = next((v.dtype for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)), None)
    if weights is None or inputs is None or weights == inputs:
        return ""
    wanted, given = (str(dtype).removeprefix("torch.") for dtype in (weights, inputs))
    return f"its weights are {wanted} and the inputs {given}: convert the inputs, x.to(torch.{wanted}), or the model"


def _channels_last(model: nn.Module, batch: Batch, cause: str) -> str:
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))), None)
    x = batch.args[0] if batch.args else None
    if not isinstance(first, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or not isinstance(x, Tensor) or x.ndim < 3:
        return ""
    last = x.shape[-1] == first.in_channels != x.shape[1] and "channels" in cause
    return "the channels are on the last axis: move them to the second, x.movedim(-1, 1)" if last else ""


def _shapes(model: nn.Module, batch: Batch, cause: str) -> str:
    return (
        _SHAPES.search(cause)
        and either(
            "give inputs of the shape that the model reads, or change the model",
            "change the data's channels and size (dataset.channels=, dataset.size=), or the model",
        )
    ) or ""
