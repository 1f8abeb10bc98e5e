"""Class attributes read from source files without importing them: ``--help`` and shell completion must not wait for torch.

Only this package's own files are read. An import would run all of them; here the values in class bodies are evaluated.
"""

import ast
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

UNREADABLE = "???"  # a value that only running the module tells


class _Constants(dict[str, Any]):
    """The module-level constants that a class body refers to, evaluated on first use."""

    def __init__(self, module: ast.Module) -> None:
        super().__init__(field=dataclasses.field)
        self.nodes = {name: line.value for line in module.body for name in _targets(line) if isinstance(line, ast.Assign)}

    def __missing__(self, name: str) -> Any:
        self[name] = self.value(self.nodes[name])  # KeyError: eval then looks among the builtins
        return self[name]

    def value(self, node: ast.expr) -> Any:
        """The value of an expression; the default of a ``dataclasses.field``."""
        try:
            found = eval(compile(ast.Expression(node), "<class body>", "eval"), {}, self)
        except (NameError, AttributeError, TypeError):
            return UNREADABLE
        if isinstance(found, dataclasses.Field):
            return found.default if found.default_factory is dataclasses.MISSING else found.default_factory()
        return found


@dataclasses.dataclass
class ClassSource:
    """A class: its class variables and its dataclass fields with their defaults, inherited ones included."""

    name: str
    variables: dict[str, Any] = dataclasses.field(default_factory=dict)
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


@cache
def read_classes(folder: Path) -> list[ClassSource]:
    """The classes of a folder's files that state ``names`` of their own."""
    nodes: dict[str, tuple[ast.ClassDef, _Constants]] = {}
    for file in sorted(folder.glob("*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        constants = _Constants(module)
        nodes |= {node.name: (node, constants) for node in module.body if isinstance(node, ast.ClassDef)}
    named = [name for name, (node, _) in nodes.items() if any("names" in _targets(line) for line in node.body)]
    return [found for found in (_read(name, nodes) for name in named) if found.variables["names"]]


def _targets(line: ast.stmt) -> list[str]:
    targets = [line.target] if isinstance(line, ast.AnnAssign) else line.targets if isinstance(line, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _read(name: str, nodes: dict[str, tuple[ast.ClassDef, _Constants]]) -> ClassSource:
    node, constants = nodes[name]
    found = ClassSource(name)
    for base in reversed([base.id for base in node.bases if isinstance(base, ast.Name) and base.id in nodes]):
        parent = _read(base, nodes)
        found.variables |= parent.variables
        found.fields |= parent.fields
    for line in node.body:
        for target in _targets(line):
            if isinstance(line, ast.AnnAssign) and line.value is not None:
                kind = found.variables if "ClassVar" in ast.unparse(line.annotation) else found.fields
                kind[target] = constants.value(line.value)
            elif isinstance(line, ast.Assign):
                found.variables[target] = constants.value(line.value)
    return found
