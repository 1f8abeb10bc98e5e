import importlib.metadata
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import command, snapshot

import nodelens as nl
from nodelens.app import cli
from nodelens.app.entries import from_registry

ROOT = Path(__file__).parents[2]
SMALL = ("dataset.calibration=64", "metrics=[rq]")
MISTAKES = [
    ("analyze metrics=[rq,synergi]", "metrics: no option 'synergi'. Did you mean 'synergy'?"),
    ("analyze metrics=synergi", "no option 'synergi'. Did you mean 'synergy'?"),
    ("analyze metrics=null", "metrics=null chooses nothing: choose one of"),
    ("analyze metrics=[]", "no metric is chosen: give some, as in 'metrics=[rq,synergy]'"),
    ("analyze metrics=rq,synergy", "write metrics=[...]"),
    ("analyze -m metrics=[rq],[synergi]", "Did you mean 'synergy'?"),
    ("analyze -m metrics.rq.relativ=true,false", "Did you mean 'metrics.rq.relative'?"),
    ("analyze model=resnet", "Available: causal_lm, cnn, custom, mlp, resnet18"),
    ("analyze hydra/launcher=submitit_lokal", "submitit_local"),
    ("analyze foo", "'foo' sets nothing: settings are key=value"),
    ("train lr=0.1", "no key 'lr' in the config of train. Did you mean 'model.optimizer.lr'? (--cfg job lists all)"),
    ("analyze --bogus", "--bogus: there is no such flag; settings are key=value, as in bogus=...; --hydra-help lists the flags"),
    ("analyze metrics=[rq", "quote it"),
    ("analyze --config-dir nowhere", "no folder at"),
    (
        "analyze metrics.rq.relativ=false",
        "no key 'metrics.rq.relativ' in the config of analyze. Did you mean 'metrics.rq.relative'?",
    ),
    ("analyze sead=1", "Did you mean 'seed'?"),
    ("analyze +model.net.foo=3", "model.net.foo: nodelens.models.mlp takes no 'foo'. It takes: classes, channels, size, hidden"),
    (
        "analyze +trainer.max_epoch=3",
        "trainer.max_epoch: lightning.pytorch.Trainer takes no 'max_epoch'. Did you mean 'max_epochs'?",
    ),
    ("train trainer.max_epoch=3", "Did you mean 'trainer.max_epochs'?"),
    ("train +model.optimizer.lrr=1", "torch.optim.AdamW takes no 'lrr'. Did you mean 'lr'?"),
    ("analyze seed=abc", "seed: Value 'abc'"),
    ("analyze metrics.rq.relative=maybe", "metrics.rq.relative is 'maybe'; nodelens.metrics.RayleighQuotient takes bool"),
    ("train trainer.max_epochs=abc", "trainer.max_epochs is 'abc'; lightning.pytorch.Trainer takes int or null"),
    ("analyze model.net.hidden=7", "model.net.hidden is 7; nodelens.models.mlp takes"),
    ("analyze metrics.synergy.target=foo", "target is 'foo'; it takes logit_margin, correct_logit"),
    ("analyze groups=0", "groups is 0; it is 1 or more"),
    ("analyze positions=0", "positions is 0"),
    ("analyze budget.memory=lots", "a size such as 4GB"),
    ("analyze budget.memory=1KB", "or a larger budget"),
    ("analyze split=tset", "did you mean 'test'?"),
    ("analyze layers=conv*", "the model has: fc1, fc2, head"),
    ("prune scope=conv*", "scope 'conv*' matches no group; there are fc1, fc2"),
    ("train callbacks=measure layers=conv*", "no layer matches 'conv*'"),
    ("analyze ckpt_path=nope.ckpt", "nope.ckpt; give a .safetensors file"),
    ("train ckpt_path=nope.ckpt", "nope.ckpt; give a .safetensors file"),
    ("analyze dataset=npz", "dataset.path has no value: give dataset.path=..."),
    ("analyze dataset=npz dataset.path=nope.npz", "nope.npz; set dataset.path"),
    ("analyze ckpt_path=code.ckpt", "it may be a pickle that holds code, which is never run"),
    ("analyze model.weights=code.ckpt", "it may be a pickle that holds code, which is never run"),
    ("train ckpt_path=code.ckpt", "it may be a pickle that holds code, which is never run"),
    ("analyze ckpt_path=other.ckpt", "does not fit the model"),
    (
        "analyze model=resnet18 model.net.channels=3",
        "change the data's channels and size (dataset.channels=, dataset.size=), or the model",
    ),
    ("train model=cnn model.net.channels=3", "cannot take the data, input 0 (2, 1, 8, 8) float32"),
    ("train model.net.classes=5", "MLP has 5 outputs, the data have 10 classes"),
    ("analyze hydra.run.dir=plain.txt/run", "plain.txt: Not a directory; choose another, hydra.run.dir=<folder>"),
    ("analyze hydra.run.dir=/proc/nodelens", "/proc/nodelens cannot be written"),
    ("analyze paths.output_dir=plain.txt/run", "cannot be written"),
    ("analyze dataset=cifar10", "uoft-cs/cifar10' is not on this machine and the hub cannot be reached; use dataset=digits"),
    ("analyze model.net._target_=nope.Net", "no module 'nope' for 'nope.Net'"),
    ("analyze model.net._target_=torch.nn.Linaer", "torch.nn has no 'Linaer'. Did you mean 'Linear'?"),
    ("analyze model.net._target_=nope", "'nope' is not a dotted name"),
    ("analyze trainer.accelerator=abacus", "trainer=cpu works everywhere"),
    ("analyze trainer=ddp layers=conv*", "no layer matches 'conv*'"),
    ("prune amounts=[1.0]", "amount is 1.0"),
    ("prune amounts=[]", "the sweep has no amount"),
    ("prune mode=lo", "mode is 'lo'"),
    ("prune criterion=tailor", "Did you mean 'taylor'?"),
    ("prune +criterion.x=rand", "no metric is called 'rand'"),
    ("prune +criterion.x.effective_rank=1", "effective_rank gives one value per layer"),
    ("prune +criterion.x.taylor=much", "criterion 'x': taylor is 'much'"),
]


@pytest.fixture
def files(quiet_home):
    (quiet_home / "plain.txt").write_text("a file")
    (quiet_home / "code.ckpt").write_bytes(pickle.dumps({"state_dict": Path("x")}))
    torch.save({"a": torch.zeros(2)}, quiet_home / "other.ckpt")
    return quiet_home


# others alike are in MISTAKES or in tests/test_wrong_inputs.py
ALIKE = {
    "analyze budget.memory=1KB",
    "analyze model=resnet18 model.net.channels=3",
    "train callbacks=measure layers=conv*",
    "analyze model.weights=code.ckpt",
    "train ckpt_path=code.ckpt",
    "prune amounts=[]",
    "prune +criterion.x=rand",
    "analyze +trainer.max_epoch=3",
}
CASES = [pytest.param(*case, id=case[0], marks=[pytest.mark.slow] * (case[0] in ALIKE)) for case in MISTAKES]


@pytest.mark.parametrize(("words", "said"), CASES)
def test_a_mistake_ends_in_one_line_and_leaves_nothing(words, said, files):
    before = snapshot(files)
    ended = command(*words.split())
    assert ended.code == 1
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert ended.err.startswith("nodelens: ")
    assert said in ended.err
    assert snapshot(files) == before
    assert sorted(p.name for p in files.iterdir()) == ["code.ckpt", "other.ckpt", "plain.txt"]


def test_a_failed_job_of_a_sweep_is_a_line_and_the_others_run(quiet_home):
    ended = command("analyze", "-m", "layers=conv*,fc1", "hydra.sweep.dir=sweep", *SMALL)
    assert ended.code == 1
    assert ended.err.splitlines() == [ended.err.rstrip("\n")]
    assert "no layer matches 'conv*'" in ended.err
    assert "job 0: layers=conv*" in ended.err
    assert (quiet_home / "sweep/1/units.parquet").is_file()


def test_a_mistake_that_was_set_right_may_use_the_same_folder(quiet_home):
    (quiet_home / "run").mkdir()
    assert command("analyze", "hydra.run.dir=run", "layers=conv*", *SMALL).code == 1
    assert command("analyze", "hydra.run.dir=run", "layers=fc*", *SMALL).code == 0
    assert (quiet_home / "run/units.parquet").is_file()


def test_a_network_of_outputs_only_has_nothing_to_prune(quiet_home):
    ended = command("prune", "model.net.hidden=[]")
    assert ended.code == 1
    assert ended.err == (
        "nodelens: scope '*' leaves no group to prune: the input of head: 64 units: reads the model's input; "
        "head: 10 units: the model's output\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("seed=1", "run holds a run with seed=0, this one has seed=1: choose another folder (hydra.run.dir=)"),
        ("ckpt_path=a/other.ckpt", "ckpt_path: there is nothing at "),
        ("metrics=[rq,synergi]", "Did you mean 'synergy'?"),
        ("layers=conv*", "layers=*, this one has layers=conv*"),
    ],
)
def test_earlier_results_stay_as_they_are(words, said, finished):
    before = snapshot(finished)
    ended = command("analyze", f"hydra.run.dir={finished}", *SMALL, *words.split())
    assert ended.code == 1
    assert said in ended.err
    assert snapshot(finished) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert command("analyze", f"hydra.run.dir={folder}", *SMALL).code == 0
    return folder


def started(*words, cwd):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "nodelens.app", *words],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ckpt_path=nope.ckpt"], "ckpt_path: there is nothing at"),
        pytest.param(["model=cnn", "model.net.channels=3"], "cannot take the data", marks=pytest.mark.slow),  # imports for seconds
    ],
    ids=["before torch is imported", "with a model"],
)
def test_a_mistake_in_a_process_of_its_own_from_another_folder(words, said, tmp_path):
    ended = started("analyze", *words, cwd=tmp_path)
    assert ended.returncode == 1
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert said in ended.stderr
    assert not list(tmp_path.iterdir())


def test_the_console_script_takes_a_task_or_says_its_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nodelens", "analyse"])
    with pytest.raises(SystemExit, match=r"^nodelens: the first word is a task, .* not 'analyse'\. Did you mean 'analyze'\?$"):
        cli.script()
    monkeypatch.setattr(sys, "argv", ["nodelens", "--version"])
    cli.script()
    assert capsys.readouterr() == (f"{importlib.metadata.version('nodelens')}\n", "")


def python(code, folder):
    """Runs code in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_help_needs_no_torch_and_names_the_groups(tmp_path):
    code = (
        "import sys; sys.argv = ['analyze.py', '--help']\nimport nodelens.app.cli as c\n"
        "try: c.analyze()\nfinally: assert 'torch' not in sys.modules"
    )
    ended = python(code, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "metrics: activation, activation_" in ended.stdout
    listed = dict(line.split(": ", 1) for line in ended.stdout.splitlines() if ", " in line)
    assert {*nl.list_metrics(), "default", "edges"} <= set(listed["metrics"].split(", "))
    assert {*from_registry()["criterion"], "composite", "random", "cluster_aware", "generalized_importance", "read_halo"} == set(
        listed["criterion"].split(", ")
    )
    assert "relative: true" in ended.stdout


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("metrics=redun", ["metrics=redundancy", "metrics=redundancy_gaussian"]),
        ("criterion=tay", ["criterion=taylor", "criterion=taylor_producer", "criterion=taylor_saliency"]),
        ("metrics=rq metrics.rq.rel", ["metrics.rq.relative="]),
        ("finetune=", ["finetune=default", "finetune=none"]),
    ],
)
def test_the_shell_completes_names_and_options(line, words, monkeypatch, quiet_home):
    monkeypatch.setenv("COMP_LINE", f"python prune.py {line}")
    ended = command("prune", "-sc", "query=bash")
    assert ended.code == 0, ended.err
    assert ended.out.split() == words


def test_an_old_key_is_a_line_beside_the_run(quiet_home):
    (quiet_home / "conf/experiment").mkdir(parents=True)
    (quiet_home / "conf/experiment/mine.yaml").write_text("# @package _global_\nbudget: {passes: 2}\n")
    ended = command("analyze", "--config-dir", "conf", "experiment=mine", "wide=diagonal", "hydra.run.dir=run", *SMALL)
    assert ended.code == 0, ended.err
    assert ended.err.splitlines()[:2] == [
        "nodelens: wide is now called covariance; the old key works in this version only",
        "nodelens: budget.passes is now called budget.max_passes; the old key works in this version only "
        f"(in {quiet_home}/conf/experiment/mine)",
    ]
    assert ended.err.count("is now called") == 2


def test_the_evaluation_of_the_first_version_is_found_and_the_function_stays(tmp_path):
    code = (
        "import nodelens as nl, torch, warnings\n"
        "from nodelens.evaluate import evaluate\n"
        "data = [(torch.eye(3), torch.arange(3))]\n"
        "assert evaluate(torch.nn.Identity(), data) == nl.evaluate(torch.nn.Identity(), data)\n"
    )
    ended = subprocess.run([sys.executable, "-W", "default", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "DeprecationWarning: nodelens.evaluate is now nodelens.evaluation.evaluate; the function is nl.evaluate" in ended.stderr


def test_the_module_of_the_first_version_works_and_says_its_new_name(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "nodelens.cli", "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout == f"{importlib.metadata.version('nodelens')}\n"
    assert ended.stderr == "warning: python -m nodelens.cli is now nodelens, or python -m nodelens.app\n"


def test_the_version_is_that_of_the_package_everywhere(monkeypatch, capsys):
    version = importlib.metadata.version("nodelens")
    assert nl.__version__ == version
    assert command("train", "--version") == (0, f"{version}\n", "")
    monkeypatch.setattr(sys, "argv", ["nodelens", "--help"])
    cli.script()
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("usage: nodelens <task>", "train ", "analyze ", "prune ", "--version"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: (_ for _ in ()).throw(importlib.metadata.PackageNotFoundError))
    assert nl.__version__ == "unknown"


def test_missing_weights_are_found_before_torch_is_imported(tmp_path):
    code = (
        "import sys; sys.argv = ['analyze.py', 'ckpt_path=nope.ckpt']\nimport nodelens.app.cli as c\n"
        "try: c.analyze()\nfinally: assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    ended = python(code, tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"nodelens: ckpt_path: there is nothing at {tmp_path}/nope.ckpt; give a .safetensors file")
    assert len(ended.stderr.splitlines()) == 1


def test_a_group_may_be_chosen_with_a_plus(quiet_home):
    ended = command("analyze", "+experiment=quick", "hydra.run.dir=run", "dataset.calibration=64")
    assert ended.code == 0, ended.err
    assert set(nl.load("run").metadata["metrics"]) == {"rq", "taylor"}
