"""The streams of an encoder-decoder: which modules see the rows of the decoder."""

import torch
from torch import Tensor, nn

from .batch import Batch, read_of, tensor_of
from .eval_mode import eval_mode
from .hooks import observed
from .layers import Layer


@torch.no_grad()
def decoder_sites(model: nn.Module, batch: Batch) -> frozenset[str]:
    """``<module>.input`` and ``<module>.output`` of what has one row per token of the decoder, found by running two samples.

    The decoder's text is cut by a token if both texts have the same length, so that the lengths tell the two apart.
    """
    decoder, encoder = batch.kwargs.get("decoder_input_ids"), batch.kwargs.get("input_ids")
    if not isinstance(decoder, Tensor) or not isinstance(encoder, Tensor) or decoder.shape[1] == encoder.shape[1] == 1:
        return frozenset()
    length = decoder.shape[1] - (decoder.shape[1] == encoder.shape[1])
    kwargs = {k: v[:2, :length] if k.startswith("decoder_") and isinstance(v, Tensor) else v for k, v in batch.kwargs.items()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    names, found = {module: name for name, module in model.named_modules()}, set[str]()

    def see(module: nn.Module, args: tuple, named: dict, output: object) -> None:
        for side, shown in (("input", read_of(args, named)), ("output", output)):
            tensor = tensor_of(shown)
            if tensor is not None and tensor.ndim > 2 and tensor.shape[1] == length:
                found.add(f"{names[module]}.{side}")

    small = Batch.of({k: v for k, v in kwargs.items() if k != "labels"}).head(2).to(device)
    with eval_mode(model), torch.inference_mode(False), observed(list(names), see):
        small.run(model)
    return frozenset(found)


def side_of(layer: Layer, port: str) -> str:
    """The site of a port as ``decoder_sites`` names it."""
    read = layer.side == "input" or port.startswith(("input", "change"))
    return f"{layer.name}.{'input' if read else 'output'}"
