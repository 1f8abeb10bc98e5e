"""What a value is, as plain values: equal for equal settings in any process, different for what computes something else."""

import hashlib
import re
from functools import partial
from pathlib import Path
from types import CellType, CodeType
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
from torch import Tensor, nn

from nodelens.results.result import Result, fingerprint

_PLAIN = (bool, int, float, str, bytes, type(None))
_DEEP = 32  # levels of values inside values


def identity(value: Any, around: tuple[int, ...] = ()) -> Any:
    """A value as nested lists of plain values, for a key under which work is kept.

    Functions are their code with constants, defaults and what they close over; modules their options and weights; tensors, arrays
    and tables their content; other objects their text, or the values inside them where the text is only an address. A value inside
    itself is the number of levels between both. A value below 32 levels equals none, not even itself another time.

    around: the ids of the values that this one is inside
    """
    if id(value) in around and not isinstance(value, _PLAIN):
        return f"{len(around) - around.index(id(value))} levels above"
    inner = (*around, id(value))
    if isinstance(value, _PLAIN):
        return value if isinstance(value, (int, str, type(None))) else repr(value)
    if isinstance(value, (type, Path)):
        return str(value)
    if isinstance(value, (Tensor, np.ndarray, pd.DataFrame, pd.Series)):
        return _content(value)
    if len(around) >= _DEEP:
        return f"{type(value).__qualname__} {uuid4().hex}"
    if isinstance(value, dict):
        return [[identity(k, inner), identity(v, inner)] for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [identity(each, inner) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted((identity(each, inner) for each in value), key=repr)
    if isinstance(value, partial):
        return identity([value.func, value.args, value.keywords], inner)
    if isinstance(value, nn.Module):
        plain = [{k: v for k, v in vars(m).items() if isinstance(v, _PLAIN)} for m in value.modules()]
        return [type(value).__qualname__, fingerprint(value), identity(plain, inner)]
    if isinstance(value, CodeType):
        return [value.co_code.hex(), list(value.co_names), identity(value.co_consts, inner)]
    if (code := getattr(value, "__code__", None)) is not None:
        closed = [_held(cell) for cell in value.__closure__ or ()]
        of = [code, value.__defaults__, value.__kwdefaults__, closed, getattr(value, "__self__", None)]
        return [value.__module__, value.__qualname__, identity(of, inner)]
    text = str(value)
    if re.search(r" at 0x[0-9a-f]+", text):
        return [type(value).__qualname__, identity(vars(value), inner) if hasattr(value, "__dict__") else ""]
    return text


def _held(cell: CellType) -> Any:
    """What a variable that a function closes over holds; a text where it holds nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return "<unset>"


def identity_of_result(result: Result | None) -> Any:
    """The tables of units and layers and the matrices of a result; integers that became floats in a file are equal."""
    if result is None:
        return None
    tables = [_of_table(table) for table in (result.units, result.layers)]
    return [*tables, [[*key, _content(matrix)] for key, matrix in sorted(result.matrices.items())]]


def _of_table(table: pd.DataFrame) -> Any:
    columns = [[str(name), _content(column)] for name, column in table.items()]
    return [hashlib.sha256("\n".join(map(str, table.index)).encode()).hexdigest(), *columns]


def _content(value: Any) -> list[Any]:
    if isinstance(value, pd.DataFrame):
        return list(_of_table(value))
    if isinstance(value, Tensor):
        value = value.detach().cpu().float().numpy() if value.dtype.is_floating_point else value.detach().cpu().numpy()
    array = np.asarray(value)
    try:
        held = np.ascontiguousarray(array, dtype=float).tobytes()
    except (TypeError, ValueError):  # words
        held = "\n".join(map(str, array.reshape(-1))).encode()
    return [list(array.shape), hashlib.sha256(held).hexdigest()]
