"""Which rows of a tensor an edit changes: by sample, and by position of the prompt or of the generated tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .token_positions import find_text, indices, sought
from .tokens_seen import Prompt, TokensSeen

PHASES = ("all", "prompt", "generated")
_MANY = 100_000  # generated tokens; how many there will be is not known


class Selected(NamedTuple):
    """Rows to change, int64, of one shape: (samples, positions), or flat where samples differ in their number of positions."""

    b: Tensor  # the row of the batch
    p: Tensor  # the column of this call
    sample: Tensor  # its place among the selected samples
    position: Tensor  # its place among the selected positions
    size: tuple[int, int]  # selected samples and, at most, positions


@dataclass(eq=False)
class Selection:
    """The samples, positions and phase of an edit. Positions are found once per prompt; they may be one list per selected sample.

    Positions are those of the prompt, in the phase ``generated`` those of the generated tokens.
    """

    samples: Any
    positions: Any
    phase: str
    tokenizer: Any = None
    texts: Sequence[str] | None = None
    prompt: Prompt | None = field(default=None, repr=False)  # whose columns were found
    found: dict[int, list[int]] = field(default_factory=dict, repr=False)
    last: tuple[Any, Selected | None] = field(default=(None, None), repr=False)  # of one call, which may pass many sites

    @property
    def everything(self) -> bool:
        return self.samples is None and self.positions is None and self.phase == "all"

    def rows(self, seen: TokensSeen) -> Selected | None:
        """The rows to change in this call; None if there are none.

        Raises ValueError for samples or positions out of range, and for a text that is not found or not unique.
        """
        call = (seen.prompt, seen.before, seen.now, seen.samples)
        if self.last[0] != call:
            self.last = (call, self._rows(seen))
        return self.last[1]

    def _rows(self, seen: TokensSeen) -> Selected | None:
        assert seen.prompt is not None
        n = len(seen.prompt)
        chosen = range(n) if self.samples is None else indices(self.samples, n, "samples")
        wanted = [self._wanted(seen, place, sample) for place, sample in enumerate(chosen)]
        passing = [[(k, c) for k, c in enumerate(own) if 0 <= c < seen.now] for own in wanted]
        if not any(passing):
            return None
        rows = [
            [(sample * seen.repeats + r, column, place, k) for k, column in passing[place]]
            for place, sample in enumerate(chosen)
            for r in range(seen.repeats)
        ]
        regular = len({len(row) for row in rows}) == 1
        table = torch.tensor(rows if regular else [entry for row in rows for entry in row])
        b, p, place, position = table.unbind(-1)
        return Selected(b, p, place, position, (len(chosen), max(map(len, wanted))))

    def _wanted(self, seen: TokensSeen, place: int, sample: int) -> Sequence[int]:
        """The selected columns of a sample, counted from the first of this call; ``place``: among the selected samples."""
        assert seen.prompt is not None
        prompt, first = seen.prompt, -seen.before
        if self.positions is None:
            end = first + prompt.columns
            return {
                "all": range(first, seen.now),
                "prompt": range(first, end),
                "generated": range(end, max(end, seen.now)),
            }[self.phase]
        if self.phase == "generated":
            return [k + first + prompt.columns for k in self._generated()]
        if prompt is not self.prompt:
            self.prompt, self.found = prompt, {}
        if sample not in self.found:
            self.found[sample] = self._in_prompt(prompt, place, sample)
        return [column + first for column in self.found[sample]]

    def _generated(self) -> list[int]:
        text = self.positions if isinstance(self.positions, str) else ""
        numbers = self.positions if isinstance(self.positions, list) else [self.positions]
        if "n" in text or "-" in text or sought(text) or any(isinstance(k, int) and k < 0 for k in numbers):
            raise ValueError(
                f"positions {self.positions!r} of generated tokens: how many there will be is not known; count from the first, as "
                "in 0, :3 or ::2"
            )
        return indices(self.positions, _MANY, "positions")

    def _in_prompt(self, prompt: Prompt, place: int, sample: int) -> list[int]:
        positions, places = self.positions, prompt.places(sample)
        if (text := sought(positions)) is not None:
            if prompt.ids is None:
                raise ValueError(f"positions {positions!r} search the text of the prompt, but its token ids are not known")
            known = None if self.texts is None else self.texts[sample]
            chosen = find_text(text, prompt.ids[sample], prompt.real[sample], self.tokenizer, known)
        else:
            each = isinstance(positions, list) and bool(positions) and not isinstance(positions[0], int)
            chosen = indices(positions[place] if each else positions, len(places), "positions")
        return [places[k] for k in chosen]
