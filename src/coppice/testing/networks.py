"""Random, always valid networks in the style people write them, for testing the pruner on graphs nobody drew by hand.

A network is a random DAG of blocks. Every block is an ordinary `nn.Module` with ordinary shape code: some keep sizes as
attributes, some read them from `x.shape`, a few have them frozen as numbers in `forward`. The builder runs each block on the
example tensors as it adds it, so that shapes are tracked by PyTorch itself and an invalid combination can't be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn

from coppice.testing.blocks import Add, Concat, FrozenAttention, Gate
from coppice.testing.draws import (
    MAP_DRAWS,
    MAP_MIXING_DRAWS,
    MAX_WIDTH,
    TOKEN_DRAWS,
    TOKEN_MIXING_DRAWS,
    VECTOR_DRAWS,
    VECTOR_MIXING_DRAWS,
    Shape,
    any_width,
    chance,
    draw_frozen,
    draw_stem,
)
from coppice.testing.map_blocks import GlobalPool, PoolFlatten
from coppice.testing.token_blocks import FirstToken, SeparateAttention, TokenMean

BATCH = 2
FROZEN_SHARE = 0.08


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
        outputs: list[Output] = []
        vectors: list[int] = []
        if chance(self.rng, 0.25):
            vectors = [self.to_vector(self.rng.randrange(1, len(self.values)))]
            outputs.append(Output("aux", self.add(nn.Linear(self.width(vectors[0]), 3), vectors[0])))
        loose = [v for v in range(len(self.values)) if v not in self.used and all(v != o.value for o in outputs)]
        vectors = [self.to_vector(v) for v in loose] or vectors
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
