"""How well the logits of a lens predict the next token, and what the model itself predicts, as sums over tokens."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nodelens.statistics import Accumulator, Gram
from nodelens.statistics.processes import reduce_sums


def place(logits: Tensor, tokens: Tensor) -> Tensor:
    """How many tokens have a larger logit than the given one, (n,) int64: 0 for the first place. logits (n, V), tokens (n,)."""
    return (logits > logits.gather(1, tokens[:, None])).sum(1)


def kl(own: Tensor, other: Tensor) -> Tensor:
    """KL(own || other) in nats, (n,), of the logarithms of probabilities (n, V); one of the two may be (V,)."""
    p = own.exp()
    return torch.where(p > 0, p * (own - other), 0).sum(-1)


def row_scores(logits: Tensor, final: Tensor, following: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Tensor]:
    """Scores of each token, (n,), of a lens and the model's own logits (n, V); following (n,): the true next tokens.

    precision_at_k: whether the next token is among the k largest logits of the lens. agreement_at_k: whether the model's first
    choice is. surprisal: -ln p(next token). kl: KL(model || lens). entropy: of the lens. In nats.
    Source: Belrose et al. 2023, 2303.08112, section 3 (kl); Pal et al. 2023, 2311.04897, section 3 (precision, surprisal).
    """
    lens, own = logits.float().log_softmax(1), final.float().log_softmax(1)
    true, first = place(lens, following), place(lens, own.argmax(1))
    found = {f"precision_at_{k}": (true < k).double() for k in ks} | {f"agreement_at_{k}": (first < k).double() for k in ks}
    return found | {
        "surprisal": -lens.gather(1, following[:, None])[:, 0].double(),
        "kl": kl(own, lens).double(),
        "entropy": -torch.where(lens > -math.inf, lens.exp() * lens, 0).sum(1).double(),
    }


@dataclass
class TokenMeans:
    """Means over tokens, with standard errors over samples, of named scores; sums only, by layer.

    The tokens of a sample are not independent, so that the error is that of a ratio of two sums over samples.
    Source: Cochran, Sampling Techniques, 3rd ed. 1977, eq. 6.13, without the finite population correction
    """

    names: tuple[str, ...] = ()
    sums: dict[int, Accumulator] = field(default_factory=dict)

    def add(self, layer: int, scores: Mapping[str, Tensor], sample: Tensor, samples: int) -> None:
        """Adds the scores of tokens, (n,) each; sample (n,) int64: which of the batch's samples each token belongs to."""
        self.names = tuple(scores)
        columns = torch.stack([*scores.values(), torch.ones_like(sample, dtype=torch.float64)], 1)
        totals = columns.new_zeros(samples, columns.shape[1]).index_add(0, sample, columns)
        totals = totals[totals[:, -1] > 0]
        if len(totals):
            self.sums.setdefault(layer, Accumulator(Gram)).add(Gram.of(totals))

    def reduced(self, device: torch.device) -> None:
        """Adds the sums of all processes. Collective."""
        reduce_sums(self.sums, device)

    def row(self, layer: int) -> dict[str, float]:
        """tokens, samples, and for each score its mean and ``<score>_se``; NaN for the error of one sample, and without tokens."""
        gram = self.sums[layer].value if layer in self.sums else None
        if not isinstance(gram, Gram):
            return {"tokens": 0, "samples": 0} | dict.fromkeys(self.names, math.nan)
        n, mean, covariance = int(gram.n), gram.mean.cpu(), gram.covariance.cpu()
        found: dict[str, float] = {"tokens": round(n * float(mean[-1])), "samples": n}
        for k, name in enumerate(self.names):
            ratio = float(mean[k] / mean[-1])
            spread = covariance[k, k] - 2 * ratio * covariance[k, -1] + ratio**2 * covariance[-1, -1]
            found |= {name: ratio, f"{name}_se": math.sqrt(float(spread.clamp_min(0)) / n) / float(mean[-1])}
        return found
