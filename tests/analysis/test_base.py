"""What all analyses have in common."""

from dataclasses import dataclass

import pytest
from torch import nn

import nodelens as nl
from nodelens.analysis.base import Analysis, AnalysisCall


@dataclass(frozen=True)
class Seen(Analysis):
    """Returns what it is called with."""

    def run(self, model, data, call):
        return model, data, call


def test_losses_are_measured_on_the_data_unless_there_is_an_evaluation_split():
    _, data, call = Seen()(nn.Identity(), [1])
    assert (call.evaluation, call.seed, call.objective) == (data, 0, {})
    call = Seen()(nn.Identity(), [1], evaluation=[2], seed=3, task="classification")[2]
    assert (call.evaluation, call.seed, call.objective) == ([2], 3, {"task": "classification"})


def test_an_analysis_needs_no_metrics_unless_it_says_so():
    assert Seen().required_metrics() == {}


def test_measured_units_that_are_not_there_name_the_analysis():
    with pytest.raises(ValueError, match=r"^Seen reads what a run has measured: run it by nl.analyze\(model, data, metrics, "):
        AnalysisCall("Seen", []).measured  # noqa: B018


@pytest.mark.parametrize("name", ["cascade", "clusters", "halo", "modularity", "supernode_lesions", "validity"])
def test_analyses_of_measured_units_say_so(name):
    with pytest.raises(ValueError, match=r"(Analysis|Lesions) reads what a run has measured"):
        nl.get_analysis(name)(nn.Linear(2, 2), [])


def test_every_analysis_is_one():
    assert all(isinstance(nl.get_analysis(name), Analysis) for name in nl.list_analyses())


def test_an_analysis_without_run_is_none():
    with pytest.raises(NotImplementedError):
        Analysis()(nn.Identity())


def test_an_option_that_a_call_does_not_have_is_named():
    with pytest.raises(TypeError, match=r"^Seen has no option 'los'. Did you mean 'loss'\? Options are task, output, loss"):
        Seen()(nn.Identity(), [1], los=None)
