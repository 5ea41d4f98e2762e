"""Blocks on feature maps, (N, C, H, W); some keep sizes as attributes, some read them from `x.shape`."""

# Calling an nn.Module gives Any, in every line of every forward.
# mypy: no-warn-return-any

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
