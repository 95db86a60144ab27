"""Finds out which values an ONNX graph knows of each column of its inputs: categories, vocabularies, thresholds, ids.

The graph is walked from its inputs. Operators that only move values (Concat, Split, Slice, Gather of columns, Reshape,
Cast, Identity, ...) are followed, column by column, to the nodes that compare the values with values of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shorttail.models.onnx_graph import Graph, Node, read_graph

Array = NDArray[Any]
EXAMPLES_MAX: Final = 1000  # values of a vocabulary that examples are made of
MISSING_TEXTS: Final = ("nan", "NaN", "None", "", "missing")  # how converters and people write a missing category


@dataclass(frozen=True)
class Vocabulary:
    """The values that one node knows.

    values: texts or numbers, in the node's order. refuses: whether the node raises an error for any other value.
    words: the values are parts of a text, not whole values. imputes: the values are replaced by another one.
    """

    values: Sequence[Any]
    refuses: bool = False
    words: bool = False
    imputes: bool = False


@dataclass
class Feed:
    """What a column feeds. known: the vocabularies. opaque: whether a node reads it that is not followed."""

    known: list[Vocabulary] = field(default_factory=list)
    opaque: bool = False

    @property
    def is_unused(self) -> bool:
        return not (self.known or self.opaque)

    @property
    def refuses(self) -> bool:
        """Whether a node raises an error for a value that is not in its vocabulary."""
        return any(vocabulary.refuses for vocabulary in self.known)

    def examples(self) -> list[Any]:
        """Return values that every node takes, as far as the graph says; empty if it knows none."""
        given = [value for vocabulary in self.known for value in spread(vocabulary.values)]
        strict = [as_set(vocabulary.values) for vocabulary in self.known if vocabulary.refuses]
        return list(dict.fromkeys([value for value in given if all(value in taken for taken in strict)] or given))

    def missing_texts(self) -> list[str]:
        """Return those of MISSING_TEXTS that the column's vocabularies have.

        What an imputer replaces stands for a missing value, whatever the encoder behind it has for its replacement.
        """
        whole = [vocabulary for vocabulary in self.known if not vocabulary.words]
        for chosen in ([vocabulary for vocabulary in whole if vocabulary.imputes], whole):
            known = {value for vocabulary in chosen for value in vocabulary.values}
            if found := [text for text in MISSING_TEXTS if text in known]:
                return found
        return []


class Place(NamedTuple):
    """A column of an input. shift: what the graph has added to its values so far."""

    input: str
    column: int
    shift: float = 0


class Followed(NamedTuple):
    """A tensor whose values come from the inputs unchanged. columns: the places of each of its columns.

    rank: 1 for [rows], else 2. words: its values are parts of the inputs' texts.
    """

    columns: tuple[frozenset[Place], ...]
    rank: int
    words: bool = False

    @property
    def places(self) -> frozenset[Place]:
        return frozenset().union(*self.columns)


def read_feeds(data: bytes, widths: Mapping[str, int | None]) -> dict[str, list[Feed]]:
    """Return what each column of each input feeds.

    data: the ONNX file. widths: input -> number of columns, None for an input of shape [rows]. If the graph cannot be
    followed, all columns are opaque.
    """
    feeds = {name: [Feed() for _ in range(1 if width is None else width)] for name, width in widths.items()}
    try:
        graph = read_graph(data)
        if graph.has_functions:
            raise ValueError("it defines functions")
        Walk(graph, widths, feeds).run()
    except (ValueError, IndexError, KeyError, TypeError, OverflowError):
        # The walk reads what strangers wrote. ONNX Runtime says what is wrong with a damaged file.
        for feed in (feed for columns in feeds.values() for feed in columns):
            feed.opaque = True
    return feeds


class Walk:
    """Follows the columns of the inputs through the nodes of a graph, and fills their feeds."""

    def __init__(self, graph: Graph, widths: Mapping[str, int | None], feeds: dict[str, list[Feed]]):
        self.graph, self.feeds = graph, feeds
        self.constants = dict(graph.constants)
        self.followed = {
            name: Followed(
                tuple(frozenset([Place(name, column)]) for column in range(1 if width is None else width)),
                1 if width is None else 2,
            )
            for name, width in widths.items()
        }
        self.tests: dict[str, list[tuple[Place, Vocabulary]]] = {}  # tensors that say which values a node knows

    def run(self) -> None:
        for node in self.graph.nodes:
            if node.op_type in ("If", "Loop", "Scan", "SequenceMap"):
                raise ValueError("a body may read any tensor")
            self.visit(node)
        for output in self.graph.outputs:
            if output.name in self.followed:
                self.opaque(self.followed[output.name])

    def visit(self, node: Node) -> None:
        self.fold(node)
        read = [self.followed[name] for name in node.inputs if name in self.followed]
        if node.op_type in KEEPING_TESTS and node.inputs and node.inputs[0] in self.tests:
            self.tests[node.outputs[0]] = self.tests[node.inputs[0]]
        if not read:
            return
        moved = MOVES[node.op_type](self, node) if node.op_type in MOVES else None
        if moved is not None:
            for name, tensor in zip(node.outputs, moved, strict=False):
                self.followed[name] = tensor
        elif node.op_type in READERS:
            READERS[node.op_type](self, node)
        else:
            for tensor in read:
                self.opaque(tensor)

    def fold(self, node: Node) -> None:
        """Record the result of a node that makes or passes on a constant."""
        if node.op_type == "Constant":
            given = [node.attributes[name] for name in CONSTANT_VALUES if node.attributes.get(name) is not None]
            if given:
                value = strings(given[0]) if isinstance(given[0], tuple) else given[0]
                self.constants[node.outputs[0]] = np.asarray(value)
        elif node.op_type in ("Identity", "Cast") and node.inputs[0] in self.constants:
            self.constants[node.outputs[0]] = self.constants[node.inputs[0]]

    def opaque(self, tensor: Followed) -> None:
        for place in tensor.places:
            self.feeds[place.input][place.column].opaque = True

    def knows(self, tensor: Followed, values: Iterable[Any], refuses: bool = False) -> list[tuple[Place, Vocabulary]]:
        """Record that a node compares all values of a tensor with these. Returns what was recorded."""
        values = values if isinstance(values, range) else list(values)
        found = []
        for place in tensor.places:
            own = shifted(values, -place.shift) if place.shift else values
            vocabulary = Vocabulary(own, refuses, tensor.words)
            self.feeds[place.input][place.column].known.append(vocabulary)
            found.append((place, vocabulary))
        return found

    def source(self, node: Node) -> Followed | None:
        """Return the first input of a node if it is followed."""
        return self.followed.get(node.inputs[0])

    def constant(self, node: Node, index: int) -> Array | None:
        """Return an input of a node if it is a constant, None if it is not, or is left out."""
        return self.constants.get(node.inputs[index]) if index < len(node.inputs) else None

    # -- operators that move values: they return what their outputs are, None if that cannot be followed ---------------

    def keep(self, node: Node) -> list[Followed] | None:
        source = self.source(node)
        return None if source is None else [source]

    def reshape(self, node: Node) -> list[Followed] | None:
        """Follow a change of shape. A column that may hold values of several columns has the places of all."""
        source = self.source(node)
        if source is None:
            return None
        width = len(source.columns)
        shape = self.constant(node, 1) if node.op_type == "Reshape" else None
        if shape is not None:
            sizes = shape.ravel().tolist()
            keeps = sizes[1:] == [width] or (width == 1 and sizes[1:] in ([], [1]))
            rank = 1 if len(sizes) == 1 else 2
        else:
            keeps = width == 1 or (node.op_type == "Flatten" and source.rank == 2)
            rank = 1 if node.op_type == "Squeeze" else 2
        return [Followed(source.columns if keeps else (source.places,), rank, source.words)]

    def tokens(self, node: Node) -> list[Followed] | None:
        source = self.source(node)
        return None if source is None else [Followed((source.places,), 2, words=True)]

    def concat(self, node: Node) -> list[Followed] | None:
        """Follow columns that are put side by side, up to the first input that is not followed."""
        if node.op_type == "Concat" and int(node.attributes["axis"]) not in (1, -1):
            return None
        parts = [self.followed.get(name) for name in node.inputs]
        first = next((i for i, part in enumerate(parts) if part is None), len(parts))
        for part in parts[first:]:
            if part is not None:
                self.opaque(part)
        known = [part for part in parts[:first] if part is not None]
        if not known:
            return None
        if any(part.rank == 1 for part in known) and node.op_type == "Concat":
            return None
        columns = tuple(column for part in known for column in part.columns)
        return [Followed(columns, 2, any(part.words for part in known))]

    def select(self, source: Followed, columns: Sequence[int], rank: int = 2) -> Followed | None:
        width = len(source.columns)
        if not all(-width <= column < width for column in columns):
            return None
        return Followed(tuple(source.columns[column] for column in columns), rank, source.words)

    def extract(self, node: Node) -> list[Followed] | None:
        source, which = self.source(node), self.constant(node, 1)
        if source is None or which is None:
            return None
        taken = self.select(source, which.ravel().tolist())
        return None if taken is None else [taken]

    def gather(self, node: Node) -> list[Followed] | None:
        source, which = self.source(node), self.constant(node, 1)
        axis = int(node.attributes.get("axis", 0))
        if source is None or which is None or source.rank != 2 or axis not in (1, -1):
            return None
        taken = self.select(source, which.ravel().tolist(), which.ndim + 1)
        return None if taken is None else [taken]

    def split(self, node: Node) -> list[Followed] | None:
        source = self.source(node)
        if source is None or int(node.attributes.get("axis", 0)) not in (1, -1):
            return None
        given = node.attributes.get("split", self.constant(node, 1))
        count = len(node.outputs)
        even = -(-len(source.columns) // count)
        sizes = [even] * count if given is None else np.asarray(given).ravel().tolist()
        ends = np.minimum(np.cumsum(sizes), len(source.columns)).tolist()
        return [
            Followed(source.columns[begin:end], 2, source.words) for begin, end in zip([0, *ends], ends, strict=False)
        ]

    def slice(self, node: Node) -> list[Followed] | None:
        source = self.source(node)
        if source is None:
            return None
        names = ("starts", "ends", "axes", "steps")
        given = [node.attributes.get(name, self.constant(node, i + 1)) for i, name in enumerate(names)]
        computed = any(part is None and name for part, name in zip(given, node.inputs[1:], strict=False))
        if computed or given[0] is None or given[1] is None:
            return None
        starts, ends = (np.asarray(part).ravel().tolist() for part in given[:2])
        axes = list(range(len(starts))) if given[2] is None else np.asarray(given[2]).ravel().tolist()
        steps = [1] * len(starts) if given[3] is None else np.asarray(given[3]).ravel().tolist()
        if any(axis not in (1, -1) for axis in axes) or source.rank != 2:
            return None
        columns = range(len(source.columns))
        for start, end, step in zip(starts, ends, steps, strict=True):
            columns = columns[start:end:step]
        taken = self.select(source, columns)
        return None if taken is None else [taken]

    def shift(self, node: Node) -> list[Followed] | None:
        """Follow the sum with, or the difference from, a constant number."""
        source, constant = self.source(node), self.constant(node, 1)
        if source is None and node.op_type == "Add":
            source, constant = self.followed.get(node.inputs[1]), self.constant(node, 0)
        if source is None or constant is None or constant.size != 1 or constant.dtype.kind not in "iuf":
            return None
        by = constant.ravel().tolist()[0] * (-1 if node.op_type == "Sub" else 1)
        columns = tuple(frozenset(p._replace(shift=p.shift + by) for p in places) for places in source.columns)
        return [Followed(columns, source.rank, source.words)]

    def where(self, node: Node) -> list[Followed] | None:
        """Follow a column of which some values are replaced. Those that a test found first are imputed."""
        condition, *branches = node.inputs
        found = [self.followed[name] for name in branches if name in self.followed]
        if condition in self.followed:
            self.opaque(self.followed[condition])
        for place, vocabulary in self.tests.get(condition, ()):
            known = self.feeds[place.input][place.column].known
            if any(place in tensor.places for tensor in found) and vocabulary in known:
                known[known.index(vocabulary)] = Vocabulary(
                    vocabulary.values, vocabulary.refuses, vocabulary.words, imputes=True
                )
        if len(found) > 1:
            return None
        return found or None

    # -- operators that know values ------------------------------------------------------------------------------------

    def table(self, node: Node) -> None:
        """Gather: a constant table whose rows the values number."""
        tables, which = self.constant(node, 0), self.followed.get(node.inputs[1])
        if source := self.source(node):
            self.opaque(source)
        if which is not None and tables is not None and tables.ndim:
            self.knows(which, range(tables.shape[int(node.attributes.get("axis", 0))]), refuses=True)
        elif which is not None:
            self.opaque(which)

    def one_hot_encoder(self, node: Node) -> None:
        values = node.attributes.get("cats_strings", node.attributes.get("cats_int64s"))
        self.read_list(node, values, refuses=not int(node.attributes.get("zeros", 1)))

    def label_encoder(self, node: Node) -> None:
        names = ("keys_strings", "keys_int64s", "keys_floats", "keys_tensor", "classes_strings")
        values = next((node.attributes[name] for name in names if node.attributes.get(name) is not None), None)
        self.tests[node.outputs[0]] = self.read_list(node, values)

    def category_mapper(self, node: Node) -> None:
        self.read_list(node, node.attributes.get("cats_strings"))
        self.read_list(node, node.attributes.get("cats_int64s"))

    def tfidf(self, node: Node) -> None:
        source = self.source(node)
        if source is not None:
            source = source._replace(words=True)
            pool = node.attributes.get("pool_strings", node.attributes.get("pool_int64s"))
            self.knows(source, strings(pool) if isinstance(pool, tuple) else np.asarray(pool).tolist())

    def one_hot(self, node: Node) -> None:
        source, depth = self.source(node), self.constant(node, 1)
        if source is not None and depth is not None:
            self.knows(source, range(int(depth.ravel()[0])))

    def comparison(self, node: Node) -> None:
        tests = []
        for name, other in (node.inputs, node.inputs[::-1]):
            if name in self.followed:
                if node.op_type != "Equal":
                    self.opaque(self.followed[name])  # a limit: other numbers are as good
                if other in self.constants:
                    tests += self.knows(self.followed[name], self.constants[other].ravel().tolist())
                else:
                    self.opaque(self.followed[name])
        if node.op_type == "Equal":
            self.tests[node.outputs[0]] = tests

    def trees(self, node: Node) -> None:
        """A tree ensemble: the thresholds of each feature."""
        source = self.source(node)
        if source is None:
            return
        self.opaque(source)  # a number that no node tests is as good as any other
        features = np.asarray(node.attributes["nodes_featureids"])
        names = ("nodes_values_as_tensor", "nodes_values", "nodes_splits")
        thresholds = np.asarray(next(node.attributes[name] for name in names if node.attributes.get(name) is not None))
        modes = node.attributes.get("nodes_modes")
        if isinstance(modes, tuple):
            leaf = [i for i, mode in enumerate(modes[0]) if as_text(mode) == "LEAF"]
            inner = ~np.isin(np.asarray(modes[1]), leaf)
            features, thresholds = features[inner], thresholds[inner]
        order = np.argsort(features, kind="stable")
        features, thresholds = features[order], thresholds[order]
        ends = np.searchsorted(features, np.arange(len(source.columns) + 1))
        for places, begin, end in zip(source.columns, ends[:-1], ends[1:], strict=True):
            tested = np.unique(thresholds[begin:end])
            tested = tested[np.isfinite(tested)]
            if len(tested):
                self.knows(Followed((places,), 1), spread(tested).tolist())

    def read_list(self, node: Node, values: Any, refuses: bool = False) -> list[tuple[Place, Vocabulary]]:
        source = self.source(node)
        if source is None or values is None:
            return []
        listed = strings(values) if isinstance(values, tuple) else np.asarray(values).ravel().tolist()
        return self.knows(source, listed, refuses)


def spread(values: Any) -> Any:
    """Return at most EXAMPLES_MAX of the values, from all over the list."""
    return values[:: -(-len(values) // EXAMPLES_MAX) or 1]


def as_set(values: Sequence[Any]) -> range | set[Any]:
    return values if isinstance(values, range) else set(values)


def shifted(values: Sequence[Any], by: float) -> Sequence[Any]:
    if isinstance(values, range) and isinstance(by, int):
        return range(values.start + by, values.stop + by)
    return [value + by for value in values]


def strings(value: tuple[Any, Any]) -> list[str]:
    """Return the distinct texts of an attribute that is a list of strings."""
    return [as_text(text) for text in value[0]]


def as_text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace")


CONSTANT_VALUES: Final = ("value", "value_int", "value_ints", "value_float", "value_floats", "value_strings")
KEEPING_TESTS: Final = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")

MOVES: Final[dict[str, Callable[[Walk, Node], list[Followed] | None]]] = {
    "Identity": Walk.keep,
    "Cast": Walk.keep,
    "Dropout": Walk.keep,
    "Imputer": Walk.keep,
    "StringNormalizer": Walk.keep,
    "Reshape": Walk.reshape,
    "Flatten": Walk.reshape,
    "Squeeze": Walk.reshape,
    "Unsqueeze": Walk.reshape,
    "Transpose": Walk.reshape,
    "Tokenizer": Walk.tokens,
    "StringSplit": Walk.tokens,
    "Concat": Walk.concat,
    "FeatureVectorizer": Walk.concat,
    "ArrayFeatureExtractor": Walk.extract,
    "Gather": Walk.gather,
    "Split": Walk.split,
    "Slice": Walk.slice,
    "Add": Walk.shift,
    "Sub": Walk.shift,
    "Where": Walk.where,
}

READERS: Final[dict[str, Callable[[Walk, Node], None]]] = {
    "Gather": Walk.table,
    "OneHotEncoder": Walk.one_hot_encoder,
    "LabelEncoder": Walk.label_encoder,
    "CategoryMapper": Walk.category_mapper,
    "TfIdfVectorizer": Walk.tfidf,
    "OneHot": Walk.one_hot,
    "Equal": Walk.comparison,
    "Less": Walk.comparison,
    "LessOrEqual": Walk.comparison,
    "Greater": Walk.comparison,
    "GreaterOrEqual": Walk.comparison,
    "TreeEnsemble": Walk.trees,
    "TreeEnsembleClassifier": Walk.trees,
    "TreeEnsembleRegressor": Walk.trees,
}
