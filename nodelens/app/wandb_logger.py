"""The logger of Weights & Biases, for which the environment's ``WANDB_*`` count."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import WandbLogger


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
    **options: Any,
) -> WandbLogger:
    """Lightning's logger of W&B. What is None follows the environment, such as ``WANDB_RUN_GROUP``.

    Without it, the project is nodelens, the job type the ``task``, the place ``folder``, and the mode offline; the runs of a
    multirun have its folder as group. settings: gives
    the config of the run, which W&B shows. options: further arguments of ``wandb.init``.
    """
    env = {key: os.environ.get(f"WANDB_{key}") or None for key in ("DIR", "PROJECT", "JOB_TYPE", "NAME", "RUN_GROUP", "TAGS")}
    mode = os.environ.get("WANDB_MODE", "offline") if offline is None else "offline" if offline else "online"
    logger = WandbLogger(
        save_dir=save_dir or env["DIR"] or folder,
        project=project or env["PROJECT"] or "nodelens",
        job_type=job_type or env["JOB_TYPE"] or task,
        name=name or env["NAME"],
        group=group or env["RUN_GROUP"] or _sweep(),
        tags=list(tags) if tags else env["TAGS"].split(",") if env["TAGS"] else None,
        config=None if settings is None else dict(settings()),
        mode=mode,
        **options,
    )
    if options.get("anonymous") is None:
        logger._wandb_init.pop("anonymous", None)  # Lightning passes it always, and W&B warns of it
    return logger


def _sweep() -> str | None:
    """The last two parts of a multirun's folder, such as its date and time; None outside of one."""
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return None
    return "/".join(Path(HydraConfig.get().sweep.dir).parts[-2:])[-128:]  # as long as W&B takes
