"""Hashes of samples: those of SplitMix64, whatever the number of samples, their layout or the memory that they stand in."""

import pytest
import torch

from nodelens.statistics.sample_hash import content_hashes, generator, mix

ALL_BITS = 2**64 - 1


def splitmix(state):
    """The output function of SplitMix64 in Python's integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & ALL_BITS
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & ALL_BITS
    return state ^ (state >> 31)


def mixed(*parts):
    state = 0
    for part in parts:
        state = splitmix((state + part + 0x9E3779B97F4A7C15) & ALL_BITS)
    return state & (2**63 - 1)


def test_numbers_are_those_of_splitmix64():
    rows, columns = torch.arange(5)[:, None] - 2, torch.arange(7) * 10**17
    expected = [[mixed(int(a), int(b), 3) for b in columns] for a in rows]
    assert mix(rows, columns, 3).tolist() == expected
    assert mix(columns[:, None], rows.T, 3).T.shape == (5, 7)
    assert int(mix(4, 5)) == mixed(4, 5)


def test_contents_are_the_sum_of_the_scrambled_entries():
    x = torch.randint(-9, 9, (3, 4), generator=torch.Generator().manual_seed(0))
    sums = [sum(splitmix((int(v) + mixed(k)) & ALL_BITS) for k, v in enumerate(row)) & ALL_BITS for row in x]
    assert content_hashes(x).tolist() == [mixed(each) for each in sums]


def test_a_sample_has_the_same_hash_alone_and_among_many_in_any_layout():
    x = torch.randn(100, 3, 40, 30, generator=torch.Generator().manual_seed(0))
    found = content_hashes(x)
    assert len(found.unique()) == 100
    assert torch.equal(content_hashes(x.to(memory_format=torch.channels_last)), found)
    assert torch.equal(content_hashes(x.flip(0)).flip(0), found)
    assert torch.equal(torch.cat([content_hashes(each[None]) for each in x[:5]]), found[:5])
    assert content_hashes(x[:0]).shape == (0,)


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1], ids=str)
def test_generators_are_seeded_by_the_hash_of_seed_and_names(seed):
    words = [4, int.from_bytes(b"conv"), 9, int.from_bytes(b"layer1."), int.from_bytes(b"ab")]
    assert generator(seed, "conv", "layer1.ab").initial_seed() == mixed(seed, *words) == int(mix(seed, *words))
