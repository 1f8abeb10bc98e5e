"""Checkpoint files of a training: written atomically, and checked before a training is resumed from them."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer

from nodelens.results.files import write

NEW, LAST, PREVIOUS = "new.ckpt", "last.ckpt", "previous.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint next to its destination and renames it, so that it appears complete or not at all.

    Lightning's own writer collects the file in the folder for temporary files. If that is another file system, as usual on
    clusters, the file is copied from there, and a copy that is interrupted leaves a part of a checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Raises OSError, with the path, if the checkpoint cannot be written."""
        if "://" in str(path):  # object storage, which has transactions of its own
            super().save_checkpoint(checkpoint, path, storage_options)
            return

        def fill(temporary: Path) -> None:
            with temporary.open("wb") as file:  # given a path, torch reports a full disk as an internal error
                torch.save(checkpoint, file)

        # a new last checkpoint changes its name; the checksums in its file, which ``damage`` compares, go with it
        write(Path(path), fill, listed=Path(path).name != NEW)


def write_atomically(trainer: Trainer) -> None:
    """Makes a trainer write its checkpoints atomically, unless its strategy or its user chose another way."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None if it is intact: its checksums are compared, which torch does not do."""
    if path.is_dir():  # a sharded checkpoint
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        return f"it is {path.stat().st_size} bytes long and not a complete checkpoint" if path.exists() else str(error)
    return None if wrong is None else f"the checksum of its record {wrong} is wrong"


def to_resume_from(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint in a folder from which a training continues, and one line for each newer one that is damaged.

    That is ``last.ckpt``, else ``previous.ckpt``, else the newest other one; None if the folder has neither of the first two.
    Raises ValueError if all are damaged.
    """
    found = [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()]
    if not found:
        return None, []
    others = [path for path in folder.glob("*.ckpt") if path not in found]
    found += sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
    lines: list[str] = []
    for path in found:
        wrong = damage(path)
        if wrong is None:
            return path, lines
        lines.append(f"{path} is damaged: {wrong}")
    raise ValueError(f"{'; '.join(lines)}; no other checkpoint is there to continue from: choose another folder (hydra.run.dir=)")
