"""An ONNX Runtime session configured for latency: explicit threads, no spinning, no memory arena, no logging.

Batches run at their own size. Padded sizes in bound buffers are no faster on a CPU (docs/models.md has the figures);
on a GPU they are faster, see buckets.py. Without arena and memory patterns ONNX Runtime keeps no memory for each batch
size that it has seen, and small batches take no longer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail._native import runs
from shorttail._native.runs import RunTooLong
from shorttail.config import LIMITS
from shorttail.define.catalog import TensorInfo
from shorttail.errors import Internal, InvalidArgument, ResourceExhausted
from shorttail.models.runtime import onnxruntime

Array = NDArray[Any]
FAILED: Final = "the model failed: "
ON_CPU: tuple[Any, ...] = ("CPUExecutionProvider",)

# What ONNX Runtime writes before the reason of an error.
PREFIX: Final = re.compile(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ")
NODE: Final = re.compile(
    r"Non-zero status code returned while running (?P<type>\S+) node\. Name:'(?P<name>.*?)' Status Message: "
)
# "/onnxruntime_src/.../reshape_helper.h:91 onnxruntime::ReshapeHelper::ReshapeHelper(...) a == b was false. "
PLACE: Final = re.compile(
    r"(?<!\S)\S+\.(?:h|cc|cpp|cu|cuh):\d+ (?:.*? was false\. |(?:\S+ )*?onnxruntime::[^()]*\([^()]*\)"
    r"(?:::<lambda\([^()]*\)>)?(?: const)? )?"
)
REASON_MAX: Final = 300  # characters


class ModelFailed(Internal):
    """The model raised an error while it ran. The message is "the model failed: " and ONNX Runtime's reason."""

    @property
    def reason(self) -> str:
        return self.message.removeprefix(FAILED)


class RowsRefused(ModelFailed):
    """The model was not run, because it must not get one of the rows (models/missing.py)."""


class RunTimedOut(ModelFailed):
    """The run took longer than it may (Model(run_timeout=)), and was ended."""


def run_options() -> Any:
    """Return the options of a run: without logging, because the error that a run raises says the same."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    return options


class Session:
    """An ONNX file loaded into ONNX Runtime.

    path: the .onnx file. outputs: names of the outputs to compute, None for all. threads: ONNX Runtime's intra-op
    threads; with 1 the calling thread runs the model and no thread pool is used. providers: execution providers.
    fixed_rows: the batch size that the file was exported for, None if it takes any. run_key: by which native/runs.pyx
    knows the model; run_timeout_s: how long a run may take.
    Raises InvalidArgument if ONNX Runtime cannot load the file.
    """

    def __init__(
        self,
        path: Path,
        outputs: Sequence[str] | None = None,
        threads: int = 1,
        providers: Sequence[Any] = ON_CPU,
        *,
        run_key: int = 1,
        run_timeout_s: float = LIMITS.run_timeout_s,
    ):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False  # ONNX Runtime would keep a memory plan for every batch size it sees
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        try:
            self.onnx = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise InvalidArgument(f"{path.name}: ONNX Runtime cannot load this model: {one_line(error)}") from error
        self.inputs = [_tensor(node) for node in self.onnx.get_inputs()]
        self.outputs = [_tensor(node) for node in self.onnx.get_outputs()]
        self.output_names = list(outputs) if outputs is not None else [tensor.name for tensor in self.outputs]
        self.fixed_rows = next((info.shape[0] for info in self.inputs if info.shape and info.shape[0]), None)
        self.description = f"ONNX Runtime, {threads} thread{'s' * (threads != 1)}"
        self._input_names = [tensor.name for tensor in self.inputs]
        # InferenceSession.run first checks the names of inputs and outputs, which takes as long as a small model. Here
        # the names come from the model itself, so the method behind it is called directly.
        self._run = self.onnx._sess.run
        self._run_key = run_key
        self._run_timeout_ns = int(run_timeout_s * 1e9)

    def run(self, inputs: Sequence[Array], options: Any = None) -> list[Array]:
        """Run a batch. Drops the GIL.

        inputs: an array for each of `self.inputs`, in order. options: an onnxruntime.RunOptions, with which the run has
        no time limit, or None. Returns an array for each of `output_names`, in order. Raises ModelFailed, RunTimedOut.
        """
        feeds = dict(zip(self._input_names, inputs, strict=True))
        try:
            if options is None:
                return runs.run(self._run, self.output_names, feeds, self._run_key, self._run_timeout_ns, run_options)
            result: list[Array] = self._run(self.output_names, feeds, options)
        except RunTooLong:
            limit_s = self._run_timeout_ns / 1e9
            raise RunTimedOut(f"{FAILED}it ran longer than its run_timeout of {limit_s:g} s") from None
        except Exception as error:
            raise ModelFailed(f"{FAILED}{one_line(error)}") from error
        return result


class ExactRows:
    """Runs batches of exactly the rows that the file was exported for, and refuses others: nothing is padded."""

    def __init__(self, session: Session, rows: int):
        self.inputs = session.inputs
        self.output_names = session.output_names
        self.description = f"{session.description}, exactly {rows} row{'s' * (rows != 1)} a request"
        self.rows = rows
        self._session = session

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run a batch. Raises InvalidArgument if it has another number of rows; else as Session.run."""
        if len(inputs[0]) != self.rows:
            raise InvalidArgument(f"the model takes exactly {self.rows} rows a request, not {len(inputs[0])}")
        return self._session.run(inputs)


class FixedRows:
    """Runs batches of any size in a session that takes exactly `rows` rows: in pieces, of which the last is padded."""

    def __init__(self, session: Session, rows: int):
        self.inputs = session.inputs
        self.output_names = session.output_names
        self.description = f"{session.description}, {rows} row{'s' * (rows != 1)} at a time"
        self._session = session
        self._rows = rows

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run a batch. Inputs, results and errors are those of Session.run."""
        return run_in_pieces(self._run_piece, inputs, self._rows)

    def _run_piece(self, inputs: Sequence[Array]) -> list[Array]:
        rows = len(inputs[0])
        if rows == self._rows:
            return self._session.run(inputs)
        results = self._session.run([padded(array, self._rows) for array in inputs])
        check_rows(self.output_names, results, self._rows)
        return [array[:rows] for array in results]


class RawSession:
    """Runs requests that bring the model's tensors, one at a time."""

    def __init__(self, session: Session):
        self.inputs = session.inputs
        self.output_names = session.output_names
        self.description = session.description
        self._session = session

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run a request. Inputs and results are those of Session.run, of any shapes.

        Raises RunTimedOut; InvalidArgument if the model fails, because only ONNX Runtime knows which shapes and values
        a graph takes; and ResourceExhausted for outputs of more than LIMITS.raw_output_bytes.
        """
        try:
            outputs = self._session.run(inputs)
        except RunTimedOut:
            raise
        except ModelFailed as error:
            raise InvalidArgument(f"the model refuses this request: {error.reason}") from None
        size_bytes = sum(array.nbytes for array in outputs)
        if size_bytes > LIMITS.raw_output_bytes:
            raise ResourceExhausted(
                f"the outputs have {size_bytes} bytes; at most {LIMITS.raw_output_bytes} are sent: ask in parts"
            )
        return outputs


def run_in_pieces(run: Callable[[Sequence[Array]], list[Array]], inputs: Sequence[Array], rows_max: int) -> list[Array]:
    """Call `run` with at most `rows_max` rows at a time, and return the concatenated results.

    Raises ModelFailed if results of the pieces do not fit together.
    """
    rows = len(inputs[0])
    if rows <= rows_max:
        return run(inputs)
    pieces = [run([array[at : at + rows_max] for array in inputs]) for at in range(0, rows, rows_max)]
    try:
        return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]
    except ValueError:
        raise ModelFailed(f"{FAILED}the width of an output depends on the values of the rows") from None


def check_rows(names: Sequence[str], results: Sequence[Array], rows: int) -> None:
    """Check that the first axis of every output is the rows. Raises InvalidArgument that names the outputs that fit."""
    fitting = [name for name, array in zip(names, results, strict=True) if np.shape(array)[:1] == (rows,)]
    for name, array in zip(names, results, strict=True):
        if name not in fitting:
            cure = f"; name the others: outputs={fitting}" if fitting else ""
            raise InvalidArgument(
                f"output '{name}' has the shape {list(np.shape(array))} for a batch of {rows}; the first axis of an"
                f" output must be the rows{cure}"
            )


def blank_rows(array: Array, rows: int) -> Array:
    """Return `rows` rows of zeros, or of empty strings, with the array's width and dtype."""
    return np.full((rows, *array.shape[1:]), "" if array.dtype.hasobject else 0, array.dtype)


def padded(array: Array, rows: int) -> Array:
    """Return the array with its last row repeated, up to `rows` rows. A model may refuse a row of zeros or of ""."""
    if not len(array):
        return blank_rows(array, rows)
    return array[np.minimum(np.arange(rows), len(array) - 1)]


def one_line(error: Exception) -> str:
    """Return the reason of an ONNX Runtime error in a single line, with the node that failed.

    For example "OneHotEncoder node 'tier': Unknown Category and zeros = 0.". A text longer than REASON_MAX characters
    loses its beginning, because ONNX Runtime names the cause last.
    """
    text = PREFIX.sub("", " ".join(str(error).split()))
    node = NODE.match(text)
    where = ""
    if node is not None:
        where = f"{node['type']} node '{node['name']}': " if node["name"] else f"{node['type']} node: "
        text = text[node.end() :]
    text = PLACE.sub("", text)
    return where + (text if len(text) <= REASON_MAX else f"... {text[-REASON_MAX:]}")


def _tensor(node: Any) -> TensorInfo:
    """Convert ONNX Runtime's description: "tensor(float)" becomes "float"; a type that is no tensor keeps its text."""
    kind = node.type
    if kind.startswith("tensor("):
        return TensorInfo(
            node.name,
            kind[len("tensor(") : -1],
            tuple(size if isinstance(size, int) and size > 0 else None for size in node.shape),
        )
    return TensorInfo(node.name, kind, ())
