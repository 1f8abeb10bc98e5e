"""Random vectors that depend on a sample, a row and a seed alone: the same in any batch, with any padding, in any process."""

import torch
from torch import Tensor

from nodelens.statistics.sample_hash import generator, mix


def rows_of_tokens(mask: Tensor | None, samples: int, positions: int) -> Tensor:
    """The number of each position among those that count, (samples, positions) int64 on the CPU, so that padding moves none."""
    if mask is None:
        return torch.arange(positions).expand(samples, positions)
    return (mask.cpu().long().cumsum(1) - 1).clamp_min(0)


def signs(hashes: Tensor, rows: Tensor, width: int, numbers: range, seed: int, word: str, like: Tensor) -> Tensor:
    """Independent signs, 1 or -1, of one vector per number, (len(numbers), samples, rows, width), in the dtype of ``like``."""
    start = int(generator(seed, word).initial_seed())
    small = mix(hashes.cpu()[:, None], rows, start)  # (samples, rows)
    each = mix(small, torch.tensor(list(numbers))[:, None, None])[..., None].to(like.device)
    last = torch.arange(width, device=like.device)
    found = like.new_empty(*each.shape[:-1], width)
    for k in range(len(found)):  # one by one: the integers take more memory than the signs
        found[k] = (mix(each[k], last) >> 17 & 1).to(like) * 2 - 1
    return found


def uniforms(hashes: Tensor, rows: Tensor, number: int, seed: int, word: str) -> Tensor:
    """Independent numbers, uniform in [0, 1), (samples, rows) float64 on the CPU."""
    start = int(generator(seed, word).initial_seed())
    return (mix(mix(hashes.cpu()[:, None], rows, start), number) >> 10).double() / (1 << 53)
