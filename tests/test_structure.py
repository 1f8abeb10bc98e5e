"""The order of the rooms, and what holds in all of them. Each rule is a function of a tree, so that it can be shown to fail."""

import ast
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

from nodelens.metrics.registry import find_metrics

HOME = Path(__file__).parents[1] / "nodelens"
# a room imports from itself and from those before it; models and data stand beside the others
ORDER = [
    *("models", "data", "statistics", "network", "results", "metrics", "engine", "interventions"),
    *("pruning", "analysis", "evaluation", "training", "report", "compat", "app"),
]
BESIDE = {"models", "data"}
LEAVES = {
    "nodelens.statistics.seeding",
    "nodelens.network.expressions",
    "nodelens.network.sharded",
    "nodelens.results.arrays",
    "nodelens.results.files",
    "nodelens.compat.names",
}  # import nothing: any room may use them
SHARED = "messages"
WALLS = {  # which rooms, or files, may import a library
    "hydra": {"app"},
    "omegaconf": {"app"},
    "lightning": {"models", "data", "training", "app"},
    "matplotlib": {"report"},
    "plotly": {"report"},
    "wandb": {"app"},
    "rich": {"app"},
}


@dataclass
class File:
    """A module of the package: its dotted name, and what it imports, wherever the import stands."""

    name: str
    source: str
    package: bool

    @cached_property
    def tree(self):
        return ast.parse(self.source)

    @property
    def room(self):
        return self.name.split(".")[1] if "." in self.name else ""

    @cached_property
    def imported(self):
        """Every dotted name, lazy imports and those for a type checker included; names of a module are not resolved."""
        parent = self.name.split(".") if self.package else self.name.split(".")[:-1]
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                stem = parent[: len(parent) - node.level + 1] if node.level else []
                whole = ".".join([*stem, *([node.module] if node.module else [])])
                found += [f"{whole}.{alias.name}" for alias in node.names]
        return found


def package(home=HOME):
    """{name: file} of a package's files."""
    return dict(_package(home))


@cache  # files are parsed once for all rules
def _package(home):
    files = {}
    for path in sorted(home.rglob("*.py")):
        parts = [home.name, *path.relative_to(home).with_suffix("").parts]
        inits = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if inits else parts)
        files[name] = File(name, path.read_text(), inits)
    return files


def modules(file, files):
    """The modules of the package that a file imports; a name taken from a package counts as that package."""
    for name in file.imported:
        while name and name not in files:
            name = name.rpartition(".")[0]
        if name:
            yield name


def upward(files):
    """Imports of a room that stands further right."""
    place = {room: k for k, room in enumerate(ORDER)}
    found = []
    for file in files.values():
        if file.room in ("", SHARED):
            continue
        for name in modules(file, files):
            other = files[name].room
            if file.name in LEAVES and other != SHARED:
                found.append(f"{file.name} imports {name}, but is a file that any room may use")
            if other in (file.room, SHARED) or name in LEAVES:
                continue
            if other == "" or file.room in BESIDE or place[other] > place[file.room]:
                found.append(f"{file.name} imports {name}")
    return found


def cycles(files):
    """Files that import each other in a circle. A package's __init__ that only gathers names is passed through."""
    graph = {name: {m for m in modules(f, files) if m != name} for name, f in files.items()}
    found, state = [], {}

    def visit(name, path):
        state[name] = 1
        for other in sorted(graph[name]):
            if state.get(other) == 1:
                found.append(" -> ".join([*path[path.index(other) :], other]))
            elif other not in state:
                visit(other, [*path, other])
        state[name] = 2

    for name in sorted(graph):
        if name not in state:
            visit(name, [name])
    return found


def classes_twice(files):
    """Public class names that occur more than once."""
    names = Counter(
        n.name for f in files.values() for n in f.tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")
    )
    return sorted(name for name, n in names.items() if n > 1)


def outside_walls(files):
    """Imports of a library in a room that may not have it."""
    return [
        f"{f.name} imports {lib}"
        for f in files.values()
        for lib, rooms in WALLS.items()
        if f.room not in rooms and lib in {name.split(".")[0] for name in f.imported}
    ]


CONFIG_KEY = re.compile(r"\b(dataset|model\.net|budget|objective)\.[a-z_]+|\bmodel\.path\b|=(true|false|null)\b")
IN_BOTH_WORDS = {"either", "option", "setting"}


def config_words(files):
    """Errors and notes outside of the app that use a key of the config, whatever the interface in use."""

    def texts(node):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in IN_BOTH_WORDS:
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):  # a docstring
                yield from texts(child)

    return [
        f"{f.name}: {text}"
        for f in files.values()
        if f.room not in ("app", SHARED) and f.name != "nodelens.metrics.catalogue"  # which explains both
        for text in texts(f.tree)
        if CONFIG_KEY.search(text)
    ]


RULES = {
    "upward": upward,
    "cycles": cycles,
    "classes_twice": classes_twice,
    "outside_walls": outside_walls,
    "config_words": config_words,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_the_rule(rule):
    assert RULES[rule](package()) == []


@pytest.mark.parametrize(
    ("rule", "added"),
    {
        "upward": {"nodelens.statistics.moments": "def f():\n    from nodelens.engine.plan import Plan\n"},
        "cycles": {"nodelens.network.layers": "if TYPE_CHECKING:\n    from .roles import Roles\n"},
        "classes_twice": {"nodelens.network.targets": "class Layer: ...\n"},
        "outside_walls": {"nodelens.engine.table": "import matplotlib.pyplot\n"},
        "config_words": {"nodelens.data.text": "def f(x):\n    raise ValueError(f'set dataset.length={x}')\n"},
    }.items(),
)
def test_each_rule_can_fail(rule, added):
    files = package()
    for name, text in added.items():
        files[name] = File(name, files[name].source + "\n" + text, files[name].package)
    assert RULES[rule](files)


def test_a_metric_name_that_is_given_twice_is_refused(tmp_path, monkeypatch):
    (tmp_path / "more_metrics").mkdir()
    (tmp_path / "more_metrics" / "__init__.py").touch()
    (tmp_path / "more_metrics" / "again.py").write_text(
        "from nodelens.metrics import Metric\n\n\nclass Again(Metric):\n    names = ('rq',)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"metric name 'rq' of more_metrics.again.Again is taken: .*RayleighQuotient has it"):
        find_metrics("more_metrics", [tmp_path / "more_metrics"])


def test_there_are_rooms_and_no_flat_files():
    top = {p.name for p in HOME.iterdir() if p.name not in ("__pycache__", "conf")}
    assert {name for name in top if (HOME / name).is_file()} == {"__init__.py", "py.typed", f"{SHARED}.py"}
    assert {name for name in top if (HOME / name).is_dir()} <= set(ORDER)
    assert all((HOME / room / "__init__.py").is_file() for room in top if (HOME / room).is_dir())


def calls(file, name):
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name(called):
                yield called
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Attribute, ast.IfExp)):
            yield from (n.attr for n in ast.walk(node.value) if isinstance(n, ast.Attribute) and name(n.attr))


def test_hooks_are_registered_in_one_file():
    def hook(called):
        return called.startswith("register_") and "hook" in called and called != "register_comm_hook"  # between processes

    assert [f.name for f in package().values() if list(calls(f, hook))] == ["nodelens.network.hooks"]


def test_objects_are_built_in_one_place():
    found = [f.name for f in package().values() for _ in calls(f, lambda called: called == "instantiate")]
    assert found == ["nodelens.app.config"]


def test_what_a_notebook_imports_is_light():
    heavy = ["lightning", "hydra", "wandb", "matplotlib", "plotly", "datasets", "transformers"]
    steps = ["import nodelens", "import nodelens.data, nodelens.models", "import nodelens.engine.analyze"]
    steps += ["import nodelens as nl; nl.analyze, nl.get_metric, nl.load"]
    show = f"print([m for m in [*{heavy}, 'torch'] if m in sys.modules])\n"
    found = subprocess.run(
        [sys.executable, "-c", "import sys\n" + "".join(f"{step}\n{show}" for step in steps)],
        cwd=HOME.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert found.splitlines() == ["[]", "['torch']", "['torch']", "['torch']"]


def test_no_file_is_out_of_hand():
    assert not {name: n for name, f in package().items() if (n := len(f.source.splitlines())) > 320}
