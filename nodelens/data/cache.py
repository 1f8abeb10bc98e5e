"""Tokens that were made once: stored in one file each, found by what they were made of, read where they lie on the disk."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nodelens.results.files import write

from .blocks import TokenStream

_log = logging.getLogger(__name__)
_FORM = 1  # of the file; one more when the same text would be stored otherwise
_CHUNK = 1 << 24  # bytes that are hashed at once

Parts = tuple[TokenStream, list[int]]  # a stream, and where its parts begin and the last one ends


def cached(folder: str | Path, about: dict[str, Any], make: Callable[[], Parts]) -> Parts:
    """The stream that ``make`` returns, stored in a folder under a hash of what it is made of; made only where it is not there.

    It is mapped into memory, of which the system keeps what is used. A file that cannot be read, or does not hold what was
    written, is made again. about: plain values that decide which tokens there are.
    """
    key = hashlib.blake2b(json.dumps({"form": _FORM, **about}, sort_keys=True).encode(), digest_size=16).hexdigest()
    file = Path(folder).expanduser() / f"{key}.safetensors"
    if file.is_file():
        try:
            return _opened(file)
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            _log.warning("the cached tokens at %s are damaged (%s); they are made again", file, error)
    stream, edges = make()
    tensors = {"ids": stream.ids, "nbytes": stream.nbytes, "starts": stream.starts, "edges": torch.tensor(edges)}
    if stream.marks is not None:
        tensors["marks"] = stream.marks
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    write(file, lambda beside: save_file(tensors, beside, {"hash": _hash_of(tensors)}))
    return _opened(file)


def file_hash(files: Iterable[Path]) -> str:
    """A hash of what files hold, in this order."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.stat().st_size} ".encode())
        for part in _stretches(file):
            digest.update(part)
    return digest.hexdigest()


def _stretches(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while part := stream.read(_CHUNK):
            yield part


def _opened(file: Path) -> Parts:
    with safe_open(file, "pt") as held:
        tensors = {name: held.get_tensor(name) for name in list(held.keys())}
        if (held.metadata() or {}).get("hash") != _hash_of(tensors):
            raise ValueError("it does not hold what was written")
    edges = tensors.pop("edges").tolist()
    return TokenStream(**tensors), edges


def _hash_of(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {len(tensors[name])} ".encode())
        for part in tensors[name].split(_CHUNK):
            digest.update(part.numpy().data)
    return digest.hexdigest()
