"""Weights with many zeros in a small file that loads back bit for bit: a safetensors file with one bit a weight and what is not zero.

Of a tensor that gets smaller so there are two in the file: `mask/NAME` (uint8, a bit a weight, the highest of a byte first) and
`values/NAME` (what is not zero, in order, in its own dtype); all others are `dense/NAME`. The shapes are in the header, as JSON. Zero is
what has no bit set: a negative zero is a value. No pickle, and nothing is unpacked before its size is known to be within a limit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coppice.errors import CoppiceError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "coppice-sparse-1"
LIMIT = 8 * 2**30  # bytes that a file may become when it is unpacked
_MOST_DIMS = 16
_DENSE, _MASK, _VALUES = "dense/", "mask/", "values/"


def save_sparse(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` to `path`, whole or not at all."""
    import torch
    from safetensors.torch import save_file

    from coppice.run import replacing

    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        stays = (flat.view(torch.uint8).view(-1, flat.element_size()) != 0).any(1) if flat.numel() else torch.ones(0, dtype=torch.bool)
        count = int(stays.sum())
        if tensor.dim() == 0 or count * flat.element_size() + -(-flat.numel() // 8) >= flat.numel() * flat.element_size():
            stored[_DENSE + name] = tensor.detach().cpu().clone().contiguous()
            continue
        shapes[name] = list(tensor.shape)
        stored[_MASK + name] = torch.from_numpy(np.packbits(stays.numpy()))
        stored[_VALUES + name] = flat[stays].clone()
    with replacing(path) as temporary:
        save_file(stored, temporary, metadata={"format": FORMAT, "shapes": json.dumps(shapes)})


def load_sparse(path: Path, limit: int = LIMIT) -> dict[str, Tensor]:
    """The tensors of a file that `save_sparse` wrote, dense again, the same bits. Raises CoppiceError for anything else.

    A file that would take more than `limit` bytes of memory is refused before it is unpacked.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
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


def _unpacked(path: Path, file: Any, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    import torch

    owner = name.partition("/")[2]
    values, packed, shape = file.get_tensor(_VALUES + owner), file.get_tensor(name).numpy(), shapes[owner]
    stays = torch.from_numpy(np.unpackbits(packed, count=math.prod(shape)).view(bool))
    if int(stays.sum()) != len(values):
        raise _broken(path, f"the mask of {owner!r} has {int(stays.sum())} weights, the file {len(values)} values")
    tensor = torch.zeros(math.prod(shape), dtype=values.dtype)
    tensor[stays] = values
    return tensor.reshape(shape)


def _broken(path: Path, reason: str) -> CoppiceError:
    return CoppiceError(f"{path} is damaged or was not written by coppice: {reason}")


_WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
