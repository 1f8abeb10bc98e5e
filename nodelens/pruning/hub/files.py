"""The files that make a saved pruned model a folder of the hub."""

import json
from typing import Any

from nodelens.pruning.surgery.structure import structure

from .modelling_file import FILE, config_fields, modelling_file
from .widths import Widths


def is_of_transformers(model: Any) -> bool:
    """Whether the class of a model is one of transformers itself, which opens it again by its name."""
    if not any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__):
        return False
    import transformers

    return getattr(transformers, type(model).__name__, None) is type(model)


def hub_files(pruned: Any) -> dict[str, str]:
    """{name: text} of the files with which transformers opens a pruned model; empty for a model of another library.

    ``config.json`` says the widths that are left, if the config of the class can. Otherwise it has the dense ones, and
    ``modeling_pruned.py``, which transformers runs with ``trust_remote_code=True`` only, resizes the model. nodelens never runs it.
    """
    model = pruned.model
    if not is_of_transformers(model) or getattr(model, "is_quantized", False):
        return {}
    left = tuple((group, group.n - len(pruned.plan.removed[group.name])) for group in _pruned_groups(pruned))
    config = Widths(model, pruned.numbers, left if pruned.apply == "slice" else ()).config()
    of_file = {} if config is not None else config_fields(model, pruned.dense, structure(model), pruned.numbers)
    content = json.loads((config if config is not None else model.config).to_json_string())
    dtype = str(next((p.dtype for p in model.parameters() if p.is_floating_point()), "float32")).removeprefix("torch.")
    content |= {"architectures": [type(model).__name__], "dtype": dtype} | of_file
    files = {"config.json": json.dumps(content, indent=2, sort_keys=True) + "\n"}
    if of_file:
        files[FILE] = modelling_file(model)
    if model.can_generate() and model.generation_config is not None:
        files["generation_config.json"] = model.generation_config.to_json_string()
    return files


def _pruned_groups(pruned: Any) -> list[Any]:
    groups = (*pruned.groups, *pruned.groups.opt_in)
    return [group for group in groups if pruned.plan.removed.get(group.name)]
