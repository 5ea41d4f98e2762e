"""What the translators of layers and ops write down: values, and ops in the vocabulary of ``coppice.rules`` with how to run them again.

An op's ``call`` is a function of its operands' arrays, in the order of ``inputs`` and then ``others``, and of the widths of the letters
of its rule; it answers the results' arrays. It is written with ``keras.ops``, in the precision of what it is given: the oracle of
verification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from coppice.graph import Kind, Op, Value
from coppice.keras.walk import trained, weights_of

Array = Any  # of the backend
Run = Callable[[Sequence[Array], Mapping[str, int]], Array]
"""(operands, widths of the rule's letters) -> one result, or a tuple of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """A tensor of the model as it is traced: which value it is, and what Keras needs to know of it."""

    id: int
    shape: tuple[int, ...]
    dtype: str

    def symbol(self) -> Any:
        return keras.KerasTensor(self.shape, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class Binding:
    """A field of a layer's configuration that holds a width: that of a dim of a value, or of a letter of an op's rule.

    ``index``: the place in a sequence, whose dense values are ``sequence``.
    """

    path: str
    key: str
    value: int | None = None
    dim: int = 0
    op: int | None = None
    letter: str = ""
    index: int | None = None
    sequence: tuple[int, ...] = ()


@dataclass(slots=True)
class Tape:
    """A recording under way. ``path`` is that of the layer (or op) that is being translated."""

    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    bindings: list[Binding] = field(default_factory=list)
    constants: dict[int, Any] = field(default_factory=dict)
    ties: list[tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=list)  # dims (value, dim) that must keep one width
    path: str = ""
    kind: str = ""  # its class
    _weights: dict[int, int] = field(default_factory=dict)  # id of a variable -> its value

    def new(self, shape: Sequence[int], kind: Kind, dtype: str = "float32", names: tuple[str, ...] = ()) -> int:
        size = 1 if dtype == "bool" else np.dtype(dtype if dtype != "bfloat16" else "float16").itemsize
        self.values.append(Value(len(self.values), tuple(shape), kind, size, names))
        return len(self.values) - 1

    def declare(self, path: str, layer: Any) -> None:
        """Make the layer's weights known by their names."""
        learned = trained(layer)
        for name, variable in weights_of(path, layer).items():
            known = self._weights.get(id(variable))
            if known is None:
                kind = Kind.PARAMETER if id(variable) in learned else Kind.BUFFER
                self._weights[id(variable)] = self.new(variable.shape, kind, str(variable.dtype), (name,))
            elif name not in self.values[known].names:
                self.values[known].names += (name,)

    def weight(self, variable: Any) -> int | None:
        return None if variable is None else self._weights[id(variable)]

    def constant(self, array: Any) -> int:
        found = self.new(np.shape(array), Kind.CONSTANT, "float32")
        self.constants[found] = array
        return found

    def emit(
        self,
        rule: str,
        inputs: Sequence[Traced | int | None],
        result: Any,
        call: Run,
        attrs: dict[str, Any] | None = None,
        others: Sequence[Traced | int] = (),
    ) -> Any:
        """Write an op down; answers its result. ``result`` is a shape, or what tells shape and precision, or a list of these."""
        ids = tuple(v.id if isinstance(v, Traced) else v for v in inputs)
        dtype = next((v.dtype for v in inputs if isinstance(v, Traced)), "float32")
        several = isinstance(result, list)
        outs = []
        for spec in result if several else [result]:
            shape, kind = (tuple(spec), dtype) if isinstance(spec, tuple) else (tuple(spec.shape), str(spec.dtype))
            outs.append(Traced(self.new(shape, Kind.INTERMEDIATE, kind), shape, kind))
        unread = tuple(dict.fromkeys(v.id if isinstance(v, Traced) else v for v in others))
        outputs = tuple(out.id for out in outs)
        self.ops.append(Op(rule, f"keras.{self.kind}", ids, outputs, self.path, attrs or {}, unread, call))
        return outs if several else outs[0]

    def bind(self, key: str, out: Traced, dim: int) -> None:
        """The layer's ``config[key]`` is the width of a dim of ``out``."""
        self.bindings.append(Binding(self.path, key, out.id, dim % len(out.shape)))

    def bind_letter(self, key: str, letter: str) -> None:
        """The layer's ``config[key]`` is the width of a letter of the op that was written last."""
        self.bindings.append(Binding(self.path, key, op=len(self.ops) - 1, letter=letter))

    def bind_all(self, key: str, out: Traced, dims: Sequence[int | None], dense: Sequence[int]) -> None:
        """``config[key][k]`` is the width of dim ``dims[k]`` of ``out`` (None: as it was)."""
        for index, dim in enumerate(dims):
            if dim is not None:
                self.bindings.append(Binding(self.path, key, out.id, dim, index=index, sequence=tuple(dense)))

    def tie(self, a: int, dim: int, b: int, other: int) -> None:
        """These dims (of values ``a`` and ``b``) must keep one width, though not the same indices."""
        self.ties.append(((a, dim), (b, other)))
