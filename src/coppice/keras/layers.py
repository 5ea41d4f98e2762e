"""Keras layers in the vocabulary of ``coppice.rules``: the one table that knows what a layer computes.

A line maps the name of a class of Keras to a function of the tape, the layer and what it was called with; it writes the layer's ops down
(with its weights as operands), says which fields of its configuration hold a width, and answers the result. What is not in the table is
pinned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from coppice.keras.attention import einsum_dense, grouped_query_attention, multi_head_attention
from coppice.keras.common_ops import NoRuleError, Translate, activation, joined, mixing, permuted, pointwise, reduced, view
from coppice.keras.tape import Tape, Traced


def is_last(layer: Any) -> bool:
    return bool(layer.data_format == "channels_last")


def with_bias(y: Any, bias: Any, last: bool) -> Any:
    if bias is None:
        return y
    rank = len(y.shape)
    return y + ops.reshape(bias, (1,) * (rank - 1) + (-1,) if last else (1, -1) + (1,) * (rank - 2))


# --- layers with weights --------------------------------------------------------------------------------------------


def dense(t: Tape, layer: Any, x: Traced) -> Traced:
    inputs = [x, t.weight(layer.kernel), t.weight(layer.bias)]

    def run(a: Sequence[Any], s: Any) -> Any:
        y = ops.matmul(a[0], a[1])
        return y if a[2] is None else y + a[2]

    out = t.emit("dense", inputs, (*x.shape[:-1], layer.units), run)
    t.bind("units", out, -1)
    return activation(t, layer.activation, out)


def conv(t: Tape, layer: Any, x: Traced) -> Traced:
    last = is_last(layer)
    options = {"strides": layer.strides, "dilation_rate": layer.dilation_rate, "data_format": layer.data_format}
    padding, pads = layer.padding, None
    if padding == "causal":  # zeros in front of the only spatial dim
        before = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
        padding, pads = "valid", ([(0, 0), (before, 0), (0, 0)] if last else [(0, 0), (0, 0), (before, 0)])

    def run(a: Sequence[Any], s: Any) -> Any:
        z = a[0] if pads is None else ops.pad(a[0], pads)
        return with_bias(ops.conv(z, a[1], padding=padding, **options), a[2], last)

    inputs = [x, t.weight(layer.kernel), t.weight(layer.bias)]
    shape = tuple(layer.compute_output_shape(x.shape))
    out: Traced = t.emit("conv_kernel_first", inputs, shape, run, {"last": last, "sizes": {"g": layer.groups}})
    t.bind("filters", out, -1 if last else 1)
    if layer.groups > 1:
        t.bind_letter("groups", "g")
    return activation(t, layer.activation, out)


def conv_transpose(t: Tape, layer: Any, x: Traced) -> Traced:
    last = is_last(layer)

    def run(a: Sequence[Any], s: Any) -> Any:
        y = ops.conv_transpose(
            a[0], a[1], strides=layer.strides, padding=layer.padding, output_padding=layer.output_padding,
            dilation_rate=layer.dilation_rate, data_format=layer.data_format,
        )  # fmt: skip
        return with_bias(y, a[2], last)

    inputs = [x, t.weight(layer.kernel), t.weight(layer.bias)]
    out: Traced = t.emit("conv_transpose_kernel_first", inputs, tuple(layer.compute_output_shape(x.shape)), run, {"last": last})
    t.bind("filters", out, -1 if last else 1)
    return activation(t, layer.activation, out)


def depthwise_conv(t: Tape, layer: Any, x: Traced) -> Traced:
    out = _depthwise(t, layer, x, layer.kernel, layer.bias, tuple(layer.compute_output_shape(x.shape)))
    return activation(t, layer.activation, out)


def _depthwise(t: Tape, layer: Any, x: Traced, kernel: Any, bias: Any, shape: tuple[int, ...]) -> Traced:
    last = is_last(layer)

    def run(a: Sequence[Any], s: Any) -> Any:
        y = ops.depthwise_conv(
            a[0], a[1], strides=layer.strides, padding=layer.padding, dilation_rate=layer.dilation_rate, data_format=layer.data_format
        )
        return with_bias(y, a[2], last)

    out: Traced = t.emit("depthwise_conv", [x, t.weight(kernel), t.weight(bias)], shape, run, {"last": last})
    if layer.depth_multiplier > 1:
        t.bind_letter("depth_multiplier", "m")
    return out


def separable_conv(t: Tape, layer: Any, x: Traced) -> Traced:
    last = is_last(layer)
    whole = tuple(layer.compute_output_shape(x.shape))
    channels = x.shape[-1 if last else 1] * layer.depth_multiplier
    between = (*whole[:-1], channels) if last else (whole[0], channels, *whole[2:])
    middle = _depthwise(t, layer, x, layer.depthwise_kernel, None, between)

    def run(a: Sequence[Any], s: Any) -> Any:
        return with_bias(ops.conv(a[0], a[1], strides=1, padding="valid", data_format=layer.data_format), a[2], last)

    inputs = [middle, t.weight(layer.pointwise_kernel), t.weight(layer.bias)]
    out: Traced = t.emit("conv_kernel_first", inputs, whole, run, {"last": last, "sizes": {"g": 1}})
    t.bind("filters", out, -1 if last else 1)
    return activation(t, layer.activation, out)


def batch_norm(t: Tape, layer: Any, x: Traced, training: Any = None, mask: Any = None) -> Any:
    axis = layer.axis % len(x.shape)
    if axis not in (1, len(x.shape) - 1):
        raise NoRuleError("it normalises a dim that is neither the first nor the last")
    shape = [-1 if k == axis else 1 for k in range(len(x.shape))]

    def run(a: Sequence[Any], s: Any) -> Any:
        gamma, beta, mean, variance = (None if w is None else ops.reshape(w, shape) for w in a[1:])
        scale = ops.rsqrt(variance + layer.epsilon)
        y = (a[0] - mean) * (scale if gamma is None else scale * gamma)
        return y if beta is None else y + beta

    weights = [layer.gamma if layer.scale else None, layer.beta if layer.center else None, layer.moving_mean, layer.moving_variance]
    last = axis == len(x.shape) - 1
    return t.emit("batch_norm", [x, *map(t.weight, weights)], x.shape, run, {"last": last})


def layer_norm(t: Tape, layer: Any, x: Traced) -> Any:
    rank = len(x.shape)
    axes = sorted(a % rank for a in ([layer.axis] if isinstance(layer.axis, int) else layer.axis))
    if axes != list(range(rank - len(axes), rank)):
        raise NoRuleError("it normalises dims that are not the last ones")
    if layer.rms_scaling:
        raise NoRuleError("scaling by the variance alone, which Keras gave up")

    def run(a: Sequence[Any], s: Any) -> Any:
        y = (a[0] - ops.mean(a[0], axis=axes, keepdims=True)) * ops.rsqrt(ops.var(a[0], axis=axes, keepdims=True) + layer.epsilon)
        y = y if a[1] is None else y * a[1]
        return y if a[2] is None else y + a[2]

    return t.emit("layer_norm", [x, t.weight(layer.gamma), t.weight(layer.beta)], x.shape, run, {"dims": len(axes)})


def rms_norm(t: Tape, layer: Any, x: Traced) -> Any:
    rank = len(x.shape)
    axes = sorted(a % rank for a in ([layer.axis] if isinstance(layer.axis, int) else layer.axis))
    if axes != list(range(rank - len(axes), rank)):
        raise NoRuleError("it normalises dims that are not the last ones")

    def run(a: Sequence[Any], s: Any) -> Any:
        return a[0] * ops.rsqrt(ops.mean(ops.square(a[0]), axis=axes, keepdims=True) + layer.epsilon) * a[1]

    return t.emit("layer_norm", [x, t.weight(layer.scale)], x.shape, run, {"dims": len(axes)})


def group_norm(t: Tape, layer: Any, x: Traced) -> Any:
    axis = layer.axis % len(x.shape)
    if axis not in (1, len(x.shape) - 1) or len(x.shape) < 3:
        raise NoRuleError("it normalises a dim that is neither the first nor the last")
    last = axis == len(x.shape) - 1
    groups = x.shape[axis] if layer.groups == -1 else layer.groups

    def run(a: Sequence[Any], s: Any) -> Any:
        z, now = a[0], s.get("g", groups)
        shape = list(z.shape)
        apart = [*shape[:axis], now, shape[axis] // now, *shape[axis + 1 :]]
        z = ops.reshape(z, apart)
        over = [k for k in range(1, len(apart)) if k != axis]
        z = (z - ops.mean(z, axis=over, keepdims=True)) * ops.rsqrt(ops.var(z, axis=over, keepdims=True) + layer.epsilon)
        z = ops.reshape(z, shape)
        one = [-1 if k == axis else 1 for k in range(len(shape))]
        z = z if a[1] is None else z * ops.reshape(a[1], one)
        return z if a[2] is None else z + ops.reshape(a[2], one)

    weights = [layer.gamma if layer.scale else None, layer.beta if layer.center else None]
    out = t.emit("group_norm", [x, *map(t.weight, weights)], x.shape, run, {"last": last, "sizes": {"g": groups}})
    if layer.groups != -1:
        t.bind_letter("groups", "g")
    return out


def custom_scale(t: Tape, layer: Any, inputs: Sequence[Traced]) -> Traced:
    """The first, and a fixed share of the second."""
    return pointwise(t, list(inputs), inputs[0].shape, lambda *a: layer(list(a)))


def unit_norm(t: Tape, layer: Any, x: Traced) -> Traced:
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    return mixing(t, x, axes, layer)


def embedding(t: Tape, layer: Any, x: Traced) -> Any:
    if layer.mask_zero:
        raise NoRuleError("it makes a mask, which layers after it read")
    shape = (*x.shape, layer.output_dim)
    run: Any = lambda a, s: ops.take(a[0], ops.cast(a[1], "int32"), axis=0)  # noqa: E731
    out = t.emit("embedding", [t.weight(layer.embeddings), x], shape, run)
    t.bind("output_dim", out, -1)
    return out


def prelu(t: Tape, layer: Any, x: Traced) -> Traced:
    run: Any = lambda z, alpha: ops.relu(z) - alpha * ops.relu(-z)  # noqa: E731
    return pointwise(t, [x, _given(t.weight(layer.alpha))], x.shape, run)


def layer_scale(t: Tape, layer: Any, x: Traced) -> Traced:
    out = pointwise(t, [x, _given(t.weight(layer.gamma))], x.shape, ops.multiply)
    t.bind("projection_dim", out, -1)
    return out


def normalization(t: Tape, layer: Any, x: Traced) -> Any:
    if layer.invert or not layer.weights:
        raise NoRuleError("a normalisation with given numbers, or an inverted one")
    shape = layer._broadcast_shape
    run: Any = lambda z, mean, variance: (  # noqa: E731
        (z - ops.reshape(mean, shape)) / ops.maximum(ops.sqrt(ops.reshape(variance, shape)), keras.config.epsilon())
    )
    kept = list(layer._keep_axis)
    if kept and kept != [len(x.shape) - 1]:
        raise NoRuleError("it keeps statistics along other dims than the last")
    return pointwise(t, [x, _given(t.weight(layer.adapt_mean)), _given(t.weight(layer.adapt_variance))], x.shape, run)


def _given(value: int | None) -> int:
    assert value is not None  # a built layer of that kind always has it
    return value


# --- layers without weights -----------------------------------------------------------------------------------------


def identity(t: Tape, layer: Any, x: Traced, *_: Any, **__: Any) -> Traced:
    """What does nothing outside training."""
    return pointwise(t, [x], x.shape, lambda z: z)


def elementwise(t: Tape, layer: Any, x: Traced) -> Traced:
    return pointwise(t, [x], x.shape, layer)


def rescaling(t: Tape, layer: Any, x: Traced) -> Any:
    if not (isinstance(layer.scale, (int, float)) and isinstance(layer.offset, (int, float))):
        raise NoRuleError("it scales each channel by a number of its own")
    return elementwise(t, layer, x)


def activation_layer(t: Tape, layer: Any, x: Traced) -> Traced:
    return activation(t, layer.activation, x)


def softmax_layer(t: Tape, layer: Any, x: Traced, mask: Any = None) -> Any:
    if mask is not None:
        raise NoRuleError("a softmax with a mask")
    return mixing(t, x, [layer.axis] if isinstance(layer.axis, int) else list(layer.axis), layer)


def spatial(t: Tape, layer: Any, x: Traced, training: Any = None) -> Traced:
    """Every channel for itself, over the dims between batch and channels: pooling, padding, cropping, resizing."""
    last = getattr(layer, "data_format", "channels_last") == "channels_last"
    shape = tuple(layer.compute_output_shape(x.shape))
    rule = "spatial_last" if last else "spatial_first"
    found: Traced = t.emit(rule, [x], shape, lambda a, s: layer(a[0]))
    return found


def global_pooling(t: Tape, layer: Any, x: Traced, mask: Any = None) -> Any:
    if mask is not None:
        raise NoRuleError("pooling with a mask")
    dims = range(1, len(x.shape) - 1) if is_last(layer) else range(2, len(x.shape))
    return reduced(t, x, list(dims), layer.keepdims, "mixed", layer)


def flatten(t: Tape, layer: Any, x: Traced) -> Traced:
    if layer.data_format == "channels_first" and len(x.shape) > 2:
        x = permuted(t, x, [0, *range(2, len(x.shape)), 1])
    return view(t, x, (x.shape[0], math.prod(x.shape[1:])))


def reshape(t: Tape, layer: Any, x: Traced) -> Traced:
    shape = tuple(layer.compute_output_shape(x.shape))
    out = view(t, x, shape)
    t.bind_all("target_shape", out, list(range(1, len(shape))), shape[1:])
    return out


def permute(t: Tape, layer: Any, x: Traced) -> Traced:
    return permuted(t, x, [0, *layer.dims])


def repeat_vector(t: Tape, layer: Any, x: Traced) -> Traced:
    one = view(t, x, (x.shape[0], 1, x.shape[1]))
    shape = (x.shape[0], layer.n, x.shape[1])
    out: Traced = t.emit("expand", [one], shape, lambda a, s: ops.repeat(a[0], layer.n, axis=1))
    t.bind("n", out, 1)
    return out


def merged(t: Tape, layer: Any, inputs: Sequence[Traced]) -> Any:
    if len({len(x.shape) for x in inputs}) > 1:  # Keras then inserts dims behind the batch
        raise NoRuleError("tensors of several ranks are merged")
    shape = tuple(max(sizes) for sizes in zip(*(x.shape for x in inputs), strict=True))
    return pointwise(t, list(inputs), shape, lambda *a: layer(list(a)))


def concatenate(t: Tape, layer: Any, inputs: Sequence[Traced]) -> Traced:
    return joined(t, inputs, layer.axis)


def _each(names: str, translate: Translate) -> dict[str, Translate]:
    return dict.fromkeys(names.split(), translate)


TABLE: dict[str, Translate] = {
    **_each("Dense", dense),
    **_each("EinsumDense", einsum_dense),
    **_each("Conv1D Conv2D Conv3D", conv),
    **_each("Conv1DTranspose Conv2DTranspose Conv3DTranspose", conv_transpose),
    **_each("DepthwiseConv1D DepthwiseConv2D", depthwise_conv),
    **_each("SeparableConv1D SeparableConv2D", separable_conv),
    **_each("BatchNormalization", batch_norm),
    **_each("LayerNormalization", layer_norm),
    **_each("RMSNormalization", rms_norm),
    **_each("GroupNormalization", group_norm),
    **_each("UnitNormalization", unit_norm),
    **_each("Embedding", embedding),
    **_each("PReLU", prelu),
    **_each("LayerScale", layer_scale),
    **_each("CustomScaleLayer", custom_scale),
    **_each("Normalization", normalization),
    **_each("MultiHeadAttention", multi_head_attention),
    **_each("GroupedQueryAttention", grouped_query_attention),
    **_each(
        "Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D GaussianDropout GaussianNoise AlphaDropout ActivityRegularization "
        "StochasticDepth Identity",
        identity,
    ),
    **_each("ReLU LeakyReLU ELU", elementwise),
    **_each("Rescaling", rescaling),
    **_each("Activation", activation_layer),
    **_each("Softmax", softmax_layer),
    **_each(
        "MaxPooling1D MaxPooling2D MaxPooling3D AveragePooling1D AveragePooling2D AveragePooling3D "
        "ZeroPadding1D ZeroPadding2D ZeroPadding3D "
        "Cropping1D Cropping2D Cropping3D UpSampling1D UpSampling2D UpSampling3D Resizing CenterCrop AdaptiveAveragePooling1D "
        "AdaptiveAveragePooling2D AdaptiveAveragePooling3D AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D",
        spatial,
    ),
    **_each(
        "GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D",
        global_pooling,
    ),
    **_each("Flatten", flatten),
    **_each("Reshape", reshape),
    **_each("Permute", permute),
    **_each("RepeatVector", repeat_vector),
    **_each("Add Subtract Multiply Average Maximum Minimum", merged),
    **_each("Concatenate", concatenate),
}
