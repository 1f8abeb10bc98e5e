"""Index expressions such as ``n//2:`` or ``0,2,-1``: parsed, never evaluated."""

import ast
import operator
import re
from collections.abc import Callable

LENGTH = 100  # largest number of characters of an expression
LARGEST = 10**6  # largest absolute value of any intermediate result
CHARACTERS = re.compile(r"[0-9n()+\-*/%:, ]*")
_TWO: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def parse_index(text: str, n: int) -> list[int]:
    """The indices in [0, n) that an expression selects among n items, in its order, without duplicates.

    ``all``, or comma-separated items: a number, or a slice ``start:stop:step``, whose parts are made of integers, n,
    + - * // % and brackets. Negative numbers and slices have the same meaning as in Python.

    Raises ValueError, with the text and n, for anything else, an index out of range, a division by zero or an empty selection.

    >>> parse_index("0, n//2:, -1", 6)
    [0, 3, 4, 5]
    """
    try:
        found = _indices(text, n)
        if not found:
            raise ValueError("it selects nothing")
    except ValueError as reason:
        shown = text if len(text) <= LENGTH else f"{text[:LENGTH]}..."
        raise ValueError(f"index {shown!r} with n = {n}: {reason}") from None
    return found


def _indices(text: str, n: int) -> list[int]:
    if len(text) > LENGTH:
        raise ValueError(f"it has {len(text)} characters, at most {LENGTH} are allowed")
    if text.strip() == "all":
        return list(range(n))
    if not CHARACTERS.fullmatch(text):
        raise ValueError("allowed are all, or integers, n, + - * // %, brackets, colons and commas")
    return list(dict.fromkeys(index for item in text.split(",") for index in _item(item, n)))


def _item(item: str, n: int) -> range:
    """The indices of a number or a slice. Brackets contain no colon or comma, so splitting at them first is safe."""
    parts = [_value(part, n) if part.strip() else None for part in item.split(":")]
    if len(parts) > 3:
        raise ValueError(f"{item.strip()!r} has more colons than start:stop:step")
    if len(parts) > 1:
        if parts[2:] == [0]:
            raise ValueError(f"the step of {item.strip()!r} is 0")
        return range(n)[slice(*parts)]
    index = parts[0]
    if index is None:
        raise ValueError("a number or a slice is missing")
    if not -n <= index < n:
        raise ValueError(f"{item.strip()} is out of range" + (f"; valid are {-n} to {n - 1}" if n > 0 else ""))
    return range(index % n, index % n + 1)


def _value(text: str, n: int) -> int:
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        raise ValueError(f"{text.strip()!r} is not an expression of integers and n") from None
    return _number(tree.body, text.strip(), n)


def _number(node: ast.expr, text: str, n: int) -> int:
    match node:
        case ast.Constant(value=int(value)):
            pass
        case ast.Name(id="n"):
            value = n
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_number(operand, text, n)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _TWO:
            a, b = _number(left, text, n), _number(right, text, n)
            if b == 0 and isinstance(op, (ast.FloorDiv, ast.Mod)):
                raise ValueError(f"{text!r} divides by zero")
            value = _TWO[type(op)](a, b)
        case _:
            raise ValueError(f"{text!r} is not an expression of integers and n")
    if abs(value) > LARGEST:
        raise ValueError(f"{text!r} gives a number beyond {LARGEST:,}")
    return value
