"""Blocks on tokens, (N, L, C), and attention in its usual spellings; some keep sizes as attributes, some read them from `x.shape`."""

# Calling an nn.Module gives Any, in every line of every forward.
# mypy: no-warn-return-any

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, out: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


class GatedMlp(nn.Module):
    """SwiGLU: one linear makes the gate and the value, cut at the stored hidden width."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.w12(x)
        return self.w3(F.silu(y[..., : self.hidden]) * y[..., self.hidden :])


class TokenMixer(nn.Module):
    """MLP-Mixer's mixing across tokens."""

    def __init__(self, tokens: int, hidden: int) -> None:
        super().__init__()
        self.mlp = Mlp(tokens, hidden, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x.transpose(1, 2)).transpose(1, 2)


class EinsumLinear(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("blc,cd->bld", x, self.weight)


class PositionEmbedding(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pos_embed


class PositionTable(nn.Module):
    """Position embedding looked up in a table by a buffer of indices (Hugging Face)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens, width)
        self.register_buffer("position_ids", torch.arange(tokens)[None])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(self.position_ids)


class ClassToken(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)


class TokenMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class FirstToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class ToMap(nn.Module):
    """Tokens back to a square map, with the width read from the tensor."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        side = int(n**0.5)
        return x.transpose(1, 2).reshape(b, c, side, side)


class ToMapStored(nn.Module):
    """Tokens back to a square map, with the width stored."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.embed_dim, self.side = width, side

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 1).contiguous().view(-1, self.embed_dim, self.side, self.side)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, fused: bool) -> Tensor:
    """softmax(q k' * scale) v over (..., tokens, head width); without a scale, one over the root of the head width."""
    if fused:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    factor = scale if scale is not None else q.shape[-1] ** -0.5
    return ((q @ k.transpose(-2, -1)) * factor).softmax(dim=-1) @ v


class ClassicAttention(nn.Module):
    """ViT's first form: q, k, v in one linear, the head width computed from the input's width."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = heads, fused
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        return self.proj(attend(q, k, v, self.scale, self.fused).transpose(1, 2).reshape(b, n, c))


class StoredAttention(nn.Module):
    """q, k, v in one linear, with the number and the width of the heads stored (timm)."""

    def __init__(self, width: int, heads: int, head_dim: int, fused: bool, default_scale: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused = heads, head_dim, fused
        self.attn_dim = heads * head_dim
        self.scale = None if default_scale else head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * self.attn_dim)
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(self.attn_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.attn_drop(attend(q, k, v, self.scale, self.fused))
        return self.proj(y.transpose(1, 2).reshape(b, n, self.attn_dim))


class ChunkedAttention(nn.Module):
    """q, k, v in one linear, chunked; heads made by a view that leaves their width open."""

    def __init__(self, width: int, heads: int, head_dim: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.to_qkv = nn.Linear(width, 3 * heads * head_dim)
        self.to_out = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        return self.to_out(attend(q, k, v, None, self.fused).transpose(1, 2).flatten(2))


class SeparateAttention(nn.Module):
    """q, k and v from their own linears, a head width for q and k and another for v; keys and values from a context."""

    def __init__(self, width: int, context: int, heads: int, qk_dim: int, v_dim: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.v_dim, self.fused = heads, qk_dim, v_dim, fused
        self.scale = qk_dim**-0.5
        self.q = nn.Linear(width, heads * qk_dim)
        self.k = nn.Linear(context, heads * qk_dim)
        self.v = nn.Linear(context, heads * v_dim)
        self.proj = nn.Linear(heads * v_dim, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        b, n, _ = x.shape
        m = context.shape[1]
        q = self.q(x).view(b, n, self.num_heads, self.qk_dim).transpose(1, 2)
        k = self.k(context).view(b, m, self.num_heads, self.qk_dim).transpose(1, 2)
        v = self.v(context).view(b, m, self.num_heads, self.v_dim).transpose(1, 2)
        y = attend(q, k, v, self.scale, self.fused)
        return self.proj(y.transpose(1, 2).reshape(b, n, self.num_heads * self.v_dim))


class TorchAttention(nn.Module):
    """PyTorch's own multi-head attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return y
