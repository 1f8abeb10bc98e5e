"""A wrapper that returns the activations and weights of chosen layers of a model."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nodelens.network.arguments import check_arguments
from nodelens.network.find_layers import find_layers
from nodelens.network.hooks import Capture, Site
from nodelens.network.layers import Layer
from nodelens.network.roles import roles_of

from .applying import applied
from .edit_value import Edit
from .representation_context import RepresentationContext
from .running import run_context
from .states import StateManager

_SIZES = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")


class ModelWrapper:
    """Runs a model and returns activations and weights of its layers, for metrics from tensors.

    >>> wrapper = ModelWrapper(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), tracked_layers=["0"])
    >>> outputs, activations = wrapper.forward_with_activations(torch.ones(4, 3))
    >>> activations["0"].shape, wrapper.get_layer_weights()["0"].shape
    (torch.Size([4, 2]), torch.Size([2, 3]))
    """

    def __init__(
        self, model: nn.Module, tracked_layers: str | Sequence[str] = "*", sites: Sequence[str] = (), tokenizer: Any = None
    ):
        """tracked_layers, sites: as in ``find_layers``. Extra sites are captured only if a call names them.

        tokenizer: of transformers, for ``run`` on texts. Raises ValueError for a name without a match.
        """
        check_arguments("nl.ModelWrapper", model)
        self.model, self.tokenizer, self._dropout = model, tokenizer, ExitStack()
        self.layers = [layer.name for layer in find_layers(model, tracked_layers)]
        self._found = {layer.name: layer for layer in find_layers(model, [*self.layers, *sites])}

    def forward_with_activations(
        self,
        inputs: Tensor | Mapping[str, Any],
        layers: str | Sequence[str] | None = None,
        port: Literal["output", "input"] = "output",
    ) -> tuple[Any, dict[str, Tensor]]:
        """The model's output and {layer: its output, or input}, for one batch, in the current mode of the model.

        inputs: a tensor, or a mapping of keyword arguments. layers: default: all tracked layers.

        Activations are detached copies, because a later operation, such as an in-place ReLU, may overwrite the original. If a layer
        runs several times, its calls are concatenated along the first axis.

        Raises ValueError for a layer that is not tracked, or never runs.
        """
        if port not in ("output", "input"):
            raise ValueError(f"port is {port!r}; it must be 'output' or 'input'")
        chosen = self._chosen(layers)
        shown: dict[str, list[Tensor]] = {layer.name: [] for layer in chosen}
        with Capture(
            [Site(layer, port) for layer in chosen], lambda site, tensor: shown[site.layer.name].append(tensor.clone())
        ) as capture:
            capture.gate = True
            outputs = self._run(inputs)
        uncalled = next((name for name, calls in shown.items() if not calls), None)
        if uncalled is not None:
            raise ValueError(
                f"layer {uncalled!r} is never called by {type(self.model).__name__}.forward (its parent may read its weight "
                "directly): name another layer, such as the module that takes its output"
            )
        return outputs, {name: calls[0] if len(calls) == 1 else torch.cat(calls) for name, calls in shown.items()}

    def capture_activations_safe(
        self, inputs: Tensor | Mapping[str, Any], layers: str | Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """The activations of ``forward_with_activations``, without the model's output."""
        return self.forward_with_activations(inputs, layers)[1]

    @staticmethod
    def preprocess_activations(
        activations: Mapping[str, Tensor], mode: Literal["flatten", "none"] = "flatten"
    ) -> dict[str, Tensor]:
        """Activations as (samples, features), or as they are. Raises ValueError for another mode."""
        if mode not in ("flatten", "none"):
            raise ValueError(f"mode is {mode!r}; it must be 'flatten' or 'none'")
        return {name: a.flatten(1) if mode == "flatten" and a.ndim > 2 else a for name, a in activations.items()}

    def get_layer_weights(
        self, layers: str | Sequence[str] | None = None, flatten: bool = False, include_bias: bool = False
    ) -> dict[str, Tensor]:
        """{layer: its stored weight, detached}. Raises ValueError for a layer that is not tracked or has no weight.

        flatten: one row per unit, (units, fan_in). include_bias: with the biases, (units,), under ``<layer>_bias``.
        """
        weights = {}
        for layer in self._chosen(layers):
            tensor = layer.tensor
            if tensor is None:
                raise ValueError(f"layer {layer.name!r} ({type(layer.module).__name__}) has no weights of its units: leave it out")
            weights[layer.name] = layer.weight if flatten and layer.weight is not None else tensor
            bias = getattr(layer.module, "bias", None)
            if include_bias and isinstance(bias, Tensor):
                weights[f"{layer.name}_bias"] = bias.detach()
        return weights

    def apply_structured_dropout(
        self,
        dropout_masks: Mapping[str, Tensor],
        mode: Literal["multiplicative", "zeroing"] = "multiplicative",
        permanent: bool = False,
    ) -> None:
        """Multiplies the outputs of units by masks, {layer: (units,)}, in every call of the model until ``restore_weights``.

        The weights themselves are not changed, and a unit whose mask is 0 puts out 0, whatever its bias. mode: ``zeroing`` takes
        every mask that is not 0 for 1. A second call adds to the first. Raises ValueError for an unknown layer or mode, for
        ``permanent``, and when the model runs for a mask of another length.
        """
        if mode not in ("multiplicative", "zeroing"):
            raise ValueError(f"mode is {mode!r}; it must be 'multiplicative' or 'zeroing'")
        if permanent:
            raise ValueError("permanent=True changes weights, which a wrapper does not do: nl.prune(...) removes units")
        masks = {name: mask if mode == "multiplicative" else mask != 0 for name, mask in dropout_masks.items()}
        self._dropout.enter_context(applied(self.model, [Edit(name, "scale", value=mask.float()) for name, mask in masks.items()]))

    def restore_weights(self) -> None:
        """Ends ``apply_structured_dropout``."""
        self._dropout.close()

    def run(self, context: RepresentationContext, state_manager: StateManager | None = None) -> Any:
        """The model's output for the prompt of a context; the manager loads and saves states as its config says.

        Text prompts are padded on the left; their special tokens are those of the tokenizer. The model runs without gradients.

        Raises ValueError for a model in training mode or without blocks, a text without a tokenizer, prompts of different lengths
        without a padding token, names, layers or positions that are not there, and states of another width, dtype or number of
        positions. Nothing is saved then.
        """
        if not isinstance(context, RepresentationContext):
            raise TypeError(f"run takes a RepresentationContext, which says what to run, and not {type(context).__name__}")
        return run_context(self.model, self.tokenizer, context, StateManager() if state_manager is None else state_manager)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(roles_of(self.model).blocks)

    @property
    def tracked_layers(self) -> list[str]:
        """Names of the tracked layers; the same as ``layers``."""
        return self.layers

    def get_layer(self, layer_name: str) -> nn.Module:
        """The module of one layer, tracked or not. Raises ValueError for a name that no module has, or a pattern of several."""
        found = find_layers(self.model, layer_name)
        if len(found) > 1:
            raise ValueError(f"{layer_name!r} names {len(found)} layers: {', '.join(layer.name for layer in found[:4])}; give one")
        return found[0].module

    def get_layer_info(self, layer_name: str | None = None) -> dict[str, Any]:
        """Type, parameters and sizes of a layer, or {layer: these} of all tracked ones. Raises ValueError as ``get_layer`` does."""
        if layer_name is None:
            return {layer: self.get_layer_info(layer) for layer in self.layers}
        module = self.get_layer(layer_name)
        counts = {p: p.numel() for p in module.parameters()}
        info = {
            "name": layer_name,
            "type": type(module).__name__,
            "total_params": sum(counts.values()),
            "trainable_params": sum(n for p, n in counts.items() if p.requires_grad),
        }
        weight = getattr(module, "weight", None)
        sizes = {size: getattr(module, size) for size in _SIZES if hasattr(module, size)}
        return info | ({"weight_shape": list(weight.shape)} if isinstance(weight, Tensor) else {}) | sizes

    def _chosen(self, layers: str | Sequence[str] | None) -> list[Layer]:
        names = self.layers if layers is None else [layer.name for layer in find_layers(self.model, layers)]
        unknown = next((name for name in names if name not in self._found), None)
        if unknown is not None:
            raise ValueError(f"layer {unknown!r} is not tracked; tracked layers: {', '.join(self._found)}")
        return [self._found[name] for name in names]

    def _run(self, inputs: Tensor | Mapping[str, Any]) -> Any:
        if isinstance(inputs, Tensor):
            return self.model(inputs)
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        raise ValueError(f"inputs must be a tensor or a mapping of keyword arguments, not a {type(inputs).__name__}")
