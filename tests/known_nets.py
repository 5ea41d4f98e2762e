"""Small networks, each built around one known trap, and the awkward modules that users write.

`TRAPS` and `AWKWARD` map a name to a function that returns a model in eval mode and its example inputs. The weights are
random and non-degenerate (no zero biases, no unit scales), so that a wrong slice shows in the output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from coppice.testing.networks import randomise

Net = tuple[nn.Module, tuple[object, ...]]
Known = Callable[[], Net]

TRAPS: dict[str, Known] = {}
AWKWARD: dict[str, Known] = {}


def known(table: dict[str, Known]) -> Callable[[Known], Known]:
    """Enters a builder in a table, seeded, its parameters randomised."""

    def enter(build: Known) -> Known:
        @functools.wraps(build)
        def seeded() -> Net:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model, inputs = build()
            randomise(model, 0)
            return model.eval(), inputs

        table[build.__name__] = seeded
        return seeded

    return enter


def image(channels: int = 3, side: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, side, side)


# ---------------------------------------------------------------------------------------------------------------- named traps


class ConcatPoolFlatten(nn.Module):
    """The net on which the best-known peer slices wrongly without an error: every channel is 16 inputs of the linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(3, 16, 3, padding=1)
        self.fc = nn.Linear(24 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(torch.cat((self.a(x), self.b(x)), 1))
        return self.fc(F.adaptive_avg_pool2d(y, 4).flatten(1))


@known(TRAPS)
def concat_pool_flatten() -> Net:
    return ConcatPoolFlatten(), (image(),)


class SubPixel(nn.Module):
    """Four conv channels make one channel of the consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.shuffle(F.gelu(self.conv1(x))))
        return self.fc(y.mean((2, 3)))


@known(TRAPS)
def pixel_shuffle_between_convs() -> Net:
    return SubPixel(), (image(),)


class SumBelowProduct(nn.Module):
    """The flattened (cell, channel) dim has a concat in its minor position: sizes (a + b) repeat for every cell."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(3, 12, 3, padding=1)
        self.fc = nn.Linear(16 * 20, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(torch.sigmoid(torch.cat((self.a(x), self.b(x)), 1)), 2)
        return self.fc(y.permute(0, 2, 3, 1).flatten(1))


@known(TRAPS)
def sum_below_product() -> Net:
    return SumBelowProduct(), (image(),)


class HeadsOfConcat(nn.Module):
    """A concat inside each head: (heads, a + b) after a view."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 4 * 6)
        self.b = nn.Linear(12, 4 * 2)
        self.out = nn.Linear(4 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = torch.cat((self.a(x).view(n, t, 4, -1), self.b(x).view(n, t, 4, -1)), -1)
        return self.out(torch.tanh(y).flatten(2)).mean(1)


@known(TRAPS)
def concat_inside_each_head() -> Net:
    return HeadsOfConcat(), (torch.randn(2, 5, 12),)


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class OddShuffle(nn.Module):
    """Two branches of odd width, shuffled, and split again where the halves straddle both."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, half, 3, padding=1)
        self.b = nn.Conv2d(3, half, 1)
        self.shuffle = Shuffle(2)
        self.c = nn.Conv2d(half, 8, 1)
        self.d = nn.Conv2d(half, 8, 1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.shuffle(torch.cat((F.relu(self.a(x)), F.relu(self.b(x))), 1)).chunk(2, 1)
        return self.fc((torch.tanh(self.c(first)) + self.d(second)).mean((2, 3)))


@known(TRAPS)
def channel_shuffle_of_odd_width() -> Net:
    return OddShuffle(9), (image(),)


@known(TRAPS)
def channel_shuffle_of_even_width() -> Net:
    return OddShuffle(8), (image(),)


class BiasThroughActivation(nn.Module):
    """After BatchNorm's bias and sigmoid or exp, a channel set to zero isn't zero any more: f(0) != 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 12, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.bn1(self.conv1(x)))
        return self.fc(torch.exp(-self.bn2(self.conv2(x)).abs()).mean((2, 3)))


@known(TRAPS)
def batch_norm_bias_through_sigmoid_and_exp() -> Net:
    return BiasThroughActivation(), (image(),)


class Attention(nn.Module):
    """Scale left to its default, which depends on the head width."""

    def __init__(self, width: int = 24, heads: int = 3, head_dim: int = 8, fused: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused = heads, head_dim, fused
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return x + self.proj(y.transpose(1, 2).reshape(b, n, -1))


class TokenClassifier(nn.Module):
    def __init__(self, width: int, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(7, width)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(1))


@known(TRAPS)
def default_attention_scale_fused() -> Net:
    return TokenClassifier(24, Attention(), Attention()), (torch.randn(2, 6, 7),)


@known(TRAPS)
def default_attention_scale_matmul() -> Net:
    return TokenClassifier(24, Attention(fused=False)), (torch.randn(2, 6, 7),)


class SizeOneBroadcast(nn.Module):
    """A one-channel map, a per-channel parameter and a pooled map, each broadcast over the others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.score = nn.Conv2d(16, 1, 1)
        self.scale = nn.Parameter(torch.ones(1, 16, 1, 1))
        self.shift = nn.Parameter(torch.zeros(16, 1, 1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x))
        x = x * torch.sigmoid(self.score(x)) + x.mean((2, 3), keepdim=True)
        return self.fc((x * self.scale + self.shift).amax((2, 3)))


@known(TRAPS)
def size_one_broadcast() -> Net:
    return SizeOneBroadcast(), (image(),)


class EqualSizes(nn.Module):
    """Batch, width, height, heads, head width and hidden width are all 8: nothing may be matched by size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.rows = nn.Linear(8, 8)
        self.channels = nn.Linear(8, 8)
        self.square = nn.Parameter(torch.ones(8, 8))
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = x + self.rows(x)
        x = x + self.channels(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.fc(torch.tanh(x.mean((2, 3)) @ self.square))


@known(TRAPS)
def dims_of_equal_size() -> Net:
    return EqualSizes(), (image(8, 8, batch=8),)


class CalledManyTimes(nn.Module):
    """A recurrent block: one module, called four times, on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.step = nn.Sequential(nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(4):
            x = torch.tanh(x + self.step(x))
        return self.fc(x.mean((2, 3)))


@known(TRAPS)
def module_called_many_times() -> Net:
    return CalledManyTimes(), (image(),)


class CalledOnTwoWidths(nn.Module):
    """One head on two features of different origin: both origins become one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(3, 16, 3, 2, 1)
        self.head = nn.Conv2d(16, 12, 1)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.head(torch.relu(self.a(x))), self.head(torch.relu(self.b(x)))
        return self.fc(torch.sigmoid(low).mean((2, 3)) + torch.tanh(high).amax((2, 3)))


@known(TRAPS)
def one_head_on_two_branches() -> Net:
    return CalledOnTwoWidths(), (image(),)


class TwoNames(nn.Module):
    """One weight under two names; used plainly and transposed (an autoencoder's tied decoder)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(7, 16)
        self.encode = nn.Linear(16, 24)
        self.again = nn.Linear(16, 24, bias=False)
        self.again.weight = self.encode.weight
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        y = torch.sigmoid(self.encode(x)) * self.again(x)
        return self.head(F.linear(y, self.encode.weight.t()))


@known(TRAPS)
def parameter_under_two_names() -> Net:
    return TwoNames(), (torch.randn(3, 7),)


class TinyViT(nn.Module):
    """Class token, position embedding, pre-norm blocks with the head width computed from the input's width."""

    def __init__(self, width: int = 24, heads: int = 3, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, width))
        self.blocks = nn.ModuleList(ViTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))


@known(TRAPS)
def position_embedding() -> Net:
    return TinyViT(), (image(),)


class GroupConvAfterConcat(nn.Module):
    """The groups of the conv don't line up with the branches of the concat: 8 + 16 in three groups of 8."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(24, 24, 3, padding=1, groups=groups)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(torch.sigmoid(torch.cat((self.a(x), self.b(x)), 1)))).mean((2, 3)))


@known(TRAPS)
def group_conv_after_concat_aligned() -> Net:
    return GroupConvAfterConcat(3), (image(),)


@known(TRAPS)
def group_conv_after_concat_across() -> Net:
    return GroupConvAfterConcat(2), (image(),)


@known(TRAPS)
def depthwise_conv_after_concat() -> Net:
    return GroupConvAfterConcat(24), (image(),)


class SelfConcat(nn.Module):
    """Both halves of the concat are the same tensor: an index goes from both, or from neither."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(16, 12, 1)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = torch.tanh(self.conv(torch.cat((x, torch.relu(x)), 1))).mean((2, 3))
        return self.fc(torch.cat((y, y), 1))


@known(TRAPS)
def self_concat() -> Net:
    return SelfConcat(), (image(),)


class PaddedBlock(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.planes = cout
        self.pad_shortcut = stride != 1 or cin != cout

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad_shortcut:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.planes // 4, self.planes // 4))
        return F.relu(y + x)


class PaddedResNet(nn.Module):
    """The CIFAR ResNet's shortcut: the wider stage is zeros + the narrower stage + zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layers = nn.Sequential(PaddedBlock(8, 8, 1), PaddedBlock(8, 16, 2), PaddedBlock(16, 16, 1), PaddedBlock(16, 32, 2))
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        x = F.avg_pool2d(x, x.size(3))
        return self.linear(x.view(x.size(0), -1))


@known(TRAPS)
def zero_channel_padding_shortcut() -> Net:
    return PaddedResNet(), (image(),)


class SharedOverGroups(nn.Module):
    """(g c) with a parameter shared across g: the indices must agree between the groups, not only their number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(8))
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        n, _, h, w = x.shape
        x = x.view(n, 3, -1, h, w) * self.scale.view(1, 1, -1, 1, 1)
        return self.fc(torch.relu(x.flatten(1, 2)).mean((2, 3)))


@known(TRAPS)
def parameter_shared_across_groups() -> Net:
    return SharedOverGroups(), (image(),)


class MixedChannels(nn.Module):
    """Ops that mix the axis: LayerNorm, GroupNorm, softmax and a mean over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.gn = nn.GroupNorm(4, 16)
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1)
        self.ln = nn.LayerNorm(24)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(torch.relu(self.gn(self.conv1(x))))
        x = x * torch.softmax(x, 1) + x.mean(1, keepdim=True)
        return self.fc(self.ln(x.permute(0, 2, 3, 1)).mean((1, 2)))


@known(TRAPS)
def ops_that_mix_the_channels() -> Net:
    return MixedChannels(), (image(),)


class MixedThenNotMixed(nn.Module):
    """A skip around the LayerNorm: the same axis is mixed on one path and not on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(7, 16)
        self.norm = nn.LayerNorm(16)
        self.fc2 = nn.Linear(16, 16)
        self.fc3 = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc3(torch.tanh(x + self.fc2(self.norm(x))))


@known(TRAPS)
def skip_around_a_norm() -> Net:
    return MixedThenNotMixed(), (torch.randn(4, 7),)


class RolledChannels(nn.Module):
    """Data movement over the channels that is no sum and no product: roll, flip, and a gather by a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4, 11, 8, 10, 9]))
        self.conv2 = nn.Conv2d(12, 8, 1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.conv1(x))
        x = x + torch.roll(x, 3, 1) * x.flip(1)
        return self.fc(torch.relu(self.conv2(x[:, self.order])).mean((2, 3)))


@known(TRAPS)
def roll_flip_and_gather() -> Net:
    return RolledChannels(), (image(),)


class FlattenThenBatchNorm(nn.Module):
    """BatchNorm1d on a flattened map: (channel, cell) below one BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm1d(8 * 16)
        self.fc = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.sigmoid(self.bn(F.max_pool2d(self.conv(x), 2).flatten(1))))


@known(TRAPS)
def batch_norm_after_flatten() -> Net:
    return FlattenThenBatchNorm(), (image(),)


# --------------------------------------------------------------------------------------- the awkward modules of users


class ParameterUsedTwice(nn.Module):
    """One parameter in two roles: a conv's weight and, as a matrix, a linear's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.weight = nn.Parameter(torch.ones(24, 16))
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = F.conv2d(x, self.weight[:, :, None, None]).mean((2, 3))
        return self.fc(torch.tanh(y) + F.linear(x.amax((2, 3)), self.weight))


@known(AWKWARD)
def parameter_used_twice() -> Net:
    return ParameterUsedTwice(), (image(),)


class ModuleCalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.block(x))
        x = self.block(x) + x
        return self.fc(x.mean((2, 3)))


@known(AWKWARD)
def module_called_twice() -> Net:
    return ModuleCalledTwice(), (image(),)


class FrozenSize(nn.Module):
    """Sizes written as numbers in `forward`: nothing on the module can be mended."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, padding=1)
        self.a = nn.Conv2d(8, 12, 1)
        self.b = nn.Conv2d(16, 12, 1)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        a, b = torch.split(x, [8, 16], dim=1)
        return self.fc(torch.relu(self.a(a) + self.b(b)).mean((2, 3)))


@known(AWKWARD)
def frozen_size_in_forward() -> Net:
    return FrozenSize(), (image(),)


class View512(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1)
        self.conv2 = nn.Conv2d(16, 32, 3, 2, 1)
        self.fc1 = nn.Linear(512, 24)
        self.fc2 = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = x.view(-1, 512)
        return self.fc2(F.relu(self.fc1(x)))


@known(AWKWARD)
def view_to_512() -> Net:
    return View512(), (image(),)


class Rearranged(nn.Module):
    """Heads split and merged by `einops.rearrange`."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        from einops import rearrange, reduce

        x = rearrange(self.stem(x), "b c h w -> b (h w) c")
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in self.to_qkv(x).chunk(3, dim=-1))
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        return self.fc(reduce(x + self.to_out(y), "b n c -> b c", "mean"))


@known(AWKWARD)
def einops_rearrange() -> Net:
    return Rearranged(), (image(),)


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention` and the encoder layer around it: without gradients both take PyTorch's fused fast path."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(7, width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.layer = nn.TransformerEncoderLayer(width, heads, 24, batch_first=True, activation="gelu")
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.norm(x + self.attn(x, x, x, need_weights=False)[0])
        return self.fc(self.layer(x).mean(1))


@known(AWKWARD)
def torch_multihead_attention() -> Net:
    return TorchAttention(), (torch.randn(2, 6, 7),)


class Parametrised(nn.Module):
    """Weight norm and spectral norm as parametrisations: the weight is computed from parameters of other shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = parametrizations.weight_norm(nn.Conv2d(3, 16, 3, padding=1))
        self.conv2 = parametrizations.spectral_norm(nn.Conv2d(16, 24, 3, padding=1))
        self.conv3 = nn.Conv2d(24, 16, 1)
        self.fc = parametrizations.weight_norm(nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


@known(AWKWARD)
def weight_and_spectral_norm() -> Net:
    return Parametrised(), (image(),)


class MaskBuffers(nn.Module):
    """Buffers as masks: one per channel, one per weight, and a causal one over the tokens."""

    def __init__(self, width: int = 16, heads: int = 2, tokens: int = 6) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(7, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc = nn.Linear(width, 10)
        self.register_buffer("channel_mask", (torch.arange(width) % 5 != 0).float())
        self.register_buffer("weight_mask", (torch.rand(width, width) > 0.3).float())
        self.register_buffer("causal", torch.tril(torch.ones(tokens, tokens, dtype=torch.bool)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * self.channel_mask
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)).masked_fill(~self.causal[:n, :n], float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)
        return self.fc((x + F.linear(y, self.proj.weight * self.weight_mask, self.proj.bias)).mean(1))


@known(AWKWARD)
def buffers_of_masks() -> Net:
    return MaskBuffers(), (torch.randn(2, 6, 7),)


class DictOutputs(nn.Module):
    """A dict of outputs, one of them nested, as detection and segmentation models return."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.body = nn.Conv2d(16, 24, 3, 2, 1)
        self.masks = nn.Conv2d(16, 2, 1)
        self.fc = nn.Linear(24, 10)
        self.aux = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        x = self.stem(x)
        y = F.silu(self.body(x)).mean((2, 3))
        return {"logits": self.fc(y), "masks": self.masks(x), "aux": [self.aux(y), self.aux(torch.tanh(y))]}


@known(AWKWARD)
def dict_outputs() -> Net:
    return DictOutputs(), (image(),)


class NestedInputs(nn.Module):
    """A nested list of tensors as the input, as detectors take."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(5, 16, 3, padding=1)
        self.extra = nn.Linear(4, 16)
        self.fc = nn.Linear(16, 10)

    def forward(self, inputs: list[Tensor | list[Tensor]]) -> Tensor:
        image, (depth, numbers) = inputs
        x = F.relu(self.a(image)) + torch.sigmoid(self.b(depth))
        return self.fc(x.mean((2, 3)) * self.extra(numbers))


@known(AWKWARD)
def nested_list_of_inputs() -> Net:
    return NestedInputs(), ([image(), [image(5), torch.randn(2, 4)]],)


class KeepsAnchors(nn.Module):
    """Anchors made in the first forward pass of a size and kept: the second pass runs other ops, as in many detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 24, 3, 2, 1)
        self.boxes = nn.Conv2d(24, 4, 1)
        self.made_for: torch.Size | None = None
        self.anchors = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.boxes(F.relu(self.body(F.relu(self.stem(x)))))
        if self.made_for != y.shape[2:]:
            self.made_for = y.shape[2:]
            steps = [torch.arange(n, dtype=x.dtype) + 0.5 for n in self.made_for]
            self.anchors = torch.stack(torch.meshgrid(*steps, indexing="ij")).repeat(2, 1, 1)
        return y.sigmoid() * 2 + self.anchors


@known(AWKWARD)
def anchors_kept_between_passes() -> Net:
    return KeepsAnchors(), (image(),)


class ThreeNumbers(nn.Module):
    """Attention over a map whose view is told three attributes at once, one of them twice; values wider than keys."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.value_dim, self.key_dim = heads, width // heads, 5
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.qkv = nn.Conv2d(width, heads * (2 * self.key_dim + self.value_dim), 1)
        self.proj = nn.Conv2d(width, width, 1)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        qkv = self.qkv(x).view(b, self.heads, self.key_dim * 2 + self.value_dim, h * w)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=2)
        y = v @ (q.transpose(-2, -1) @ k * self.key_dim**-0.5).softmax(-1).transpose(-2, -1)
        return self.fc((x + self.proj(y.reshape(b, c, h, w))).mean((2, 3)))


@known(AWKWARD)
def three_numbers_in_one_view() -> Net:
    return ThreeNumbers(), (image(),)


class CrossAttention(nn.Module):
    """A learned query asks the tokens: keys and values come from one projection, the query from another part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 16)
        self.query = nn.Parameter(torch.randn(1, 1, 16))
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.fc(self.attn(self.query.repeat(x.shape[0], 1, 1), x, x)[0][:, 0])


@known(AWKWARD)
def learned_query() -> Net:
    return CrossAttention(), (torch.randn(2, 6, 7),)


class DrawsTokens(nn.Module):
    """Tokens drawn at random, as masked autoencoders do: the same draw must reach both sides of a proof."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.fc = nn.Linear(7, 16), nn.Linear(16, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        order = torch.rand(x.shape[:2], dtype=x.dtype).argsort(1)[:, :3]
        x = torch.gather(x, 1, order[..., None].repeat(1, 1, x.shape[2]))
        return self.fc(F.gelu(self.body(x)).mean(1))


class SplitByWhatWasRead(nn.Module):
    """``split((c, c, 3))`` with the ``c`` of what was read, as in focal modulation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fork = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 35, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        c = x.shape[1]
        query, context, gates = torch.split(self.fork(x), (c, c, 3), 1)
        return self.fc((query * torch.tanh(context) * gates.sum(1, keepdim=True) + x).mean((2, 3)))


@known(AWKWARD)
def split_by_what_was_read() -> Net:
    return SplitByWhatWasRead(), (image(),)
