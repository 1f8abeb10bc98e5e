"""Opens a data set by hub id or local path, with a one-line error if it is not available."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import config
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import constants

from nodelens.messages import either, setting


def open_sets(path: str, name: str | None = None, streaming: bool = False) -> dict[str, Any]:
    """The splits of a hub id, or of a local folder or file, by name.

    Raises: FileNotFoundError, in one line, if the folder does not exist, or the hub lacks the data set or is unreachable;
    ValueError for a data set that is a script, which is never run.
    """
    place = Path(path).expanduser()
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        stored = datasets.load_from_disk(str(place))
        sets = _by_name(stored) if isinstance(stored, dict) else {"train": stored}
        return {key: part.to_iterable_dataset() if streaming else part for key, part in sets.items()}
    if place.exists():
        return _local(place, name, streaming)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise FileNotFoundError(
            f"no folder at {place.resolve()}; set {setting('dataset.path')} to a folder with images or parquet, or to a hub id"
        )
    try:
        with _without_retries():
            return _by_name(datasets.load_dataset(path, name, streaming=streaming))
    except (ConnectionError, FileNotFoundError) as error:
        reached = isinstance(error, DatasetNotFoundError)
        why = "the hub does not have it or requires a login" if reached else "the hub cannot be reached"
        raise FileNotFoundError(
            f"dataset '{path}' is not on this machine and {why}; "
            + either(
                "give the path of a folder with images or parquet",
                "use dataset=digits, or dataset.path=<folder with images or parquet>",
            )
        ) from error
    except RuntimeError as error:
        raise _script(path, error) from error


def stored_files(path: str, name: str | None = None) -> list[Path]:
    """The local cache files of a hub id, by split. Raises the errors of ``open_sets``."""
    sets = open_sets(path, name)
    return [Path(part["filename"]) for key in sorted(sets) for part in sets[key].cache_files]


def _local(place: Path, name: str | None, streaming: bool) -> dict[str, Any]:
    try:
        if place.is_file():
            return _by_name(datasets.load_dataset("parquet", data_files=str(place), streaming=streaming))
        return _by_name(datasets.load_dataset(str(place), name, streaming=streaming))
    except (FileNotFoundError, DatasetGenerationError) as error:
        raise FileNotFoundError(
            f"no data set at {place.resolve()}; {setting('dataset.path')} is a folder with one folder of "
            f"images per class, with parquet files, or from save_to_disk"
        ) from error
    except RuntimeError as error:
        raise _script(str(place), error) from error


def _script(path: str, error: RuntimeError) -> ValueError:
    return ValueError(f"dataset '{path}' cannot be opened: {error}; code is never run: convert the data to parquet files")


def _by_name(sets: Any) -> dict[str, Any]:
    return {str(name): part for name, part in sets.items()}


@contextmanager
def _without_retries() -> Iterator[None]:
    """Use only the cache if the hub does not answer, because its client retries for 23 seconds first."""
    offline = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = offline or not hub_answers()
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = offline


def hub_answers() -> bool:
    """Whether the hub answers one request within 5 seconds."""
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answered, with an error
    except OSError:
        return False
    return True
