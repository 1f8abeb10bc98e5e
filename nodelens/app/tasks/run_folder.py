"""The run folder: its settings, and what its results are of, are compared before anything in it is used again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from nodelens.app.config import build, recorded
from nodelens.results.files import checked, holds_results, plain, read_json, sweep_parts, tidy, write_json
from nodelens.results.identity import check_identity, code_version
from nodelens.results.result import fingerprint, flatten
from nodelens.statistics.processes import world

from .common import initial_of, load_module, verify
from .run_lock import locked

_FREE = ("dry_run", "plan_only", "save_minutes", "score", "sweep")  # settings that change no result


def check_settings(cfg: DictConfig) -> None:
    """Raises ValueError if the run folder is one of other settings, or has results without settings, so that none are mixed."""
    folder = Path(cfg.paths.output_dir)
    if not (folder / "settings.json").is_file():
        if holds_results(folder):
            raise ValueError(
                f"{folder} holds results without settings.json, the settings behind them: choose another folder (hydra.run.dir=)"
            )
        return
    stored, given = read_json(checked(folder / "settings.json")), _settings(cfg)
    old, new = ({**_chosen(settings), **_flat(settings)} for settings in (stored, given))  # what was chosen is compared first
    for key in (*_chosen(given), *sorted(old.keys() | new.keys())):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"{folder} holds a run with {key}={_or_null(old.get(key))}, this one has {key}={_or_null(new.get(key))}: "
                "choose another folder (hydra.run.dir=), or the same settings to resume"
            )


def create_run_dir(cfg: DictConfig) -> Path:
    """Creates the run folder and writes its settings; raises ValueError as check_settings does."""
    check_settings(cfg)
    folder = Path(cfg.paths.output_dir)
    if not (folder / "settings.json").is_file():
        write_json(folder / "settings.json", _settings(cfg))
    return folder


@contextmanager
def run_folder(cfg: DictConfig) -> Iterator[Path]:
    """The run folder, as ``create_run_dir`` makes it. A run that fails without results takes its settings back.

    The corrected run may then use the same folder. A run that was interrupted keeps them, to be resumed. No other run may use the
    folder at the same time, and temporary files of a run that was killed are removed. At the end the manifests list what is there.
    """
    verify(cfg)
    with locked(Path(cfg.paths.output_dir)):
        folder = create_run_dir(cfg)
        sweep_parts(folder)
        try:
            yield folder
        except Exception:
            if not holds_results(folder):
                for name in ("settings.json", "identity.json"):
                    (folder / name).unlink(missing_ok=True)
            raise
        tidy(folder)


def check_same_inputs(cfg: DictConfig, folder: Path, data: Any, net: torch.nn.Module) -> None:
    """Raises ValueError if the folder has results of another network, or of other data, initial weights or code.

    A training continues from its own checkpoints, so that the weights it started from do not count.
    """
    identity = {"data": data.fingerprint(), "code": code_version(net)}
    if cfg.task != "train":
        identity["model"] = fingerprint(net)
        initial = initial_of(cfg, net)
        identity |= {} if initial is None else {"initial": fingerprint(initial)}
    check_identity(folder, identity, write=world()[0] == 0)


def open_inputs(cfg: DictConfig, folder: Path) -> tuple[Any, Any, dict[str, Any] | None]:
    """The data, the Lightning module, and the config of the run that trained it, after ``check_same_inputs``."""
    data = build(cfg.dataset, "dataset")
    data.setup()
    module, trained_by = load_module(cfg, data.classes)
    check_same_inputs(cfg, folder, data, module.net)
    return data, module, trained_by


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """The settings that identify a run. Paths in its folder are stored relative to it, so that the folder can be moved."""
    found = plain({k: v for k, v in recorded(cfg).items() if k not in ("paths", "logger", "report", *_FREE)})
    return _relative(found, str(cfg.paths.output_dir))


def _chosen(settings: dict[str, Any]) -> dict[str, str]:
    """The entries of groups of which several may be chosen, as on the command line: {metrics: [rq,synergy]}."""
    groups = {key: value for key, value in settings.items() if isinstance(value, dict) and value}
    every = {key: all(isinstance(each, dict) and "_target_" in each for each in value.values()) for key, value in groups.items()}
    return {key: f"[{','.join(sorted(groups[key]))}]" for key, several in every.items() if several}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as one level, with the current names of renamed keys, without those that change no result."""
    return {key.replace("forecast.", "cost."): value for key, value in flatten(settings).items() if key not in _FREE}


def _relative(value: Any, home: str) -> Any:
    if isinstance(value, dict):
        return {k: _relative(v, home) for k, v in value.items()}
    if isinstance(value, list):
        return [_relative(v, home) for v in value]
    return "." + value.removeprefix(home) if isinstance(value, str) and value.startswith(home) else value


def _or_null(value: Any) -> Any:
    return "null" if value is None else value
