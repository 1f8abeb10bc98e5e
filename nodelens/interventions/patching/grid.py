"""The places of a model that a grid of patches visits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from nodelens.interventions.cells import GridCell
from nodelens.interventions.token_model import TokenModel
from nodelens.interventions.token_positions import Positions
from nodelens.messages import nearest, option
from nodelens.network.layers import Layer

COMPONENTS = {"residual": "output", "residual_input": "input", "attention": "attention", "mlp": "mlp", "heads": "heads"}
WHERE = ("component", "layer", "module", "head", "position")  # the columns that tell where a cell is


@dataclass(frozen=True)
class GridOptions:
    """Which states are exchanged.

    components: residual (the stream after a block), residual_input (before it), attention, mlp (what they put out), heads (single
                attention heads, before the output projection), or several of them
    layers:     blocks: all, indices, or an expression such as ``n//2:``
    positions:  tokens of the prompts: all, indices, an expression, or ``phrase:<text>`` of the clean prompt
    into:       corrupt: clean states are put into the corrupt run, so that a cell says what is enough to restore the answer;
                clean: the reverse, which says what the answer needs
    """

    components: str | Sequence[str] = "residual"
    layers: str | int | Sequence[int] = "all"
    positions: Positions = "all"
    into: str = "corrupt"

    def __post_init__(self) -> None:
        unknown = next((name for name in self.names if name not in COMPONENTS), None)
        if unknown is not None or not self.names:
            near = "" if unknown is None else nearest(str(unknown), COMPONENTS)
            raise ValueError(f"{option('components')} is {self.components!r}; it takes {', '.join(COMPONENTS)}.{near}")
        if self.into not in ("corrupt", "clean"):
            raise ValueError(f"{option('into')} is {self.into!r}; it is corrupt or clean, the run that is changed")

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([self.components] if isinstance(self.components, str) else self.components))


class GridSite(NamedTuple):
    """A component of a block, and its columns by head; without heads, all of them."""

    component: str
    block: int
    layer: Layer
    columns: Mapping[int | None, tuple[int, int] | None]

    def cells(self, states: Tensor, positions: Sequence[int]) -> Iterator[tuple[dict[str, Any], GridCell]]:
        """The cells that write states (T, width) of another run: where each one is, and the cell."""
        where = {"component": self.component, "layer": self.block, "module": self.layer.name}
        for head, columns in self.columns.items():
            values = states if columns is None else states[:, slice(*columns)]
            for position in positions:
                cell = GridCell(self.layer, self.block, COMPONENTS[self.component], position, values[position], columns)
                yield where | {"head": head, "position": position}, cell


def grid_sites(model: TokenModel, options: GridOptions) -> tuple[list[GridSite], list[dict[str, str]]]:
    """The sites of a grid, and a row (layer, what, reason) for each block without the component.

    Raises ValueError for a component that no chosen block has.
    """
    sites, missing = list[GridSite](), list[dict[str, str]]()
    for component in options.names:
        found = []
        for block in model.blocks(options.layers):
            try:
                found.append(_site(model, component, block))
            except ValueError as error:
                missing.append({"layer": model.roles.blocks[block].name, "what": component, "reason": str(error)})
        if not found:
            raise ValueError(f"{option('components')}={component}: {missing[-1]['reason']}")
        sites += found
    return sites, missing


def _site(model: TokenModel, component: str, block: int) -> GridSite:
    layer = model.part(block, COMPONENTS[component])
    if component != "heads":
        return GridSite(component, block, layer, {None: None})
    count, module = model.roles.blocks[block].heads, layer.module
    width: Any = getattr(module, "in_features", None) or (len(module.weight) if hasattr(module, "nf") else None)  # type: ignore[arg-type]
    if not count or not isinstance(width, int) or width % count:
        raise ValueError(f"the number of heads of block {block} of {model.name} is not known: name another component")
    size = width // count
    return GridSite(component, block, layer, {head: (head * size, (head + 1) * size) for head in range(count)})
