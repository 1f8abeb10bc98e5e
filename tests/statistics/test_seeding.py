import random

import numpy as np
import pytest
import torch

from nodelens.statistics.seeding import seed_of, seeded


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_draws_follow_the_key_and_the_global_states_continue_as_if_nothing_was_drawn():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = [draws() for _ in range(2)]
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    found = [draws()]
    with seeded(0, "a"):
        inside = draws()
        with seeded(0, "a"):
            assert draws() == inside
        after = draws()
    with pytest.raises(AssertionError), seeded(0, "b"):
        assert {*draws()} & {*inside}, "another key, other draws"
    found.append(draws())
    assert found == expected
    with seeded(0, "a"):
        assert [draws(), draws()] == [inside, after], "the inner block left the outer one alone"


def test_keys_with_equal_sums_or_joins_have_other_seeds():
    keys = [(seed, "epoch", epoch) for seed in range(30) for epoch in range(30)] + [(1, 23), (12, 3), ("1", 23)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert all(0 <= seed_of(*key) < 2**63 for key in keys)
