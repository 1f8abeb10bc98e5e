"""Roles: the parts of a transformer by function, independent of the module names of its family."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from . import architecture
from .experts import expert_layers
from .expressions import parse_index
from .layers import Layer
from .sharded import class_name

PARTS = ("input", "output", "attention", "heads", "mlp", "mlp.hidden")
Hidden = tuple[Layer, ...]
_EXPRESSION = re.compile(r"(\w+)(?:\[([^][]*)\])?((?:\.\w+)*)")


@dataclass(frozen=True)
class Block:
    """A residual block: for each of ``PARTS`` its layer, its layers (mixture of experts), or the reason why there is none.

    ``heads``: number of attention heads, each of equal width, at ``.heads``; None if unknown.
    """

    name: str
    kind: str  # its class
    parts: Mapping[str, Layer | Hidden | str]
    heads: int | None


@dataclass(frozen=True)
class Roles:
    """The blocks of a model, and the modules before and after them: embedding, final_norm, head."""

    model: str  # its class
    blocks: tuple[Block, ...]
    single: Mapping[str, Layer | str]
    reason: str = ""  # why there are no blocks

    def layers(self, expression: str) -> list[Layer]:
        """The layers of an expression such as ``final_norm`` or ``blocks[n//2:].mlp.hidden``; empty for any other text.

        ``blocks`` without an index means all blocks, without a part their outputs. Single roles have ``.input`` and ``.output``.
        For a mixture of experts, ``.mlp.hidden`` means the hidden units of each expert and of the shared experts.
        Raises ValueError for a part that is not found or ambiguous, and for an invalid index.
        """
        match = _EXPRESSION.fullmatch(expression)
        role, index, part = match.groups() if match else ("", None, "")
        if role == "blocks" and (index is not None or part[1:] in ("", *PARTS)):
            chosen = [self.blocks[k] for k in self._chosen(expression, index)]
            return [layer for block in chosen for layer in self._part(expression, block, part[1:] or "output")]
        return [self._single(expression, role, part[1:])] if role in self.single and index is None else []

    def _chosen(self, expression: str, index: str | None) -> list[int]:
        if not self.blocks:
            raise ValueError(f"{expression!r}: {self.model} has no blocks: {self.reason}; give the name of a module instead")
        try:
            return parse_index("all" if index in (None, "*") else index, len(self.blocks))
        except ValueError as error:
            raise ValueError(f"{expression!r}: {error}") from None

    def _part(self, expression: str, block: Block, part: str) -> Hidden:
        found = block.parts.get(part)
        if isinstance(found, (Layer, tuple)):
            return (found,) if isinstance(found, Layer) else found
        if found is None:
            raise ValueError(f"{expression!r}: a block has no part {part!r}; the roles of {self.model} are {self}")
        there = [str(k) for k, other in enumerate(self.blocks) if not isinstance(other.parts[part], str)]
        raise ValueError(
            f"{expression!r}: no .{part} is found in block {block.name} ({block.kind}) of {self.model}: {found}; give "
            "the name of a module instead" + (f", or blocks[{','.join(there)}].{part}" if there else "")
        )

    def _single(self, expression: str, role: str, part: str) -> Layer:
        found = self.single[role]
        if isinstance(found, str):
            raise ValueError(f"{expression!r}: no {role} is found in {self.model}: {found}; give the name of a module instead")
        if part not in ("", "input", "output"):
            raise ValueError(f"{expression!r}: {role} has no part {part!r}; it has input and output")
        return Layer(f"{found.name}.input", found.module, "input") if part == "input" else found

    def __str__(self) -> str:
        parts = [part for part in PARTS if any(not isinstance(block.parts[part], str) for block in self.blocks)]
        single = [role for role, found in self.single.items() if isinstance(found, Layer)]
        return ", ".join([f"blocks[0:{len(self.blocks)}].{part}" for part in parts] + single)


def roles_of(model: nn.Module) -> Roles:
    """The roles of a model's modules, by the module names of known families, otherwise by structure. Runs nothing.

    Blocks are the shallowest list of modules of the length in the config; without a config, the longest not inside another.
    ``input`` and ``output`` of a block are the residual stream. ``attention`` and ``mlp`` are the outputs of these modules,
    before any norm or scale with which the block adds them to the stream. ``heads`` and ``mlp.hidden`` are the inputs of their
    output projections, or the hidden units of experts. A role that is missing or ambiguous raises only when it is requested.
    """
    config = architecture.config_of(model)
    names = {module: name for name, module in model.named_modules()}
    tried = partial(_found_or_reason, names)
    listed = tried(architecture.list_of_blocks, model, config)
    if isinstance(listed, str):
        return Roles(class_name(model), (), {}, listed)
    uses = Counter(module for block in listed for module in set(block.modules()))
    single = {
        "embedding": tried(architecture.embedding_of, model),
        "final_norm": tried(architecture.final_norm_of, model, names[listed]),
        "head": tried(architecture.head_of, model, names[listed]),
    }
    return Roles(
        class_name(model),
        tuple(_block(block, config, names, uses) for block in listed),
        {role: tried(_layer, module, names, "output", 1) for role, module in single.items()},
    )


def _block(block: nn.Module, config: Any, names: Mapping[nn.Module, str], uses: Mapping[nn.Module, int]) -> Block:
    tried, width = partial(_found_or_reason, names), architecture.width_of(block, config)
    attention = tried(architecture.attention_of, block)
    heads = tried(architecture.attention_writer, attention, width)
    mlp = tried(architecture.mlp_of, block, None if isinstance(attention, str) else attention)
    hidden = tried(architecture.mlp_writer, mlp, width)
    stream = tried(architecture.stream_of, block)
    sites = {
        "input": (stream, "input"),
        "output": (stream, "output"),
        "attention": (tried(architecture.output_module, attention, heads, block), "output"),
        "heads": (heads, "input"),
        "mlp": (tried(architecture.output_module, mlp, hidden, block), "output"),
        "mlp.hidden": (hidden, "input"),
    }
    parts = {part: tried(_layer, module, names, side, uses.get(module, 0)) for part, (module, side) in sites.items()}
    fused = [] if isinstance(mlp, str) else [m for m in mlp.modules() if expert_layers(names[m], m)]
    if len(fused) == 1:
        parts["mlp.hidden"] = tried(_mixture, mlp, fused[0], names, uses)
    n = None if isinstance(heads, str) else architecture.heads_of(attention, heads, config)
    return Block(names[block], class_name(block), parts, n)


def _layer(module: nn.Module, names: Mapping[nn.Module, str], side: str, blocks: int) -> Layer:
    if blocks > 1:
        raise architecture.UnclearError(f"it is shared by {blocks} blocks, and its calls cannot be told apart")
    if side == "input" and "input" in module._modules:
        raise architecture.UnclearError("its inputs would have the name of its own submodule input")
    return Layer(f"{names[module]}.input" if side == "input" else names[module], module, side)


def _mixture(mlp: nn.Module, experts: nn.Module, names: Mapping[nn.Module, str], uses: Mapping[nn.Module, int]) -> Hidden:
    """The hidden units of a mixture of experts: of each routed expert, and of the shared experts."""
    if other := [name for name in architecture.stacked_tensors(mlp) if mlp.get_submodule(name.rpartition(".")[0]) is not experts]:
        raise architecture.UnclearError(f"its experts share one tensor, and it has another stacked tensor, {other[0]}")
    path = _layer(experts, names, "output", uses.get(experts, 0)).name  # raises if its calls cannot be told apart
    shared = architecture.shared_writers(mlp).values()
    return (*expert_layers(path, experts), *(_layer(writer, names, "input", uses.get(writer, 0)) for writer in shared))


def _found_or_reason(names: Mapping[nn.Module, str], find: Callable[..., Any], given: nn.Module | str, *more: Any) -> Any:
    """The result of a search, or the module and reason of its failure; a reason given as first argument is passed on."""
    if isinstance(given, str):
        return given
    try:
        return find(given, *more)
    except architecture.UnclearError as reason:
        return f"{names[given]}: {reason}" if names[given] else str(reason)
