"""One ONNX Runtime session, set for latency: explicit threads, no spinning, no arena, no logs on the way.

Batches run at their own size. Bound buffers of padded sizes are no faster on a CPU (docs/models.md has the figures);
for a GPU they are, see buckets.py. Without arena and memory patterns nothing is kept for the sizes that were seen, so
memory does not grow with them, and small batches take no longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from shorttail.define.catalog import TensorInfo
from shorttail.errors import Internal, InvalidArgument

Array = NDArray[Any]
ON_CPU: tuple[Any, ...] = ("CPUExecutionProvider",)


class Session:
    """A loaded model.

    path: an .onnx file; threads: intra-op threads (1 keeps a small model off the pool); outputs: names to compute,
    or None for all. fixed_rows: the rows that the file was exported for, None where any number will do.
    Raises InvalidArgument when ONNX Runtime cannot load the file.
    """

    def __init__(
        self,
        path: Path,
        outputs: Sequence[str] | None = None,
        threads: int = 1,
        providers: Sequence[Any] = ON_CPU,
    ):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False  # a plan of the memory is kept for every size that comes by
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        try:
            self.onnx = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # its exceptions share no base class
            raise InvalidArgument(f"{path.name}: ONNX Runtime cannot load this model: {one_line(error)}") from error
        self.inputs = [_tensor(node) for node in self.onnx.get_inputs()]
        self.outputs = [_tensor(node) for node in self.onnx.get_outputs()]
        self.output_names = list(outputs) if outputs is not None else [tensor.name for tensor in self.outputs]
        self.fixed_rows = next((info.shape[0] for info in self.inputs if info.shape and info.shape[0]), None)
        self.description = f"ONNX Runtime, {threads} thread{'s' * (threads != 1)}"
        self._input_names = [tensor.name for tensor in self.inputs]
        # What InferenceSession.run calls once it has checked the names of what it was given, which takes as long as a
        # small model does; here they come from the model itself.
        self._run = self.onnx._sess.run

    def run(self, inputs: Sequence[Array], options: Any = None) -> list[Array]:
        """One array for each of `self.inputs` in, one for each of `output_names` out, in order. Drops the GIL."""
        try:
            result: list[Array] = self._run(
                self.output_names, dict(zip(self._input_names, inputs, strict=True)), options
            )
        except Exception as error:
            raise Internal(f"the model failed: {one_line(error)}") from error
        return result


class FixedRows:
    """A session whose file takes exactly so many rows, for batches of any size: in pieces, the last one padded."""

    def __init__(self, session: Session, rows: int):
        self.inputs = session.inputs
        self.output_names = session.output_names
        self.description = f"{session.description}, {rows} row{'s' * (rows != 1)} at a time"
        self._session = session
        self._rows = rows

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        return in_pieces(self._run_piece, inputs, self._rows)

    def _run_piece(self, inputs: Sequence[Array]) -> list[Array]:
        rows = len(inputs[0])
        if rows == self._rows:
            return self._session.run(inputs)
        full = [np.concatenate([array, blank(array, self._rows - rows)]) for array in inputs]
        return [array[:rows] for array in self._session.run(full)]


def in_pieces(run: Callable[[Sequence[Array]], list[Array]], inputs: Sequence[Array], rows_max: int) -> list[Array]:
    """What `run` gives for a batch of any size, called with at most `rows_max` rows at a time."""
    rows = len(inputs[0])
    if rows <= rows_max:
        return run(inputs)
    pieces = [run([array[at : at + rows_max] for array in inputs]) for at in range(0, rows, rows_max)]
    return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]


def blank(array: Array, rows: int) -> Array:
    """Rows of zeros, or of empty texts, as wide as the array's."""
    return np.full((rows, *array.shape[1:]), "" if array.dtype.hasobject else 0, array.dtype)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _tensor(node: Any) -> TensorInfo:
    """dtype "float" for tensor(float); whatever is not a tensor keeps ONNX Runtime's spelling: "seq(map(...))"."""
    kind = node.type
    if kind.startswith("tensor("):
        return TensorInfo(
            node.name,
            kind[len("tensor(") : -1],
            tuple(size if isinstance(size, int) and size > 0 else None for size in node.shape),
        )
    return TensorInfo(node.name, kind, ())
