"""Randomness with an address: every random choice derives from (seed, what it is for), never from global state.

That is what makes a resumed run equal to an undisturbed one: the numbers drawn in epoch 7 do not depend on epochs 0 to 6.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *address: int | str) -> int:
    """A 63-bit seed for `address`, for example `derive_seed(0, "augment", epoch, step)`; distinct addresses are independent."""
    words = [seed % 2**64, *(zlib.crc32(part.encode()) if isinstance(part, str) else part for part in address)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def generator(seed: int, *address: int | str) -> np.random.Generator:
    """A NumPy generator for `address` (shuffles and splits; its stream does not depend on the PyTorch version)."""
    return np.random.default_rng(derive_seed(seed, *address))


@contextmanager
def seeded(seed: int, *address: int | str, device: torch.device | None = None) -> Iterator[None]:
    """Run a block with PyTorch's global generators (the CPU's, and `device`'s if it is a GPU) seeded for `address`, then put them back."""
    import torch

    on_gpu = device is not None and device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        value = derive_seed(seed, *address)
        if on_gpu:
            torch.manual_seed(value)
        else:  # torch.manual_seed would also reseed GPUs that this block does not put back
            torch.default_generator.manual_seed(value)
        yield
