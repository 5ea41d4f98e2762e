"""Weights with many zeros in a small file that loads back bit for bit: a safetensors file with one bit a weight and what is not zero.

Of a tensor that gets smaller so there are two in the file: `mask/NAME` (uint8, a bit a weight, the highest of a byte first) and
`values/NAME` (what is not zero, in order, in its own dtype); all others are `dense/NAME`. The shapes are in the header, as JSON. Zero is
what has no bit set: a negative zero is a value. No pickle, and nothing is unpacked before its size is known to be within a limit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coppice.errors import CoppiceError, VerificationError

FORMAT = "coppice-sparse-1"
LIMIT = 8 * 2**30  # bytes that a file may become when it is unpacked
_MOST_DIMS = 16
_DENSE, _MASK, _VALUES = "dense/", "mask/", "values/"


def save_sparse(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write `tensors`, all of PyTorch or all NumPy arrays, to `path`, whole or not at all."""
    from coppice.run import replacing

    stored: dict[str, Any] = {}
    shapes: dict[str, list[int]] = {}
    for name, given in tensors.items():
        tensor = given.copy("C") if isinstance(given, np.ndarray) else given.detach().cpu().clone().contiguous()
        flat = tensor.reshape(-1)
        raw = _bytes_of(flat)
        stays = np.asarray(raw.any(1))
        if tensor.ndim == 0 or stays.sum() * raw.shape[1] + -(-len(raw) // 8) >= raw.size:
            stored[_DENSE + name] = tensor
            continue
        shapes[name] = list(tensor.shape)
        stored[_MASK + name] = _alike(np.packbits(stays), tensor)
        stored[_VALUES + name] = flat[_alike(stays, tensor)]
    with replacing(path) as temporary:
        _writer(tensors)(stored, temporary, metadata={"format": FORMAT, "shapes": json.dumps(shapes)})


def save_checked(path: Path, tensors: Mapping[str, Any]) -> str:
    """The same, and what was checked of it, in words: VerificationError if the file does not hold the same bits."""
    save_sparse(path, tensors)
    again = load_sparse(path, arrays=_are_arrays(tensors))
    if again.keys() != tensors.keys() or any(not _same(again[name], tensor) for name, tensor in tensors.items()):
        raise VerificationError(f"{path.name} loaded again does not hold the bits that were saved")
    return f"{path.name} loaded again: the same bits"


def _same(left: Any, right: Any) -> bool:
    right = right if isinstance(right, np.ndarray) else right.detach().cpu()
    raw = [_bytes_of(tensor.reshape(-1)) for tensor in (left, right)]
    return left.shape == right.shape and bool((raw[0] == raw[1]).all())


def _are_arrays(tensors: Mapping[str, Any]) -> bool:
    return all(isinstance(tensor, np.ndarray) for tensor in tensors.values())


def _bytes_of(flat: Any) -> NDArray[np.uint8]:
    """A row of bytes for every number."""
    if isinstance(flat, np.ndarray):
        return flat.view(np.uint8).reshape(len(flat), flat.itemsize)
    import torch

    found: NDArray[np.uint8] = flat.view(torch.uint8).numpy().reshape(len(flat), flat.element_size())
    return found


def _alike(array: NDArray[Any], tensor: Any) -> Any:
    """The array as what the tensor is."""
    if isinstance(tensor, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array)


def _writer(tensors: Mapping[str, Any]) -> Callable[..., None]:
    if _are_arrays(tensors):
        from safetensors.numpy import save_file

        return save_file
    from safetensors.torch import save_file as save_torch

    return save_torch


def load_sparse(path: Path, limit: int = LIMIT, *, arrays: bool = False) -> dict[str, Any]:
    """The tensors of a file that `save_sparse` wrote, dense again, the same bits. Raises CoppiceError for anything else.

    `arrays`: NumPy arrays, with no need of PyTorch. A file that would take more than `limit` bytes of memory is refused before it is
    unpacked.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np" if arrays else "pt") as file:
            shapes = _shapes(path, file.metadata() or {})
            names = list(file.keys())
            _check(path, file, names, shapes, limit)
            return {
                name.partition("/")[2]: file.get_tensor(name) if name.startswith(_DENSE) else _unpacked(path, file, name, shapes)
                for name in names
                if not name.startswith(_VALUES)
            }
    except (OSError, SafetensorError) as error:
        raise CoppiceError(f"{path} can't be read as safetensors: {error}") from error


def _shapes(path: Path, metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    if metadata.get("format") != FORMAT:
        raise CoppiceError(f"{path} is no {FORMAT} file: load ordinary weights as safetensors")
    try:
        raw = json.loads(metadata["shapes"])
        shapes = {name: tuple(shape) for name, shape in raw.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise _broken(path, "its header has no table of shapes") from None
    for name, shape in shapes.items():
        if not 0 < len(shape) <= _MOST_DIMS or not all(type(size) is int and 0 < size < 2**48 for size in shape):
            raise _broken(path, f"{name!r} has no possible shape")
    return shapes


def _check(path: Path, file: Any, names: list[str], shapes: Mapping[str, tuple[int, ...]], limit: int) -> None:
    """Everything that can be seen without reading a tensor: names, kinds and sizes."""
    wanted = {prefix + name for name in shapes for prefix in (_MASK, _VALUES)}
    if {name for name in names if not name.startswith(_DENSE)} != wanted:
        raise _broken(path, "its tensors are not those of its table of shapes")
    if len({name.partition("/")[2] for name in names}) != len(names) - len(shapes):
        raise _broken(path, "a tensor is in it twice")
    total = 0
    for name in names:
        part, shape = file.get_slice(name), tuple(file.get_slice(name).get_shape())
        width = _WIDTHS.get(part.get_dtype())
        if width is None:
            raise _broken(path, f"{name!r} is of the unknown kind {part.get_dtype()}")
        owner = name.partition("/")[2]
        if name.startswith(_MASK):
            if part.get_dtype() != "U8" or shape != (-(-math.prod(shapes[owner]) // 8),):
                raise _broken(path, f"the mask of {owner!r} is not one bit a weight")
        elif name.startswith(_VALUES):
            if len(shape) != 1 or shape[0] > math.prod(shapes[owner]):
                raise _broken(path, f"{owner!r} has more values than weights")
            total += math.prod(shapes[owner]) * width
        else:
            total += math.prod(shape) * width
    if total > limit:
        raise CoppiceError(
            f"{path} would become {total} bytes in memory, more than the limit of {limit}: raise it if the file is to be trusted"
        )


def _unpacked(path: Path, file: Any, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    owner = name.partition("/")[2]
    values, packed, shape = file.get_tensor(_VALUES + owner), np.asarray(file.get_tensor(name)), shapes[owner]
    stays = np.unpackbits(packed, count=math.prod(shape)).view(bool)
    if int(stays.sum()) != len(values):
        raise _broken(path, f"the mask of {owner!r} has {int(stays.sum())} weights, the file {len(values)} values")
    if isinstance(values, np.ndarray):
        tensor: Any = np.zeros(math.prod(shape), values.dtype)
    else:
        tensor = values.new_zeros(math.prod(shape))
    tensor[_alike(stays, tensor)] = values
    return tensor.reshape(shape)


def _broken(path: Path, reason: str) -> CoppiceError:
    return CoppiceError(f"{path} is damaged or was not written by coppice: {reason}")


_WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
