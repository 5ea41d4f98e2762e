"""A mask over the weights of one tensor, one bit a weight: small enough to lie in a plan, and no larger in memory than its text."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PackedMask:
    """Bit k, the highest of a byte first, is the weight k in the order of memory: 1 where it stays. Raises ValueError if sizes disagree."""

    shape: tuple[int, ...]
    bits: bytes

    def __post_init__(self) -> None:
        if min(self.shape, default=0) < 1 or len(self.bits) != -(-math.prod(self.shape) // 8):
            raise ValueError(f"a mask of shape {self.shape} has {len(self.bits)} bytes, which is not one bit a weight")

    @classmethod
    def of(cls, mask: NDArray[np.bool_]) -> PackedMask:
        return cls(mask.shape, np.packbits(mask.ravel()).tobytes())

    def array(self) -> NDArray[np.bool_]:
        """True where a weight stays."""
        count = math.prod(self.shape)
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=count).astype(bool).reshape(self.shape)

    def sliced(self, keep: Sequence[NDArray[np.bool_]]) -> PackedMask:
        """What is left of it when these indices of each dim stay."""
        return PackedMask.of(self.array()[np.ix_(*keep)])

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "bits": base64.b64encode(self.bits).decode("ascii")}

    @classmethod
    def from_json(cls, raw: Any) -> PackedMask:
        """Raises ValueError, TypeError or KeyError where it is no mask."""
        if not all(type(size) is int for size in raw["shape"]):
            raise TypeError("a mask's shape is a list of whole numbers")
        return cls(tuple(raw["shape"]), base64.b64decode(raw["bits"], validate=True))
