"""Blocks as people write them, ordinary modules with ordinary shape code: the material of the generated networks.

Some keep sizes as attributes, some read them from `x.shape`, a few have them frozen as numbers in `forward`.
"""

# Calling an nn.Module gives Any, in every line of every forward.
# mypy: no-warn-return-any

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
