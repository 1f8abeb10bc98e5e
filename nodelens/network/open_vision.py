"""Forward methods that show the heads of attention modules of torchvision and timm, whose own code hides them.

The modules' own code reads the weight of a projection without calling it, or takes its input to be as wide as all heads together.
Sources: Liu et al. 2021, arXiv:2103.14030 (windows); Liu et al. 2022, arXiv:2111.09883 (scaled cosines); Bao et al. 2022,
arXiv:2106.08254 (relative positions); Fang et al. 2023, arXiv:2303.11331 (rotary positions).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

_MOST = math.log(100.0)  # of a learned logarithm of the scale of cosines
_APART = -100.0  # added to scores of positions that lie in one window only because it was shifted


def torchvision_windows(self: Any, x: Tensor) -> Tensor:
    """``ShiftedWindowAttention`` and its second version: x (samples, height, width, channels) -> the same shape."""
    high, wide = x.shape[1:3]
    window = list(self.window_size)
    x = nn.functional.pad(x, (0, 0, 0, -wide % window[1], 0, -high % window[0]))
    size = list(x.shape[1:3])
    shift = [0 if w >= s else step for w, s, step in zip(window, size, self.shift_size, strict=True)]
    x = x.roll([-step for step in shift], (1, 2)) if any(shift) else x
    grid = (size[0] // window[0], window[0], size[1] // window[1], window[1])
    rows = x.unflatten(2, grid[2:]).unflatten(1, grid[:2]).transpose(2, 3).flatten(3, 4).flatten(0, 2)
    mask = _apart(size, window, shift, grid, x) if any(shift) else None
    rows = _window_heads(self, rows, self.get_relative_position_bias(), mask)
    rows = nn.functional.dropout(self.proj(rows), self.dropout, self.training)
    rows = rows.unflatten(0, (-1, grid[0], grid[2])).unflatten(3, (grid[1], grid[3])).transpose(2, 3)
    x = rows.flatten(3, 4).flatten(1, 2)
    x = x.roll(shift, (1, 2)) if any(shift) else x
    return x[:, :high, :wide].contiguous()


def _apart(size: list[int], window: list[int], shift: list[int], grid: tuple[int, ...], like: Tensor) -> Tensor:
    """What is added to scores between regions that a cyclic shift brought together, (windows, 1, positions, positions)."""
    regions = []
    for length, width, step in zip(size, window, shift, strict=True):
        at = torch.arange(length, device=like.device)
        regions.append((at >= length - width).long() + (at >= length - step).long() * (step > 0))
    region = 3 * regions[0][:, None] + regions[1]
    region = region.reshape(grid).transpose(1, 2).flatten(2).flatten(0, 1)
    return torch.where(region[:, :, None] == region[:, None], 0.0, _APART).to(like.dtype)[:, None]


def _window_heads(self: Any, rows: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of torchvision's modules inside windows, (windows, positions, channels) -> what the output projection reads."""
    q, k, v = self.qkv(rows).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    scale = getattr(self, "logit_scale", None)
    if scale is None:
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    else:
        if self.qkv.bias is not None:  # keys have no bias in the second version
            k = k - self.qkv.bias.unflatten(0, (3, self.num_heads, 1, -1))[1]
        scores = _cosines(q, k, scale)
    return _mixed(
        scores + positions, mask, v, lambda weights: nn.functional.dropout(weights, self.attention_dropout, self.training)
    )


def _cosines(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    return nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).transpose(-2, -1) * scale.clamp(max=_MOST).exp()


def _mixed(scores: Tensor, mask: Tensor | None, v: Tensor, dropout: Any) -> Tensor:
    """The heads' outputs side by side, (windows, positions, heads x width); the mask has one entry per window of a sample."""
    if mask is not None:
        scores = (scores.unflatten(0, (-1, len(mask))) + mask).flatten(0, 1)
    return (dropout(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)


def _fused(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (samples, heads, positions, width), of timm's modules with biases of their own."""
    qkv = self.qkv(x)
    if self.q_bias is not None:
        qkv = qkv + torch.cat((self.q_bias, self.k_bias, self.v_bias))
    return qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def timm_beit(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    """``timm.models.beit.Attention``: x (samples, positions, channels) -> the same shape."""
    q, k, v = _fused(self, x)
    table = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
    both = [bias for bias in (table, shared_rel_pos_bias) if bias is not None]
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, sum(both) if both else None, _rate(self), scale=self.scale)  # type: ignore[arg-type]
    return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


def timm_eva(self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """``timm.models.eva.EvaAttention``: x (samples, positions, channels) -> the same shape."""
    if self.qkv is not None:
        q, k, v = _fused(self, x)
    else:
        separate = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in separate)
    q, k = self.q_norm(q), self.k_norm(k)
    if rope is not None:
        q, k = (_rotated(self, part, rope).type_as(v) for part in (q, k))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, _rate(self), is_causal, scale=self.scale)
    mixed = self.norm(mixed.transpose(1, 2).flatten(2))
    gate = getattr(self, "gate", None)
    return self.proj_drop(self.proj(mixed if gate is None else mixed * gate(x).sigmoid()))


def _rotated(self: Any, heads: Tensor, rope: Tensor) -> Tensor:
    """Heads whose positions after the prefix are rotated."""
    from timm.layers import apply_rot_embed_cat

    first = self.num_prefix_tokens
    turned = apply_rot_embed_cat(heads[:, :, first:], rope, half=getattr(self, "rotate_half", False))
    return torch.cat([heads[:, :, :first], turned], 2)


def _rate(self: Any) -> float:
    return self.attn_drop.p if self.training else 0.0


def timm_windows(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """``timm.models.swin_transformer_v2.WindowAttention``: x (windows, positions, channels) -> the same shape."""
    q, k, v = _fused(self, x)
    table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
    positions = table[self.relative_position_index.flatten()].unflatten(0, (x.shape[1], -1)).permute(2, 0, 1)
    scores = _cosines(q, k, self.logit_scale) + 16 * positions.sigmoid()
    mixed = _mixed(scores, None if mask is None else mask[:, None], v, self.attn_drop)
    return self.proj_drop(self.proj(mixed))


FORWARDS = {
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"): torchvision_windows,
    ("torchvision.models.swin_transformer", "ShiftedWindowAttentionV2"): torchvision_windows,
    ("timm.models.beit", "Attention"): timm_beit,
    ("timm.models.eva", "EvaAttention"): timm_eva,
    ("timm.models.swin_transformer_v2", "WindowAttention"): timm_windows,
}
