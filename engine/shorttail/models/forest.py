"""Runs tree ensembles in native code instead of ONNX Runtime.

`compile_forest` reads the ONNX graph and either understands all of it or raises NotAForest with the reason. The
returned Forest has the attributes and the `run` of shorttail.models.session.Session, so an engine can use either.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shorttail.define.catalog import TensorInfo
from shorttail.errors import Internal
from shorttail.models.ensemble import Ensemble, NotAForest, compile_ensemble
from shorttail.models.graph_ops import OPERATORS, Operation, keeps_value, result_dtype
from shorttail.models.onnx_graph import ELEMENTS, Graph, Node, read_graph

__all__ = ["Forest", "NotAForest", "compile_forest"]

Array = NDArray[Any]
ENSEMBLES = {"TreeEnsembleClassifier": 3, "TreeEnsembleRegressor": 3, "TreeEnsemble": 5}
ML_VERSION_MAX = 5
NODES_MAX = 200  # a graph with more nodes is not a forest with a few operators around it
DTYPES = {name: np.dtype(code) for name, code in ELEMENTS.values()}
CHECK_ROWS = 512
SCORES = [1]  # an ensemble returns (labels, scores); here only the scores are asked for, and labels are not made
TOLERANCE = 1e-5


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

    def _add(self, node: Node) -> None:
        """Append the node to the steps, or record it as an alias or a constant. Raises NotAForest."""
        for name in node.inputs:
            if name not in self._alias and name not in self._dtypes:
                raise NotAForest(f"a {node.op_type} whose input {name!r} is not known")
        inputs = [self._alias.get(name, name) for name in node.inputs]
        dtypes = [self._dtypes[name] for name in inputs]
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
        self._dtypes[node.outputs[0]] = result_dtype(node.op_type, node, dtypes)
        self._steps.append((OPERATORS[node.op_type](node), inputs, node.outputs[:1]))

    def _add_ensemble(self, node: Node, inputs: list[str], dtypes: list[str]) -> None:
        source, element = inputs[0], dtypes[0]
        if element in ("int64", "int32") and node.op_type == "TreeEnsembleClassifier":
            # ONNX Runtime converts integers to float before it compares them with the thresholds.
            inputs, element = [f"{source} as floats"], "float"
            self._steps.append((lambda x: x.astype(np.float32), [source], inputs))
        if element not in ("float", "double"):
            raise NotAForest(f"a {node.op_type} of {element or 'something that is not a tensor'}")
        ensemble = compile_ensemble(node, element)
        self.ensembles.append(ensemble)
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

    def verify_against(self, session: RunnableModel, rows: int = CHECK_ROWS, seed: int = 0) -> None:
        """Compare with ONNX Runtime on rows of thresholds, the numbers just below and above them, NaN and infinities.

        Raises NotAForest that names the difference if labels differ, or numbers differ by more than 1e-5.
        """
        random = np.random.default_rng(seed)
        inputs = self.example(rows, random)
        for batch in (inputs, [array[:1] for array in inputs]):
            expected = session.run(batch)
            try:
                got = self.run(batch)
            except (ValueError, IndexError, TypeError) as error:
                raise NotAForest(f"an operator around its trees fails: {error}") from error
            for name, ours, theirs in zip(self.output_names, got, expected, strict=True):
                _compare(name, ours, np.asarray(theirs))

    def example(self, rows: int, random: np.random.Generator) -> list[Array]:
        """Return random rows for each input. A feature that the trees test gets values at and beside its thresholds."""
        result = []
        feature = np.concatenate([ensemble.feature for ensemble in self.ensembles])
        threshold = np.concatenate([ensemble.threshold for ensemble in self.ensembles])
        order = np.argsort(feature, kind="stable")
        feature, threshold = feature[order], threshold[order]
        first = 0
        for info in self.inputs:
            width = info.shape[1] if len(info.shape) == 2 else None
            if width is None:
                width = max(ensemble.trees.n_features for ensemble in self.ensembles)
            array = random.normal(size=(rows, width)).astype(DTYPES[info.dtype])
            for column in range(width):
                begin, end = np.searchsorted(feature, [first + column, first + column + 1])
                _mix(array[:, column], threshold[begin:end], random)
            first += width
            result.append(array)
        return result


def compile_forest(model_path: Path, output_names: Sequence[str]) -> Forest:
    """Return the forest of an ONNX file. Raises NotAForest, with a reason, if the graph is not fully understood."""
    try:
        graph = read_graph(model_path.read_bytes())
        _check_graph(graph)
        return Forest(graph, output_names)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise NotAForest(f"its graph cannot be read: {error}") from error


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


def _needed(graph: Graph, output_names: Sequence[str]) -> list[Node]:
    """Return the nodes that those outputs depend on, in the file's order, which ONNX requires to be topological."""
    names = set(output_names)
    kept = []
    for node in reversed(graph.nodes):
        if names.intersection(node.outputs):
            kept.append(node)
            names.update(node.inputs)
    return kept[::-1]


def _mix(column: Array, thresholds: NDArray[np.float64], random: np.random.Generator) -> None:
    """Overwrite most of a column with values where errors show: a threshold, its neighbours, NaN, infinities, zero."""
    if column.dtype.kind != "f":
        column[:] = random.integers(-100, 100, len(column))
        if len(thresholds):
            known = np.clip(np.nan_to_num(thresholds), -1e9, 1e9)
            column[::2] = random.choice(known, len(column[::2])).astype(column.dtype)
        return
    if len(thresholds):
        at = random.choice(thresholds, len(column)).astype(column.dtype)
        side = random.integers(0, 4, len(column))
        with np.errstate(over="ignore"):  # the neighbour of the largest number is infinity, which is tried as well
            up, down = np.nextafter(at, np.inf, dtype=column.dtype), np.nextafter(at, -np.inf, dtype=column.dtype)
            column[:] = np.select([side == 0, side == 1, side == 2], [at, up, down], column * np.abs(at).mean())
    special = random.random(len(column))
    for i, value in enumerate((np.nan, np.inf, -np.inf, 0.0)):
        column[(special >= i * 0.02) & (special < (i + 1) * 0.02)] = value


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
