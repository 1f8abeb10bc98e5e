"""Whatever fine-tuning draws follows the seed of its cell, and nothing of the caller's is left changed."""

import os
import random

import numpy as np
import pandas as pd
import pytest
import torch
from command import command
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import nodelens as nl
from nodelens.data import Digits
from nodelens.network.batch import Batch
from nodelens.pruning.context import PruningContext
from nodelens.pruning.sweep.sweep import Sweep, cells
from nodelens.training.loader_order import seeded_order, set_epoch


def network(dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 10))


@pytest.fixture(scope="module")
def digits():
    data = Digits()
    data.setup()
    return data


def flat(pruned):
    return torch.cat([p.detach().flatten() for p in pruned.model.parameters()])


def pairs(digits):
    whole = next(iter(digits.loader("train", batch_size=2000)))
    return TensorDataset(whole.x, whole.y)


def with_generator(digits):
    return DataLoader(pairs(digits), batch_size=100, shuffle=True, generator=torch.Generator().manual_seed(5))


def with_global_state(digits):
    return DataLoader(pairs(digits), batch_size=100, shuffle=True)


def with_sampler(digits):
    data = pairs(digits)
    return DataLoader(data, batch_size=100, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(5)))


def with_workers(digits):
    return DataLoader(pairs(digits), batch_size=100, shuffle=True, num_workers=1)


def of_nodelens(digits):
    return digits.train_dataloader()


LOADERS = [of_nodelens, with_generator, with_global_state, with_sampler, with_workers]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("make", LOADERS, ids=lambda make: make.__name__)
def test_three_seeds_give_three_results_and_each_of_them_again(make, digits):
    loader = make(digits)

    def tuned(seed):
        tune = nl.Finetune(loader, digits.loader("val"), epochs=2, lr=0.05)
        return nl.prune(network(), "magnitude", 0.5, example_inputs=torch.rand(2, 1, 8, 8), finetune=tune, seed=seed)

    first, *others, again = (flat(tuned(seed)) for seed in (0, 1, 2, 0))
    assert torch.equal(first, again), "whatever was read before"
    assert not any(torch.equal(first, other) for other in others)
    assert not torch.equal(*others)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_dropout_follows_the_seed_where_the_order_is_given(digits):
    batches = list(digits.loader("train"))

    def tuned(seed, own=None):
        tune = nl.Finetune(batches, digits.loader("val"), epochs=2, lr=0.05, seed=own)
        pruned = nl.prune(network(0.3), "magnitude", 0.5, example_inputs=torch.rand(2, 1, 8, 8), finetune=tune, seed=seed)
        assert pruned.finetuned["best_epoch"] > 0, "not the weights before training"
        return flat(pruned)

    assert torch.equal(tuned(0), tuned(0))
    assert not torch.equal(tuned(0), tuned(1))
    assert torch.equal(tuned(0, own=7), tuned(1, own=7)), "a seed of its own stays"


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_global_states_and_those_of_the_loader_are_given_back(digits):
    loader, data = with_generator(digits), with_global_state(digits)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), dict(os.environ)
    states = loader.generator.get_state()
    tune = nl.Finetune(loader, digits.loader("val"), epochs=1)
    nl.prune(network(0.5), "random", 0.5, data=data, finetune=tune, seed=3, compensate="bias")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist(), dict(os.environ)) == before[1:]
    assert torch.equal(loader.generator.get_state(), states)


def test_called_alone_it_leaves_global_states_too():
    """A shuffled loader draws a seed whenever it is read, for validation as well."""
    data = TensorDataset(torch.randn(12, 64), torch.randint(10, (12,)))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    tune, net = nl.Finetune(loader, loader, epochs=1), network(0.5)
    before = torch.get_rng_state(), np.random.get_state()[1:3], random.getstate()
    tune(net, lambda model: None)
    after = torch.get_rng_state(), np.random.get_state()[1:3], random.getstate()
    assert torch.equal(after[0], before[0])
    assert after[1][1] == before[1][1]
    assert (after[1][0] == before[1][0]).all()
    assert after[2] == before[2]


def test_a_loader_continues_its_own_order_after_a_seeded_one(digits):
    own, order = digits.train_dataloader(), []
    for k in range(2):
        set_epoch(own, k)
        order.append([batch.ids.tolist() for batch in own])
    loader = digits.train_dataloader()
    assert [batch.ids.tolist() for batch in loader] == order[0]
    with seeded_order(loader, 9):
        assert [batch.ids.tolist() for batch in loader] not in order
    assert [batch.ids.tolist() for batch in loader] == order[1]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_a_cell_of_a_sweep_does_not_depend_on_the_cells_before_it(digits, tmp_path):
    context = PruningContext.of(network(0.3), Batch.of(torch.rand(2, 1, 8, 8)))
    tune = nl.Finetune(with_generator(digits), digits.loader("val"), epochs=1, lr=0.05)

    def total(pruned):
        return {"total": float(flat(pruned).double().sum())}

    def run(folder, seeds):
        todo = cells(criterion=[nl.Criterion.of("magnitude")], amount=[0.5], seed=seeds)
        table = context.table([todo[0].options.criterion])
        evaluate = lambda pruned: {"accuracy": float(flat(pruned).double().sum())}  # noqa: E731
        return {
            row["seed"]: row["result"]["accuracy"]
            for row in Sweep(folder, context, table, evaluate, finetune=lambda _: tune).run(todo)
        }

    whole = run(tmp_path / "whole", [0, 1, 2])
    assert len(set(whole.values())) == 3
    assert run(tmp_path / "two", [2, 1]) == {seed: whole[seed] for seed in (1, 2)}


def test_seeds_reach_fine_tuning_on_the_command_line(quiet_home):
    words = ("criterion=[magnitude]", "amounts=[0.5]", "finetune=default", "finetune.epochs=1", "dataset.calibration=64")
    words += ("latency.batches=[]", "logger=none", "save=none")
    for run, seeds in (("three", "[0,1,2]"), ("one", "[2]")):
        ended = command("prune", *words, f"seeds={seeds}", f"hydra.run.dir={run}")
        assert ended.code == 0, ended.err
    three, one = (pd.read_parquet(f"{run}/sweep.parquet").set_index("seed") for run in ("three", "one"))
    assert three["loss"].nunique() == 3
    assert three["plan"].nunique() == 1, "the same units are removed"
    assert three.loc[2, "loss"] == one.loc[2, "loss"]


def test_data_that_are_none_or_empty_are_named():
    for name in ("train", "val"):
        for given, message in (
            (None, f"takes batches as {name}, a loader or a list, and not None"),
            ([], f"read: {name} is empty"),
        ):
            with pytest.raises(ValueError, match=message):
                nl.Finetune(**{"train": [1], "val": [1]} | {name: given})
