"""What error messages share: the nearest name, and the refusal of keywords that nothing reads."""

import difflib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import wraps
from typing import Any, TypeVar

RENAMED = {  # options of nl.analyze and nl.prune that work under their old names for one version
    "wide": "covariance",
    "passes": "max_passes",
    "recover": "finetune",
    "axes": "custom_groups",
    "inexact": "allow_approximate",
    "nan": "nan_policy",
}
# Lightning's warning wherever Slurm is installed, on login nodes too, with a regular expression's escapes
SRUN_HINT = r"The `srun` command is available on your system but is not used"
_T = TypeVar("_T", bound=Callable[..., Any])


def nearest(word: str, words: Iterable[str]) -> str:
    """' Did you mean ...?', or nothing where no word is near."""
    near = difflib.get_close_matches(word, list(words), 1, 0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_names(call: str, named: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises TypeError for an option that a call does not have, and suggests the nearest one."""
    unknown = next((name for name in named if name not in known), None)
    if unknown is not None:
        listed = ", ".join(dict.fromkeys(known)) or "none"
        raise TypeError(f"{call} has no option {unknown!r}.{nearest(unknown, known)} Options are {listed}")


def with_new_names(call: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the new names in place of the deprecated ones, with a warning for each."""
    for old in RENAMED.keys() & named.keys():
        warnings.warn(f"{call}: {old}= is now {RENAMED[old]}=", DeprecationWarning, stacklevel=3)
    return {RENAMED.get(name, name): value for name, value in named.items()}


def keywords_of(function: Callable[..., Any]) -> list[str]:
    """The keywords in the signature of a function or method, without ``**options``."""
    parameters = inspect.signature(function).parameters.values()
    own = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [name for name in own if name not in ("self", "cls", "_cls")]


def refuse_unknown(target: _T, call: str) -> _T:
    """The function, or the class with its public methods, with ``check_names`` for keywords that its signature does not have.

    A class is changed in place. Functions with ``**options`` check these themselves and are returned as they are.
    """
    if not inspect.isclass(target):
        return _checked(target, call)
    for name, value in list(vars(target).items()):
        makes = name in ("__init__", "__new__")
        if name in getattr(target, "__dataclass_fields__", ()) or (name.startswith("_") and not makes):
            continue
        title = call if makes else f"{call}.{name}"
        if inspect.isfunction(value):
            setattr(target, name, _checked(value, title))
        elif isinstance(value, (classmethod, staticmethod)):
            setattr(target, name, type(value)(_checked(value.__func__, title)))
    return target


def _checked(function: _T, call: str) -> _T:
    open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    if open_ended or hasattr(function, "_known"):
        return function
    known = keywords_of(function)

    @wraps(function)
    def checked(*args: Any, **named: Any) -> Any:
        check_names(call, named, known)
        return function(*args, **named)

    checked._known = known  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]
