"""Where a long run keeps the states that it will come back to: on the device, in host memory, in a directory.

``hg.metagradient`` keeps few states of the training and runs on from them again. A store says where they lie, and how
many there may be. ``directory`` also keeps how far the run has come: after a kill, the same call goes on from there.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import tree, validate
from hypergrad.types import PyTree

__all__ = ["DamagedError", "Kept", "Store", "device", "directory", "host"]

_ANOTHER = "Pass another directory, or remove this one if it holds nothing else."
_BY_CHECKSUM = "values of", "key", "losses", "data"  # what a directory knows by a checksum alone


class DamagedError(Exception):
    """A kept file is missing or is not what was written. The run computes it again where it can."""


class Kept:
    """States of one run by number, on the device. Other stores override what differs.

    Attributes:
      bytes_moved: written and read so far.
    """

    def __init__(self) -> None:
        self.bytes_moved = 0
        self._states: dict[int, Any] = {}

    def put(self, number: int, state: PyTree) -> None:
        """Keep a state."""
        self._states[number] = state

    def get(self, number: int, like: PyTree) -> PyTree:
        """Return a state that was kept, placed as ``like`` is; raise ``DamagedError`` where it is not whole."""
        del like
        return self._states[number]

    def drop(self, number: int) -> None:
        """Forget a state."""
        self._states.pop(number, None)

    def record(self, position: int, progress: PyTree) -> None:
        """Note how far the run has come; ``progress`` None: what it has gathered is as it was."""

    def resume(self, progress: PyTree) -> tuple[int, PyTree]:
        """Return how far an earlier call has come, and what it has gathered; (0, ``progress``) where there is none."""
        return 0, progress

    def reserve(self, num_bytes: int) -> None:
        """Raise ``OSError`` where there is no space for so many bytes, those that are kept included."""


class Store(NamedTuple):
    """Where states are kept.

    Attributes:
      slots: s ≥ 1, states that may be kept, that at the start of the run included.
      open: ``open(about) -> Kept``: for one run. ``about()`` returns what identifies the run, by name.
      where: "device", "host" or "directory".
    """

    slots: int
    open: Callable[[Callable[[], Mapping[str, Any]]], Kept]
    where: str


def device(slots: int = 10) -> Store:
    """Keep states on the device: no transfers, and ``slots`` copies of weights and optimizer state there.

    Args:
      slots: s ≥ 1.

    Returns:
      A ``Store``.

    Raises:
      TypeError, ValueError: ``slots`` is no int, or below 1.

    >>> device(3).slots
    3
    """
    return Store(validate.positive_int("slots", slots), lambda _about: Kept(), "device")


def host(slots: int = 10) -> Store:
    """Keep states in the memory of the host; the device holds one at a time.

    Args:
      slots: s ≥ 1.

    Returns:
      A ``Store``.

    Raises:
      TypeError, ValueError: ``slots`` is no int, or below 1.

    >>> host(3).where
    'host'
    """
    return Store(validate.positive_int("slots", slots), lambda _about: _Host(), "host")


def directory(path: str | os.PathLike[str], slots: int = 10) -> Store:
    """Keep states in files, and resume a run that was stopped: the same call goes on, and ends with the same bits.

    Args:
      path: a directory for one call with one λ, created if missing. Only one process may use it at a time. Files of
        other names stay. After the run it holds the result, and the same call returns it at once: remove it to start
        again.
      slots: s ≥ 1.

    Returns:
      A ``Store``. Each file is written under another name and then renamed, and has a checksum. A state that is damaged
      is named in a warning, and computed again from the one before it.

    Raises:
      TypeError, ValueError: ``slots`` is no int, or below 1. When a run begins: a directory of another run, with the
        name of what differs; one with files of the names of ours, and no run.
      OSError: when a run begins, a path that cannot be written, or too little space.

    >>> directory("run_1", slots=3).slots
    3
    """
    folder = pathlib.Path(path).expanduser()
    return Store(
        validate.positive_int("slots", slots),
        lambda about: _Directory(folder, slots, about()),
        "directory",
    )


class _Host(Kept):
    def put(self, number: int, state: PyTree) -> None:
        self._states[number] = jax.tree.map(lambda leaf: np.array(_to_host(leaf)), state)
        self.bytes_moved += tree.num_bytes(self._states[number])

    def get(self, number: int, like: PyTree) -> PyTree:
        self.bytes_moved += tree.num_bytes(self._states[number])
        return jax.tree.map(_placed, self._states[number], like)


class _Directory(Kept):
    def __init__(self, folder: pathlib.Path, slots: int, about: Mapping[str, Any]) -> None:
        super().__init__()
        self._folder = folder
        about = json.loads(json.dumps({**about, "slots": slots}))
        known, self._about = folder / "run.json", json.dumps(about, indent=1).encode()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if known.exists():
                _compare(folder, _content(known, dict), about)
            else:
                self._refuse_others()
                _write(known, [self._about])
        except OSError as error:
            fix = "Pass a path that this process may write."
            raise OSError(
                validate.message("a directory to keep states in", f"{folder}: {error.strerror}", fix)
            ) from error

    def put(self, number: int, state: PyTree) -> None:
        self._save(f"state_{number}", state)

    def get(self, number: int, like: PyTree) -> PyTree:
        return self._load(f"state_{number}", like)

    def drop(self, number: int) -> None:
        (self._folder / f"state_{number}").unlink(missing_ok=True)

    def record(self, position: int, progress: PyTree) -> None:
        _, before = self._position()
        name = before if progress is None else f"progress_{position}"
        if progress is not None:
            self._save(name, progress)
        _write(self._folder / "position.json", [json.dumps([position, name, self._signed(position, name)]).encode()])
        if before and before != name:
            (self._folder / before).unlink(missing_ok=True)

    def resume(self, progress: PyTree) -> tuple[int, PyTree]:
        position, name = self._position()
        for file in self._own_files():  # what a kill has left
            if file.name != name and not re.fullmatch(r"state_\d+", file.name):
                file.unlink()
        try:
            return position, (self._load(name, progress) if name else progress)
        except DamagedError:  # the run begins again, and with it the position
            (self._folder / "position.json").unlink()
            (self._folder / name).unlink(missing_ok=True)
            raise

    def reserve(self, num_bytes: int) -> None:
        free = shutil.disk_usage(self._folder).free + sum(file.stat().st_size for file in self._own_files())
        if free < num_bytes:
            fix = "Free space, take fewer slots, or another directory."
            raise OSError(validate.message(f"{num_bytes:,} bytes of space in {self._folder}", f"{free:,}", fix))

    def _refuse_others(self) -> None:
        """Refuse files of our names where no run is described: they are of another program, or of a damaged run."""
        names = sorted(file.name for file in [*self._own_files(), self._folder / "position.json"] if file.exists())
        if names:
            wanted = f"a directory without {names[0]}, or with the run.json of its run"
            raise ValueError(validate.message(wanted, str(self._folder), _ANOTHER))

    def _own_files(self) -> list[pathlib.Path]:
        return [file for file in self._folder.iterdir() if re.fullmatch(r"(progress|state)_\d+(\.part)?", file.name)]

    def _position(self) -> tuple[int, str]:
        file = self._folder / "position.json"
        if not file.exists():
            return 0, ""
        try:
            position, name, signed = _content(file, list)
        except ValueError:
            position, name, signed = 0, "", ""
        if signed != self._signed(position, name):
            wanted = f"{file} as this run wrote it"
            raise ValueError(validate.message(wanted, "a damaged file, or one of another run", _ANOTHER))
        return position, name

    def _signed(self, position: int, name: str) -> str:
        return hashlib.blake2b(self._about + f"{position} {name}".encode(), digest_size=16).hexdigest()

    def _save(self, name: str, state: PyTree) -> None:
        """Write the leaves, one at a time, and their checksum."""

        def parts() -> Iterator[Any]:
            digest = hashlib.blake2b()
            for leaf in jax.tree.leaves(state):
                part = _to_host(leaf).reshape(-1).view(np.uint8).data
                digest.update(part)
                self.bytes_moved += part.nbytes
                yield part
            yield digest.digest()

        _write(self._folder / name, parts())

    def _load(self, name: str, like: PyTree) -> PyTree:
        file = self._folder / name
        if not file.exists():
            raise DamagedError(f"{file} is missing")
        digest = hashlib.blake2b()

        def read(like: Any) -> Any:
            form = jax.eval_shape(_raw, like)
            part = stream.read(form.size * form.dtype.itemsize)
            digest.update(part)
            self.bytes_moved += len(part)
            if len(part) < form.size * form.dtype.itemsize:
                raise DamagedError(f"{file} is damaged")
            return _placed(np.frombuffer(part, form.dtype).reshape(form.shape), like)

        with file.open("rb") as stream:
            state = jax.tree.map(read, like)
            if stream.read() != digest.digest():
                raise DamagedError(f"{file} is damaged")
        return state


def _content(file: pathlib.Path, kind: type) -> Any:
    try:
        found = json.loads(file.read_text())
    except ValueError:
        found = None
    if not isinstance(found, kind):
        raise ValueError(validate.message(f"{file} as a run wrote it", "another file, or a damaged one", _ANOTHER))
    return found


def _compare(folder: pathlib.Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            fix = "Pass what the run was begun with, or another directory."
            values = f"{before.get(name)!r}, not {value!r}"
            got = f"one with different {name}" if name.startswith(_BY_CHECKSUM) else f"one with {name} {values}"
            raise ValueError(validate.message(f"{folder} to belong to this run", got, fix))


def _write(file: pathlib.Path, parts: Iterable[Any]) -> None:
    """Write a file such that it is whole or absent, also after a loss of power."""
    beside = file.with_name(file.name + ".part")
    with beside.open("wb") as stream:
        for part in parts:
            stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, file)


def _raw(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if tree.is_key(leaf) else jnp.asarray(leaf)


def _to_host(leaf: Any) -> np.ndarray:
    return np.asarray(jax.device_get(_raw(leaf)))


def _placed(leaf: np.ndarray, like: Any) -> Any:
    """Return an array of the kind and place of ``like``; a copy, since on CPU a device array may share its memory."""
    if tree.is_key(like):
        return jax.random.wrap_key_data(jnp.array(leaf), impl=jax.random.key_impl(like))
    # Committed arrays stay committed and others not: jit would compile again.
    return jax.device_put(np.array(leaf), like.sharding) if like.committed else jnp.array(leaf)
