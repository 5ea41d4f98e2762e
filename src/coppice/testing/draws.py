"""How a block for a given shape is drawn at random; None where it does not fit the shape."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from torch import nn

from coppice.testing.blocks import (
    Affine,
    Chunk,
    FrozenAttention,
    FrozenFlatten,
    FrozenSplit,
    HalfSlice,
    Narrow,
    Residual,
    ScaledResidual,
    SelfConcat,
    Split,
    TiedPair,
    Twice,
)
from coppice.testing.map_blocks import (
    ChannelLayerNorm,
    ChannelShuffle,
    ChannelShuffleStored,
    ChannelsLastMlp,
    DownBlock,
    EinsumConv,
    GatedConv,
    GlobalPool,
    OneChannelGate,
    PaddedShortcut,
    PatchTokens,
    PoolFlatten,
    PoolFlattenStored,
    ShuffleUnit,
    ShuffleUp,
    SpatialGate,
    SplitReuse,
    SqueezeExcite,
    SqueezeExciteLinear,
    SubtractMean,
    ToTokens,
    ToTokensPermute,
    Upsample,
    WindowAttention,
    ZeroPadChannels,
    bottleneck,
    conv_bn_act,
)
from coppice.testing.token_blocks import (
    ChunkedAttention,
    ClassicAttention,
    ClassToken,
    EinsumLinear,
    FirstToken,
    GatedMlp,
    Mlp,
    PositionEmbedding,
    PositionTable,
    SeparateAttention,
    StoredAttention,
    TokenMean,
    TokenMixer,
    ToMap,
    ToMapStored,
    TorchAttention,
)

WIDTHS = (8, 12, 16, 24, 32)
ODD_WIDTHS = (5, 7, 9, 15)
MAX_WIDTH = 64
MAX_SIDE = 16

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
