"""Tasks of lm-evaluation-harness (Gao et al., 2024), an optional extra: benchmarks that ask a language model for answers."""

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
    """{task: {metric: value}}, with the standard error of a metric as ``<metric>_se``, NaN where the harness has none.

    net:         a causal language model of transformers, where it is and as it is; in eval mode while this lasts
    tokenizer:   of transformers, or the folder or hub id that has it
    tasks:       names of the harness, or whole task configs; their data come from the hub unless they lie here
    limit:       questions of each task, a share of them below 1; None: all
    num_fewshot: answered examples before a question; None: the task's own number
    include:     a folder with task files (.yaml) of one's own

    A metric is called as in the harness, with its filter behind a comma where it has one: ``exact_match,strict-match``.
    Raises: ValueError where lm_eval is not installed, a task is unknown, or there is no tokenizer.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("lm-evaluation-harness is not installed: pip install nodelens[lm_eval]")
    if tokenizer is None:
        raise ValueError("the tasks of lm_eval are texts: give the model's own tokenizer, of transformers or a folder (model.path)")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager, wanted = TaskManager(include_path=include), [task if isinstance(task, str) else dict(task) for task in tasks]
    unknown = [task for task in wanted if isinstance(task, str) and not manager.match_tasks([task])]
    if unknown or not wanted:
        what = f"has no task {', '.join(map(repr, unknown))}" if unknown else "is asked for no task"
        raise ValueError(f"lm_eval {what}: `lm_eval ls tasks` shows what there is, include= adds a folder of one's own")
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
    """Numbers by metric; beside them stand names and counts."""
    found = {}
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if not comma:
            continue
        error = "_se" if name.endswith("_stderr") else ""
        name = name.removesuffix("_stderr") + ("" if kind == "none" else f",{kind}")
        found[name + error] = float(value) if isinstance(value, int | float) else float("nan")
    return found
