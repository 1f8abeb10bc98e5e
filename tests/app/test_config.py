import copy
import dataclasses
import re
import tomllib
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from hydra.core.config_store import ConfigStore
from ids import label
from omegaconf import OmegaConf

import nodelens as nl
from nodelens.app import renamed
from nodelens.app.checks import check
from nodelens.app.class_source import read_classes
from nodelens.app.config import CONF, TASKS, build, resolved
from nodelens.app.entries import from_registry, from_source
from nodelens.app.renamed import RENAMED
from nodelens.engine.members import of_groups_only
from nodelens.engine.validation import in_bytes
from nodelens.metrics import METRICS, get_metric

ROOT = Path(__file__).parents[2]
GROUPS = ("dataset", "model", "metrics", "trainer", "logger", "callbacks", "criterion", "experiment", "pruning", "paths")
GROUPS += ("allocation", "schedule", "finetune")


def options(group):
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def tasks_with(group):
    return {
        "callbacks": ("train",),
        "criterion": ("prune",),
        "pruning": ("prune",),
        "allocation": ("prune",),
        "schedule": ("prune",),
        "finetune": ("prune",),
        "experiment": TASKS,
        "logger": ("train",),
        "trainer": ("train",),
    }.get(group, ("analyze",))


SETS = {"none", "default", "forward", "activation", "information", "scar", "spectrum", "normalization_ablation", "edges"}
WRITTEN = {"composite", "random", "scar_prot", "scar_conn", "supernode_protection_score", "supernode_connectivity_score"}
WRITTEN |= {"cluster_aware", "generalized_importance", "read_halo"}
ALONE = {"experiment", "pruning", "text"}  # groups and options that choose those of other groups


def chosen_together():
    """Tasks and options of their groups, each option at least once: composing takes a while."""
    for task in TASKS:
        groups = [[(group, option) for option in options(group)] for group in GROUPS if task in tasks_with(group)]
        yield from ((task, [choice]) for group in groups for choice in group if ALONE & {*choice})
        together = [[choice for choice in group if not ALONE & {*choice}] for group in groups]
        yield from ((task, [choice for choice in row if choice]) for row in zip_longest(*together))


EVERY = list(chosen_together())
MORE = {
    "custom": "model.net._target_=torch.nn.Identity",
    "dict": "allocation.dict.shares={fc1:0.5}",
    "npz": "dataset.path=somewhere",
    "imagefolder": "dataset.path=somewhere",
    "text": "model=tiny_lm",
    "causal_lm": "model.path=somewhere",
    "timm": "model.name=a_name",
    "torchvision": "model.name=a_name",
}


def test_every_option_of_every_task_is_among_them():
    wanted = {(task, group, option) for group in GROUPS for option in options(group) for task in tasks_with(group)}
    assert {(task, *choice) for task, choices in EVERY for choice in choices} == wanted


@pytest.mark.parametrize(("task", "choices"), EVERY, ids=[" ".join([t, *map("=".join, choices)]) for t, choices in EVERY])
def test_every_option_composes_and_fits_its_code(task, choices):
    more = [MORE[option] for _, option in choices if option in MORE]
    cfg = nl.load_config(task, [*map("=".join, choices), *more])
    for part in ("dataset", "model", "trainer", "metrics", "logger", "callbacks"):
        if part in cfg:
            check(resolved(cfg)[part], part)
    assert cfg.task == task


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18", "vit_tiny"])
def test_every_small_model_builds_for_the_data(name):
    module = build(nl.load_config("analyze", [f"model={name}"]).model, "model")
    assert module.net(torch.zeros(2, 1, 8, 8)) is not None
    assert isinstance(module.make_optimizer(module.parameters()), torch.optim.AdamW)


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_every_large_model_builds_without_its_weights(name):
    with torch.device("meta"):
        assert build(nl.load_config("analyze", [f"model={name}"]).model.net, "model.net")


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")  # which MLflow asks of SQLAlchemy 2.1
@pytest.mark.parametrize("name", options("logger"))
def test_every_logger_builds(name, quiet_home):
    if name in ("tensorboard", "mlflow"):
        pytest.importorskip(name)
    assert len(build(nl.load_config("train", [f"logger={name}"]).logger, "logger")) == (name != "none")


@pytest.mark.parametrize("name", options("callbacks"))
def test_every_callback_builds(name, quiet_home):
    found = build(nl.load_config("train", [f"callbacks={name}", "metrics=[rq,taylor]"]).callbacks, "callbacks")
    assert all(type(c).__mro__[-2].__name__ == "Callback" for c in found.values())


@pytest.mark.parametrize("name", ["cpu", "ddp", "debug", "default"])
def test_every_trainer_builds(name, quiet_home):
    assert build(nl.load_config("train", [f"trainer={name}"]).trainer, "trainer", logger=False).max_epochs in (1, 30)


@pytest.fixture(scope="module")
def every_metric():
    """The config in which all metrics are chosen at once; composing takes a while."""
    return nl.load_config("analyze", [f"metrics=[{','.join(nl.list_metrics())}]"])


@pytest.mark.parametrize("name", nl.list_metrics())
def test_a_metric_entry_says_what_its_class_says(every_metric, name):
    node = resolved(every_metric)["metrics"][name]
    metric = build(node, f"metrics.{name}")
    assert metric == get_metric(name)
    assert set(node) - {"_target_"} == {f.name for f in dataclasses.fields(metric) if f.init}


def test_there_is_an_entry_for_every_metric_and_a_criterion_for_every_metric_of_units():
    assert not SETS & set(nl.list_metrics()), "a set that is called like a metric would hide it"
    assert set(options("metrics")) == SETS, "a file that repeats a class"
    assert set(from_registry()["metrics"]) == set(nl.list_metrics())
    of_units = {name for name in nl.list_metrics() if get_metric(name).shape == "unit"}
    assert set(options("criterion")) == WRITTEN, "a file that repeats a class"
    assert set(from_registry()["criterion"]) == of_units
    assert len([*ROOT.glob("conf/**/*.yaml")]) <= 100


@pytest.mark.parametrize("group", ["metrics", "criterion"])
def test_what_is_read_from_the_source_is_what_the_registry_says(group):
    read, imported = from_source()[group], from_registry()[group]
    assert read == imported
    for name, node in imported.items():
        assert list(read[name]) == list(node), f"{name}: the order of the options"


def test_a_class_is_read_without_running_its_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import no_such_library\n"
        "_PRESETS = {'half': {'power': 0.5}}\n"
        "class Base(Metric):\n    names: ClassVar = ()\n    view: str = 'positions'\n    power: float = 1.0\n"
        "class Mine(Base):\n    names = ('mine', 'my')\n    presets: ClassVar = _PRESETS\n    kind: ClassVar = 'unit'\n"
        "    power: float = 2.0\n    eps: float = no_such_library.eps\n    parts: list = field(default_factory=lambda: [1])\n"
        "class Child(Mine):\n    extra: int = 3\n"
    )
    (mine,) = read_classes(tmp_path)
    assert mine.variables == {"names": ("mine", "my"), "presets": {"half": {"power": 0.5}}, "kind": "unit"}
    assert list(mine.fields.items()) == [("view", "positions"), ("power", 2.0), ("eps", "???"), ("parts", [1])]


CRITERIA = sorted({*from_registry()["criterion"], *options("criterion")})


@pytest.fixture(scope="module")
def every_criterion():
    return nl.load_config("prune", [f"criterion=[{','.join(CRITERIA)}]"])


def test_every_metric_and_every_criterion_can_be_chosen_at_once(every_metric, every_criterion):
    check(resolved(every_metric)["metrics"], "metrics")
    assert list(every_metric.metrics) == nl.list_metrics()
    controls = ["read_halo_control"]  # comes with read_halo
    assert [name for name in every_criterion.criterion if name not in controls] == CRITERIA
    assert {*controls} <= {*every_criterion.criterion}


@pytest.mark.parametrize("name", ["rq", "scar_prot", "composite", "redundancy"])
def test_a_criterion_that_is_chosen_alone_is_the_only_one(every_criterion, name):
    assert nl.load_config("prune", [f"criterion={name}"]).criterion == {name: every_criterion.criterion[name]}


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_reads_its_metric_and_says_which_way(every_criterion, name):
    terms = resolved(every_criterion)["criterion"][name]
    if name not in ("random", "composite", "cluster_aware", "generalized_importance", "read_halo"):
        terms = terms.get("terms", terms)
        assert set(terms) == {name}
        assert abs(terms[name]) == 1
        metric = get_metric(name).names[0]
        alike = any(word in metric for word in ("similarity", "redundancy", "node_correlation", "dot_product"))
        assert terms[name] == (-1 if alike or "zero_fraction" in name else 1)


OLD = [
    ("analyze", "plan_only=true", "dry_run", True),
    ("prune", "plan_only=true", "dry_run", True),
    ("analyze", "forecast.devices=8", "cost.devices", 8),
    ("analyze", "++forecast.memory=80GB", "cost.memory", "80GB"),
    ("train", "wide=sample:8", "covariance", "sample:8"),
    ("analyze", "budget.passes=4", "budget.max_passes", 4),
    ("prune", "recover=finetune", "finetune.epochs", 5),
    ("prune", "recover=none", "finetune", {}),
    ("prune", "inexact=true", "allow_approximate", True),
    ("prune", "axes=[{name: a}]", "custom_groups", [{"name": "a"}]),
]


@pytest.mark.parametrize(("task", "old", "new", "value"), OLD, ids=[f"{task} {old}" for task, old, *_ in OLD])
def test_an_old_key_works_and_a_warning_names_the_new_one(task, old, new, value):
    key = next(key for key in RENAMED if re.match(rf"\+*{key}[.=]", old))
    now = RENAMED[key]
    with pytest.warns(FutureWarning, match=f"^{key} is now called {now}; the old key works in this version only$"):
        cfg = nl.load_config(task, [old])
    assert OmegaConf.select(cfg, new) == value


def test_an_option_of_a_metric_is_renamed_where_the_metric_has_the_new_one(monkeypatch):
    entries = {"metrics": {"mi": {"_target_": "Mi", "permutations": 0}, "own": {"_target_": "Own", "control": 0}}}
    monkeypatch.setattr(renamed, "from_source", lambda: entries)
    renamed.taken_warnings()
    assert renamed.with_new_keys(["metrics.mi.control=9", "metrics.own.control=9", "metrics=[mi]", "~metrics"]) == [
        *("metrics.mi.permutations=9", "metrics.own.control=9", "metrics=[mi]", "~metrics"),
    ]
    assert len(renamed.taken_warnings()) == 1


@pytest.mark.filterwarnings("always")
def test_old_keys_in_a_file_of_the_users_own_work_too(quiet_home, recwarn):
    for file, text in {
        "conf/experiment/mine.yaml": "# @package _global_\ndefaults: [{override /recover: finetune}]\n"
        "inexact: true\nbudget: {passes: 3}\nrecover: {epochs: 2}\n",
        "conf/analysis/wider.yaml": "defaults: [geometry]\ngeometry: {wide: diagonal, passes: 2}\n",
        "conf/metrics/rq.yaml": "rq: {_target_: nodelens.metrics.RayleighQuotient, relative: false}\n",
    }.items():
        (quiet_home / file).parent.mkdir(parents=True, exist_ok=True)
        (quiet_home / file).write_text(text)
    place = "hydra.searchpath=['file://conf']"
    cfg = nl.load_config("prune", [place, "experiment=mine"])
    assert (cfg.allow_approximate, cfg.budget.max_passes, cfg.finetune.epochs, cfg.finetune.lr) == (True, 3, 2, 0.01)
    found = {str(w.message).partition(" (in ")[0] for w in recwarn}
    assert found == {
        f"{old} is now called {RENAMED[old]}; the old key works in this version only"
        for old in ("recover", "inexact", "budget.passes")
    }
    geometry = nl.load_config("analyze", [place, "analysis=wider"]).analysis.geometry
    assert (geometry.covariance, geometry.max_passes) == ("diagonal", 2)
    assert nl.load_config("analyze", [place, "metrics=[rq]"]).metrics.rq == {  # a file comes before the entry of its name
        "_target_": "nodelens.metrics.RayleighQuotient",
        "relative": False,
    }
    assert nl.load_config("analyze", ["metrics=[rq]"]).metrics.rq.relative is True


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"hydra.searchpath: no folder at .*nowhere"):
        nl.load_config("analyze", ["hydra.searchpath=[file://nowhere]"])


@pytest.mark.parametrize("name", sorted(SETS - {"none"}))
def test_a_set_of_metrics_builds(name):
    assert build(nl.load_config("analyze", [f"metrics={name}"]).metrics, "metrics")


def test_sets_hold_what_their_names_say():
    def chosen(name):
        return build(nl.load_config("analyze", [f"metrics={name}"]).metrics, "metrics")

    def reads(metric):
        return {part for need in metric.needs().values() for part in (need.port, str(need.target))}

    assert {type(m) for m in chosen("edges").values()} <= {m for m in METRICS if m.kind == "edge"}
    for name, metric in chosen("forward").items():
        assert metric.shape in ("unit", "layer"), name
        assert metric.parameter in ("weight", "tensor"), name
        assert not any("grad" in r or r == "next" for r in reads(metric)), name
        assert not of_groups_only(metric), name
    variants = {"raw", "token_l2", "token_rms", "feature_standardized"}
    for name, metric in chosen("normalization_ablation").items():
        column, variant = next((name.removesuffix(f"_{v}"), v) for v in variants if name.endswith(f"_{v}"))
        assert metric == get_metric(column, rows=variant)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["metrics=[rq,synergy]"], ["rq", "synergy"]),
        (["metrics=rq"], ["rq"]),
        (["metrics=[]"], []),
        (["metrics=[rq]", "metrics.rq.relative=false"], ["rq"]),
        (["experiment=quick"], ["rq", "taylor"]),
        (["experiment=quick", "metrics=[synergy]"], ["synergy"]),
    ],
    ids=label,
)
def test_metrics_are_chosen_as_a_list(words, names):
    assert list(nl.load_config("analyze", words).metrics) == names


def test_the_default_set_has_a_metric_of_every_family():
    cfg = nl.load_config("analyze", ["metrics=default", "metrics.rq.relative=false"])
    kinds = {type(m).__module__.rpartition(".")[2] for m in build(cfg.metrics, "metrics").values()}
    assert kinds == {"activation", "alignment", "information", "synergy", "taylor", "spectrum", "weight"}
    assert cfg.metrics.rq.relative is False


def test_an_experiment_holds_what_differs_and_the_command_line_has_the_last_word():
    assert nl.load_config("train", ["experiment=quick"]).trainer.max_epochs == 2
    assert nl.load_config("train", ["experiment=quick", "trainer.max_epochs=3"]).trainer.max_epochs == 3


def test_compositions_share_the_nodes_of_the_store_and_do_not_change_them():
    first = nl.load_config("prune", ["criterion=rq"])
    first.criterion.rq.rq, first.budget.width = 7.0, 7
    second = nl.load_config("prune", ["criterion=rq"])
    assert (second.criterion.rq.rq, second.budget.width) == (1.0, 4096)
    repo = ConfigStore.instance().repo
    copied = copy.deepcopy(repo)
    assert copied["hydra"] is not repo["hydra"]
    for name in ("prune_schema.yaml", "_dummy_empty_config_.yaml"):
        assert copied[name] is repo[name]
    assert copied["hydra"]["config.yaml"] is repo["hydra"]["config.yaml"], "Hydra's own"


def test_callbacks_join():
    cfg = nl.load_config("train", ["callbacks=[default,early_stopping,measure]"])
    assert sorted(cfg.callbacks) == ["checkpoint", "early_stopping", "last", "measure"]


def test_a_model_of_ones_own_takes_its_options_without_a_plus():
    cfg = nl.load_config("analyze", ["model.net._target_=my.Net", "model.net.depth=3"])
    assert OmegaConf.to_container(cfg.model.net) == {"_target_": "my.Net", "depth": 3}


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="no task is called 'analyse'; there are train, analyze, prune"):
        nl.load_config("analyse")


@pytest.mark.parametrize(("size", "number"), [("4GB", 4e9), ("512 MiB", 512 * 2**20), (10, 10), ("1.5kb", 1500), (None, None)])
def test_sizes_are_read(size, number):
    assert in_bytes(size) == number


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"_target_": "collections.Counters"}, "collections has no 'Counters'. Did you mean 'Counter'?"),
        ({"_target_": "nodelens.models.mlp", "classes": 10, "channels": 1}, "x: nodelens.models.mlp needs size: add x.size=..."),
        (
            {"_target_": "nodelens.models.mlp", "classes": True, "channels": 1, "size": 8},
            "x.classes is True; nodelens.models.mlp takes int",
        ),
        ({"_target_": "nodelens.results.result.Result.sav"}, "nodelens.results.result.Result has no 'sav'. Did you mean 'save'?"),
    ],
    ids=label,
)
def test_a_config_that_does_not_fit_its_code_is_refused(node, said):
    with pytest.raises(ValueError) as refused:
        check(node, "x")
    assert said in str(refused.value)


def test_every_package_and_config_file_travels_in_the_wheel():
    made = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "nodelens").rglob("__init__.py")}
    assert {*made["packages"]} == there | {"nodelens.conf"}
    packed = {p for pattern in made["package-data"]["nodelens.conf"] for p in CONF.glob(pattern)}
    assert {p for p in CONF.rglob("*") if p.is_file()} <= packed
    packed = {p for pattern in made["package-data"]["nodelens"] for p in (ROOT / "nodelens").glob(pattern)}
    assert {*(ROOT / "nodelens").rglob("*.c")} <= packed
