"""Small stored data sets of random pictures, in the three forms that `Hub` reads."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

N, NAMES = 41, ("cat", "dog", "eel")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "hf"))


@pytest.fixture(scope="session")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (N, 10, 10, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def table(pictures) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    rows = {"image": [Image.fromarray(picture) for picture in pictures], "label": [i % 3 for i in range(N)]}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture(scope="session")
def stored(table, pictures, tmp_path_factory) -> dict[str, str]:
    """Paths by form: saved, parquet, imagefolder (with a test folder)."""
    base: Path = tmp_path_factory.mktemp("stored")
    table.save_to_disk(str(base / "saved"))
    (base / "parquet").mkdir()
    table.to_parquet(str(base / "parquet" / "train.parquet"))
    for i, picture in enumerate(pictures):
        folder = base / "imagefolder" / ("train" if i < 30 else "test") / NAMES[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
    return {form: str(base / form) for form in ("saved", "parquet", "imagefolder")}
