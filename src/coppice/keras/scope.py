"""Where nothing is differentiated: PyTorch keeps what a gradient would need unless it is told so, other backends don't."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras


def without_gradients() -> AbstractContextManager[Any]:
    if keras.backend.backend() != "torch":
        return nullcontext()
    import torch

    return torch.no_grad()
