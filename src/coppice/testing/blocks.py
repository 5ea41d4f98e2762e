"""Blocks as people write them, ordinary modules with ordinary shape code: the material of the generated networks.

Here those for any layout, and those with sizes frozen as numbers in `forward`; for maps and tokens see `map_blocks`, `token_blocks`.
"""

# Calling an nn.Module gives Any, in every line of every forward.
# mypy: no-warn-return-any

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Gate(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * torch.sigmoid(y)


class Concat(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, self.dim)


class SelfConcat(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x), self.dim)


class Chunk(nn.Module):
    def __init__(self, parts: int, dim: int) -> None:
        super().__init__()
        self.parts, self.dim = parts, dim

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(self.parts, self.dim)


class Split(nn.Module):
    """Splits at sizes kept as an attribute."""

    def __init__(self, sizes: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.sizes, self.dim = list(sizes), dim

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, self.sizes, self.dim)


class Narrow(nn.Module):
    def __init__(self, start: int, length: int, dim: int) -> None:
        super().__init__()
        self.start, self.length, self.dim = start, length, dim

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(self.dim, self.start, self.length)


class HalfSlice(nn.Module):
    """Keeps one half, with the size read from the tensor."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return x[:, :half] if self.first else x[:, half:]


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ScaledResidual(nn.Module):
    """A residual branch behind a per-channel scale parameter (LayerScale)."""

    def __init__(self, body: nn.Module, gamma_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.body = body
        self.gamma = nn.Parameter(torch.ones(gamma_shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.body(x)


class Affine(nn.Module):
    """Scale and shift by parameters that broadcast over size-1 dims."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))
        self.shift = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Twice(nn.Module):
    """One module, called twice."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.relu(self.body(x)))


class TiedPair(nn.Module):
    """Two modules that share one weight parameter under two names, each with its own bias."""

    def __init__(self, first: nn.Conv2d | nn.Linear, second: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class FrozenFlatten(nn.Module):
    def __init__(self, cin: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, 32, 1)
        self.fc = nn.Linear(128, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.conv(x)), 2).reshape(-1, 128))


class FrozenSplit(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, 24, 3, padding=1)
        self.a = nn.Conv2d(8, cout, 1)
        self.b = nn.Conv2d(16, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.conv(x), [8, 16], dim=1)
        return self.a(a) + self.b(b)


class FrozenAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 96)
        self.proj = nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], -1, 32))
