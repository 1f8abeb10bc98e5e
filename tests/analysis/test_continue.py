"""Analyses that are stopped in the middle continue from what was done, and find what undisturbed ones do."""

import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from families import build as build_family
from nets import Mixed, build, images
from nets import batches as in_batches
from torch import nn

import nodelens as nl
from nodelens.analysis.modularity.layer_modules import Search
from nodelens.engine.signals import StoppedError

STOPPED = r"stopped by SIGTERM: the sums of \d+ batches of this reading of the data are saved in"


class Stream:
    """Batches that can be read several times. At one of them this process sends itself a signal."""

    def __init__(self, data, at=None):
        self.data, self.at, self.read = data, at, 0

    def __iter__(self):
        for batch in self.data:
            self.read += 1
            if self.read == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def language_model(family="llama 8/4"):
    return build_family(family)[0]


def tokens(n=6, length=7):
    g = torch.Generator().manual_seed(0)
    every = [torch.randint(3, 30, (2, length), generator=g) for _ in range(n)]
    return [{"input_ids": ids, "labels": ids} for ids in every]


def counted(model):
    """A list that grows by one with each batch the model runs on."""
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def equal(one, other):
    """All tables of two results, to the bit."""
    first, second = one.tables(), other.tables()
    assert first.keys() == second.keys()
    for name, table in first.items():
        pd.testing.assert_frame_equal(table, second[name], check_exact=True, obj=name)


LANGUAGE = {
    "supernodes": {"draws": 3, "groups": 4, "resamples": 3, "ablate": 2},
    "geometry": {"max_tokens": 70, "sample_limit": 16, "metrics": ["spectrum", "sample", "novelty"]},
}


@pytest.mark.parametrize(
    ("name", "at"),
    [("supernodes", 16), *(pytest.param("supernodes", at, marks=pytest.mark.slow) for at in (4, 10)), ("geometry", 4)],
)
def test_passes_of_language_models_continue_to_the_bit(name, at, tmp_path):
    """Supernodes read the data twice and once more for ablation; the first reading of a batch is for the plan."""
    analysis, model = nl.get_analysis(name, **LANGUAGE[name]), language_model()
    calls = counted(model)
    whole = analysis(model, Stream(tokens()))
    every = len(calls)
    with pytest.raises(StoppedError, match=STOPPED):
        analysis(model, Stream(tokens(), at), save_to=tmp_path)
    calls.clear()
    found = analysis(model, Stream(tokens()), save_to=tmp_path)
    equal(found, whole)
    assert len(calls) < every, "batches in the sums are not run again"


def test_routers_continue(tmp_path):
    analysis, model = nl.get_analysis("geometry", metrics=["router"]), language_model("mixtral")
    whole = analysis(model, Stream(tokens()))
    with pytest.raises(StoppedError, match=STOPPED):
        analysis(model, Stream(tokens(), 4), save_to=tmp_path)
    equal(analysis(model, Stream(tokens()), save_to=tmp_path), whole)


@pytest.fixture(scope="module")
def network():
    return build(Mixed), in_batches(*images(), 16)


def measured(network, analysis, at=None, **options):
    model, data = network
    return nl.analyze(model, Stream(data, at), ["taylor"], ["stem", "point"], analysis=analysis, **options)


@pytest.mark.parametrize("name", ["halo", "cascade"])
def test_readings_of_networks_continue_to_the_bit(name, network, tmp_path):
    options = {"halo": {"permutations": 9, "column": "taylor", "top": 0.2}, "cascade": {"by": "taylor", "draws": 2, "counts": (1,)}}
    analysis = nl.get_analysis(name, **options[name])
    whole = measured(network, {name: analysis})
    reads = Stream(network[1])
    nl.analyze(network[0], reads, ["taylor"], ["stem", "point"])
    with pytest.raises(StoppedError, match=STOPPED):
        measured(network, {name: analysis}, reads.read + 5, save_to=tmp_path)
    assert list((tmp_path / name).rglob("*.pt"))
    equal(measured(network, {name: analysis}, save_to=tmp_path).analyses[name], whole.analyses[name])


def test_modules_that_were_found_are_not_sought_again(network, tmp_path, monkeypatch):
    analysis = nl.get_analysis("modularity", associations="redundancy", shuffles=2, starts=1)
    whole = measured(network, analysis)
    sought, seek = [], Search.__call__

    def stopped(self, association, rng):
        sought.append(len(association))
        if len(sought) == 2:
            raise KeyboardInterrupt
        return seek(self, association, rng)

    monkeypatch.setattr(Search, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        measured(network, analysis, save_to=tmp_path)
    found = measured(network, analysis, save_to=tmp_path)
    assert len(sought) == 3, "the first layer was not sought again"
    equal(found.analyses["modularity"], whole.analyses["modularity"])
    for key, picture in whole.analyses["modularity"].matrices.items():
        np.testing.assert_array_equal(found.matrices[key], picture)
    other = nl.get_analysis("modularity", associations="redundancy", shuffles=3, starts=1)
    measured(network, other, save_to=tmp_path)
    assert len(sought) == 5, "other options are other work"


def test_stability_that_was_found_is_not_sought_again(network, tmp_path, monkeypatch):
    from nodelens.analysis.clusters import clusters_analysis

    analysis = nl.get_analysis("clusters", columns=["taylor"], n_clusters=2, draws=3)
    whole = measured(network, analysis, save_to=tmp_path)
    monkeypatch.setattr(clusters_analysis, "stability", None)
    equal(measured(network, analysis, save_to=tmp_path).analyses["clusters"], whole.analyses["clusters"])


def test_other_data_are_refused(tmp_path):
    analysis, model = nl.get_analysis("geometry", metrics=["spectrum"]), language_model()
    with pytest.raises(StoppedError):
        analysis(model, Stream(tokens(), 4), save_to=tmp_path)
    with pytest.raises(
        ValueError, match=r"holds the sums of \d batches, but the data do not begin with these batches: give the same"
    ):
        analysis(model, tokens()[::-1], save_to=tmp_path)
    with pytest.raises(ValueError, match="but the data do not begin with these batches"):
        analysis(model, tokens(1), save_to=tmp_path)


def test_sums_are_saved_every_so_many_minutes(tmp_path, network):
    """Without a signal: the process is killed, here by an error that nobody expects."""
    analysis, model = nl.get_analysis("geometry", metrics=["spectrum"]), language_model()
    whole, broken = analysis(model, tokens()), [*tokens()[:4], {"input_ids": "text"}]
    with pytest.raises((ValueError, TypeError, AttributeError)):
        analysis(model, broken, save_to=tmp_path, save_minutes=0)
    calls = counted(model)
    equal(analysis(model, tokens(), save_to=tmp_path, save_minutes=0), whole)
    assert len(calls) == 4, "two for the dry run, and two batches that were not in the sums"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({"by": "rq"}, {"by": "taylor"}, marks=pytest.mark.slow),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, {"loss": nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.3)}),
        ({"how": "zero"}, {"how": "mean"}),
    ],
    ids=["ranking", "loss", "replacement"],
)
def test_other_work_in_the_same_folder_is_not_continued(first, second, network, tmp_path):
    def found(options, folder=None):
        own = {"draws": 2, "counts": (1,), "by": "rq"} | options
        loss = {"loss": own.pop("loss")} if "loss" in own else {}
        analysis = {"cascade": nl.get_analysis("cascade", **own)}
        metrics, layers = ["rq", "taylor"], ["stem", "point"]
        return nl.analyze(*network, metrics, layers, analysis=analysis, save_to=folder, **loss).analyses["cascade"]

    found(first, tmp_path)
    assert list((tmp_path / "cascade").rglob("*.pt"))
    equal(found(second, tmp_path), found(second))
