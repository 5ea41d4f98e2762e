"""Ops of TensorFlow that Keras's layers are made of, and tf2onnx has no rule for."""

from __future__ import annotations

from typing import Any

import numpy as np


def register() -> None:
    """Tell tf2onnx of them."""
    from tf2onnx.handler import tf_op
    from tf2onnx.utils import map_onnx_to_numpy_type

    @tf_op("Erfc")
    class Erfc:
        """1 - erf(x), which ONNX has no name for: GELU is made of it."""

        @classmethod
        def version_9(cls, graph: Any, node: Any, **_: Any) -> None:
            (x,), shapes, dtypes = node.input, node.output_shapes, node.output_dtypes
            one = graph.make_const(f"{node.name}/one", np.ones((), map_onnx_to_numpy_type(graph.get_dtype(x))))
            graph.remove_node(node.name)
            erf = graph.make_node("Erf", [x])
            graph.make_node("Sub", [one.output[0], erf.output[0]], name=node.name, outputs=node.output, shapes=shapes, dtypes=dtypes)
