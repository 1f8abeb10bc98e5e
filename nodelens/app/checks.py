"""Checks a config against the code that it names: the keys and types of every ``_target_``."""

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from nodelens.messages import nearest

_CONTROL = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}


def check(node: Any, path: str) -> None:
    """Checks a config (plain containers) against the signatures of its targets.

    Raises ValueError, with the key, its value and what is expected, for an unknown target, an unknown key and a wrong type.
    """
    if isinstance(node, Mapping):
        if "_target_" in node:
            _check_target(node, path)
        for key, value in node.items():
            check(value, f"{path}.{key}")
    elif isinstance(node, list):
        for k, value in enumerate(node):
            check(value, f"{path}[{k}]")


def find(target: str, path: str) -> Any:
    """The object with a dotted name. Raises ValueError, with the nearest name in its module, if there is none."""
    module, _, name = str(target).rpartition(".")
    if not module:
        raise ValueError(f"{path}._target_: {target!r} is not a dotted name such as my_package.MyNet")
    try:
        home = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not (module + ".").startswith(str(error.name) + "."):
            raise
        if "." not in module:
            raise ValueError(
                f"{path}._target_: no module {module!r} for {target!r}: start in its folder, or add that folder to PYTHONPATH"
            ) from error
        home = find(module, path)  # a class, of which the target is a method
    if not hasattr(home, name):
        raise ValueError(f"{path}._target_: {module} has no {name!r}.{nearest(name, vars(home))}")
    return getattr(home, name)


def _check_target(node: Mapping[str, Any], path: str) -> None:
    target = find(node["_target_"], path)
    try:
        parameters = _parameters(target)
    except (TypeError, ValueError):  # a built-in without a signature
        return
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [n for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    hints = _hints(target)
    for key, value in node.items():
        if key in _CONTROL:
            continue
        if key not in names and not open_ended:
            raise ValueError(
                f"{path}.{key}: {node['_target_']} takes no {key!r}.{nearest(key, names)} It takes: {', '.join(names) or 'nothing'}"
            )
        if key in hints and not _fits(value, hints[key]):
            raise ValueError(f"{path}.{key} is {value!r}; {node['_target_']} takes {_words(hints[key])}")
    if not node.get("_partial_"):
        _check_complete(node, path, parameters)


def _parameters(target: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a target. A class of this package that takes ``**options`` passes them on to its bases; others may not."""
    found = dict(inspect.signature(target).parameters)
    own = inspect.isclass(target) and target.__module__.startswith("nodelens.")
    for base in target.__mro__[1:] if own else ():
        passed_on = next((name for name, p in found.items() if p.kind is p.VAR_KEYWORD), None)
        if passed_on is None:
            break
        if "__init__" in vars(base):
            del found[passed_on]
            found = dict(inspect.signature(base).parameters) | found
    return found


def _check_complete(node: Mapping[str, Any], path: str, parameters: Mapping[str, inspect.Parameter]) -> None:
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    missing = [n for n in needed if n not in node and "_args_" not in node]
    if missing:
        raise ValueError(f"{path}: {node['_target_']} needs {', '.join(missing)}: add {path}.{missing[0]}=...")


def _hints(target: Callable) -> dict[str, Any]:
    owner = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(owner)
    except (NameError, TypeError, AttributeError):  # names that only type checkers import
        return {}


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(value, Mapping) or (isinstance(value, str) and value.startswith("${")):
        return True  # built or resolved later
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is Literal:
        return value in args
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint is type(None):
        return value is None
    if origin is Callable:
        return callable(value)  # a config has functions as sections only
    if origin in (list, Sequence, tuple, set):
        return isinstance(value, list) and all(_fits(v, args[0]) for v in value if args)
    if getattr(hint, "__module__", "") == "torch" and hint.__name__ == "Tensor":
        return False  # a config holds no tensors
    return not (value is None and inspect.isclass(hint) and hint is not object)


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_words(a) for a in get_args(hint))
    if get_origin(hint) is Callable:
        return "a section with _target_"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)
