"""lm-evaluation-harness: what it is called with and what is made of its answer; the real one where it is installed."""

import importlib.util
import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from command import command
from real import folder

import nodelens as nl
from nodelens.evaluation.harness import harness
from nodelens.models import causal_lm, tiny_lm

HERE = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture
def stub(monkeypatch):
    """A harness that keeps what it is called with."""
    calls = SimpleNamespace()

    def simple_evaluate(model, **options):
        calls.model, calls.options, calls.training = model, options, model.pretrained.training
        scores = {"alias": "girls", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict": 1}
        return {"results": {"girls": scores | {"exact_match_stderr,strict": 0.25}}}

    class Manager:
        def __init__(self, include_path=None):
            calls.include = include_path

        def match_tasks(self, names):
            return [name for name in names if name == "girls"]

    modules = {"lm_eval": {"simple_evaluate": simple_evaluate}, "lm_eval.tasks": {"TaskManager": Manager}, "lm_eval.models": {}}
    modules["lm_eval.models.huggingface"] = {"HFLM": lambda **options: SimpleNamespace(**options)}
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_scores_come_back_by_task_and_metric(stub):
    net = tiny_lm(width=16, layers=1, mlp=24).train()
    found = harness(net, "a tokenizer", ["girls"], limit=3, batch_size=2, num_fewshot=1, include="here")
    assert math.isnan(found["girls"].pop("acc_se"))
    assert found == {"girls": {"acc": 0.5, "exact_match,strict": 1.0, "exact_match,strict_se": 0.25}}
    assert (stub.model.pretrained, stub.model.tokenizer, stub.model.batch_size) == (net, "a tokenizer", 2)
    assert {k: stub.options[k] for k in ("tasks", "limit", "num_fewshot")} == {"tasks": ["girls"], "limit": 3, "num_fewshot": 1}
    assert (stub.include, stub.training, net.training) == ("here", False, True)


def test_what_cannot_be_asked(stub, monkeypatch):
    for tasks, words in (
        (["girls", "boys"], r"lm_eval has no task 'boys': `lm_eval ls tasks`"),
        ([], "no lm_eval task is given"),
    ):
        with pytest.raises(ValueError, match=words):
            harness(tiny_lm(), "t", tasks)
    with pytest.raises(ValueError, match="the tasks of lm_eval are texts: give the tokenizer of the model"):
        harness(tiny_lm(), None, ["girls"])
    for name in [name for name in sys.modules if name.startswith("lm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("nodelens.evaluation.harness.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^lm-evaluation-harness is not installed: pip install nodelens\[lm_eval\]$"):
        harness(tiny_lm(), "t", ["girls"])


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="lm_eval is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_task_of_ones_own(tmp_path):
    model = str(folder("NODELENS_DATA") / "models/stories260K")
    rows = [{"question": "Once upon a time, there was a little girl named", "choices": [" Lily", " xqz"], "answer": 0}] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"task": "girls", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    task |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}"}
    task |= {"doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    (tmp_path / "girls.yaml").write_text(json.dumps(task))
    state = torch.get_rng_state()
    assert harness(causal_lm(model), model, ["girls"], include=str(tmp_path)) == {"girls": {"acc": 1.0, "acc_se": 0.0}}
    assert torch.equal(torch.get_rng_state(), state)


def test_tasks_stand_beside_the_perplexity_of_a_run(tmp_path, monkeypatch):
    asked = {}

    def stub(net, tokenizer, **options):
        asked.update(options, tokenizer=tokenizer)
        return {"girls": {"acc": 0.75, "acc_se": 0.25}}

    monkeypatch.setattr("nodelens.evaluation.harness.harness", stub)
    monkeypatch.chdir(tmp_path)
    small = ("model=tiny_lm", "model.net.width=16", "model.net.layers=1", "model.net.mlp=24", "dataset=text", "dataset.length=32")
    words = ("dataset.max_tokens=1000", "metrics=[activation_mean]", "evaluate=lm_eval", "evaluate.tasks=[girls]", "logger=csv")
    ended = command("analyze", *small, *words, "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    assert asked["tasks"] == ["girls"]
    assert "lm_eval girls: acc 0.75, acc_se 0.25" in ended.out
    assert nl.load("run").metadata["lm_eval"] == {"girls": {"acc": 0.75, "acc_se": 0.25}}
    assert "lm_eval/girls/acc" in (tmp_path / "run/csv/version_0/metrics.csv").read_text()
