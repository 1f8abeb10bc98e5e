"""What a value is: equal for equal settings, different for what computes something else, however deep that lies."""

import torch

from nodelens.engine.identity import identity


class Holder:
    def __init__(self, value):
        self.value = value


def nested(value, levels):
    for _ in range(levels):
        value = [value]
    return value


def recursive(step):
    def count(n):
        return 0 if n == 0 else count(n - 1) + step

    return count


def unset():
    def early():
        return late

    found = identity(early)
    late = 3
    return found, identity(early)


def test_values_below_many_levels_are_told_apart():
    assert identity(nested(1, 20)) == identity(nested(1, 20)) != identity(nested(2, 20))
    assert identity(nested([1], 40)) != identity(nested([2], 40))
    assert identity(nested([1], 40)) != identity(nested([1], 40))  # unknown is not equal


def test_a_function_that_calls_itself_is_known_by_what_it_closes_over():
    assert identity(recursive(1)) == identity(recursive(1)) != identity(recursive(2))


def test_objects_that_hold_each_other_are_known_by_what_they_hold():
    def ring(number):
        first, second = Holder(torch.tensor(number)), Holder(None)
        first.other, second.other = second, first
        return first

    assert identity(ring(1)) == identity(ring(1)) != identity(ring(2))


def test_a_variable_without_a_value_yet_is_told_apart():
    before, after = unset()
    assert before != after
