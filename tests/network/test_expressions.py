"""Index expressions have the meaning of Python's slicing, and nothing is evaluated."""

import itertools
import random
import time

import pytest

from nodelens.network.expressions import LARGEST, LENGTH, parse_index

OPERATORS = ("+", "-", "*", "//", "%")


def python(text, n):
    """The indices that Python's own slicing selects; None for an error or an empty selection."""
    every, found = list(range(n)), []
    try:
        for item in text.split(","):
            taken = eval(f"every[{item}]", {"every": every, "n": n})
            found += taken if isinstance(taken, list) else [taken]
    except (IndexError, ZeroDivisionError, ValueError):
        return None
    return list(dict.fromkeys(found)) or None


def parsed(text, n):
    try:
        return parse_index(text, n)
    except ValueError as error:
        words = str(error)
    assert words.startswith(f"index {text!r} with n = {n}: ")
    return None


def number(dice, depth=0):
    kind = dice.random()
    if kind < 0.35 or depth > 3:
        return str(dice.randrange(12))
    if kind < 0.55:
        return "n"
    if kind < 0.65:
        return f"-{number(dice, depth + 1)}"
    if kind < 0.75:
        return f"({number(dice, depth + 1)})"
    return f"{number(dice, depth + 1)}{' ' * dice.randrange(2)}{dice.choice(OPERATORS)}{number(dice, depth + 1)}"


def item(dice):
    if dice.random() < 0.5:
        return number(dice)
    return ":".join(number(dice) if dice.random() < 0.6 else "" for _ in range(dice.choice((2, 3))))


def test_every_expression_agrees_with_python():
    dice, answers = random.Random(0), 0
    for _ in range(6000):
        text, n = ", ".join(item(dice) for _ in range(dice.choice((1, 1, 1, 2, 3)))), dice.randrange(9)
        if len(text) <= LENGTH:
            expected = python(text, n)
            assert parsed(text, n) == expected, (text, n)
            answers += expected is not None
    assert answers > 1500


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_all_short_slices(n):
    ends = ("", "0", "2", "n", "-1", "-n", "n//2", "n-1", "9")
    for parts in itertools.product(ends, ends, ("", "1", "2", "-1", "-2", "0")):
        text = ":".join(parts)
        assert parsed(text, n) == python(text, n), text
        assert parsed(text.rpartition(":")[0], n) == python(text.rpartition(":")[0], n)


@pytest.mark.parametrize("characters", ["0123n()+-*/%:, ", "0n,:-_.[]{}'\"ablx=@&|^~<>!#\\\n\t\x00٣²n;"])
def test_any_string_gives_indices_or_a_value_error(characters):
    dice = random.Random(1)
    for _ in range(10_000):
        text, n = "".join(dice.choices(characters, k=dice.randrange(30))), dice.randrange(12)
        found = parsed(text, n)
        assert found is None or (set(found) <= set(range(n)) and len(set(found)) == len(found) > 0)


@pytest.mark.slow
def test_a_hundred_thousand_strings_give_indices_or_a_value_error_in_bounded_time():
    dice, longest, answers = random.Random(2), 0.0, 0
    alphabets = ("0123n()+-*/%:, ", "n:,-/02", "".join(map(chr, range(32, 127))), "n0-():\u0663\u00b2\uff4e\U0001d7d9\ud800\x00")
    for k in range(100_000):
        text, n = (
            "".join(dice.choices(alphabets[k % 4], k=dice.randrange(2 ** dice.randrange(8)))),
            dice.choice((0, 1, 5, 48, 2048)),
        )
        start = time.process_time()
        found = parsed(text, n) if len(text) <= LENGTH else None
        if len(text) > LENGTH:
            with pytest.raises(ValueError, match=f"at most {LENGTH} are allowed"):
                parse_index(text, n)
        longest = max(longest, time.process_time() - start)
        assert found is None or (set(found) <= set(range(n)) and len(set(found)) == len(found) > 0)
        answers += found is not None
    assert longest < 0.5
    assert answers > 1000


def test_indices_keep_their_order_without_duplicates():
    assert parse_index("3, 0, :2, -1", 5) == [3, 0, 1, 4]
    assert parse_index("::-1", 4) == [3, 2, 1, 0]
    assert parse_index(" all ", 3) == parse_index(":", 3) == [0, 1, 2]
    assert parse_index("n//3:", 9) == [3, 4, 5, 6, 7, 8]
    assert parse_index("-" * (LENGTH - 1) + "1", 3) == [2]


MALICIOUS = [
    "().__class__.__base__.__subclasses__()",
    "__import__('os').system('true')",
    "9**9**9",
    "9" * 50,
    "*".join(["999"] * 20),
    "n*n*n*n*n*n*n",
    "1" + "*9" * 49,
    "(" * 50 + "n" + ")" * 49,
    "(" * 150 + "n" + ")" * 150,
    "[0 for _ in iter(int, 1)]",
    "lambda: 0",
    "n.bit_length()",
    "n(0)",
    "n[0]",
    "0][0",
    "0) or (1",
    "0 if n else 1",
    "m",
    "nn",
    "True",
    "None",
    "1.0",
    "1e3",
    "1j",
    "0x1",
    "0b1",
    "1_0",
    "007",
    "'0'",
    "b'0'",
    "...",
    "n/2",
    "2**2",
    "+1",
    "~0",
    "1<<9",
    "n@n",
    "n==n",
    "(1,2)",
    "(1:2)",
    "()",
    "*n",
    "**n",
    "n:=3",
    "0;1",
    "0\n",
    "\t0",
    "0 # 1",
    "1 2",
    "٣",
    "\uff4e",
    "0,",
    ",0",
    "0,,1",
    "",
    " ",
    "1:2:3:4",
    "ALL",
    "all,0",
    "0, all",
]


@pytest.mark.parametrize("text", MALICIOUS)
def test_text_outside_the_grammar_raises(text):
    with pytest.raises(ValueError, match="with n = 5: "):
        parse_index(text, 5)


REASONS = {
    "5": "index '5' with n = 5: 5 is out of range; valid are -5 to 4",
    "0, n": "index '0, n' with n = 5: n is out of range; valid are -5 to 4",
    "5:": "index '5:' with n = 5: it selects nothing",
    "n//(n-5)": "index 'n//(n-5)' with n = 5: 'n//(n-5)' divides by zero",
    "n%0:": "index 'n%0:' with n = 5: 'n%0' divides by zero",
    "::0": "index '::0' with n = 5: the step of '::0' is 0",
    "9**9": "index '9**9' with n = 5: '9**9' is not an expression of integers and n",
    "0:999*999*2": f"index '0:999*999*2' with n = 5: '999*999*2' gives a number beyond {LARGEST:,}",
    "open": "index 'open' with n = 5: allowed are all, or integers, n, + - * // %, brackets, colons and commas",
    "1:2:3:4": "index '1:2:3:4' with n = 5: '1:2:3:4' has more colons than start:stop:step",
    "0,": "index '0,' with n = 5: a number or a slice is missing",
    "1," * 60: f"index '{'1,' * 50}...' with n = 5: it has 120 characters, at most 100 are allowed",
}


@pytest.mark.parametrize(("text", "words"), REASONS.items(), ids=[text[:12] for text in REASONS])
def test_an_error_repeats_the_text_and_n(text, words):
    with pytest.raises(ValueError) as caught:
        parse_index(text, 5)
    assert str(caught.value) == words


def test_zero_items_have_no_indices():
    for text in ("all", ":", "0", "-1", "n"):
        with pytest.raises(ValueError, match="with n = 0"):
            parse_index(text, 0)
