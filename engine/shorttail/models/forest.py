"""Runs tree ensembles in native code instead of ONNX Runtime.

`compile_forest` reads the ONNX graph and either understands all of it or raises NotAForest with the reason. The
returned Forest has the attributes and the `run` of shorttail.models.session.Session, so an engine can use either.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shorttail.define.catalog import TensorInfo
from shorttail.errors import Internal, InvalidArgument
from shorttail.models.check_rows import ROWS, Batch, CheckRows
from shorttail.models.ensemble import Ensemble, NotAForest, compile_ensemble
from shorttail.models.graph_ops import OPERATORS, Operation, keeps_value, result_dtype, selected_columns
from shorttail.models.leaf_paths import Columns
from shorttail.models.onnx_graph import ELEMENTS, Graph, Node, lone_model, read_graph
from shorttail.models.session import Session

__all__ = ["Forest", "NotAForest", "compile_forest"]

Array = NDArray[Any]
ENSEMBLES = {"TreeEnsembleClassifier": 3, "TreeEnsembleRegressor": 3, "TreeEnsemble": 5}
ML_VERSION_MAX = 5
FLOAT, DOUBLE = 1, 11  # TensorProto.DataType
COLUMNS_MAX = 1_000_000
NODES_MAX = 200  # a graph with more nodes is not a forest with a few operators around it
DTYPES = {name: np.dtype(code) for name, code in ELEMENTS.values()}
SCORES = [1]  # an ensemble returns (labels, scores); here only the scores are asked for, and labels are not made
TOLERANCE = 1e-5
ALONE = 4  # rows that are also compared in batches of one row


class RunnableModel(Protocol):
    """The interface that Forest, Session, FixedRows and BucketSession share."""

    inputs: list[TensorInfo]
    output_names: list[str]

    @property
    def description(self) -> str:
        """What runs the model, in a few words, without the reason."""

    def run(self, inputs: Sequence[Array]) -> list[Array]: ...


class Forest:
    """A compiled tree ensemble with the few operators around it. `compile_forest` makes it.

    inputs, outputs: the tensors as the file declares them. output_names: the outputs that `run` returns, in order.
    """

    def __init__(self, graph: Graph, output_names: Sequence[str]):
        self.inputs = graph.inputs
        self.outputs = graph.outputs
        self.output_names = list(output_names)
        self.ensembles: list[Ensemble] = []
        self._constants = graph.constants
        self._steps: list[tuple[Operation | Ensemble, list[str], list[str]]] = []
        self._alias: dict[str, str] = {}
        self._dtypes = {name: _name_of(value.dtype) for name, value in graph.constants.items()}
        self._dtypes |= {info.name: info.dtype for info in graph.inputs}
        self._columns: dict[str, Columns | None] = {}
        self._sources: list[Columns] = []  # which input columns the features of each ensemble are
        self._widths = self._name_columns(_features(graph))
        for node in _needed(graph, self.output_names):
            self._add(node)
        if not self.ensembles:
            raise NotAForest("it has no tree ensemble")
        self._results = [self._alias.get(name, name) for name in self.output_names]
        for name in self._results:
            if name not in self._dtypes:
                raise NotAForest(f"no node makes its output {name!r}")
        self._single = self._only_step()

    @property
    def description(self) -> str:
        """For example "compiled forest, avx2, 300 trees"."""
        trees = sum(ensemble.trees.n_trees for ensemble in self.ensembles)
        return f"compiled forest, {self.ensembles[0].trees.simd}, {trees} tree{'s' * (trees != 1)}"

    def _name_columns(self, features: int) -> list[int]:
        """Number the columns of the inputs, one input after the other, and return the number of each input's columns.

        features: taken for an input whose width the file leaves open.
        """
        widths = [features if info.shape[1] is None else info.shape[1] for info in self.inputs]
        if sum(widths) > COLUMNS_MAX:
            raise NotAForest(f"it has {sum(widths)} columns")
        first = 0
        for info, width in zip(self.inputs, widths, strict=True):
            self._columns[info.name] = Columns(np.arange(first, first + width), np.zeros(width, bool))
            first += width
        return widths

    def _add(self, node: Node) -> None:
        """Append the node to the steps, or record it as an alias or a constant. Raises NotAForest."""
        for name in node.inputs:
            if name not in self._alias and name not in self._dtypes:
                raise NotAForest(f"a {node.op_type} whose input {name!r} is not known")
        inputs = [self._alias.get(name, name) for name in node.inputs]
        dtypes = [self._dtypes[name] for name in inputs]
        self._columns |= dict.fromkeys(node.outputs)
        if node.op_type in ENSEMBLES and node.domain == "ai.onnx.ml":
            self._add_ensemble(node, inputs, dtypes)
            return
        if node.op_type == "Constant" and "value" in node.attributes:
            self._constants[node.outputs[0]] = node.attributes["value"]
            self._dtypes[node.outputs[0]] = _name_of(node.attributes["value"].dtype)
            return
        if node.domain not in ("", "ai.onnx", "ai.onnx.ml") or node.op_type not in (*OPERATORS, "Identity"):
            raise NotAForest(f"it has a node of type {node.op_type}")
        passed_on = keeps_value(node, dtypes[0], self._constants)
        if passed_on is not None:
            self._alias[node.outputs[0]] = self._alias.get(passed_on, passed_on)
            return
        self._columns[node.outputs[0]] = selected_columns(node, [self._columns.get(n) for n in inputs], self._constants)
        self._dtypes[node.outputs[0]] = result_dtype(node.op_type, node, dtypes)
        self._steps.append((OPERATORS[node.op_type](node), inputs, node.outputs[:1]))

    def _add_ensemble(self, node: Node, inputs: list[str], dtypes: list[str]) -> None:
        source, element, columns = inputs[0], dtypes[0], self._columns.get(inputs[0])
        if columns is None:
            raise NotAForest(f"its trees test numbers that it computes: {source!r}")
        if element in ("int64", "int32") and node.op_type == "TreeEnsembleClassifier":
            # ONNX Runtime converts integers to float before it compares them with the thresholds.
            inputs, element = [f"{source} as floats"], "float"
            self._steps.append((lambda x: x.astype(np.float32), [source], inputs))
        if element not in ("float", "double"):
            raise NotAForest(f"a {node.op_type} of {element or 'something that is not a tensor'}")
        ensemble = compile_ensemble(node, element)
        if ensemble.trees.n_features > len(columns.column):
            raise NotAForest(f"its trees test column {ensemble.trees.n_features - 1} of {source!r}, which has fewer")
        self.ensembles.append(ensemble)
        self._sources.append(columns)
        names = list(node.outputs)
        if ensemble.trees.classifier:
            texts = ensemble.labels is not None and ensemble.labels.dtype == object
            self._dtypes |= dict(zip(names, ("string" if texts else "int64", "float"), strict=False))
        else:
            names.insert(0, "")
            self._dtypes[node.outputs[0]] = element if node.op_type == "TreeEnsemble" else "float"
        self._steps.append((ensemble, inputs, names))

    def _only_step(self) -> tuple[Ensemble, list[int]] | None:
        """If the graph is a single ensemble over its only input, return the ensemble and, for each output, which of the
        ensemble's two results (0: labels, 1: scores) it is; else None.
        """
        if len(self._steps) != 1 or len(self.inputs) != 1:
            return None
        ensemble, inputs, names = self._steps[0]
        if not isinstance(ensemble, Ensemble) or inputs != [self.inputs[0].name]:
            return None
        if not all(name in names for name in self._results):
            return None
        return ensemble, [names.index(name) for name in self._results]

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run a batch. Drops the GIL inside the ensembles.

        inputs: an array for each of `self.inputs`, in order, [rows, columns]. Returns an array for each of
        `output_names`, in order. Raises Internal if an input's dtype or number of axes is not what the file declares.
        """
        if self._single is not None and len(inputs) == 1:
            ensemble, picked = self._single
            if picked == SCORES:
                return [ensemble.trees.run(inputs[0])[1]]
            both = ensemble.run(inputs[0])
            return [both[i] for i in picked]  # type: ignore[misc]
        values = dict(self._constants)
        for info, array in zip(self.inputs, inputs, strict=True):
            if array.dtype != DTYPES[info.dtype] or array.ndim != len(info.shape):
                raise Internal(f"the model failed: its input {info.name!r} is {info.dtype}, not {array.dtype}")
            values[info.name] = array
        for operation, sources, names in self._steps:
            arguments = [values[name] for name in sources]
            if isinstance(operation, Ensemble):
                label, scores = operation.run(np.ascontiguousarray(arguments[0]))
                values[names[1]] = scores
                if label is not None:
                    values[names[0]] = label
            else:
                values[names[0]] = operation(*arguments)
        return [values[name] for name in self._results]

    def verify_against(self, session: RunnableModel, rows: int = ROWS, seed: int = 0) -> None:
        """Compare with ONNX Runtime on rows made for leaves (shorttail.models.check_rows).

        rows: for how many leaves, which are spread over the trees. Raises NotAForest that names the difference if
        labels differ, or numbers differ by more than 1e-5.
        """
        for number, batch in enumerate(self.check_rows(seed).batches(rows)):
            self._compare_with(session, batch.inputs)
            self._compare_ways(batch)
            for i in range(ALONE if number == 0 else 0):
                self._compare_with(session, [array[i : i + 1] for array in batch.inputs])

    def verify_every_leaf(self, session: RunnableModel, path: Path, seed: int = 0) -> None:
        """Compare as `verify_against` does, on rows that reach every leaf, and compare the sums of the trees as well.

        The sums, without post-transform, show a wrong leaf also where the outputs are labels or probabilities near 1.
        path: the ONNX file. Raises NotAForest.
        """
        lone = lone_ensembles(path, self.output_names, self.ensembles)
        for batch in self.check_rows(seed).batches_to_every_leaf():
            self._compare_with(session, batch.inputs)
            self._compare_ways(batch)
            for ensemble, alone, rows in zip(self.ensembles, lone, batch.matrices, strict=True):
                _compare(alone.output_names[0], ensemble.trees.run_raw(rows)[1], alone.run([rows])[0])

    def check_rows(self, seed: int = 0) -> CheckRows:
        """Return the rows that `verify_against` checks."""
        inputs = [(DTYPES[info.dtype], width) for info, width in zip(self.inputs, self._widths, strict=True)]
        return CheckRows(list(zip(self.ensembles, self._sources, strict=True)), inputs, seed)

    def _compare_with(self, session: RunnableModel, batch: list[Array]) -> None:
        """Raise NotAForest if a batch gives other outputs than in ONNX Runtime."""
        expected = session.run(batch)
        try:
            with np.errstate(all="ignore"):  # infinite and missing numbers are tried on purpose
                got = self.run(batch)
        except (ValueError, IndexError, TypeError) as error:
            raise NotAForest(f"an operator around its trees fails: {error}") from error
        for name, ours, theirs in zip(self.output_names, got, expected, strict=True):
            _compare(name, ours, np.asarray(theirs))

    def _compare_ways(self, batch: Batch) -> None:
        """Raise NotAForest if rows give other scores one by one than together: small batches take another way."""
        for ensemble, rows in zip(self.ensembles, batch.matrices, strict=True):
            together, alone = ensemble.trees.run(rows)[1], ensemble.trees.run_alone(rows)[1]
            if not np.array_equal(together, alone, equal_nan=True):
                raise NotAForest("a row gives other scores alone than in a batch")


def compile_forest(model_path: Path, output_names: Sequence[str]) -> Forest:
    """Return the forest of an ONNX file. Raises NotAForest, with a reason, if the graph is not fully understood."""
    try:
        graph = read_graph(model_path.read_bytes())
        _check_graph(graph)
        return Forest(graph, output_names)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise NotAForest(f"its graph cannot be read: {error}") from error


def lone_ensembles(path: Path, output_names: Sequence[str], ensembles: Sequence[Ensemble]) -> list[Session]:
    """Return each ensemble of an ONNX file as a model of its own, without its post-transform, in ONNX Runtime.

    Its only output are the scores. Raises NotAForest if ONNX Runtime does not run one of them alone.
    """
    graph = read_graph(path.read_bytes())
    nodes = [node for node in _needed(graph, output_names) if node.op_type in ENSEMBLES]
    result = []
    with TemporaryDirectory() as folder:
        for node, ensemble in zip(nodes, ensembles, strict=True):
            lone = Path(folder) / "lone.onnx"
            lone.write_bytes(lone_model(node, DOUBLE if ensemble.trees.wide else FLOAT, graph.opsets, "post_transform"))
            try:
                result.append(Session(lone, [node.outputs[-1]]))
            except InvalidArgument as error:
                raise NotAForest(f"one of its ensembles does not run alone: {error.message}") from error
    return result


def _check_graph(graph: Graph) -> None:
    """Raise NotAForest for a graph that cannot be a forest, whatever its nodes are."""
    if graph.has_functions:
        raise NotAForest("it defines functions")
    if graph.opsets.get("ai.onnx.ml", 1) > ML_VERSION_MAX:
        raise NotAForest(f"it uses ai.onnx.ml {graph.opsets['ai.onnx.ml']}")
    if len(graph.nodes) > NODES_MAX:
        raise NotAForest(f"it has {len(graph.nodes)} nodes")
    for info in graph.inputs:
        if info.dtype not in DTYPES or info.dtype == "string" or len(info.shape) != 2:
            raise NotAForest(f"its input {info.name!r} is not a matrix of numbers")


def _features(graph: Graph) -> int:
    """Return how many columns the trees of a graph test: the highest number of a feature plus 1, 0 without trees."""
    attributes = [node.attributes for node in graph.nodes if node.op_type in ENSEMBLES]
    lists = [np.asarray(a.get("nodes_featureids", ())) for a in attributes]
    return max((int(numbers.max()) + 1 for numbers in lists if numbers.size), default=0)


def _needed(graph: Graph, output_names: Sequence[str]) -> list[Node]:
    """Return the nodes that those outputs depend on, in the file's order, which ONNX requires to be topological."""
    names = set(output_names)
    kept = []
    for node in reversed(graph.nodes):
        if names.intersection(node.outputs):
            kept.append(node)
            names.update(node.inputs)
    return kept[::-1]


def _compare(name: str, ours: Array, theirs: Array) -> None:
    """Raise NotAForest if our array for an output differs from ONNX Runtime's."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        raise NotAForest(
            f"output {name!r} is {ours.dtype} {ours.shape}, and {theirs.dtype} {theirs.shape} in ONNX Runtime"
        )
    if ours.dtype.kind == "f":
        equal = np.isclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE / 10, equal_nan=True)
    else:
        equal = ours == theirs
    if not equal.all():
        where = tuple(int(i) for i in np.argwhere(~np.asarray(equal))[0])
        raise NotAForest(f"output {name!r} gives {ours[where]} where ONNX Runtime gives {theirs[where]}")


def _name_of(dtype: np.dtype[Any]) -> str:
    """Return the ONNX name of a NumPy dtype, "" if it has none here."""
    return next((name for name, known in DTYPES.items() if known == dtype), "")
