"""The op table: what every op does to the dims of its operands, one line an op.

``LINES`` holds the rules that the notation can say (see ``coppice.notation``); ``SHAPE_RULES`` names the few that need sizes
or positions and are functions in ``coppice.movement``. Coupling, surgery, cost and the oracle all read these lines, so they can't
disagree. An op with no rule is pinned: nobody assumes that an op they don't know is element-wise.

A front-end maps its own ops to these names (for PyTorch: ``coppice.torch.aten``). To add a rule, see ``docs/add-an-op-rule.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Rule:
    """A line of notation; ``macs`` are products of letters to sum up, ``~k`` for operand k's uncut dims and ``~out`` for the result's."""

    line: str | Callable[[dict[str, Any]], str]
    macs: tuple[str, ...] | Callable[[dict[str, Any]], tuple[str, ...]] = ()

    def text(self, attrs: dict[str, Any]) -> str:
        return self.line if isinstance(self.line, str) else self.line(attrs)

    def products(self, attrs: dict[str, Any]) -> tuple[str, ...]:
        return self.macs if isinstance(self.macs, tuple) else self.macs(attrs)


def _layer_norm(attrs: dict[str, Any]) -> str:
    """Normalisation over the last ``dims`` dims, as one pattern."""
    letters = [f"c{k}" for k in range(attrs["dims"])]
    weight = " ".join(letters)
    return f"... {' '.join(f'{c}!' for c in letters)}, {weight}, {weight} -> ... {weight}"


def _batch_statistics(attrs: dict[str, Any]) -> str:
    """Normalised by the mean and variance of what comes in: over everything but the channels, as a standardised weight is."""
    rest = [f"d{k}" for k in range(attrs["rank"] - 2)]
    mixed = " ".join(f"{d}!" for d in rest)
    return f"n! c {mixed}, c, c, c, c -> n c {' '.join(rest)}, c, c"


def _attention(attrs: dict[str, Any]) -> str:
    """With no scale given, the op scales by the head dim's width itself: it mixes it."""
    depth = "d" if attrs.get("scaled") else "d!"
    return f"... q {depth}, ... k {depth}, ... k! v, ... q k -> ... q v, ... q"


def _weight_norm(attrs: dict[str, Any]) -> str:
    """A weight scaled to a given norm, index by index of dim ``dim``: it mixes all other dims."""
    letters = [f"c{k}" for k in range(attrs["rank"])]
    norm = " ".join(c if k == attrs["dim"] else "~" for k, c in enumerate(letters))
    mixed = " ".join(c if k == attrs["dim"] else f"{c}!" for k, c in enumerate(letters))
    return f"{mixed}, {norm} -> {' '.join(letters)}, {norm}"


def _channels(first: str, last: str) -> Callable[[dict[str, Any]], str]:
    """The line where channels come right behind the batch (``last`` not set), and where they come last."""
    return lambda attrs: last if attrs.get("last") else first


LINES: dict[str, Rule] = {
    "conv": Rule("n (g i) ~..., (g o) i ~..., (g o) -> n (g o) ~...", macs=("n g o i ~1 ~out",)),
    "pointwise_conv": Rule("n (g i) ..., (g o) i ~..., (g o) -> n (g o) ...", macs=("n g o i ...",)),
    "conv_transpose": Rule("n (g i) ~..., (g i) o ~..., (g o) -> n (g o) ~...", macs=("n g i o ~0 ~1",)),
    "conv_kernel_first": Rule(
        _channels(
            "n (g i) ~..., ~... i (g o), (g o) -> n (g o) ~...",
            "n ~... (g i), ~... i (g o), (g o) -> n ~... (g o)",
        ),
        macs=("n g o i ~1 ~out",),
    ),
    "conv_transpose_kernel_first": Rule(
        _channels("n i ~..., ~... o i, o -> n o ~...", "n ~... i, ~... o i, o -> n ~... o"), macs=("n i o ~0 ~1",)
    ),
    "depthwise_conv": Rule(
        _channels("n c ~..., ~... c m, (c m) -> n (c m) ~...", "n ~... c, ~... c m, (c m) -> n ~... (c m)"), macs=("n c m ~1 ~out",)
    ),
    "dense": Rule("... i, i o, o -> ... o", macs=("... i o",)),
    "einsum": Rule(lambda attrs: str(attrs["line"]), macs=lambda attrs: tuple(attrs["macs"])),
    "mm": Rule("a b, b c, ... c -> a c", macs=("a b c",)),
    "bmm": Rule("n a b, n b c, n a c -> n a c", macs=("n a b c",)),
    "mv": Rule("a b, b -> a", macs=("a b",)),
    "dot": Rule("a, a -> ", macs=("a",)),
    "weight_norm": Rule(_weight_norm),
    "lstm": Rule("t! n i, (q h!) i, (q h) h, (q h), (q h), n h, n h -> t n h, n h, n h", macs=("t n q h i", "t n q h h")),
    "batch_norm": Rule(_channels("n c ..., c, c, c, c -> n c ...", "... c, c, c, c, c -> ... c")),
    "batch_statistics": Rule(_batch_statistics),
    "layer_norm": Rule(_layer_norm),
    "group_norm": Rule(
        _channels("n (g c!) ~..., (g c), (g c) -> n (g c) ~..., n g, n g", "n ~... (g c!), (g c), (g c) -> n ~... (g c)"),
    ),
    "attention": Rule(_attention, macs=("... q k d", "... q k v")),
    "attention_heads": Rule("n q (g r) d!, n k g d!, n k! g v -> n q (g r) v", macs=("n q k g r d", "n q k g r v")),
    "channel_shuffle": Rule("n (g c) ... -> n (c g) ..."),
    "pixel_shuffle": Rule("... (c ~) ~ ~ -> ... c ~ ~"),
    "pixel_unshuffle": Rule("... c ~ ~ -> ... (c ~) ~ ~"),
    "im2col": Rule("n c ~ ~ -> n (c ~) ~"),
    "col2im": Rule("n (c ~) ~ -> n c ~ ~"),
    "embedding": Rule("~ c, ... -> ... c"),
    "spatial1d": Rule("... ~ -> ... ~"),
    "spatial2d": Rule("... ~ ~ -> ... ~ ~"),
    "spatial3d": Rule("... ~ ~ ~ -> ... ~ ~ ~"),
    "spatial_first": Rule("n c ~... -> n c ~..."),
    "spatial_last": Rule("n ~... c -> n ~... c"),
    "grid_sample": Rule("n c ~..., n ~... -> n c ~..."),
    "roi_align": Rule("~ c ~ ~, ~... -> ~ c ~ ~"),
}
