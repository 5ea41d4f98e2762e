"""What an HDF5 file of weights that may come from anywhere holds, looked at before anything reads it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import h5py

from coppice.errors import CoppiceError

MOST = 1_000_000  # groups and arrays


def arrays_in(path: Path, source: io.BytesIO | Path, size: int) -> dict[str, int]:
    """The bytes of every array by its name: each lies in the file (of ``size`` bytes) whole, and is made of numbers.

    ``path``: what to call it. Raises CoppiceError where an array is larger than the file, lies elsewhere, or where groups lead in circles.
    """
    found: dict[str, int] = {}
    try:
        with h5py.File(source, "r") as file:
            seen, pending = {_place(file)}, [("", file)]
            while pending:
                prefix, group = pending.pop()
                for name in group:
                    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                        raise CoppiceError(f"{path} was refused: its weights {name!r} are a link to somewhere else")
                    entry, whole = group[name], f"{prefix}{name}"
                    if _place(entry) in seen or len(seen) > MOST:
                        raise CoppiceError(f"{path} was refused: its weights {whole!r} lie in it twice, or there are far too many")
                    seen.add(_place(entry))
                    if isinstance(entry, h5py.Group):
                        pending.append((f"{whole}/", entry))
                    else:
                        found[whole] = _bytes_of(path, whole, entry, size)
            if sum(found.values()) > size:
                raise CoppiceError(f"{path} was refused: its weights are said to be larger than the file")
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, RecursionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CoppiceError(f"{path} is truncated or its weights are damaged: {lines[0][:160]}") from error
    return found


def attributes_of(path: Path) -> set[str]:
    """The names of what the file says of itself, from which its kind is seen."""
    try:
        with h5py.File(path, "r") as file:
            return set(file.attrs)
    except (OSError, RuntimeError, ValueError) as error:
        raise CoppiceError(f"{path} is truncated or no HDF5 file: save the weights again with model.save_weights") from error


def _place(entry: Any) -> int:
    """Where an object lies in the file, by whatever name it was reached."""
    return int(h5py.h5o.get_info(entry.id).addr)


def _bytes_of(path: Path, name: str, entry: Any, size: int) -> int:
    if not isinstance(entry, h5py.Dataset) or entry.dtype.hasobject:
        raise CoppiceError(f"{path} was refused: its weights {name!r} are no numbers")
    if entry.external or entry.is_virtual or entry.nbytes > size:
        raise CoppiceError(f"{path} was refused: its weights {name!r} are said to be {entry.nbytes} bytes, the file has fewer")
    return int(entry.nbytes)
