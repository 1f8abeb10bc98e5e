"""What error messages share: the nearest name, the words of the interface in use, and arguments that do not fit a call."""

import difflib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from importlib import metadata
from numbers import Integral
from os import PathLike
from typing import Any, TypeVar

RENAMED = {  # options of nl.analyze and nl.prune that work under their old names for one version
    "wide": "covariance",
    "passes": "max_passes",
    "recover": "finetune",
    "axes": "custom_groups",
    "inexact": "allow_approximate",
    "nan": "nan_policy",
}
LIGHTNING_HINTS = (  # of its warnings, those that nobody can act on, as regular expressions of their beginnings
    r"The `srun` command is available on your system but is not used",  # wherever Slurm is installed, on login nodes too
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ".*does not have many workers",
    "The number of training batches",
)
_CONFIG_KEYS = {  # keywords in Python that a config has under another key
    "task": "objective.task",
    "output": "objective.output",
    "loss": "objective.loss",
    "budget": "budget.memory",
    "width": "budget.width",
    "max_passes": "budget.max_passes",
    "initial": "initial_path",
}
_of_config: ContextVar[bool] = ContextVar("of_config", default=False)
_T = TypeVar("_T", bound=Callable[..., Any])


@contextmanager
def config_words() -> Iterator[None]:
    """Within it, messages name options by their config keys, for a task that is run from a config."""
    before = _of_config.set(True)
    try:
        yield
    finally:
        _of_config.reset(before)


def either(python: str, config: str) -> str:
    """The words of the interface in use: a call in Python, or a config with its command line."""
    return config if _of_config.get() else python


def option(keyword: str) -> str:
    """An option in the words of the interface in use: its keyword in Python, or its key in a config.

    >>> with config_words():
    ...     print(option("loss"), option("budget"), option("layers"))
    objective.loss budget.memory layers
    """
    return either(keyword, _CONFIG_KEYS.get(keyword, keyword))


def setting(key: str, *value: Any) -> str:
    """An argument of a data set or model in the words of the interface in use: its key in a config, or its name in Python.

    >>> with config_words():
    ...     print(setting("dataset.length"), setting("dataset.streaming", False), setting("model.net.path", None))
    dataset.length dataset.streaming=false model.net.path=null
    >>> print(setting("dataset.length"), setting("dataset.streaming", False), setting("model.net.path", None))
    length streaming=False path=None
    """
    name = either(key.rpartition(".")[2], key)
    if not value:
        return name
    words = {"None": "null", "True": "true", "False": "false"}
    return f"{name}={either(repr(value[0]), words.get(str(value[0]), str(value[0])))}"


def version() -> str:
    """The version of the installed package; unknown for a folder that is on the path without being installed."""
    try:
        return metadata.version("nodelens")
    except metadata.PackageNotFoundError:
        return "unknown"


def nearest(word: str, words: Iterable[str]) -> str:
    """' Did you mean ...?', or nothing where no word is near."""
    near = difflib.get_close_matches(word, list(words), 1, 0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def listed(names: Sequence[object], most: int = 12) -> str:
    """Names on one line, at most ``most`` of them.

    >>> listed(["fc1", "fc2", "fc3"], 2), listed([])
    ('fc1, fc2 and 1 more', 'none')
    """
    rest = len(names) - most
    return ", ".join(map(str, names[:most])) + (f" and {rest} more" if rest > 0 else "") if len(names) else "none"


def first_line(error: BaseException) -> str:
    """The first line of what an error says; the name of its class if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def shown(value: Any, most: int = 60) -> str:
    """A value as an error message shows it: on one line, cut after 60 characters."""
    if isinstance(value, int) and abs(value) >= 10**most:
        return f"an integer of more than {most} digits"
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def kind_of(value: Any) -> str:
    """What a value is, in the words of an error message.

    >>> kind_of(None), kind_of(3), kind_of(int), kind_of("fc1")
    ('None', 'int', 'the class int', "the text 'fc1'")
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    shape = getattr(value, "shape", None)
    sized = f" {tuple(shape)}" if isinstance(shape, tuple) else ""
    return "None" if value is None else f"{type(value).__name__}{sized}"


def as_seed(seed: Any, name: str = "seed") -> int:
    """A seed as an int. Raises TypeError for what is no integer, ValueError for one that torch or NumPy would refuse."""
    if not isinstance(seed, Integral):
        raise TypeError(f"{name} is {shown(seed)}; it is an integer")
    number = int(seed)
    if not 0 <= number < 2**63:
        raise ValueError(f"{name} is {shown(number)}; it is an integer from 0 to 2**63 - 1")
    return number


def check_texts(name: str, given: Any, example: str) -> None:
    """Raises TypeError for an option that is neither a text nor a list of texts."""
    listed = isinstance(given, Iterable) and not isinstance(given, (str, Mapping))
    wrong = next((item for item in given if not isinstance(item, str)), None) if listed else given
    if not isinstance(given, str) and (wrong is not None or not listed):
        within = f"has {kind_of(wrong)} in it" if listed else f"is {kind_of(given)}"
        raise TypeError(f"{name} {within}; it is a name or a list of names, such as {example}")


def check_folder(call: str, folder: Any) -> None:
    """Raises TypeError for a folder that is no path."""
    if not isinstance(folder, (str, PathLike)):
        raise TypeError(f"{call} takes the path of a folder, such as 'outputs/run', not {kind_of(folder)}")


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
    """The function, or the class with its public methods, with an error of one line for arguments that its signature does not take.

    A class is changed in place. Functions with ``**options`` check these themselves.
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
    if hasattr(function, "_known"):
        return function
    signature = inspect.signature(function)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    known = keywords_of(function)

    @wraps(function)
    def checked(*args: Any, **named: Any) -> Any:
        if not open_ended:
            check_names(call, named, known)
        try:
            return function(*args, **named)
        except TypeError as error:
            reason = _misplaced(signature, args, named)
            if not reason:
                raise
            raise TypeError(f"{call}: {reason}; {_order(signature)}") from error

    checked._known = known  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]


def _misplaced(signature: inspect.Signature, args: tuple[Any, ...], named: Mapping[str, Any]) -> str:
    """Why arguments do not fit a signature; empty where they do, so that the error is another one."""
    try:
        signature.bind(*args, **named)
    except TypeError as error:
        return str(error)
    return ""


def _order(signature: inspect.Signature) -> str:
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls", "_cls")]
    ordered = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    others = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    takes = f"the arguments in order are {', '.join(ordered)}" if ordered else "it takes no argument without a name"
    return takes + (f"; give others by name, as {others[0]}=" if others else "")
