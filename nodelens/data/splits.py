"""Assigns samples to splits: seeded, disjoint, the same in every process, and stored with the results."""

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nodelens.messages import setting
from nodelens.results.files import write_text

NAMES = ("train", "val", "test", "calibration", "all")


def check_loading(batch_size: int, workers: int) -> None:
    """Raises ValueError for a batch without samples or a negative number of worker processes."""
    if batch_size < 1:
        raise ValueError(f"{setting('dataset.batch_size')} is {batch_size}; give a count of samples, 1 or more")
    if workers < 0:
        raise ValueError(f"{setting('dataset.workers')} is {workers}; give a count of processes, 0 to read without any")


def make_splits(rows: int, own_test: int, val: float, test: float, calibration: int, seed: int) -> dict[str, Tensor]:
    """Sorted sample numbers (int64) of train, val, test and calibration; each number occurs once.

    rows:         training rows of the source, numbered from 0; its `own_test` test rows follow
    val, test:    shares of `rows`; test applies only if the source has no test rows
    calibration:  number of samples taken from the remaining training samples, at most half of them
    Raises: ValueError for a share outside [0, 1), a negative count, or if no training sample remains.
    """
    for name, share in (("val", val), ("test", test)):
        if not 0 <= share < 1:
            raise ValueError(f"{setting(f'dataset.{name}')} is {share}; give a share of the samples in [0, 1)")
    if calibration < 0 or int(calibration) != calibration:
        raise ValueError(f"{setting('dataset.calibration')} is {calibration}; give a count of samples, 0 or more")
    held = {"test": 0 if own_test else round(test * rows), "val": round(val * rows)}
    free = rows - held["test"] - held["val"]
    if free < 1:
        raise ValueError(
            f"no sample is left to train on: {rows} samples, of which {held['val']} go to val and "
            f"{held['test']} to test; lower {setting('dataset.val')} and {setting('dataset.test')}"
        )
    held["calibration"] = min(int(calibration), free // 2)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    parts = order.split([*held.values(), rows - sum(held.values())])
    splits = {name: part.sort().values for name, part in zip([*held, "train"], parts, strict=True)}
    if own_test:
        splits["test"] = torch.arange(rows, rows + own_test)
    return splits


def pick(splits: dict[str, Tensor], split: str) -> Tensor:
    """The sorted sample numbers of `split`; "all" means every sample.

    Raises: ValueError for an unknown name.
    """
    if split not in NAMES:
        near = difflib.get_close_matches(str(split), NAMES, 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ValueError(f"no split '{split}'; {hint}there are {', '.join(NAMES)}")
    return torch.cat(list(splits.values())).sort().values if split == "all" else splits[split]


def shard(ids: Tensor, rank: int, world: int) -> Tensor:
    """The numbers at positions i with i % world == rank: each sample once over all ranks, no sample repeated.

    Raises: ValueError unless 0 <= rank < world.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of world {world} does not exist; ranks run from 0 to world - 1")
    return ids[rank::world]


def write_splits(folder: str | Path, splits: dict[str, Tensor], about: dict[str, Any]) -> Path:
    """Write `splits.json` atomically: sizes, and the sample numbers of every split except train (the rest)."""
    file = Path(folder) / "splits.json"
    record = about | {"sizes": {name: len(ids) for name, ids in splits.items()}}
    record |= {name: ids.tolist() for name, ids in splits.items() if name != "train"}
    write_text(file, json.dumps(record))
    return file
