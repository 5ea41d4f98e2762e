"""A recorded model as repair and elimination see it: its layers that multiply features by a weight, whatever the framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from coppice.graph import Op
from coppice.stepwise import Stepwise

Array = NDArray[Any]


class Linear(Protocol):
    """A layer of a recording that multiplies patches of features by a weight, group by group; its channels are dim ``channels``.

    ``input`` and ``output`` are value ids, ``normed`` that of the result of the BatchNorm right after it, if there is one. The indices of
    the dims ``summed`` of the input, as a product, make up groups and features: channel by channel, for each all places of a kernel.
    """

    index: int
    weight: str
    input: int
    output: int
    normed: int | None
    channels: int
    summed: tuple[int, ...]

    @property
    def can_shift(self) -> bool:
        """Whether a constant can be added to the results: in the bias, or in the mean that a BatchNorm takes away."""

    def matrix(self) -> Array:
        """The weight as it is now: (groups, outputs a group, features a group)."""

    def bias(self) -> Array | None:
        """As it is now, group by group."""

    def changed(self, matrix: Array, shift: Array | None) -> dict[str, Array]:
        """The model's tensors with the weight ``matrix``, and what ``shift`` says of each output (group by group) added to the results."""

    def affine(self) -> tuple[Array, Array]:
        """Shift and scale of the BatchNorm after the layer, as it is now; a scale of next to nothing is taken as one."""

    def positions(self, shape: Sequence[int]) -> int:
        """How many positions a sample of results of this shape has."""

    def samples(self, x: Array) -> int:
        """How many samples a batch of inputs has at each position."""

    def features(self, x: Array, at: Array, shape: Sequence[int]) -> Array:
        """What the weight is multiplied with for results of this shape at positions ``at``: (groups, samples, features a group)."""

    def responses(self, y: Array, at: Array) -> Array:
        """The results at these positions: (groups, samples, outputs a group)."""


class Model(Protocol):
    """A model's recording, its layers, and its tensors by name."""

    @property
    def program(self) -> Stepwise: ...

    @property
    def layers(self) -> Sequence[Linear]: ...

    def array(self, value: int, batch: int) -> Array:
        """What a value is now for one of the program's active batches."""

    def adds(self, op: Op) -> bool:
        """Whether the op is the plain sum of its two operands."""

    def tensor(self, name: str) -> Array:
        """A copy of a parameter or buffer as it is now."""

    def write(self, values: Mapping[str, Array]) -> None:
        """Set tensors of the model."""

    def answers(self) -> Array:
        """The first output for all active batches with the tensors as they are now; scores, where the model ends with a softmax."""
