"""Dimensions that a reshape splits or merges: which of their factors is pruned."""

import re
from bisect import bisect_right
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .graph_ids import WIDTH, Ids, Place, Product, joined

_ROUNDS = 16
_NUMBER = re.compile(r"head|group|branch")  # attributes that count factors of a width


def settle(found: Ids, by_input: Collection[str] = ()) -> Ids:
    """The ids with a choice of the factor of every product along which units are removed; the other factors are frozen.

    A factor is chosen if the others cannot shrink. Among several, the heads of attention are preferred, then dimensions over
    which no operation reduces, then the last one, because a number of groups is usually a constant of the code.
    by_input: modules that derive the width of a head from the width of their input: there each head is as wide as a share of the
    input, so that a unit is one position of that share.
    """
    ids = found.copy()
    for summed, reason, module in ids.summed:
        if module in by_input:
            ids.normalized.append(summed)
        else:
            ids.freeze(summed, reason)
    undecided, ids.products = ids.products, []
    if by_input:
        _tie_to_input(ids, [p for p in undecided if p.module in by_input])
        alone = [Product(summed, (), module) for summed, _, module in ids.summed if module in by_input]  # a single head
        _tie_to_input(ids, alone)
    for round_ in range(_ROUNDS):
        if not undecided:
            break
        marks = _Marks.of(ids)
        sure = [p for p in undecided if sum(marks.free(factor) > 0 for factor in p.factors) <= 1]
        if round_ == _ROUNDS - 1 or not sure:
            sure = undecided
        for product in sure:
            scores = [marks.score(factor) for factor in product.factors]
            chosen = max(range(len(scores)), key=lambda k: (scores[k], k))
            _choose(ids, product, chosen, scores[chosen][1])
            for k, factor in enumerate(product.factors):
                marks.fixed[marks.label[factor]] |= k != chosen
        done = {id(product) for product in sure}
        undecided = [product for product in undecided if id(product) not in done]
    return ids


@dataclass(frozen=True, eq=False)
class _Marks:
    """What is known about the units so far, by the label of each id, (count,): label is their lowest id."""

    label: Tensor
    fixed: Tensor
    reduced: Tensor
    heads: Tensor

    @classmethod
    def of(cls, ids: Ids) -> "_Marks":
        label = joined(ids.count, ids.ties)
        marks = ([i for i, _ in ids.frozen], ids.normalized, ids.heads)
        return cls(label, *(_marked(ids.count, label, mark) for mark in marks))

    def free(self, factor: Tensor) -> float:
        """The share of its ids that are not frozen."""
        return 1 - float(self.fixed[self.label[factor]].double().mean())

    def score(self, factor: Tensor) -> tuple[float, bool, bool]:
        own = self.label[factor]
        return self.free(factor), bool(self.heads[own].any()), not self.reduced[own].any()


def _tie_to_input(ids: Ids, products: Iterable[Product]) -> None:
    """Ties the entries of products to the input of the layer that makes them, if they are as many or a multiple."""
    marks = _Marks.of(ids)
    starts = [int(outputs[0]) for outputs, _ in ids.layers]
    for product in products:
        for factor in product.factors:
            if marks.heads[marks.label[factor]].any():
                ids.freeze(factor, "the code divides the width of its input by their number")
        whole = product.whole.flatten()
        outputs, inputs = ids.layers[max(0, bisect_right(starts, int(whole[0])) - 1)]
        if whole[0] >= outputs[0] and whole[-1] <= outputs[-1] and len(whole) % len(inputs) == 0:
            ids.tie(whole, inputs.repeat(len(whole) // len(inputs)))


def _choose(ids: Ids, product: Product, chosen: int, heads: bool) -> None:
    ids.tie(*product.along(chosen))
    for k, factor in enumerate(product.factors):
        if k != chosen:
            ids.freeze(factor, "units are removed along another dimension of the same reshape")
    factor, whole = product.factors[chosen].unique(), product.whole.unique()
    for name, value in product.numbers.items():
        width = WIDTH.search(name) is not None
        if value == len(factor) and (_NUMBER.search(name) and not width if heads else width):
            ids.put(Place(product.module, name, 0, factor, "tied", is_count=True))
        elif value == len(whole) and width:
            ids.put(Place(product.module, name, 0, whole, "tied", is_count=True))


def _marked(count: int, label: Tensor, marks: Iterable[Tensor]) -> Tensor:
    """Whether each label is among those of the marked ids, (count,)."""
    found = torch.zeros(count, dtype=torch.bool)
    for ids in marks:
        found[label[ids]] = True
    return found
