"""States of a model that are carried from one pass to another."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nodelens.results.files import write


@dataclass(frozen=True)
class StateMap:
    """A function of a state, applied when it is saved; the result is the state ``mapped_<name>``.

    retain_original: whether the state itself is saved, too
    """

    map_fn: Callable[[Tensor], Tensor]
    retain_original: bool = True

    def apply(self, state_name: str, state_tensor: Tensor) -> dict[str, Tensor]:
        """{name: tensor} of what is saved. Raises ValueError for a function that returns no tensor."""
        mapped = self.map_fn(state_tensor)
        if not isinstance(mapped, Tensor):
            raise ValueError(f"the map of state {state_name!r} returns {type(mapped).__name__}: it must return a tensor")
        return ({state_name: state_tensor} if self.retain_original else {}) | {f"mapped_{state_name}": mapped}


@dataclass(frozen=True)
class StateConfig:
    """Which states a pass saves and loads. A single name may stand for a list.

    Names are ``embed`` (the embeddings), ``layer_<k>`` (the output of block k), ``layer`` (all layers of the context) and
    ``lm_head`` (the logits); what a map saves is ``mapped_<name>``.

    save_states:     states to save, at the positions of the context (``embed``: all)
    load_states:     states that take the place of the model's own: a ``layer_<k>`` in every layer of the context, ``layer`` each
                     saved layer in its own
    state_maps:      {name: map}: a ``StateMap``, a function, or a tuple of a function and its further arguments
    position_maps:   {name: (source, target)}: positions of the state and of the prompt, each as in ``RepresentationContext``.
                     Without one, a state of as many positions as the context selects takes their place, of a longer one those
                     positions
    concate_outputs: states of which several passes are joined along the first axis; others replace the one before
    """

    save_states: str | Sequence[str] = ()
    load_states: str | Sequence[str] = ()
    state_maps: Mapping[str, Any] = field(default_factory=dict)
    position_maps: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    concate_outputs: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("save_states", "load_states", "concate_outputs"):
            value = getattr(self, name)
            object.__setattr__(self, name, [value] if isinstance(value, str) else list(value or ()))
        object.__setattr__(self, "position_maps", dict(self.position_maps or {}))
        object.__setattr__(self, "state_maps", {name: _as_map(name, given) for name, given in (self.state_maps or {}).items()})
        for name, pair in self.position_maps.items():
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(
                    f"position_maps[{name!r}] is {pair!r}: give (source, target), positions of the state and of the prompt"
                )


class StateManager:
    """Keeps states by name between passes.

    ``save``, ``load``, ``pop``, ``map`` and ``clear`` are also there under the names of minterp: ``add_state``, ``get_state``,
    ``load_state``, ``pop_state``. States are detached copies, on the device of their site.

    max_bytes: memory that states may take; those beyond it are written to safetensors files in a private temporary folder, which is
               removed with the manager. None: no limit. spill: whether they may be written; if not, states beyond are an error
    """

    def __init__(self, config: StateConfig | None = None, max_bytes: int | None = None, spill: bool = True):
        """Raises ValueError for a budget that is not positive."""
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(f"max_bytes is {max_bytes}: give a positive number of bytes, or None for no limit")
        self.config = config or StateConfig()
        self.max_bytes, self.spill = max_bytes, spill
        self._parts: dict[str, list[Tensor | Path]] = {}
        self._folder: Path | None = None
        self._written = 0

    def update_config(self, config: StateConfig) -> None:
        """Another config for the next passes; states stay."""
        self.config = config

    def save(self, name: str, state: Tensor) -> None:
        """Saves a state, mapped as the config says.

        Raises ValueError for a state that differs from those it is to be joined to in width, dtype or device, and for one beyond
        the budget where it must not be written.
        """
        self.save_all({name: state})

    def save_all(self, states: Mapping[str, Tensor]) -> None:
        """Saves several states, all or none. Raises ValueError as ``save`` does."""
        mapped: dict[str, Tensor] = {}
        for name, state in states.items():
            given = self.config.state_maps.get(name) or self.config.state_maps.get(name.partition("_")[0])
            mapped |= given.apply(name, state) if given else {name: state}
        self._check(mapped)
        for name, state in mapped.items():
            self._add(name, state)

    def load(self, name: str) -> Tensor:
        """A state. Raises ValueError for a name that is not saved."""
        parts = [self._read(part) for part in self._known(name)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def pop(self, name: str) -> Tensor:
        """A state, which is not kept. Raises ValueError for a name that is not saved."""
        state = self.load(name)
        self._drop(name)
        return state

    def map(self, name: str, map_fn: Callable[[Tensor], Tensor], retain_original: bool = True) -> Tensor:
        """Maps a saved state; the result is returned and saved as ``mapped_<name>``. Raises ValueError as ``save`` does."""
        mapped = StateMap(map_fn, retain_original).apply(name, self.load(name))[f"mapped_{name}"]
        self._check({f"mapped_{name}": mapped})
        self._add(f"mapped_{name}", mapped, joined=False)
        if not retain_original:
            self._drop(name)
        return mapped

    def clear(self) -> None:
        """Forgets all states, and removes what was written."""
        self._parts.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    add_state, get_state, load_state, pop_state = save, load, load, pop

    @property
    def names(self) -> list[str]:
        """Names of the saved states, in the order in which they were saved."""
        return list(self._parts)

    @property
    def states(self) -> dict[str, Tensor]:
        """{name: state}, those that were written read again."""
        return {name: self.load(name) for name in self._parts}

    @property
    def nbytes(self) -> int:
        """Bytes that states take in memory."""
        return sum(part.nbytes for parts in self._parts.values() for part in parts if isinstance(part, Tensor))

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __repr__(self) -> str:
        written = sum(isinstance(part, Path) for parts in self._parts.values() for part in parts)
        more = f", {written} parts on disk" if written else ""
        return f"StateManager({', '.join(self._parts) or 'no states'}; {self.nbytes:,} bytes in memory{more})"

    def _known(self, name: str) -> list[Tensor | Path]:
        if name not in self._parts:
            raise ValueError(f"there is no state {name!r}; saved are {', '.join(self._parts) or 'none'}")
        return self._parts[name]

    def _joined(self, name: str) -> bool:
        return name in self._parts and name in self.config.concate_outputs

    def _check(self, states: Mapping[str, Tensor]) -> None:
        """Raises ValueError for states that cannot be joined to those before, or that are beyond a budget that must be kept."""
        for name, state in states.items():
            if self._joined(name):
                _check_alike(name, self._read(self._parts[name][0]), state)
        new, kept = sum(state.nbytes for state in states.values()), self._kept(states)
        if self.max_bytes is not None and kept + new > self.max_bytes and not self.spill:
            raise ValueError(
                f"states {', '.join(states)} take {new:,} bytes, with {kept:,} bytes of others; max_bytes is {self.max_bytes:,}: "
                "save fewer states or positions, raise max_bytes, or let them be written with spill=True"
            )

    def _kept(self, names: Collection[str]) -> int:
        """Bytes in memory that stay when states of these names are saved."""
        replaced = [part for name in names if not self._joined(name) for part in self._parts.get(name, ())]
        return self.nbytes - sum(part.nbytes for part in replaced if isinstance(part, Tensor))

    def _add(self, name: str, state: Tensor, joined: bool | None = None) -> None:
        if not (self._joined(name) if joined is None else joined):
            self._drop(name)
        beyond = self.max_bytes is not None and self.nbytes + state.nbytes > self.max_bytes
        self._parts.setdefault(name, []).append(self._write(state) if beyond else state.detach().clone())

    def _write(self, state: Tensor) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="nodelens-states-"))  # readable by its owner only
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._written += 1
        path = self._folder / f"{self._written}.safetensors"
        write(path, lambda target: save_file({str(state.device): state.detach().contiguous()}, target), listed=False)
        return path

    def _read(self, part: Tensor | Path) -> Tensor:
        if isinstance(part, Tensor):
            return part
        ((device, state),) = load_file(part).items()
        return state.to(device)

    def _drop(self, name: str) -> None:
        for part in self._parts.pop(name, ()):
            if isinstance(part, Path):
                part.unlink(missing_ok=True)


def _as_map(name: str, given: Any) -> StateMap:
    """A map from itself, a function, or a function and its further arguments."""
    if isinstance(given, StateMap):
        return given
    function, *more = given if isinstance(given, (tuple, list)) and given else (given,)
    if not callable(function):
        raise ValueError(
            f"state_maps[{name!r}] is {given!r}: give a StateMap, a function, or a tuple of a function and its arguments"
        )
    return StateMap(lambda state: function(state, *more)) if more else StateMap(function)


def _check_alike(name: str, first: Tensor, state: Tensor) -> None:
    """Raises ValueError for states that cannot be joined along the first axis."""
    if first.shape[1:] != state.shape[1:] or first.dtype != state.dtype:
        kinds = [f"{tuple(s.shape)} {str(s.dtype).removeprefix('torch.')}" for s in (first, state)]
        raise ValueError(
            f"state {name!r} is {kinds[1]}, and those before it {kinds[0]}: to join them, all but the first axis, and the dtype, "
            "must be equal; leave it out of concate_outputs, or pop those before"
        )
