"""Random, always valid networks in the style people write them, for testing the pruner on graphs nobody drew by hand.

A network is a random DAG of blocks. Every block is an ordinary `nn.Module` with ordinary shape code: some keep sizes as
attributes, some read them from `x.shape`, a few have them frozen as numbers in `forward`. The builder runs each block on the
example tensors as it adds it, so that shapes are tracked by PyTorch itself and an invalid combination can't be drawn.
"""

# Calling an nn.Module gives Any, in every line of every forward.
# mypy: no-warn-return-any

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (8, 12, 16, 24, 32)
ODD_WIDTHS = (5, 7, 9, 15)
MAX_WIDTH = 64
MAX_SIDE = 16
BATCH = 2
FROZEN_SHARE = 0.08

# ---------------------------------------------------------------------------------------------------------------- any layout


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


# ------------------------------------------------------------------------------------------------- feature maps: (N, C, H, W)


def conv_bn_act(cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), act or nn.ReLU(inplace=True))


def bottleneck(width: int, hidden: int, groups: int = 1) -> nn.Sequential:
    last = nn.Sequential(nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width))
    return nn.Sequential(conv_bn_act(width, hidden, 1), conv_bn_act(hidden, hidden, 3, groups=groups), last)


class DownBlock(nn.Module):
    """Residual block with a projected, strided shortcut."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, 2, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class PaddedShortcut(nn.Module):
    """Residual block whose shortcut is a strided slice with zero channels on both sides (the CIFAR ResNet's option A)."""

    def __init__(self, cin: int, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.conv = nn.Conv2d(cin, cin + before + after, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(cin + before + after)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))
        return F.relu(self.bn(self.conv(x)) + shortcut)


class ZeroPadChannels(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of a map, through a channels-last copy (ConvNeXt)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.normalized_shape = (width,)
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        return F.layer_norm(y, self.normalized_shape, self.weight, self.bias, 1e-6).permute(0, 3, 1, 2)


class ChannelsLastMlp(nn.Module):
    """ConvNeXt block: depthwise conv, then LayerNorm and two linears on the channels-last map, scaled, plus the input."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.fc2(F.gelu(self.fc1(y)))).permute(0, 3, 1, 2)


class ChannelShuffle(nn.Module):
    """ShuffleNet's shuffle, with the sizes read from the tensor."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ChannelShuffleStored(nn.Module):
    """The same, with the sizes stored when the module was made."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.channels, self.groups, self.channels_per_group = width, groups, width // groups

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(-1, self.groups, self.channels_per_group, x.size(2), x.size(3)).permute(0, 2, 1, 3, 4)
        return y.reshape(-1, self.channels, x.size(2), x.size(3))


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit: half of the channels untouched, the other half convolved, concatenated and shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            conv_bn_act(half, half, 1),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            conv_bn_act(half, half, 1),
        )
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        return self.shuffle(torch.cat((x1, self.branch(x2)), dim=1))


class SplitReuse(nn.Module):
    """YOLO's C2f: split in two, convolve the second half, concatenate all three."""

    def __init__(self, cin: int, hidden: int, cout: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.cv1 = conv_bn_act(cin, 2 * hidden, 1, act=nn.SiLU())
        self.cv2 = conv_bn_act(3 * hidden, cout, 1, act=nn.SiLU())
        self.m = conv_bn_act(hidden, hidden, 3, act=nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.hidden, self.hidden), 1))
        y.append(self.m(y[-1]))
        return self.cv2(torch.cat(y, 1))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, squeeze: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        return torch.sigmoid(self.fc2(F.relu(self.fc1(scale)))) * x


class SqueezeExciteLinear(nn.Module):
    """Squeeze-and-excite through two linears and a view to size-1 dims."""

    def __init__(self, width: int, squeeze: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, squeeze), nn.ReLU(inplace=True), nn.Linear(squeeze, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.fc(x.mean((2, 3)).view(b, c)).view(b, c, 1, 1)
        return x * y.expand_as(x)


class OneChannelGate(nn.Module):
    """Gated by a map of a single channel, broadcast over all of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.score(x))


class SpatialGate(nn.Module):
    """CBAM's spatial attention: mean and maximum over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), dim=1)
        return x * torch.sigmoid(self.conv(pooled))


class GatedConv(nn.Module):
    """One conv makes both the value and its gate."""

    def __init__(self, cin: int, cout: int, use_glu: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, 2 * cout, 3, padding=1)
        self.use_glu = use_glu

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.use_glu:
            return F.glu(y, dim=1)
        value, gate = y.chunk(2, dim=1)
        return value * torch.sigmoid(gate)


class SubtractMean(nn.Module):
    """Removes each channel's spatial mean (broadcast over size-1 dims)."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)


class ShuffleUp(nn.Module):
    """Sub-pixel upsampling: conv, pixel-shuffle, conv."""

    def __init__(self, cin: int, mid: int, cout: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, 4 * mid, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.conv2 = nn.Conv2d(mid, cout, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.shuffle(F.relu(self.conv1(x))))


class Upsample(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode=self.mode)


class EinsumConv(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(cout, cin))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,oc->nohw", x, self.weight)


class ToTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class ToTokensPermute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.permute(0, 2, 3, 1).reshape(b, h * w, c)


class PatchTokens(nn.Module):
    """Vision transformer's stem: strided conv, tokens, learned position embedding."""

    def __init__(self, cin: int, width: int, patch: int, tokens: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(cin, width, patch, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2) + self.pos_embed


class GlobalPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class PoolFlatten(nn.Module):
    """Pools to a few cells and flattens, with the batch size read from the tensor and the rest left open."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, self.side).reshape(x.size(0), -1)


class PoolFlattenStored(nn.Module):
    """The same with the flattened size stored."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side, self.features = side, width * side * side

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_max_pool2d(x, self.side).reshape(-1, self.features)


class WindowAttention(nn.Module):
    """Swin's attention in windows with a relative position bias, on a map; shifted by a roll when asked."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.num_heads, self.window, self.shift = heads, window, shift
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        cell = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        offset = cell[:, :, None] - cell[:, None, :] + window - 1
        self.bias_index: Tensor
        self.register_buffer("bias_index", offset[0] * (2 * window - 1) + offset[1])

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        s = self.window
        y = x.permute(0, 2, 3, 1)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = y.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        qkv = self.qkv(y).reshape(y.shape[0], s * s, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        bias = self.bias_table[self.bias_index.view(-1)].view(s * s, s * s, -1).permute(2, 0, 1)
        attention = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        y = self.proj((attention @ v).transpose(1, 2).flatten(2))
        y = y.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        return x + y.permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------- tokens: (N, L, C)


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


# ------------------------------------------------------------------------------------------- sizes frozen as numbers in forward


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


# ------------------------------------------------------------------------- how a block for a given shape is drawn (None: doesn't fit)

Shape = tuple[int, ...]
Draw = Callable[[Random, Shape], nn.Module | None]


def chance(rng: Random, share: float) -> bool:
    return rng.random() < share


def divisor(rng: Random, *widths: int) -> int:
    """A group count of at least 2 that divides all of `widths`, or 1 if there is none."""
    fitting = [g for g in (2, 3, 4, 5, 7, 8) if all(w % g == 0 and w > g for w in widths)]
    return rng.choice(fitting) if fitting else 1


def any_width(rng: Random) -> int:
    return rng.choice(ODD_WIDTHS) if chance(rng, 0.15) else rng.choice(WIDTHS)


def activation(rng: Random, width: int) -> nn.Module:
    choices = (nn.ReLU(), nn.GELU(), nn.Hardswish(), nn.SiLU(), nn.Sigmoid(), nn.Softplus(), nn.ReLU6(), nn.PReLU(width), nn.LeakyReLU(0.1))
    return rng.choice(choices)


def draw_conv(rng: Random, shape: Shape) -> nn.Module | None:
    kernel, stride = rng.choice((1, 3)), 2 if shape[2] >= 4 and chance(rng, 0.25) else 1
    return nn.Conv2d(shape[1], any_width(rng), kernel, stride, kernel // 2, bias=chance(rng, 0.7))


def draw_group_conv(rng: Random, shape: Shape) -> nn.Module | None:
    cout = rng.choice(WIDTHS)
    groups = divisor(rng, shape[1], cout)
    return nn.Conv2d(shape[1], cout, 3, 1, 1, groups=groups) if groups > 1 else None


def draw_depthwise(rng: Random, shape: Shape) -> nn.Module | None:
    multiplier = 2 if 2 * shape[1] <= MAX_WIDTH and chance(rng, 0.4) else 1
    return nn.Conv2d(shape[1], multiplier * shape[1], 3, 1, 1, groups=shape[1])


def draw_transposed(rng: Random, shape: Shape) -> nn.Module | None:
    if 2 * shape[2] > MAX_SIDE:
        return None
    cout = rng.choice(WIDTHS)
    groups = divisor(rng, shape[1], cout) if chance(rng, 0.3) else 1
    if chance(rng, 0.5):
        return nn.ConvTranspose2d(shape[1], cout, 2, 2, groups=groups)
    return nn.ConvTranspose2d(shape[1], cout, 3, 2, 1, output_padding=1, groups=groups)


def draw_conv_bn_act(rng: Random, shape: Shape) -> nn.Module | None:
    cout = any_width(rng)
    return conv_bn_act(shape[1], cout, rng.choice((1, 3)), act=activation(rng, cout) if chance(rng, 0.5) else None)


def draw_batch_norm(rng: Random, shape: Shape) -> nn.Module | None:
    return nn.BatchNorm2d(shape[1], affine=chance(rng, 0.9))


def draw_bn_act(rng: Random, shape: Shape) -> nn.Module | None:
    return nn.Sequential(nn.BatchNorm2d(shape[1]), activation(rng, shape[1]))


def draw_activation(rng: Random, shape: Shape) -> nn.Module | None:
    return activation(rng, shape[1])


def draw_down_block(rng: Random, shape: Shape) -> nn.Module | None:
    return DownBlock(shape[1], any_width(rng)) if shape[2] >= 4 else None


def draw_padded_shortcut(rng: Random, shape: Shape) -> nn.Module | None:
    return PaddedShortcut(shape[1], 4, rng.choice((0, 4))) if shape[2] >= 4 and shape[1] + 8 <= MAX_WIDTH else None


def draw_bottleneck(rng: Random, shape: Shape) -> nn.Module | None:
    hidden = rng.choice(WIDTHS)
    body = bottleneck(shape[1], hidden, divisor(rng, hidden) if chance(rng, 0.4) else 1)
    return ScaledResidual(body, (1, shape[1], 1, 1)) if chance(rng, 0.3) else Residual(body)


def draw_inverted(rng: Random, shape: Shape) -> nn.Module | None:
    hidden = rng.choice(WIDTHS)
    layers = [conv_bn_act(shape[1], hidden, 1, act=nn.ReLU6()), conv_bn_act(hidden, hidden, 3, groups=hidden, act=nn.Hardswish())]
    return Residual(nn.Sequential(*layers, nn.Conv2d(hidden, shape[1], 1, bias=False), nn.BatchNorm2d(shape[1])))


def draw_pad_channels(rng: Random, shape: Shape) -> nn.Module | None:
    return ZeroPadChannels(rng.choice((0, 2, 4)), rng.choice((1, 4))) if shape[1] + 8 <= MAX_WIDTH else None


def draw_self_concat(rng: Random, shape: Shape) -> nn.Module | None:
    return SelfConcat(1 if len(shape) == 4 else -1) if 2 * shape[-1 if len(shape) < 4 else 1] <= MAX_WIDTH else None


def draw_shuffle(rng: Random, shape: Shape) -> nn.Module | None:
    groups = divisor(rng, shape[1])
    if groups == 1:
        return None
    return rng.choice((ChannelShuffle(groups), ChannelShuffleStored(shape[1], groups), nn.ChannelShuffle(groups)))


def draw_shuffle_unit(rng: Random, shape: Shape) -> nn.Module | None:
    return ShuffleUnit(shape[1]) if shape[1] % 2 == 0 else None


def draw_split_reuse(rng: Random, shape: Shape) -> nn.Module | None:
    return SplitReuse(shape[1], rng.choice((5, 8, 12)), any_width(rng))


def draw_squeeze_excite(rng: Random, shape: Shape) -> nn.Module | None:
    return rng.choice((SqueezeExcite, SqueezeExciteLinear))(shape[1], rng.choice((4, 8)))


def draw_one_channel_gate(rng: Random, shape: Shape) -> nn.Module | None:
    return OneChannelGate(shape[1])


def draw_gated_conv(rng: Random, shape: Shape) -> nn.Module | None:
    return GatedConv(shape[1], any_width(rng), chance(rng, 0.5))


def draw_subtract_mean(rng: Random, shape: Shape) -> nn.Module | None:
    return SubtractMean()


def draw_pixel_shuffle(rng: Random, shape: Shape) -> nn.Module | None:
    if 2 * shape[2] > MAX_SIDE:
        return None
    if shape[1] % 4 == 0 and chance(rng, 0.5):
        return nn.PixelShuffle(2)
    return ShuffleUp(shape[1], rng.choice((5, 8)), any_width(rng))


def draw_pixel_unshuffle(rng: Random, shape: Shape) -> nn.Module | None:
    return nn.PixelUnshuffle(2) if shape[2] % 2 == 0 and shape[2] >= 4 and 4 * shape[1] <= MAX_WIDTH else None


def draw_upsample(rng: Random, shape: Shape) -> nn.Module | None:
    return Upsample(rng.choice(("nearest", "bilinear"))) if 2 * shape[2] <= MAX_SIDE else None


def draw_pool(rng: Random, shape: Shape) -> nn.Module | None:
    return rng.choice((nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1))) if shape[2] >= 4 else None


def draw_map_affine(rng: Random, shape: Shape) -> nn.Module | None:
    return Affine((1, shape[1], 1, 1))


def draw_map_dropout(rng: Random, shape: Shape) -> nn.Module | None:
    return rng.choice((nn.Dropout(0.2), nn.Dropout2d(0.2)))


def draw_twice(rng: Random, shape: Shape) -> nn.Module | None:
    return Twice(nn.Conv2d(shape[1], shape[1], 3, padding=1) if len(shape) == 4 else nn.Linear(shape[-1], shape[-1]))


def draw_tied(rng: Random, shape: Shape) -> nn.Module | None:
    if len(shape) == 4:
        return TiedPair(nn.Conv2d(shape[1], shape[1], 1), nn.Conv2d(shape[1], shape[1], 1))
    return TiedPair(nn.Linear(shape[-1], shape[-1]), nn.Linear(shape[-1], shape[-1]))


def draw_einsum(rng: Random, shape: Shape) -> nn.Module | None:
    return EinsumConv(shape[1], any_width(rng)) if len(shape) == 4 else EinsumLinear(shape[-1], any_width(rng))


def draw_narrow(rng: Random, shape: Shape) -> nn.Module | None:
    dim = 1 if len(shape) == 4 else -1
    width = shape[dim]
    if width < 6:
        return None
    length = rng.randint(3, width - 1)
    if dim == 1 and chance(rng, 0.4):
        return HalfSlice(chance(rng, 0.5))
    return Narrow(rng.randint(0, width - length), length, dim)


def draw_split(rng: Random, shape: Shape) -> nn.Module | None:
    dim = 1 if len(shape) == 4 else -1
    width = shape[dim]
    if width < 6:
        return None
    if width % 2 == 0 and chance(rng, 0.5):
        return Chunk(2, dim)
    first = rng.randint(2, width - 3)
    return Split((first, width - first), dim)


def draw_to_tokens(rng: Random, shape: Shape) -> nn.Module | None:
    if shape[2] > 8:
        return PatchTokens(shape[1], rng.choice(WIDTHS), 4, (shape[2] // 4) ** 2) if shape[2] % 4 == 0 else None
    return rng.choice((ToTokens(), ToTokensPermute(), PatchTokens(shape[1], rng.choice(WIDTHS), 1, shape[2] ** 2)))


def draw_flatten(rng: Random, shape: Shape) -> nn.Module | None:
    side = rng.choice([s for s in (1, 2, 4) if s <= shape[2]])
    pool = rng.choice((PoolFlatten(side), PoolFlattenStored(shape[1], side), nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten())))
    return nn.Sequential(pool, nn.Linear(shape[1] * side * side, any_width(rng)))


def draw_global_pool(rng: Random, shape: Shape) -> nn.Module | None:
    return GlobalPool() if len(shape) == 4 else TokenMean()


def draw_channel_norm(rng: Random, shape: Shape) -> nn.Module | None:
    return ChannelLayerNorm(shape[1])


def draw_group_norm(rng: Random, shape: Shape) -> nn.Module | None:
    return nn.GroupNorm(rng.choice((1, divisor(rng, shape[1]))), shape[1])


def draw_convnext(rng: Random, shape: Shape) -> nn.Module | None:
    return ChannelsLastMlp(shape[1], rng.choice(WIDTHS))


def draw_spatial_gate(rng: Random, shape: Shape) -> nn.Module | None:
    return SpatialGate()


def draw_window_attention(rng: Random, shape: Shape) -> nn.Module | None:
    heads = divisor(rng, shape[1])
    if heads == 1 or shape[2] % 2 or shape[2] < 4:
        return None
    return WindowAttention(shape[1], heads, 2, rng.choice((0, 1)))


def draw_linear(rng: Random, shape: Shape) -> nn.Module | None:
    return nn.Linear(shape[-1], any_width(rng), bias=chance(rng, 0.8))


def draw_pointwise(rng: Random, shape: Shape) -> nn.Module | None:
    return rng.choice((nn.GELU(), nn.ReLU(), nn.Hardswish(), nn.Sigmoid(), nn.Tanh()))


def draw_mlp(rng: Random, shape: Shape) -> nn.Module | None:
    hidden = any_width(rng)
    if chance(rng, 0.3):
        return Residual(GatedMlp(shape[-1], hidden))
    return Residual(Mlp(shape[-1], hidden, shape[-1])) if chance(rng, 0.7) else Mlp(shape[-1], hidden, any_width(rng))


def draw_token_scale(rng: Random, shape: Shape) -> nn.Module | None:
    return ScaledResidual(Mlp(shape[-1], rng.choice(WIDTHS), shape[-1]), (shape[-1],))


def draw_token_affine(rng: Random, shape: Shape) -> nn.Module | None:
    return Affine((1, 1, shape[-1]) if len(shape) == 3 and chance(rng, 0.5) else (shape[-1],))


def draw_token_mixer(rng: Random, shape: Shape) -> nn.Module | None:
    return TokenMixer(shape[1], rng.choice((8, 12)))


def draw_position(rng: Random, shape: Shape) -> nn.Module | None:
    return (PositionTable if chance(rng, 0.4) else PositionEmbedding)(shape[1], shape[2])


def draw_class_token(rng: Random, shape: Shape) -> nn.Module | None:
    return ClassToken(shape[2])


def draw_to_map(rng: Random, shape: Shape) -> nn.Module | None:
    side = int(shape[1] ** 0.5)
    if side * side != shape[1]:
        return None
    return ToMap() if chance(rng, 0.5) else ToMapStored(shape[2], side)


def draw_first_token(rng: Random, shape: Shape) -> nn.Module | None:
    return FirstToken()


def draw_layer_norm(rng: Random, shape: Shape) -> nn.Module | None:
    return nn.LayerNorm(shape[-1], elementwise_affine=chance(rng, 0.9))


def draw_attention(rng: Random, shape: Shape) -> nn.Module | None:
    width, heads, fused = shape[2], rng.choice((2, 3, 4)), chance(rng, 0.5)
    own_heads = divisor(rng, width)  # where the heads must divide the input's width
    choices: list[nn.Module] = [
        StoredAttention(width, heads, rng.choice((4, 6, 8)), fused, chance(rng, 0.5)),
        ChunkedAttention(width, heads, rng.choice((4, 6, 8)), fused),
        SeparateAttention(width, width, heads, rng.choice((4, 6)), rng.choice((4, 8)), fused),
    ]
    if own_heads > 1:
        choices += [ClassicAttention(width, own_heads, fused), TorchAttention(width, own_heads)]
    attention = rng.choice(choices)
    body = nn.Sequential(nn.LayerNorm(width), attention) if chance(rng, 0.7) else attention
    return ScaledResidual(body, (width,)) if chance(rng, 0.3) else Residual(body)


def draw_vector_norm(rng: Random, shape: Shape) -> nn.Module | None:
    return nn.BatchNorm1d(shape[1])


def draw_dropout(rng: Random, shape: Shape) -> nn.Module | None:
    return nn.Dropout(0.2)


def draw_stem(rng: Random, side: int) -> nn.Module:
    """The first block of an image: a convolution, or a vision transformer's patches."""
    if chance(rng, 0.3):
        return PatchTokens(3, rng.choice(WIDTHS), 4, (side // 4) ** 2)
    return nn.Conv2d(3, any_width(rng), 3, 1, 1) if chance(rng, 0.5) else conv_bn_act(3, rng.choice(WIDTHS), 3)


MAP_DRAWS: tuple[Draw, ...] = (
    draw_conv, draw_conv, draw_conv_bn_act, draw_conv_bn_act, draw_group_conv, draw_depthwise, draw_transposed, draw_batch_norm,
    draw_bn_act, draw_activation, draw_down_block, draw_padded_shortcut, draw_bottleneck, draw_inverted, draw_pad_channels,
    draw_self_concat, draw_shuffle, draw_shuffle_unit, draw_split, draw_split_reuse, draw_squeeze_excite, draw_one_channel_gate,
    draw_gated_conv, draw_subtract_mean, draw_pixel_shuffle, draw_pixel_unshuffle, draw_upsample, draw_pool, draw_map_affine,
    draw_map_dropout, draw_twice, draw_tied, draw_einsum, draw_narrow, draw_to_tokens, draw_to_tokens, draw_flatten,
)  # fmt: skip
MAP_MIXING_DRAWS: tuple[Draw, ...] = (draw_channel_norm, draw_group_norm, draw_convnext, draw_spatial_gate, draw_window_attention)
TOKEN_DRAWS: tuple[Draw, ...] = (
    draw_linear, draw_pointwise, draw_mlp, draw_token_scale, draw_token_affine, draw_token_mixer, draw_position, draw_class_token,
    draw_to_map, draw_twice, draw_tied, draw_einsum, draw_narrow, draw_split, draw_self_concat, draw_dropout, draw_global_pool,
    draw_first_token,
)  # fmt: skip
TOKEN_MIXING_DRAWS: tuple[Draw, ...] = (draw_attention,) * 7 + (draw_layer_norm,) * 2
VECTOR_DRAWS: tuple[Draw, ...] = (
    draw_linear, draw_pointwise, draw_mlp, draw_vector_norm, draw_twice, draw_tied, draw_narrow, draw_split, draw_dropout, draw_self_concat
)  # fmt: skip
VECTOR_MIXING_DRAWS: tuple[Draw, ...] = (draw_layer_norm,)


def draw_frozen(rng: Random, shape: Shape) -> nn.Module | None:
    if len(shape) == 3:
        return FrozenAttention(shape[2])
    if len(shape) == 4:
        return FrozenSplit(shape[1], any_width(rng)) if chance(rng, 0.5) or shape[2] < 2 else FrozenFlatten(shape[1], any_width(rng))
    return None


# ------------------------------------------------------------------------------------------------------------------- the network


@dataclass(frozen=True)
class Step:
    """One call: which block, on which of the values made so far."""

    block: int
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Output:
    name: str
    value: int


class Network(nn.Module):
    """Runs its steps in order; the inputs are the first values, and a block that returns several tensors appends them all."""

    def __init__(self, blocks: Sequence[nn.Module], steps: Sequence[Step], outputs: Sequence[Output], as_dict: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.steps = tuple(steps)
        self.outputs = tuple(outputs)
        self.as_dict = as_dict

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        values = list(inputs)
        for step in self.steps:
            made = self.blocks[step.block](*(values[k] for k in step.sources))
            values.extend(made if isinstance(made, (tuple, list)) else (made,))
        if self.as_dict:
            return {output.name: values[output.value] for output in self.outputs}
        made = tuple(values[output.value] for output in self.outputs)
        return made if len(made) > 1 else made[0]


class _Builder:
    """Blocks, steps and the example values so far; `used` are the values that something consumes."""

    def __init__(self, rng: Random, inputs: Sequence[Tensor], mixing: bool) -> None:
        self.rng, self.mixing = rng, mixing
        self.values = list(inputs)
        self.used: set[int] = set()
        self.blocks: list[nn.Module] = []
        self.steps: list[Step] = []

    def shape(self, value: int) -> Shape:
        return tuple(self.values[value].shape)

    def width(self, value: int) -> int:
        shape = self.shape(value)
        return shape[1] if len(shape) == 4 else shape[-1]

    def add(self, block: nn.Module, *sources: int) -> int:
        """Appends a block and returns its first value."""
        self.blocks.append(block.eval())
        return self.call(len(self.blocks) - 1, *sources)

    def call(self, block: int, *sources: int) -> int:
        made = self.blocks[block](*(self.values[k] for k in sources))
        first = len(self.values)
        self.values.extend(made if isinstance(made, (tuple, list)) else (made,))
        self.steps.append(Step(block, sources))
        self.used.update(sources)
        return first

    def pick(self) -> int:
        """Mostly a recent value, sometimes any."""
        if chance(self.rng, 0.75):
            return self.rng.randrange(max(0, len(self.values) - 3), len(self.values))
        return self.rng.randrange(len(self.values))

    def grow(self) -> None:
        source = self.pick()
        if self.width(source) > 3 and chance(self.rng, 0.3):
            return self.merge(source)
        if chance(self.rng, 0.05) and self.repeat(source):
            return None
        shape = self.shape(source)
        plain = {4: MAP_DRAWS, 3: TOKEN_DRAWS, 2: VECTOR_DRAWS}[len(shape)]
        mixing = {4: MAP_MIXING_DRAWS, 3: TOKEN_MIXING_DRAWS, 2: VECTOR_MIXING_DRAWS}[len(shape)]
        for _ in range(20):
            block = self.rng.choice(plain + mixing if self.mixing else plain)(self.rng, shape)
            if block is not None:
                self.add(block, source)
                return None
        return None

    def repeat(self, source: int) -> bool:
        """Calls an earlier block again, on another value of the same shape."""
        shape = self.shape(source)
        fitting = [s for s in self.steps if len(s.sources) == 1 and self.shape(s.sources[0]) == shape and s.sources[0] != source]
        if not fitting:
            return False
        self.call(self.rng.choice(fitting).block, source)
        return True

    def project(self, source: int, width: int) -> int:
        layer = nn.Conv2d(self.width(source), width, 1) if len(self.shape(source)) == 4 else nn.Linear(self.width(source), width)
        return self.add(layer, source)

    def partner(self, source: int) -> int:
        """Another value with the same batch and positions, an existing one where possible."""
        shape, dim = self.shape(source), 1 if len(self.shape(source)) == 4 else -1

        def positions(s: Shape) -> list[int]:
            return [len(s)] + [n for k, n in enumerate(s) if k != dim % len(s)]

        others = [v for v in range(len(self.values)) if v != source and positions(self.shape(v)) == positions(shape)]
        if others and chance(self.rng, 0.7):
            return self.rng.choice(others)
        return self.project(source, any_width(self.rng))

    def merge(self, source: int) -> None:
        """Joins a value with one or two others: sum, gate, concat, or attention to another sequence."""
        other = self.partner(source)
        rank, draw = len(self.shape(source)), self.rng.random()
        if rank == 3 and self.mixing and draw < 0.2:
            block = SeparateAttention(self.width(source), self.width(other), 2, 4, self.rng.choice((4, 6)), chance(self.rng, 0.5))
            self.add(block, source, other)
        elif draw < 0.6:
            if self.width(other) != self.width(source):
                other = self.project(other, self.width(source))
            self.add(Add() if chance(self.rng, 0.7) else Gate(), source, other)
        else:
            sources = [source, other] + ([self.partner(source)] if chance(self.rng, 0.4) else [])
            if sum(self.width(v) for v in sources) <= MAX_WIDTH:
                self.add(Concat(1 if rank == 4 else -1), *sources)

    def to_vector(self, value: int) -> int:
        shape = self.shape(value)
        if len(shape) == 2:
            return value
        if len(shape) == 3:
            return self.add(TokenMean() if chance(self.rng, 0.7) else FirstToken(), value)
        side = 2 if shape[2] >= 2 and shape[1] <= 32 and chance(self.rng, 0.3) else 1
        return self.add(GlobalPool() if side == 1 else PoolFlatten(side), value)

    def finish(self, classes: int) -> Network:
        """Every value nothing consumed goes to the classifier; sometimes an inner value gets a head of its own."""
        outputs = []
        if chance(self.rng, 0.25):
            inner = self.rng.randrange(1, len(self.values))
            outputs.append(Output("aux", self.add(nn.Linear(self.width(vector := self.to_vector(inner)), 3), vector)))
        loose = [v for v in range(len(self.values)) if v not in self.used and all(v != o.value for o in outputs)]
        vectors = [self.to_vector(v) for v in loose]
        joined = vectors[0] if len(vectors) == 1 else self.add(Concat(1), *vectors)
        outputs.insert(0, Output("logits", self.add(nn.Linear(self.width(joined), classes), joined)))
        return Network(self.blocks, self.steps, outputs, as_dict=chance(self.rng, 0.15))


def randomise(model: nn.Module, seed: int) -> None:
    """Non-degenerate parameters and running statistics, so that a wrong slice shows in the output: no zero biases, no unit scales."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape: torch.Size, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and not name.endswith(("gamma", "scale", "shift", "pos_embed", "cls_token")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
            elif name.endswith(("bias", "shift", "pos_embed", "cls_token")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
            else:
                parameter.copy_(uniform(parameter.shape, 0.3, 1.3))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.5)
            elif name.endswith("running_var"):
                buffer.copy_(uniform(buffer.shape, 0.5, 2.0))


def random_network(seed: int, size: int = 8, *, mixing: bool = True) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A random network of about `size` blocks in eval mode, and inputs for it: one or two images (2, 3, side, side), float32.

    The same seed gives the same network, parameters and inputs; the global random state is left alone. With `mixing` off,
    no op mixes the channels non-linearly (no LayerNorm, GroupNorm, attention, maximum over channels).
    """
    rng = Random(seed)
    side = rng.choice((8, 12, 16))
    generator = torch.Generator().manual_seed(seed)
    inputs = tuple(torch.randn(BATCH, 3, side, side, generator=generator) for _ in range(2 if chance(rng, 0.1) else 1))
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # modules draw their initial weights from the global state
        builder = _Builder(rng, inputs, mixing)
        for k in range(len(inputs)):
            builder.add(draw_stem(rng, side), k)
        for _ in range(max(1, size + rng.randint(-3, 3))):
            builder.grow()
        if chance(rng, FROZEN_SHARE):
            frozen = draw_frozen(rng, builder.shape(source := builder.pick()))
            if frozen is not None and (mixing or not isinstance(frozen, FrozenAttention)):
                builder.add(frozen, source)
        model = builder.finish(rng.choice((4, 10)))
    randomise(model, seed)
    return model, inputs
