"""A table forms every sum and takes every decomposition once, however many metrics read it, and drops it afterwards."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from pandas.testing import assert_frame_equal
from threadpoolctl import threadpool_info
from torch import nn

import nodelens as nl
from nodelens.engine import analyze, estimate
from nodelens.engine.metric_sums import SharedSums
from nodelens.metrics import classes
from nodelens.statistics import Accumulator, Gram, Moments
from nodelens.statistics.base import derived

SPECTRA = ["effective_rank", "entropy_dimension", "stable_rank", "top_share", "component_count", "alpha_req", "participation_ratio"]
METRICS = [*SPECTRA, "total_correlation", "o_information", "multi_redundancy", "redundancy", "layer_redundancy", "synergy"]
PAIRS = ["cca_mean", "pwcca", "linear_cka", "feature_subspace_novelty", "subspace_overlap", "energy_novelty"]


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(96, 6).double(), torch.randint(3, (96,))
    return model, list(zip(x.split(24), y.split(24), strict=True))


def test_no_decomposition_is_taken_twice(case, monkeypatch):
    taken = Counter()

    def counted(library, name):
        solve = getattr(library, name)

        def solved(matrix, *arguments, **options):
            if len(matrix) > 3:  # not the logits, nor the layer that gives them
                taken[name.startswith("eig"), np.asarray(matrix).tobytes()] += 1
            return solve(matrix, *arguments, **options)

        return solved

    for library, name in ((torch.linalg, "eigh"), (np.linalg, "eigvalsh"), (torch.linalg, "cholesky_ex")):
        monkeypatch.setattr(library, name, counted(library, name))
    model, data = case
    result = nl.analyze(model, data, metrics=[*METRICS, *PAIRS], groups=4)
    assert result.layers["effective_rank"].notna().all()
    assert result.edges["cca_mean"].notna().all()
    assert len(taken) == 2 * 5 * 2  # covariances and correlations of two layers, from all samples and without each of 4 groups
    assert set(taken.values()) == {1}


def test_every_sum_is_formed_once_for_all_metrics(case, monkeypatch):
    formed = Counter()
    without = Accumulator.without

    def counted(self, group):
        formed[id(self), group] += 1
        return without(self, group)

    monkeypatch.setattr(Accumulator, "without", counted)
    nl.analyze(case[0], case[1], metrics=METRICS, groups=4)
    assert formed
    assert set(formed.values()) == {1}


def test_norms_of_weights_are_taken_once_for_all_metrics_and_groups(case, monkeypatch):
    taken, double = Counter(), torch.Tensor.double
    places = {layer.weight.data_ptr() for layer in case[0] if isinstance(layer, nn.Linear)}
    metrics, make = ["rayleigh_quotient", "conditional_rayleigh_quotient", "delta_rq"], analyze.make_table

    def counted(*arguments):
        monkeypatch.setattr(torch.Tensor, "double", lambda x: taken.update({x.data_ptr()} & places) or double(x))
        return make(*arguments)

    monkeypatch.setattr(analyze, "make_table", counted)
    nl.analyze(case[0], case[1], metrics=metrics, groups=4)
    assert dict(taken) == dict.fromkeys(places, 1)


def test_a_part_of_a_composite_is_not_binned_again(case, monkeypatch):
    binned = Counter()
    information = classes.binned_information

    def counted(rows, *arguments):
        binned[rows.numpy().tobytes()] += 1
        return information(rows, *arguments)

    monkeypatch.setattr(classes, "binned_information", counted)
    nl.analyze(case[0], case[1], metrics=["class_mutual_information", "composite_importance"], groups=4)
    assert len(binned) == 3 * 5  # all samples, and those without each of 4 groups, at three layers
    assert set(binned.values()) == {1}


def blas_threads():
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]


def test_each_thread_computes_on_its_own():
    before, threads, seen = blas_threads(), torch.get_num_threads(), {}
    try:
        estimate._in_threads(lambda item: seen.update({item: (torch.get_num_threads(), {*blas_threads()})}), [None, 0, 1], 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen == dict.fromkeys([None, 0, 1], (1, {1}))
    assert blas_threads() == before


def test_an_error_of_one_item_is_raised_and_ends_the_others():
    begun, failed = [], threading.Event()

    def function(item):
        begun.append(item)
        if item == 0:
            failed.set()
            raise IndexError("of the item")
        failed.wait(60)
        time.sleep(0.001)

    threads = torch.get_num_threads()
    try:
        with pytest.raises(IndexError, match="of the item"):
            estimate._in_threads(function, range(1000), 2)
    finally:
        torch.set_num_threads(threads)
    assert len(begun) < 1000


def test_sums_are_dropped_after_the_last_metric_that_reads_them(case, monkeypatch):
    held = []
    release = SharedSums.release

    def counted(self, read):
        release(self, read)
        held.append(len({key for key, value in self._formed.items() if isinstance(value, Gram)}))

    monkeypatch.setattr(SharedSums, "release", counted)
    nl.analyze(case[0], case[1], metrics=METRICS, groups=4)
    assert max(held) <= 2  # all positions and whole samples of one layer
    assert held[-1] == 0


def test_the_table_does_not_depend_on_the_number_of_threads(case):
    before = torch.get_num_threads()
    tables = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            tables.append(nl.analyze(case[0], case[1], metrics=[*METRICS, *PAIRS], groups=4))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*((t.units, t.layers, t.edges) for t in tables), strict=True):
        assert_frame_equal(one, other, rtol=1e-9)


def test_what_is_derived_does_not_outlive_the_sums_it_was_derived_from():
    @derived
    def mean(statistic):
        return statistic.mean.clone()

    accumulator = Accumulator(Moments)
    accumulator.add(Moments.of(torch.ones(4, 2)))
    part = accumulator.parts[0]
    assert mean(part) is mean(part)
    assert mean(part).tolist() == [1, 1]
    assert "_derived" not in accumulator.value.__dict__  # a copy, even of a single part
    accumulator.add(Moments.of(torch.zeros(4, 2)))
    assert mean(accumulator.parts[0]).tolist() == [0.5, 0.5]
