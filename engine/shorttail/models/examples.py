"""Makes rows on which a model can run: to warm it up, to measure it, and to see what it gives.

The values come from the model's graph (models/vocabulary.py), because many models refuse values that they do not know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shorttail.define.catalog import Catalog, VersionInfo
from shorttail.errors import Internal
from shorttail.models.buffers import Buffer, input_buffer
from shorttail.models.onnx_graph import read_graph
from shorttail.models.vocabulary import Feed, read_feeds

Array = NDArray[Any]
Run = Callable[[Sequence[Array]], list[Array]]
PROBES: Final = 8  # rows that are run by themselves to see whether the model takes such rows

# Operators that fail on shapes alone, not on values. Operators that are not listed may look at values.
BY_SHAPE: Final = (
    "Add And ArrayFeatureExtractor BatchNormalization Concat Conv Div Elu Equal Exp FeatureVectorizer Flatten FusedConv"
    " FusedGemm FusedMatMul Gemm Greater Imputer LayerNormalization LeakyRelu Less LinearClassifier LinearRegressor Log"
    " LogSoftmax MatMul Mul Neg Normalizer Not Or Pow Relu Scaler Sigmoid Softmax Split Sqrt Squeeze Sub SVMClassifier"
    " SVMRegressor Tanh Transpose TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor Where"
)
# Operators that make shapes out of values: after them a failure on shapes may be one on values.
SHAPED_BY_VALUES: Final = (
    "Compress ConstantOfShape Expand If Loop NonMaxSuppression NonZero OneHot Pad Range Resize Scan SequenceMap"
    " StringSplit Tile Tokenizer TopK Unique"
)
NODE: Final = re.compile(r"while running (\w+) node")


class Examples:
    """Makes rows for the inputs of a model.

    names, buffers: the model's inputs. data: the ONNX file; it is read for the values that the model knows.
    operators: the types of its nodes.
    """

    def __init__(self, names: Sequence[str], buffers: Sequence[Buffer], data: bytes):
        self.buffers = buffers
        feeds = read_feeds(data, {name: buffer.width for name, buffer in zip(names, buffers, strict=True)})
        self._columns = [
            [Choice.of(feed, buffer.dtype) for feed in feeds[name]] for name, buffer in zip(names, buffers, strict=True)
        ]
        self.operators = operators(data)
        self._rows: list[Array] = []  # if not empty: the rows that the model is known to take, for each input

    @classmethod
    def of(cls, catalog: Catalog, info: VersionInfo, data: bytes, known: list[Array] | None = None) -> Examples:
        """Return examples for a version of a model. data: its ONNX file. known: rows on which the model has run."""
        columns, catalog = info.model.inputs_by_name([tensor.name for tensor in info.inputs]), catalog.as_pinned(info)
        buffers = [input_buffer(catalog, tensor, columns[tensor.name])[0] for tensor in info.inputs]
        made = cls([tensor.name for tensor in info.inputs], buffers, data)
        made._rows = known or []
        return made

    def __call__(self, rows: int, random: np.random.Generator) -> list[Array]:
        """Return an array with that many rows for each input."""
        if self._rows:
            picked = random.integers(0, len(self._rows[0]), rows)
            return [array[picked] for array in self._rows]
        return [
            filled(buffer, choices, rows, random) for buffer, choices in zip(self.buffers, self._columns, strict=True)
        ]

    def keep_those_that_run(self, run: Run, random: np.random.Generator, rows: int = 1) -> list[Array]:
        """Find out on which of the examples the model runs, make only such rows from now on, and return the outputs for
        one of them. rows: of each run.

        Raises Internal, with the reason of the first failure, if the model runs on none.
        """
        probes = [self(rows, random) for _ in range(PROBES)]
        passed, error = _passing(run, probes)
        if len(passed) == len(probes):
            return passed[0][1]
        if not passed:
            passed, _ = _passing(run, self._plain(rows))
        if not passed:
            assert error is not None
            raise error
        self._rows = [np.concatenate(parts) for parts in zip(*(inputs for inputs, _ in passed), strict=True)]
        return passed[0][1]

    def _plain(self, rows: int) -> Iterable[list[Array]]:
        """Yield rows of ones, and of zeros unless the model might divide an integer by one: that ends the process."""
        yield [
            np.full(shape(buffer, rows), "1" if buffer.dtype.hasobject else 1, buffer.dtype) for buffer in self.buffers
        ]
        if self.operators.isdisjoint(("Div", "Mod")):
            yield [
                np.full(shape(buffer, rows), "0" if buffer.dtype.hasobject else 0, buffer.dtype)
                for buffer in self.buffers
            ]


class Choice(NamedTuple):
    """The values that a column of the examples has. spread: how far from them it may be; 0: it has these alone."""

    values: Array
    spread: float

    @classmethod
    def of(cls, feed: Feed, dtype: np.dtype[Any]) -> Choice:
        values = usable(feed, dtype)
        if dtype.kind != "f" or feed.refuses or not feed.opaque or not len(values):
            return cls(values, 0.0)
        # Thresholds of trees: values on both sides of them take different ways.
        with np.errstate(over="ignore", invalid="ignore"):
            spread = float(values.std())
        return cls(values, spread if 0 < spread < math.inf else 1.0)


def filled(buffer: Buffer, choices: Sequence[Choice], rows: int, random: np.random.Generator) -> Array:
    """Return an array of a buffer's shape whose columns have values that the model knows."""
    array = buffer.example(rows, random)
    matrix = array.reshape(rows, -1)
    for column, (values, spread) in enumerate(choices):
        if not len(values):
            continue
        chosen = values[random.integers(0, len(values), rows)]
        if spread:
            largest = np.finfo(buffer.dtype).max
            chosen = np.clip(chosen + random.normal(size=rows) * spread, -largest, largest)
        matrix[:, column] = chosen
    return array


def usable(feed: Feed, dtype: np.dtype[Any]) -> Array:
    """Return the values that a column of that type can have, of those that its readers know."""
    values = feed.examples()
    if dtype.hasobject:
        texts = [value for value in values if isinstance(value, str)] or [str(value) for value in values]
        return np.array(texts, object)
    numbers = [value for value in values if isinstance(value, int | float)]
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        numbers = [value for value in map(round, numbers) if limits.min <= value <= limits.max]
    if dtype.kind == "f":
        numbers = [value for value in numbers if abs(value) <= np.finfo(dtype).max]
    return np.array(numbers, np.float64 if dtype.kind == "f" else dtype)


def depends_on_values(error: Internal, operators: set[str]) -> bool:
    """Return whether a model that failed on its examples might run on other values.

    It cannot if ONNX Runtime refused the arrays before a node ran, or if a node failed that looks at shapes alone, in a
    graph whose shapes do not come from values. operators: the types of the graph's nodes.
    """
    node = NODE.search(str(error.__cause__))
    if node is None:
        return False
    return node[1] not in BY_SHAPE.split() or not operators.isdisjoint(SHAPED_BY_VALUES.split())


def operators(data: bytes) -> set[str]:
    """Return the types of a graph's nodes, an empty set if the file cannot be read."""
    try:
        return {node.op_type for node in read_graph(data).nodes}
    except (ValueError, IndexError):
        return set()


def shape(buffer: Buffer, rows: int) -> tuple[int, ...]:
    return (rows,) if buffer.width is None else (rows, buffer.width)


def _passing(run: Run, tries: Iterable[list[Array]]) -> tuple[list[tuple[list[Array], list[Array]]], Internal | None]:
    """Run the model on each. Returns (inputs, outputs) of those on which it runs, and the first failure."""
    passed: list[tuple[list[Array], list[Array]]] = []
    first: Internal | None = None
    for inputs in tries:
        try:
            passed.append((inputs, run(inputs)))
        except Internal as error:
            first = first or error
    return passed, first
