"""The base data module of all image sources."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nodelens.messages import setting

from .convert import Convert
from .source import Images, Source, check_labels
from .split_data import SplitData, silence_warnings
from .splits import make_splits, write_splits


class ImageData(SplitData):
    """Disjoint train, val, test and calibration splits of one source; subclasses implement `read`.

    classes, channels, size: what the network expects; images are converted, labels are checked; None: as found
    mean, std:    normalisation after uint8 is scaled to [0, 1]; one number, or one per channel
    val, test:    held-out shares of the samples; test applies only if the source has no test set
    calibration:  samples held out from training, at most half of the remaining ones
    seed:         of the splits and of the training order; workers: loading processes
    Raises: ValueError, in `setup`, for unsuitable labels, channels or shares.
    """

    def __init__(
        self,
        *,
        classes: int | None = None,
        channels: int | None = None,
        size: int | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        batch_size: int = 64,
        val: float = 0.1,
        test: float = 0.2,
        calibration: int = 512,
        seed: int = 0,
        workers: int = 0,
    ):
        super().__init__(batch_size, workers, seed, val, test, calibration)
        self.classes, self.channels, self.size, self.mean, self.std = classes, channels, size, mean, std
        self.source: Source | None = None

    def read(self) -> Source:
        """Open the source; called once."""
        raise NotImplementedError(f"{type(self).__name__} does not define read(), which opens its source")

    def setup(self, stage: str | None = None) -> None:
        """Read and split; the second call does nothing."""
        silence_warnings()
        if self.source is not None:
            return
        source = self.read()
        self.indices = make_splits(source.rows, source.own_test, seed=self.seed, **self.shares)
        self.classes = self._found_classes(source)
        shape = source.fetch(torch.zeros(1, dtype=torch.int64), self._convert()).shape  # also checks mean and std
        self.channels = shape[1]
        self.size = self.size or (shape[2] if shape[2] == shape[3] else None)
        self.source = source

    def numbered(self, ids: Tensor) -> Images:
        return Images(self._ready(), ids, self._convert())

    def save_splits(self, folder: str | Path) -> Path:
        """Write `splits.json` into `folder`: fingerprint, seed, sizes, and the sample numbers of each split except train."""
        self.setup()
        return write_splits(folder, self.indices, {"fingerprint": self.fingerprint(), "seed": self.seed})

    def fingerprint(self) -> str:
        """A hash of the source's samples, before conversion."""
        self.setup()
        return self._ready().fingerprint()

    def _ready(self) -> Source:
        if self.source is None:
            raise RuntimeError("the data are not loaded; call setup() first")
        return self.source

    def _convert(self) -> Convert:
        return Convert(self.size, self.channels, self.mean, self.std)

    def _found_classes(self, source: Source) -> int:
        classes = self.classes or source.classes
        if classes is None:
            raise ValueError(f"the number of classes of the source is unknown; set {setting('dataset.classes')}")
        if source.labels is not None:
            check_labels(source.labels, classes)
        return classes
