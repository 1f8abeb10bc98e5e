"""Attention modules whose code hides their heads, with a forward method that shows them and allows fewer.

``nn.MultiheadAttention`` reads the weight of its output projection without calling it, so that no hook sees the heads. It takes its
input to be as wide as all heads together, so that no head can be removed. So do some modules of torchvision and timm.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_PACKAGES = ("torchvision.", "timm.")


class OpenAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that calls ``out_proj``; its heads are as wide as their rows in the input projection.

    Takes and returns what ``nn.MultiheadAttention`` does, with the same parameters under the same names. After heads are removed,
    ``attn_mask`` has one matrix for all heads, or one for each head that is left.
    """

    _qkv_same_embed_dim = property(lambda self: False)  # nn.TransformerEncoder runs no fused kernel then

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.ndim == 3
        first = self.batch_first or not batched
        given = (query,) if query is key is value else (query, key, value)  # one tensor is projected in one product
        q, k, v = self._projected([x if first and batched else x[None] if first else x.transpose(0, 1) for x in given])
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = nn.functional.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        found = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return found[0], None if weights is None else weights[0]
        return found if first else found.transpose(0, 1), weights

    def _projected(self, given: list[Tensor]) -> list[Tensor]:
        """Queries, keys and values of each head, (samples, heads, positions, width), of three inputs or one for all."""
        if self.in_proj_weight is not None and len(given) == 1:
            parts = nn.functional.linear(given[0], self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            matrices = separate if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            three = given * (3 // len(given))
            parts = tuple(nn.functional.linear(x, w, b) for x, w, b in zip(three, matrices, biases, strict=True))
        q, k, v = parts
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, more.expand(len(x), 1, -1)], 1) for x, more in ((k, self.bias_k), (v, self.bias_v)))
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v)]
        return heads[:1] + [nn.functional.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x for x in heads[1:]]

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as what is added to the scores, (samples or 1, heads or 1, queries or 1, keys); None without masks."""
        if attn_mask is not None:
            own = q.shape[0] * self.num_heads
            if attn_mask.ndim == 3 and len(attn_mask) != own:
                raise ValueError(
                    f"attn_mask has {len(attn_mask)} matrices for {len(q)} samples and {self.num_heads} heads: give "
                    f"(queries, keys), or {own} matrices"
                )
            attn_mask = _added(attn_mask, q)
            attn_mask = attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            padding = _added(padding, q).reshape(-1, 1, 1, padding.shape[-1])
            attn_mask = padding if attn_mask is None else attn_mask + padding
        if attn_mask is None:
            return None
        return nn.functional.pad(attn_mask, (0, k.shape[-2] - attn_mask.shape[-1]))


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add: True becomes -infinity."""
    return (
        torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(mask, -torch.inf)
        if mask.dtype == torch.bool
        else mask
    )


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Inside, attention modules that hide their heads run a forward method that shows them; outputs differ by rounding only."""
    hidden = [(module, type(module)) for module in model.modules() if open_class(type(module)) is not None]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        if hidden:
            torch.backends.mha.set_fastpath_enabled(False)  # whose nested tensors only the fused kernels take
        for module, kind in hidden:
            module.__class__ = open_class(kind)  # type: ignore[assignment]
        yield
    finally:
        for module, kind in hidden:
            module.__class__ = kind
        if hidden:
            torch.backends.mha.set_fastpath_enabled(fused)


def keep_open(model: nn.Module, paths: Any) -> None:
    """Lets the modules at these paths, and those that contain them, show their heads for good, as they need to with fewer heads."""
    around = {".".join(path.split(".")[:k]) for path in paths for k in range(len(path.split(".")) + 1)}
    changed = [
        module for path, module in model.named_modules() if path in around and (open_class(type(module)) or _is_open(module))
    ]
    for module in changed:
        module.__class__ = open_class(type(module)) or type(module)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(part in changed for part in module.modules()):
            module.use_nested_tensor = False  # its layers do not run fused


def _is_open(module: nn.Module) -> bool:
    return isinstance(module, OpenAttention)


def open_class(kind: Any) -> type[nn.Module] | None:
    """The class whose forward method shows the heads of a class of attention modules; None if that class hides none."""
    if kind is nn.MultiheadAttention:
        return OpenAttention
    return _of_package(kind) if kind.__module__.startswith(_PACKAGES) else None


@cache
def _of_package(kind: Any) -> type[nn.Module] | None:
    from . import open_vision

    forward = open_vision.FORWARDS.get((kind.__module__, kind.__name__))
    return (
        None if forward is None else type(f"Open{kind.__name__}", (kind,), {"forward": forward, "__module__": open_vision.__name__})
    )
