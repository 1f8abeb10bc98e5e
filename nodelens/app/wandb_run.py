"""A run of Weights & Biases: its id is kept in the run folder; results become tables, histograms, images and artifacts."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from nodelens.results.files import checked, read_json, write_json

from .tasks.progress import print_line

FILE = "wandb.json"  # in a run folder: id and project of its run, and the name of its checkpoint
_LARGEST = 5_000_000  # characters of a figure
_ID = re.compile(r"[\w-]{1,64}")
_DOWNLOADED = re.compile(r"[\w.-]+:v\d+")  # the folder that `wandb artifact get` makes
_STEPS = {  # which value is the horizontal axis of a group of curves
    "train": {"units/*": "epoch", "layers/*": "epoch", "edges/*": "epoch", "histograms/*": "epoch"},
    "prune": {"prune/*": "prune/amount"},
}


class WandbRun(WandbLogger):
    """Lightning's logger, which continues the run of its folder and logs more kinds of results.

    folder: of the run of nodelens, where the id is kept. files: whether artifacts are logged. An id that is given, or that the
    environment has (``WANDB_RUN_ID``, as under ``wandb agent``), comes before that of the folder.
    """

    def __init__(self, folder: Path, files: bool = True, **options: Any):
        self.folder, self.files = folder, files
        stored = _stored(folder / FILE).get("id")
        if not options.get("id") and not os.environ.get("WANDB_RUN_ID") and stored:
            options["id"] = stored
        super().__init__(**options)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, which the first use starts."""
        starts = self._experiment is None
        run = super().experiment
        if starts and not self.is_off:
            for pattern, step in _STEPS.get(str(self._wandb_init.get("job_type")), {}).items():
                run.define_metric(pattern, step_metric=step)
            if _stored(self.folder / FILE).get("id") != run.id:
                self._keep(id=run.id, project=run.project, entity=run.entity or None)
        return run

    @property
    def is_off(self) -> bool:
        """Whether W&B is switched off."""
        return self._wandb_init.get("mode") == "disabled"

    def log_histograms(self, histograms: Mapping[str, tuple[np.ndarray, np.ndarray]], step: Mapping[str, float]) -> None:
        """Logs {name: (counts, edges)}, with values that place them, such as the epoch."""
        import wandb

        if not self.is_off and histograms:
            media: dict[str, Any] = {name: wandb.Histogram(np_histogram=each) for name, each in histograms.items()}
            self.log_metrics(media | dict(step))

    def log_figures(self, figures: Mapping[str, Any]) -> None:
        """Logs plotly figures as media, without those that a browser would take long to show."""
        import wandb

        small = {} if self.is_off else {name: figure for name, figure in figures.items() if len(figure.to_json()) <= _LARGEST}
        media: dict[str, Any] = {f"figures/{name}": wandb.Plotly(figure) for name, figure in small.items()}
        if media:
            self.log_metrics(media)

    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Sets values of the run's summary, by which runs are sorted and compared."""
        self.experiment.summary.update(dict(values))

    def log_files(self, kind: str, paths: Iterable[Path], aliases: Iterable[str], **about: Any) -> None:
        """Logs files, or a folder with what is in it, as the artifact ``<kind>-<id of the run>`` with aliases.

        Files are not copied: those of an offline run are read where they are when the run is synchronised.
        """
        import wandb

        there = [path for path in paths if path.exists()]
        if self.is_off or not self.files or not there:
            return
        name = f"{kind}-{self.experiment.id}"
        artifact = wandb.Artifact(name, type="dataset" if kind == "results" else "model", metadata=about)
        for path in there:
            add = artifact.add_dir if path.is_dir() else artifact.add_file
            add(str(path), policy="immutable")
        self.experiment.log_artifact(artifact, aliases=list(aliases))
        self._keep(**{kind: f"{self.experiment.project}/{name}:{next(iter(aliases))}", f"{kind}_file": there[0].name})

    def use_checkpoint(self, path: str | None) -> None:
        """Records which artifact the weights are from, if a run of W&B made them: in the config, and online as an input.

        An artifact that is not online, such as that of an offline run which was not synchronised, is a warning.
        """
        import wandb

        name = None if path is None or self.is_off else origin_of_weights(Path(path))
        if name is None:
            return
        self.experiment.config.update({"checkpoint_artifact": name}, allow_val_change=True)
        if self._wandb_init.get("mode") != "offline":
            try:
                self.experiment.use_artifact(name)
            except (wandb.Error, ValueError) as error:
                reason = " ".join(str(error).split())
                print_line(f"warning: W&B does not record {name} as an input: {reason}; 'wandb sync' uploads an offline run")

    def _keep(self, **values: Any) -> None:
        write_json(self.folder / FILE, _stored(self.folder / FILE) | values)


def origin_of_weights(path: Path) -> str | None:
    """The artifact that weights are from: that of the run folder they lie in, or of a download; None for other weights.

    The artifact of a training has one checkpoint, the best; other files beside it, such as ``last.ckpt``, are in none.
    """
    place = path.expanduser().absolute()
    for folder in (place, *place.parents[:2]):
        if _DOWNLOADED.fullmatch(folder.name):
            return folder.name
        stored = _stored(folder / FILE)
        if "checkpoint" in stored and place.suffix == ".ckpt" and not _is_logged(place.name, stored):
            return None
        if name := stored.get("checkpoint") or stored.get("pruned"):
            entity = f"{stored['entity']}/" if stored.get("entity") else ""
            return f"{entity}{name}"
    return None


def _is_logged(file: str, stored: Mapping[str, str]) -> bool:
    """Whether a file is the checkpoint that a training logged; runs of earlier versions do not say which one they logged."""
    return file == stored["checkpoint_file"] if "checkpoint_file" in stored else not file.startswith("last")


def _stored(path: Path) -> dict[str, str]:
    """What a run folder says about its run: texts of letters, digits and a few signs; others are left out."""
    if not path.is_file():
        return {}
    found = read_json(checked(path))
    kept = found.items() if isinstance(found, dict) else ()
    texts = {key: value for key, value in kept if isinstance(value, str) and re.fullmatch(r"[\w./:=+-]{1,200}", value)}
    return texts if _ID.fullmatch(texts.get("id", "")) else {}
