import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1] / "nodelens"
LEVELS = (
    "anatomy buffer linalg keys rows runs geometry files checks expressions",
    "layers roles experts",
    "hooks frame statistics targets modes",
    "metrics",
    "recording plan wide passes refusals waiting control table results distributed",
    "collector collect measure analysis forecast pruning evaluate harness wrapper",
    "callbacks report tracking finetune",
    "config tasks overrides cli",
)
LEVEL = {name: k for k, names in enumerate(LEVELS) for name in names.split()}
BESIDE = {"models", "data"}
WALLS = {
    "hydra": {"config.py", "overrides.py", "cli.py"},
    "lightning": {"callbacks.py", "finetune.py", "tasks/train.py", "models", "data"},
    "matplotlib": {"report"},
    "plotly": {"report"},
    "wandb": set(),
}
FILES = sorted(HOME.rglob("*.py"))


def imports(path):
    """Every module that a file names in an import, wherever it stands but in a type checker's block."""
    tree = ast.parse(path.read_text())
    checked = {
        id(n)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for n in ast.walk(branch)
    }
    package = ["nodelens", *path.relative_to(HOME).with_suffix("").parts][:-1]
    for node in ast.walk(tree):
        if id(node) in checked:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*stem, *([node.module] if node.module else [])])
            yield from (f"{whole}.{alias.name}" for alias in node.names)


def part(path):
    return path.relative_to(HOME).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOME)))
def test_imports_point_down(path):
    own = part(path)
    if own == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "nodelens":
            continue
        other = parts[1] if len(parts) > 1 else "nodelens"
        if own in BESIDE:
            assert other == own or LEVEL.get(other) == 0, f"{own} stands beside and imports {name}"
        elif other not in BESIDE and other != own:
            assert LEVEL[other] <= LEVEL[own], f"{own} imports {name}, which stands above it"


def test_every_file_has_its_level():
    assert {part(p) for p in FILES} - BESIDE - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize(("library", "rooms"), WALLS.items(), ids=list(WALLS))
def test_a_library_stays_in_its_rooms(library, rooms):
    for path in FILES:
        here = {str(path.relative_to(HOME)), part(path)}
        assert here & rooms or library not in {name.split(".")[0] for name in imports(path)}, path


def calls(path, name):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name(called):
                yield called
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Attribute, ast.IfExp)):
            yield from (n.attr for n in ast.walk(node.value) if isinstance(n, ast.Attribute) and name(n.attr))


def test_hooks_are_registered_in_one_file():
    assert {p.name for p in FILES if list(calls(p, lambda called: called.startswith("register_") and "hook" in called))} == {
        "hooks.py"
    }


def test_objects_are_built_in_one_place():
    assert [(p.name, called) for p in FILES for called in calls(p, lambda called: called == "instantiate")] == [
        ("config.py", "instantiate")
    ]


@pytest.mark.parametrize(
    "code", ["import nodelens", "import nodelens.measure", "import nodelens as nl; nl.analyze, nl.get_metric, nl.load"]
)
def test_what_a_notebook_imports_is_light(code):
    heavy = "lightning hydra wandb matplotlib plotly datasets transformers" + (" torch" if code == "import nodelens" else "")
    found = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print([m for m in {heavy.split()} if m in sys.modules])"],
        cwd=HOME.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert found == "[]\n"


def test_no_file_is_out_of_hand():
    assert not {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 320}
