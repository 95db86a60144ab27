"""One ONNX Runtime session, set for latency: explicit threads, no spinning, no logs on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from shorttail.errors import Internal, InvalidArgument
from shorttail.store.catalog import TensorInfo


class Session:
    """A loaded model.

    path: an .onnx file; threads: intra-op threads (1 keeps a small model off the pool); outputs: names to compute,
    or None for all. Raises InvalidArgument when ONNX Runtime cannot load the file.
    """

    def __init__(self, path: Path, outputs: Sequence[str] | None = None, threads: int = 1):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class
            reason = " ".join(str(error).split())
            raise InvalidArgument(f"{path.name}: ONNX Runtime cannot load this model: {reason[:300]}") from error
        self.inputs = [_tensor(node) for node in self._session.get_inputs()]
        self.outputs = [_tensor(node) for node in self._session.get_outputs()]
        self.output_names = list(outputs) if outputs is not None else [tensor.name for tensor in self.outputs]
        self._input_names = [tensor.name for tensor in self.inputs]
        # What InferenceSession.run calls once it has checked the names of what it was given, which takes as long as a
        # small model does; here they come from the model itself.
        self._run = self._session._sess.run

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """One array for each of `self.inputs` in, one for each of `output_names` out, in order. Drops the GIL."""
        try:
            result: list[NDArray[Any]] = self._run(
                self.output_names, dict(zip(self._input_names, inputs, strict=True)), None
            )
        except Exception as error:
            raise Internal(f"the model failed: {' '.join(str(error).split())[:300]}") from error
        return result


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
