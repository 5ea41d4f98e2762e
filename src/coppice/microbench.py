"""Single ops, timed as a runtime runs them inside a model: many in one graph, each fed by an op before it, read off its own clock.

An op alone in a loop finds its weights in the cache and pays for layouts that a network changes only once. Here ops take turns, so weights
come from where a network's come from; the op before each has just written its input; and only the op's own time counts. What the runtime
fuses into it (bias and BatchNorm, ReLU) is in it.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coppice.errors import CoppiceError
from coppice.machine import pinning
from coppice.runtimes import onnx_session, openvino_model, runtime

RUNS, MOST_RUNS = 12, 60  # as many more as other programs take of the core: an op's time is its least, and one of them must be undisturbed
AT_ONCE = 2**26  # elements of inputs and weights in one graph: more would only wait for memory
HALF_A_TICK = 0.5e-6  # seconds: the runtimes' clocks tell whole microseconds
ACTIVATIONS = {"relu": "Relu", "relu6": "Clip"}  # which every runtime fuses into the convolution before them


@dataclass(frozen=True, slots=True)
class OpShape:
    """An op and its sizes: ``conv`` and ``conv_transpose`` (batch, groups, in and out channels of each), ``linear`` (rows, in, out),
    ``product`` (batch, a, b, c: a × b times b × c), ``attention`` (batch × heads, queries, keys, depth, depth of values).

    The rest is of convolutions: ``space``, the input's, and the usual four, a number for each dim of it.
    """

    kind: str
    sizes: tuple[int, ...]
    space: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    activation: str = ""

    def at(self, sizes: Sequence[int]) -> OpShape:
        return replace(self, sizes=tuple(sizes))

    @property
    def elements(self) -> int:
        """Of its inputs and weights."""
        return sum(math.prod(shape) for shape in _operands(self))

    def key(self) -> str:
        """As text: the same for the same op."""
        convolution = (self.space, self.kernel, self.stride, self.padding, self.dilation)
        parts = [self.sizes, *(convolution if self.kernel else ())]
        return " ".join([self.kind, *("x".join(map(str, part)) for part in parts), *([self.activation] if self.activation else [])])


def _operands(op: OpShape) -> list[tuple[int, ...]]:
    """The shape of the input that changes from run to run, then those of weights and of further inputs."""
    if op.kind == "conv":
        n, g, i, o = op.sizes
        return [(n, g * i, *op.space), (g * o, i, *op.kernel), (g * o,)]
    if op.kind == "conv_transpose":
        n, g, i, o = op.sizes
        return [(n, g * i, *op.space), (g * i, o, *op.kernel), (g * o,)]
    if op.kind == "linear":
        rows, i, o = op.sizes
        return [(rows, i), (i, o), (o,)]
    if op.kind == "product":
        n, a, b, c = op.sizes
        return [(n, a, b), (n, b, c)]
    n, q, k, d, v = op.sizes
    return [(n, q, d), (n, d, k), (n, k, v)]


def time_ops(
    runtime_name: str, threads: int, ops: Sequence[OpShape], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[float]:
    """Seconds of each op on the runtime. CoppiceError where the runtime is missing, or does not tell what single ops take."""
    check_tells(runtime_name)
    found: list[float] = []
    with pinning() as pin:
        for some in _portions(ops):
            pin(threads)
            found += PROFILERS[runtime_name](some, threads)
            progress(len(found), len(ops))
    return found


def check_tells(runtime_name: str) -> None:
    """CoppiceError where the runtime is missing, or does not tell what single ops take."""
    if runtime_name not in PROFILERS:
        raise CoppiceError(f"{runtime_name} does not tell what single ops take: a latency target needs one of {', '.join(PROFILERS)}")
    runtime(runtime_name)


def _portions(ops: Sequence[OpShape]) -> Iterator[list[OpShape]]:
    portion: list[OpShape] = []
    held = 0
    for op in ops:
        if portion and held + op.elements > AT_ONCE:
            yield portion
            portion, held = [], 0
        portion.append(op)
        held += op.elements
    if portion:
        yield portion


def _in_onnxruntime(ops: Sequence[OpShape], threads: int) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="coppice-") as folder:
        path = Path(folder) / "ops.onnx"
        feed = _write_graph(ops, path)
        session = onnx_session(path, 1, threads, "CPUExecutionProvider", "single ops", profile=Path(folder) / "profile")
        _repeat(lambda: session.run(None, feed))
        events = json.loads(Path(session.end_profiling()).read_text())
    spent: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["name"].removesuffix("_kernel_time")].append(event["dur"] * 1e-6)
    return _by_op(spent, len(ops))


def _in_openvino(ops: Sequence[OpShape], threads: int) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="coppice-") as folder:
        path = Path(folder) / "ops.onnx"
        feed = _write_graph(ops, path)
        request = openvino_model(path, None, threads, "single ops", PERF_COUNT=True).create_infer_request()
    spent: dict[str, list[float]] = defaultdict(list)

    def run() -> None:
        request.infer(feed, share_inputs=True)
        op = None
        for entry in request.profiling_info:  # in the order of the graph; it renames some nodes
            border = _BORDER.fullmatch(entry.node_name)
            if border:
                op = border[2] if border[1] == "before" else None
            elif op is not None and entry.node_type != "Reorder" and entry.status == entry.EXECUTED:
                spent[f"op{op}_{entry.node_name}"].append(entry.real_time.total_seconds())

    _repeat(run)
    return _by_op(spent, len(ops))


def _repeat(run: Callable[[], object]) -> None:
    """Often enough that every op has been undisturbed once."""
    run()
    began, computed = time.perf_counter(), time.process_time()
    for k in range(MOST_RUNS):
        run()
        share = (time.process_time() - computed) / (time.perf_counter() - began)
        if k + 1 >= RUNS / min(1.0, share):
            return


_OP, _BORDER = re.compile(r"op(\d+)_"), re.compile(r"(before|after)(\d+)")


def _by_op(spent: dict[str, list[float]], count: int) -> list[float]:
    """What the nodes named after each op take, at least. A runtime names a fused node after one of its parts.

    Runtimes tell whole microseconds, cut off: an op that ran in none of them is told to take half of one.
    """
    totals: dict[int, float] = defaultdict(float)
    for name, seconds in spent.items():
        found = _OP.match(name)
        if found:
            totals[int(found[1])] += min(seconds)
    if len(totals) < count:
        raise CoppiceError("the runtime does not tell what each single op takes; try another version of it")
    return [totals[k] or HALF_A_TICK for k in range(count)]


def _write_graph(ops: Sequence[OpShape], path: Path) -> dict[str, NDArray[np.float32]]:
    """One graph of all ops, independent of each other: names of what counts begin with ``op<k>_``. Answers its inputs."""
    from onnx import TensorProto, helper, numpy_helper, save

    numbers = np.random.default_rng(0)
    nodes, weights, inputs, outputs = [], [], [], []
    feed: dict[str, NDArray[np.float32]] = {}
    filled: dict[tuple[int, ...], NDArray[np.float32]] = {}
    for k, op in enumerate(ops):
        first, *others = _operands(op)
        computed = others if op.kind in ("product", "attention") else []  # no weights: what a model has computed before
        for name, shape in [(f"x{k}", first), *((f"weight{k}_{j}", shape) for j, shape in enumerate(computed))]:
            feed[name] = filled.setdefault(shape, numbers.standard_normal(shape, dtype=np.float32))
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        nodes.append(helper.make_node("Relu", [f"x{k}"], [f"fresh{k}"], name=f"before{k}"))
        names = [f"weight{k}_{j}" for j in range(len(others))]
        weights += [
            numpy_helper.from_array(0.02 * numbers.standard_normal(shape, dtype=np.float32), name)
            for name, shape in zip(names, others, strict=True)
            if not computed
        ]
        for type_, given, result, attributes in _steps(op, f"fresh{k}", names, f"op{k}_"):
            nodes.append(helper.make_node(type_, given, [result], name=result, **attributes))
            if type_ == "Clip":
                weights += [numpy_helper.from_array(np.float32(value), name) for value, name in zip((0, 6), given[1:], strict=True)]
        nodes.append(helper.make_node("ReduceMax", [nodes[-1].output[0]], [f"after{k}"], name=f"after{k}", keepdims=0))
        outputs.append(helper.make_tensor_value_info(f"after{k}", TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "ops", inputs, outputs, weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return feed


def _steps(op: OpShape, x: str, weights: Sequence[str], name: str) -> Iterator[tuple[str, list[str], str, dict[str, Any]]]:
    """The ONNX nodes of an op: type, inputs, output, attributes."""
    if op.kind in ("conv", "conv_transpose"):
        attributes = {
            "kernel_shape": op.kernel, "strides": op.stride, "pads": op.padding * 2, "dilations": op.dilation, "group": op.sizes[1],
        }  # fmt: skip
        yield "Conv" if op.kind == "conv" else "ConvTranspose", [x, *weights], f"{name}a", attributes
        if op.activation:
            limits = [f"{name}low", f"{name}high"] if op.activation == "Clip" else []
            yield op.activation, [f"{name}a", *limits], f"{name}b", {}
    elif op.kind == "linear":
        yield "Gemm", [x, *weights], f"{name}a", {}
    else:
        yield "MatMul", [x, weights[0]], f"{name}a", {}
        if op.kind == "attention":
            yield "Softmax", [f"{name}a"], f"{name}b", {"axis": -1}
            yield "MatMul", [f"{name}b", weights[1]], f"{name}c", {}


def _in_torch(ops: Sequence[OpShape], threads: int) -> list[float]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            operands = [[torch.randn(shape) for shape in _operands(op)] for op in ops]
            spent: list[list[float]] = [[] for _ in ops]

            def run() -> None:
                for op, tensors, seconds in zip(ops, operands, spent, strict=True):
                    fresh = torch.relu(tensors[0])
                    began = time.perf_counter()
                    _eager(op, fresh, tensors[1:])
                    seconds.append(time.perf_counter() - began)

            _repeat(run)
    finally:
        torch.set_num_threads(before)
    return list(map(min, spent))


def _eager(op: OpShape, x: Any, weights: Sequence[Any]) -> None:
    """The op as eager mode runs it: nothing fused."""
    import torch

    if op.kind in ("conv", "conv_transpose"):
        transposed = op.kind == "conv_transpose"
        zeros = [0] * len(op.kernel)
        torch.ops.aten.convolution.default(x, *weights, op.stride, op.padding, op.dilation, transposed, zeros, op.sizes[1])
    elif op.kind == "linear":
        torch.addmm(weights[1], x, weights[0])
    elif op.kind == "product":
        torch.bmm(x, weights[0])
    else:
        torch.nn.functional.scaled_dot_product_attention(x, weights[0].transpose(1, 2), weights[1])


PROFILERS: dict[str, Callable[[Sequence[OpShape], int], list[float]]] = {
    "torch": _in_torch,
    "onnxruntime": _in_onnxruntime,
    "openvino": _in_openvino,
}
