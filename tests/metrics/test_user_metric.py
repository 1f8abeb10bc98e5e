"""A metric as a user writes one: a class in a package of their own, a YAML file in a folder of their own; or a name at run time."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest
import torch
from command import command
from ids import label
from torch import nn

import nodelens as nl
from nodelens.app.config import load_config
from nodelens.metrics import Metric, Need, get_metric, list_metrics, register_metric, registry
from nodelens.statistics import Gram, Moments

ROOT = Path(__file__).parents[2]
CODE = '''
from dataclasses import dataclass
from typing import ClassVar

from nodelens.metrics import Metric, Need
from nodelens.statistics import Moments


@dataclass(frozen=True)
class Snr(Metric):
    """Mean over standard deviation of a unit's activation."""

    names: ClassVar = ("snr",)
    nan: ClassVar = "a unit that does not vary"
    power: float = 1.0

    def needs(self):
        return {"y": Need(Moments, "output")}

    def __call__(self, weight, y):
        return (y.mean / y.variance.sqrt()) ** self.power
'''
FILE = "snr:\n  _target_: PACKAGE.metrics.Snr\n  power: 1.0\n"
SMALL = ("dataset.calibration=64", "hydra.run.dir=run", "layers=[fc1]")


@pytest.fixture
def own(quiet_home, monkeypatch):
    """A working folder with a package and a folder of YAML files; nothing of nodelens is touched."""
    name = f"package_of_{quiet_home.name}"  # modules of an earlier test stay in this process
    (quiet_home / name).mkdir()
    (quiet_home / name / "__init__.py").touch()
    (quiet_home / name / "metrics.py").write_text(CODE)
    (quiet_home / "my conf/metrics").mkdir(parents=True)
    (quiet_home / "my conf/metrics/snr.yaml").write_text(FILE.replace("PACKAGE", name))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return quiet_home


def columns(folder):
    units = pd.read_parquet(folder / "run/units.parquet")
    assert units["snr"].notna().any()
    return [c for c in units.columns if c.startswith(("snr", "rq"))]


PLACES = [("--config-dir", "my conf"), ("hydra.searchpath=['file://my conf']",), ("hydra.searchpath=['my conf']",)]


@pytest.mark.parametrize("place", PLACES, ids=" ".join)
def test_it_runs_from_the_command_line(own, place):
    ended = command("analyze", *place, "metrics=[rq,snr]", "metrics.snr.power=2.0", *SMALL)
    assert ended.code == 0, ended.err
    assert columns(own) == ["rq", "rq_se", "snr", "snr_se"]


def test_a_folder_on_the_flag_and_one_on_the_path_are_both_seen(own):
    (own / "more/metrics").mkdir(parents=True)
    (own / "more/metrics/mine.yaml").write_text("defaults: [rq]\n")
    ended = command("analyze", "--config-dir", "more", "hydra.searchpath=['file://my conf']", "metrics=[mine,snr]", *SMALL)
    assert ended.code == 0, ended.err
    assert columns(own) == ["rq", "rq_se", "snr", "snr_se"]


def test_it_runs_in_a_process_of_its_own_started_in_the_folder(own):
    words = ["analyze", "--config-dir", "my conf", "metrics=[snr]", *SMALL]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = "from nodelens.app.cli import script; script()"  # the console script: no folder on the path
    ended = subprocess.run(
        [sys.executable, "-P", "-c", script, *words], cwd=own, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == "", "no warning of a package, on the way in or out"
    assert columns(own) == ["snr", "snr_se"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hydra.searchpath=[file://nowhere]", "metrics=[snr]"], "hydra.searchpath: no folder at "),
        (["hydra.searchpath=[pkg://nowhere.conf]", "metrics=[snr]"], "hydra.searchpath: no folder at pkg://nowhere.conf"),
        (["hydra.searchpath=['file://my conf']", "metrics=[snrr]"], "metrics: no option 'snrr'. Did you mean 'snr'?"),
        (["--config-dir", "my conf", "metrics=[snr]", "metrics.snr.power=much"], "metrics.snr.power is 'much'"),
        (["metrics=[snr]"], "metrics: no option 'snr'"),
        (["metrics=[snr]"], " more, which --help lists"),
    ],
    ids=label,
)
def test_a_mistake_is_a_line(own, words, said):
    ended = command("analyze", *words, *SMALL)
    assert ended.code == 1
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert said in ended.err


def test_a_notebook_finds_it_by_the_same_words(own):
    cfg = load_config("analyze", ["hydra.searchpath=['file://my conf']", "metrics=[snr]"])
    assert list(cfg.metrics) == ["snr"]


def spread(**more):
    """A class as a notebook's cell defines it, each time anew."""

    @dataclass(frozen=True)
    class Spread(Metric):
        """Standard deviation of a unit, times a factor."""

        names: ClassVar = ("mine", "my_spread")
        presets: ClassVar = {"mine_twice": {"factor": 2.0}}
        nan: ClassVar = "fewer than two rows"
        factor: float = 1.0

        def needs(self):
            return {"y": Need(Moments, "output")}

        def __call__(self, weight, y):
            return self.factor * y.variance.sqrt()

    for name, value in more.items():
        setattr(Spread, name, value)
    return Spread


@dataclass(frozen=True)
class Trace(Metric):
    """Summed variance of a layer's units."""

    names: ClassVar = ("my_trace",)
    kind: ClassVar = "layer"

    def needs(self):
        return {"y": Need(Gram, "output")}

    def __call__(self, weight, y):
        return y.covariance.trace()


@pytest.fixture
def names(monkeypatch):
    """The catalogue's names, which are as before when a test ends."""
    monkeypatch.setattr(registry, "_BY_NAME", dict(registry._BY_NAME))


def test_a_metric_is_known_by_name_once_it_is_registered(names):
    with pytest.raises(ValueError, match="no metric is called 'mine'"):
        get_metric("mine")
    kind = spread()
    assert register_metric(kind) is kind, "a decorator gives back what it takes"
    assert {"mine", "my_spread", "mine_twice"} <= set(list_metrics())
    assert get_metric("mine") == kind()
    assert get_metric("mine_twice", factor=3.0) == kind(3.0)
    batches = [torch.randn(40, 3, generator=torch.Generator().manual_seed(0))]
    composed = get_metric("composite", weights={"mine": 1.0}, normalize="none", log=())
    net = nn.Sequential(nn.Linear(3, 4))
    units = nl.analyze(net, batches, {**dict.fromkeys(["mine"], get_metric("mine")), "sum": composed}).units
    again = nl.analyze(net, batches, ["mine", "mine_twice", "activation_variance"]).units
    assert again["mine"].to_numpy() == pytest.approx(again["activation_variance"].pow(0.5).to_numpy(), rel=1e-12)
    assert (again["mine_twice"] == 2 * again["mine"]).all()
    assert units["sum"].to_numpy() == pytest.approx(again["mine"].to_numpy())
    assert "mine_se" in again


def test_an_object_brings_its_options_along_under_names_of_its_own(names):
    register_metric(get_metric("rq", relative=False), "rq_raw", "rq_plain")
    assert get_metric("rq_plain") == get_metric("rq", relative=False)
    assert get_metric("rq") == get_metric("rayleigh_quotient", relative=True)


def test_the_geometry_of_a_language_model_takes_it_too(names):
    from transformers import LlamaConfig, LlamaForCausalLM

    register_metric(Trace)
    register_metric(get_metric("total_correlation", shrinkage="schaefer_strimmer"), "shrunk")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": None}
    net = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes, **ids)).eval()
    tokens = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))
    found = nl.analyze_model(model=net, dataloader=[{"input_ids": tokens}], metrics=["my_trace", "shrunk"])
    assert found.metrics["my_trace"].gt(0).all()
    assert found.metrics["shrunk"].notna().all()


def test_a_cell_may_run_twice_and_the_later_class_counts(names):
    register_metric(spread())
    later = spread(nan="never")
    register_metric(later)
    assert type(get_metric("mine")) is later


@pytest.mark.parametrize(
    ("register", "said"),
    [
        (
            lambda: register_metric(spread(), "rq"),
            "metric name 'rq' of .*Spread is taken: nodelens.metrics.alignment.RayleighQuotient",
        ),
        (lambda: register_metric(Trace, "mine"), "metric name 'mine' of .*Trace is taken: .*Spread has it"),
        (
            lambda: register_metric(get_metric("rq", relative=False)),
            "metric name .* of nodelens.metrics.alignment.RayleighQuotient is",
        ),
        (lambda: register_metric(spread(names=())), r"Spread has no name: give its class names = \('mine',\)"),
        (lambda: register_metric(print), "register_metric takes a Metric, its class or an object, not <built-in function print>"),
        (lambda: register_metric(Moments), "register_metric takes a Metric"),
        (lambda: register_metric(Needy, "needy"), "metric 'needy' of .*Needy cannot be made without options"),
    ],
    ids=["builtin", "another's", "its own", "no name", "a function", "a statistic", "an option without a default"],
)
def test_what_cannot_be_registered_changes_nothing(names, register, said):
    register_metric(spread())
    before = list_metrics()
    with pytest.raises(ValueError, match=said):
        register()
    assert list_metrics() == before


@dataclass(frozen=True)
class Needy(Metric):
    """An option without a default."""

    power: float
