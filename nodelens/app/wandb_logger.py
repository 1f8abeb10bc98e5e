"""The logger of Weights & Biases, for which the environment's ``WANDB_*`` count."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from .wandb_run import WandbRun

_LONGEST = 128  # characters that W&B takes for a name or a group


def wandb_logger(
    folder: str,
    task: str,
    settings: Callable[[], Mapping[str, Any]] | None = None,
    project: str | None = None,
    offline: bool | None = None,
    job_type: str | None = None,
    save_dir: str | None = None,
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] | None = None,
    artifacts: bool = True,
    **options: Any,
) -> WandbRun:
    """Lightning's logger of W&B, with tables, histograms, figures and files of a run. A later start in a folder continues its run.

    What is None follows the environment, such as ``WANDB_RUN_GROUP``. Without it, the project is nodelens, the job type the
    ``task``, the place ``folder``, and the mode offline; the name is the end of the folder's path; the runs of a multirun have its
    folder as group, and their overrides in their names. settings: gives the config of the run, which W&B shows. artifacts: whether
    files are logged, such as checkpoints. options: further arguments of ``wandb.init``.
    """
    env = {key: os.environ.get(f"WANDB_{key}") or None for key in ("DIR", "PROJECT", "JOB_TYPE", "NAME", "RUN_GROUP", "TAGS")}
    mode = os.environ.get("WANDB_MODE", "offline") if offline is None else "offline" if offline else "online"
    logger = WandbRun(
        Path(folder),
        artifacts,
        save_dir=save_dir or env["DIR"] or folder,
        project=project or env["PROJECT"] or "nodelens",
        job_type=job_type or env["JOB_TYPE"] or task,
        name=name or env["NAME"] or _name(folder),
        group=group or env["RUN_GROUP"] or _sweep(),
        tags=list(tags) if tags else env["TAGS"].split(",") if env["TAGS"] else None,
        config=None if settings is None else dict(settings()),
        mode=mode,
        **options,
    )
    if options.get("anonymous") is None:
        logger._wandb_init.pop("anonymous", None)  # Lightning passes it always, and W&B warns of it
    if mode == "offline" and "resume" not in options:
        logger._wandb_init.pop("resume", None)  # W&B warns that it has no effect: wandb sync appends runs of the same id
    return logger


def _name(folder: str) -> str:
    """The last two parts of the folder, such as date and time; of a multirun, the number of the job and its overrides."""
    if not _is_multirun():
        return "/".join(Path(folder).absolute().parts[-2:])[-_LONGEST:]
    job = HydraConfig.get().job
    return f"{job.num} {job.override_dirname}".strip()[:_LONGEST]


def _sweep() -> str | None:
    """The last two parts of a multirun's folder, such as its date and time; None outside of one."""
    return "/".join(Path(HydraConfig.get().sweep.dir).parts[-2:])[-_LONGEST:] if _is_multirun() else None


def _is_multirun() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN
