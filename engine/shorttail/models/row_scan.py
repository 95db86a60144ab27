"""Finds operators of a graph that work across the rows of a run, so that the answer for a row depends on the others.

The shapes tell most of it. A copy of the model that returns every tensor of its graph is run with 3, 5 and 7 rows: an
axis whose size grows with the rows holds the rows. A tensor that is computed from the inputs and has no such axis is a
single result for all rows, and one that has two such axes compares rows with each other. Of an operator that keeps the
shape (Softmax, CumSum), the axis along which it works is compared with the axis of the rows. Where the copy cannot run,
the rows are followed along the first axis as far as operators leave it in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shorttail._native.forest import read_attribute
from shorttail.models.onnx_file import fields
from shorttail.models.onnx_graph import Graph, Node, read_graph, read_node
from shorttail.models.runtime import onnxruntime

Array = NDArray[Any]
Example = Callable[[int], list[Array]]

TRACED_ROWS = (3, 5, 7)
FIRST_AXIS = frozenset({0})

# Their results depend on shapes alone, not on the values of the rows.
SHAPE_ONLY = {"Shape", "Size", "ConstantOfShape", "EyeLike", "RandomNormalLike", "RandomUniformLike"}
RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
# What happens in these cannot be told from the shapes around them.
OPAQUE = {"If", "Loop", "Scan", "SequenceMap"}
# The sizes of their results depend on the values of the rows.
SIZED_BY_VALUES = {"NonZero", "Compress", "Unique"}
STANDARD = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
# They may take rows apart and put them together again, as models with two towers do: examples must show what comes out.
MOVING = {
    *("Concat", "Split", "Slice", "Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND", "Scatter"),
    *("Pad", "Tile", "ReverseSequence", "Unique", "NonZero", "Compress", "Resize"),
}
# The first axis of their result may be another one than that of their input.
RESHAPING = {
    *("Transpose", "Flatten", "Squeeze", "Unsqueeze", "Einsum", "Expand", "SpaceToDepth", "DepthToSpace"),
    *("ArrayFeatureExtractor", "LSTM", "GRU", "RNN", "SplitToSequence", "ConcatFromSequence"),
}


@dataclass(frozen=True)
class RowScan:
    """What the graph says about rows. Each text names a node, and is "" if there is no such node.

    mixes: why the outputs depend on several rows at once. moves: a node that moves rows, which may be harmless.
    random: a node that draws random numbers. has_half: whether it computes with 16-bit floats.
    """

    mixes: str = ""
    moves: str = ""
    random: str = ""
    has_half: bool = False


class Rows(NamedTuple):
    """Where the rows are in a tensor. axes: those that grow with the rows. rank: None if it is unknown."""

    axes: frozenset[int]
    rank: int | None

    def along(self, axis: int) -> bool:
        """Whether the rows are along this axis, which is counted from the last one if it is negative."""
        if axis < 0:
            return self.rank is not None and axis + self.rank in self.axes
        return axis in self.axes


NOWHERE = Rows(frozenset(), None)


class Trace(NamedTuple):
    """What runs of the copy told. places: tensor -> its rows; numbers: tensor -> its value, if it is one integer."""

    places: dict[str, Rows]
    numbers: dict[str, int]
    has_half: bool


def scan_rows(
    data: bytes, inputs: Sequence[str], outputs: Sequence[str], example: Example | None, fixed_rows: int | None
) -> RowScan:
    """Scan the graph of an ONNX file.

    data: the file. inputs, outputs: names of those that are used. example: returns inputs with the given number of
    rows, one array for each of `inputs`; None to run nothing. fixed_rows: the number of rows that the file takes, None
    if it takes any.
    """
    try:
        graph = read_graph(data, lenient=True)
    except (ValueError, IndexError):
        return RowScan()
    trace = None
    if example is not None:
        with suppress(Exception):  # ONNX Runtime's exceptions share no base class, and examples may fail
            trace = run_trace(data, graph, inputs, example, (fixed_rows,) if fixed_rows else TRACED_ROWS)
    return Scanner(graph, trace).scan(inputs, outputs)


def run_trace(data: bytes, graph: Graph, inputs: Sequence[str], example: Example, sizes: Sequence[int]) -> Trace:
    """Run a copy of the model that returns every tensor. Raises what ONNX Runtime raises."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    declared = {tensor.name for tensor in graph.outputs}
    names = dict.fromkeys(name for node in graph.nodes for name in node.outputs if name and name not in declared)
    session = onnxruntime.InferenceSession(with_outputs(data, names), options, providers=["CPUExecutionProvider"])
    returned = [node.name for node in session.get_outputs()]
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in returned}
    numbers, has_half = {}, False
    for rows in sizes:
        given = dict(zip(inputs, example(rows), strict=True))
        for name, array in given.items():
            shapes.setdefault(name, []).append(array.shape)
        for name, array in zip(returned, session.run(None, given), strict=True):
            if isinstance(array, np.ndarray):
                shapes[name].append(array.shape)
                has_half |= array.dtype == np.float16
                if array.size == 1 and array.dtype.kind == "i":
                    numbers[name] = int(array.reshape(()))
    places = {name: found for name, all_shapes in shapes.items() if (found := rows_in(all_shapes, sizes))}
    return Trace(places, numbers, has_half)


def rows_in(shapes: Sequence[tuple[int, ...]], sizes: Sequence[int]) -> Rows | None:
    """Return where the rows are, given a tensor's shape for each number of rows; None if that cannot be told."""
    if len(shapes) != len(sizes) or len({len(shape) for shape in shapes}) != 1 or any(0 in shape for shape in shapes):
        return None
    axes = set()
    for axis, lengths in enumerate(zip(*shapes, strict=True)):
        each = lengths[0] // sizes[0]
        if each and all(length == each * rows for length, rows in zip(lengths, sizes, strict=True)):
            axes.add(axis)
        elif len(set(lengths)) > 1:
            return None
    if len(sizes) == 1 and len(axes) > 1:
        return None  # with a single number of rows, another axis may be a multiple of it by chance
    return Rows(frozenset(axes), len(shapes[0]))


def with_outputs(data: bytes, names: Sequence[str] | Mapping[str, Any]) -> bytes:
    """Return an ONNX file that also returns these tensors: protocol buffers that are joined are merged."""
    return data + message(7, b"".join(message(12, message(1, name.encode())) for name in names))


def message(number: int, content: bytes) -> bytes:
    """Encode a field that holds bytes."""
    head, length = bytearray([number << 3 | 2]), len(content)
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*head, length]) + content


class Scanner:
    """Follows the values of the rows through a graph. trace: None if the copy could not be run."""

    def __init__(self, graph: Graph, trace: Trace | None):
        self._graph = graph
        self._trace = trace
        self._places: dict[str, Rows] = dict(trace.places) if trace else {}
        self._opset = graph.opsets.get("", graph.opsets.get("ai.onnx", 1))
        self._from_rows: set[str] = set()  # tensors that are computed from the values of the inputs
        self._unclear: set[str] = set()  # tensors whose shapes do not tell where the rows are

    def scan(self, inputs: Sequence[str], outputs: Sequence[str]) -> RowScan:
        self._from_rows.update(inputs)
        if self._trace is None:
            self._places.update(dict.fromkeys(inputs, Rows(FIRST_AXIS, None)))
        mixed: dict[str, str] = {}
        moves = random = ""
        for node in self._graph.nodes:
            if node.op_type in RANDOM or (node.op_type == "Dropout" and len(node.inputs) > 2):
                random = random or label(node)
            used = [*node.inputs, *captured(node)]
            if node.op_type in SHAPE_ONLY or self._from_rows.isdisjoint(used):
                continue
            self._from_rows.update(node.outputs)
            if self._trace is None and self._keeps_first_axis(node):
                place = next((self._places[name] for name in used if name in self._places), None)
                self._places.update(dict.fromkeys(node.outputs, place) if place else {})
            if self._is_unclear(node) or not self._unclear.isdisjoint(used):
                self._unclear.update(node.outputs)
            why = next((mixed[name] for name in used if name in mixed), "") or self._mixes(node)
            if why:
                mixed |= dict.fromkeys(node.outputs, why)
            elif node.op_type in OPAQUE or (node.op_type in MOVING and self._rows(node, 0).along(0)):
                moves = moves or f"{label(node)} moves rows"
        why = next((mixed[name] for name in outputs if name in mixed), "")
        return RowScan(why, moves, random, self._trace is not None and self._trace.has_half)

    def _mixes(self, node: Node) -> str:
        """Return why a node makes a row depend on others, "" if it does not or that cannot be told."""
        works_along = RULES.get(node.op_type)
        if works_along is not None and works_along(self, node):
            return f"{label(node)} works along the rows"
        for name in node.outputs if self._trace is not None else ():
            place = self._places.get(name) if name not in self._unclear else None
            if place is not None and not place.axes:
                return f"{label(node)} makes a single result of all rows"
            if place is not None and len(place.axes) > 1:
                return f"{label(node)} compares rows with each other"
        return ""

    def _is_unclear(self, node: Node) -> bool:
        """Whether the shapes around a node may not tell what it does with the rows."""
        inside = node.op_type in OPAQUE or node.domain not in STANDARD
        held = all(name in self._places and len(self._places[name].axes) == 1 for name in node.outputs if name)
        return node.op_type in SIZED_BY_VALUES or (inside and not held)

    def _keeps_first_axis(self, node: Node) -> bool:
        """Whether the first axis of a node's result is that of its inputs, as far as that is known without shapes."""
        if node.op_type in ("MatMul", "Gemm"):
            return node.inputs[0] in self._places and not attribute(node, "transA", 0)
        if node.op_type == "Reshape":
            return (self._axes(node, 1) or [1])[0] in (0, -1)
        return node.op_type not in RESHAPING | OPAQUE

    # -- rules ---------------------------------------------------------------------------------------------------

    def _rows(self, node: Node, index: int) -> Rows:
        """Return where the rows are in an input of a node; nowhere if it has none, or if that is unknown."""
        name = node.inputs[index] if index < len(node.inputs) else ""
        return self._places.get(name, NOWHERE) if name in self._from_rows else NOWHERE

    def _axes(self, node: Node, index: int) -> list[int] | None:
        """Return the axes that a constant input holds, None if it is left out or no constant."""
        name = node.inputs[index] if index < len(node.inputs) else ""
        if name in self._graph.constants:
            return [int(axis) for axis in self._graph.constants[name].reshape(-1)]
        if self._trace is not None and name in self._trace.numbers:
            return [self._trace.numbers[name]]
        return None

    def softmax(self, node: Node) -> bool:
        place, axis = self._rows(node, 0), attribute(node, "axis", -1 if self._opset >= 13 else 1)
        return place.along(axis) if self._opset >= 13 else self._at_or_after(place, axis)

    def normalized_from(self, node: Node) -> bool:
        return self._at_or_after(self._rows(node, 0), attribute(node, "axis", -1))

    def _at_or_after(self, place: Rows, axis: int) -> bool:
        start = axis if axis >= 0 else None if place.rank is None else axis + place.rank
        return start is not None and any(at >= start for at in place.axes)

    def along_axis(self, node: Node) -> bool:
        return self._rows(node, 0).along(attribute(node, "axis", -1))

    def along_axis_0_unless_said(self, node: Node) -> bool:
        return self._rows(node, 0).along(attribute(node, "axis", 0))

    def cumulative(self, node: Node) -> bool:
        return any(self._rows(node, 0).along(axis) for axis in self._axes(node, 1) or ())

    def reduced(self, node: Node) -> bool:
        place = self._rows(node, 0)
        axes = attribute(node, "axes", None)
        if axes is None:
            axes = self._axes(node, 1)
            if axes is None and len(node.inputs) > 1 and node.inputs[1]:
                return False  # they are computed: the shape of the result tells
        if axes is None or not len(axes):
            return bool(place.axes) and not attribute(node, "noop_with_empty_axes", 0)
        return any(place.along(int(axis)) for axis in axes)

    def mean_variance(self, node: Node) -> bool:
        return any(self._rows(node, 0).along(int(axis)) for axis in attribute(node, "axes", (0, 2, 3)))

    def in_training(self, node: Node) -> bool:
        """It takes statistics of each channel, which is axis 1."""
        return bool(attribute(node, "training_mode", 0)) and bool(self._rows(node, 0).axes - {1})

    def quantized_together(self, node: Node) -> bool:
        """It takes a single scale from the largest and the smallest value of the whole tensor."""
        return bool(self._rows(node, 0).axes)

    def recurrent(self, node: Node) -> bool:
        together = node.op_type.startswith("Dynamic") and self.quantized_together(node)
        return together or self._rows(node, 0).along(1 if attribute(node, "layout", 0) else 0)

    def windowed(self, node: Node) -> bool:
        """The axes behind the first two have windows. One that is 1 wide sees a single row."""
        kernel = attribute(node, "kernel_shape", None)
        if kernel is None and len(node.inputs) > 1 and node.inputs[1] in self._graph.constants:
            kernel = self._graph.constants[node.inputs[1]].shape[2:]
        return any(axis >= 2 and (kernel is None or kernel[axis - 2] != 1) for axis in self._rows(node, 0).axes)

    def attends(self, node: Node) -> bool:
        return self._rows(node, 0).along(1)

    def product(self, node: Node) -> bool:
        left, right = self._rows(node, 0), self._rows(node, 3 if node.op_type == "QLinearMatMul" else 1)
        return left.along(-1) or right.along(0 if right.rank == 1 else -2)

    def gemm(self, node: Node) -> bool:
        left, right = attribute(node, "transA", 0), attribute(node, "transB", 0)
        return self._rows(node, 0).along(0 if left else 1) or self._rows(node, 1).along(1 if right else 0)

    def einsum(self, node: Node) -> bool:
        """It sums over a letter that its result does not have."""
        equation = bytes(attribute(node, "equation", b"")).decode().replace(" ", "")
        terms, arrow, result = equation.partition("->")
        if "..." in equation:
            return False
        if not arrow:
            result = "".join(letter for letter in terms if terms.count(letter) == 1)
        pairs = [(term, self._rows(node, index)) for index, term in enumerate(terms.split(","))]
        return any(axis < len(term) and term[axis] not in result for term, place in pairs for axis in place.axes)


# operator -> whether a node of it works along the rows.
RULES: dict[str, Callable[[Scanner, Node], bool]] = {
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), Scanner.softmax),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), Scanner.normalized_from),
    **dict.fromkeys(("TopK", "LpNormalization"), Scanner.along_axis),
    **dict.fromkeys(("ArgMax", "ArgMin"), Scanner.along_axis_0_unless_said),
    "CumSum": Scanner.cumulative,
    **dict.fromkeys(
        [f"Reduce{what}" for what in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum")]
        + ["ReduceSumSquare"],
        Scanner.reduced,
    ),
    "MeanVarianceNormalization": Scanner.mean_variance,
    "BatchNormalization": Scanner.in_training,
    **dict.fromkeys(("DynamicQuantizeLinear", "DynamicQuantizeMatMul"), Scanner.quantized_together),
    **dict.fromkeys(("RNN", "LSTM", "GRU", "DynamicQuantizeLSTM"), Scanner.recurrent),
    **dict.fromkeys(
        ("Conv", "ConvInteger", "QLinearConv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"), Scanner.windowed
    ),
    **dict.fromkeys(("Attention", "MultiHeadAttention"), Scanner.attends),
    **dict.fromkeys(("MatMul", "MatMulInteger", "QLinearMatMul"), Scanner.product),
    "Gemm": Scanner.gemm,
    "Einsum": Scanner.einsum,
}


def label(node: Node) -> str:
    return f"node {node.op_type} '{node.name or next(filter(None, node.outputs), '')}'"


def attribute(node: Node, name: str, default: Any) -> Any:
    """Return an attribute's decoded value, or the default."""
    for data in node.packed:
        found, value = read_attribute(data)
        if found == name:
            return value if value is not None else default
    return default


def captured(node: Node) -> Iterator[str]:
    """Yield the names that the graphs inside a node use: those of the graph around it are among them."""
    for data in node.packed if node.op_type in OPAQUE else ():
        for number, value in fields(data):
            if number in (6, 11) and isinstance(value, memoryview):
                yield from names_used(value)


def names_used(graph: memoryview) -> Iterator[str]:
    for number, value in fields(graph):
        if number == 1 and isinstance(value, memoryview):
            node = read_node(value)
            yield from node.inputs
            yield from captured(node)
