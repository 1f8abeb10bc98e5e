"""The future lens: what a state at one position says of tokens further ahead, by a linear map to the last block's later state."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.network.layers import Layer
from nodelens.statistics import Accumulator, Cross, Gram

from .lens_pass import PredictingRows, run_lens
from .scores import TokenMeans, row_scores
from .tail import last_block


class FutureMaps:
    """Sums over tokens of the states after each block and of the last block's states ``ahead`` positions later."""

    def __init__(self, layers: Mapping[int, Layer], last: int, ahead: Sequence[int]):
        self.layers, self.last, self.ahead = layers, last, ahead
        self.grams = {(k, n): Accumulator(Gram) for k in layers for n in ahead}
        self.crosses = {(k, n): Accumulator(Cross) for k in layers for n in ahead}

    def see(self, rows: PredictingRows) -> None:
        """Adds the tokens of a batch."""
        for n in self.ahead:
            now, later = shifted(rows, n)
            goal = rows.states(self.last)[later].float()
            for block in self.layers:
                state = rows.states(block)[now].float()
                if len(state):
                    self.grams[block, n].add(Gram.of(state))
                    self.crosses[block, n].add(Cross.of(state, goal))

    def maps(self, ridge: float = 1e-4) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """{(block, ahead): (weight (d, d), bias (d,))} of least squares; ridge: a share of the mean variance added to all."""
        found = {}
        for key, accumulator in self.grams.items():
            gram, cross = accumulator.value, self.crosses[key].value
            if not isinstance(gram, Gram) or not isinstance(cross, Cross) or int(gram.n) < 2:
                raise ValueError(f"no sample has tokens {key[1]} positions apart that predict another: give longer samples")
            covariance = gram.covariance
            covariance = covariance + ridge * covariance.diagonal().mean() * torch.eye(len(covariance), device=covariance.device)
            weight = torch.linalg.solve(covariance, cross.covariance)
            found[key] = weight, cross.target_mean - gram.mean @ weight
        return found


def shifted(rows: PredictingRows, ahead: int) -> tuple[Tensor, Tensor]:
    """Indices of the tokens that have a predicting token ``ahead`` positions later in their sample, and of these, (m,) each."""
    width = rows.logits.shape[1] + ahead
    own = rows.sample * width + rows.column
    place = torch.full((len(rows.logits) * width,), -1, device=own.device)
    place[own] = torch.arange(len(own), device=own.device)
    later = place[own + ahead] if ahead else place[own]
    now = (later >= 0).nonzero()[:, 0]
    return now, later[now]


def score_maps(
    model: nn.Module,
    data: Iterable[Any],
    layers: Mapping[int, Layer],
    maps: Mapping[tuple[int, int], tuple[Tensor, Tensor]],
    ks: Sequence[int],
    output: Any = None,
) -> dict[int, TokenMeans]:
    """{ahead: scores of each block}: the true token, and the model's own prediction, that many positions after the next one."""
    means = {n: TokenMeans() for _, n in maps}

    def see(rows: PredictingRows) -> None:
        for (block, n), (weight, bias) in maps.items():
            now, later = shifted(rows, n)
            for part in rows.tail.parts(len(now)):
                state = rows.states(block)[now[part]]
                guess = (state.double() @ weight + bias).to(state.dtype)
                scores = row_scores(rows.tail(guess), rows.final()[later[part]], rows.following[later[part]], ks)
                means[n].add(block, scores, rows.sample[now[part]], len(rows.logits))

    with torch.no_grad():
        run_lens(model, data, layers, see, output=output)
    return means


def fit_maps(
    model: nn.Module, data: Iterable[Any], layers: Mapping[int, Layer], last: int, ahead: Sequence[int], output: Any = None
) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Linear maps from the states after each block to the last block's state ``ahead`` positions later. Reads data once."""
    sums = FutureMaps(layers, last, ahead)
    with torch.no_grad():
        run_lens(model, data, {**layers, last: last_block(model)}, sums.see, output=output)
    return sums.maps()
