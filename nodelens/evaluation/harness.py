"""Benchmark tasks of lm-evaluation-harness (Gao et al., 2024), an optional dependency."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

from torch import nn

from nodelens.network.eval_mode import eval_mode


def harness(
    net: nn.Module,
    tokenizer: Any,
    tasks: Iterable[str | Mapping[str, Any]],
    limit: int | float | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    include: str | None = None,
) -> dict[str, dict[str, float]]:
    """Runs tasks: {task: {metric: value}}, with standard errors as ``<metric>_se``, NaN if the harness gives none.

    net:         a causal language model of transformers, on its current device; in eval mode during the call
    tokenizer:   a transformers tokenizer, or the folder or hub id of one
    tasks:       task names of the harness, or task configs; their data are downloaded unless they are cached
    limit:       number of questions per task, or a share below 1; None: all
    num_fewshot: number of answered examples before a question; None: the default of the task
    include:     a folder with your own task files (.yaml)

    Metrics have the names of the harness, followed by a comma and the filter if there is one: ``exact_match,strict-match``.
    Raises: ValueError if lm_eval is not installed, a task is unknown, or there is no tokenizer.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("lm-evaluation-harness is not installed: pip install nodelens[lm_eval]")
    if tokenizer is None:
        raise ValueError("the tasks of lm_eval are texts: give the tokenizer of the model, as a transformers tokenizer or a folder")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager, wanted = TaskManager(include_path=include), [task if isinstance(task, str) else dict(task) for task in tasks]
    unknown = [task for task in wanted if isinstance(task, str) and not manager.match_tasks([task])]
    if unknown or not wanted:
        what = f"lm_eval has no task {', '.join(map(repr, unknown))}" if unknown else "no lm_eval task is given"
        raise ValueError(f"{what}: `lm_eval ls tasks` lists the tasks, include= adds a folder with your own")
    with eval_mode(net):
        found = simple_evaluate(
            HFLM(pretrained=net, tokenizer=tokenizer, batch_size=batch_size),
            tasks=wanted,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            random_seed=None,  # global states are left alone; examples are drawn by a seed of their own
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    return {} if found is None else {task: _metrics(values) for task, values in found["results"].items()}


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The metrics among the values of a task; entries without a filter are names and counts."""
    found = {}
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if not comma:
            continue
        error = "_se" if name.endswith("_stderr") else ""
        name = name.removesuffix("_stderr") + ("" if kind == "none" else f",{kind}")
        found[name + error] = float(value) if isinstance(value, int | float) else float("nan")
    return found
