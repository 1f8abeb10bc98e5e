"""A cache of tokenised text: one memory-mapped file per text, named after a hash of everything that determines it."""

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
_FORM = 1  # version of the file format
_CHUNK = 1 << 24  # bytes hashed at once

Parts = tuple[TokenStream, list[int]]  # a stream, and the edges of its parts


def cached(folder: str | Path, about: dict[str, Any], make: Callable[[], Parts]) -> Parts:
    """The stream that ``make`` returns, read from the folder if it is there, otherwise made and stored.

    The file is memory-mapped, so the system keeps only used parts in memory. A damaged file, whose hash differs, is made
    again. about: plain values that determine the tokens; their hash is the file name.
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
    write(file, lambda target: save_file(tensors, target, {"hash": _hash_of(tensors)}), listed=False)
    return _opened(file)


def file_hash(files: Iterable[Path]) -> str:
    """A hash of the contents of files, in this order."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.stat().st_size} ".encode())
        for part in _chunks(file):
            digest.update(part)
    return digest.hexdigest()


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while part := stream.read(_CHUNK):
            yield part


def _opened(file: Path) -> Parts:
    with safe_open(file, "pt") as held:
        tensors = {name: held.get_tensor(name) for name in list(held.keys())}
        if (held.metadata() or {}).get("hash") != _hash_of(tensors):
            raise ValueError("its contents do not match its hash")
    edges = tensors.pop("edges").tolist()
    return TokenStream(**tensors), edges


def _hash_of(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {len(tensors[name])} ".encode())
        for part in tensors[name].split(_CHUNK):
            digest.update(part.numpy().data)
    return digest.hexdigest()
