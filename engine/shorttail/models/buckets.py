"""A session whose batches are padded to powers of two, in buffers that are bound to it once: how a GPU is used.

On a GPU each size has its own page-locked host buffers, its own device buffers and, where every operator runs there,
its own captured graph, so that a run is copy, replay, copy. One thread owns all of it. The same code runs on a CPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime import OrtValue

from shorttail.config import LIMITS
from shorttail.errors import Internal, InvalidArgument
from shorttail.models.device import CPU, CudaMemory, Device, cuda_providers
from shorttail.models.session import ON_CPU, Session, blank, in_pieces, one_line

Array = NDArray[Any]
RUNS_BEFORE_REPLAY = 3  # two that ONNX Runtime makes before it captures, and the first replay


class BucketSession:
    """What shorttail.models.session.Session is, in padded sizes.

    owned: all runs are made by one thread, `executor`; else by whoever calls, one at a time.
    graphs: whether runs are captured and replayed. Raises InvalidArgument for a file that cannot be loaded or that has
    texts, which cannot be bound.
    """

    def __init__(
        self,
        path: Path,
        outputs: Sequence[str] | None = None,
        *,
        threads: int = 1,
        device: Device = CPU,
        owned: bool = True,
    ):
        self.executor = ThreadPoolExecutor(1, f"{path.parent.parent.name} on {device}") if owned else None
        self._owner = self.executor.submit(threading.get_ident).result() if self.executor else None
        self._lock = threading.Lock()
        self.device = device
        self.graphs = False
        self._memory: CudaMemory | None = None
        self._buckets: dict[int, Bucket] = {}
        self._path, self._threads, self._outputs = path, threads, outputs
        self._session: Session = self._in_owner(self._open_first)
        self.inputs, self.output_names = self._session.inputs, self._session.output_names
        self._rows_max = self._session.fixed_rows or LIMITS.bucket_rows

    @property
    def description(self) -> str:
        if self.device.kind == "cpu":
            return f"{self._session.description}, padded batches"
        graphs = "with CUDA graphs" if self.graphs else "without CUDA graphs"
        pinned = "pinned" if self._memory is not None else "pageable"
        return f"ONNX Runtime, {self.device}, {graphs}, {pinned} buffers"

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """One array for each of `self.inputs` in, one for each of `output_names` out, in order; none is used again."""
        results: list[Array] = self._in_owner(in_pieces, self._run_padded, inputs, self._rows_max)
        return results

    def _in_owner(self, function: Any, *arguments: Any) -> Any:
        if self.executor is None:
            with self._lock:
                return function(*arguments)
        if threading.get_ident() == self._owner:
            return function(*arguments)
        return self.executor.submit(function, *arguments).result()

    def _open(self, graphs: bool) -> Session:
        providers = ON_CPU if self.device == CPU else cuda_providers(self.device, graphs)
        session = Session(self._path, self._outputs, self._threads, providers)
        if any(tensor.dtype == "string" for tensor in (*session.inputs, *session.outputs)):
            raise InvalidArgument(f"{self._path.name}: texts cannot be bound to buffers")
        if self.device.kind == "cuda":
            if "CUDAExecutionProvider" not in session.onnx.get_providers():
                raise InvalidArgument(f"device '{self.device}': ONNX Runtime found no usable GPU of that number")
            # If a run fails there, its answer must not come from a CPU session made in its place.
            session.onnx.disable_fallback()
            with contextlib.suppress(OSError, AttributeError):  # slower copies, the same answers
                self._memory = self._memory or CudaMemory(self.device)
        return session

    def _open_first(self) -> Session:
        if self.device.kind == "cuda":
            with contextlib.suppress(InvalidArgument):  # not every operator runs there
                session = self._open(graphs=True)
                self.graphs = True
                return session
        return self._open(graphs=False)

    def _run_padded(self, inputs: Sequence[Array]) -> list[Array]:
        rows = len(inputs[0])
        size = self._session.fixed_rows or 1 << max(0, rows - 1).bit_length()
        bucket = self._buckets.get(size)
        try:
            if bucket is None or not bucket.takes(inputs):
                bucket = self._buckets[size] = self._new_bucket(size, inputs)
            return bucket.run(inputs)
        except Internal:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise Internal(f"the model failed: {one_line(error)}") from error

    def _new_bucket(self, size: int, inputs: Sequence[Array]) -> Bucket:
        try:
            return Bucket(self, size, inputs)
        except Exception:
            if not self.graphs:
                raise
        # Some runs cannot be captured (an operator waits for the GPU, an output's shape is declared wrongly).
        self.graphs = False
        self._buckets.clear()
        self._session = self._open(graphs=False)
        return Bucket(self, size, inputs)


class Bucket:
    """The buffers of one size, bound to the session. like: arrays as wide as those to come."""

    def __init__(self, owner: BucketSession, rows: int, like: Sequence[Array]):
        session, device, self._memory = owner._session, owner.device, owner._memory
        self._onnx = session.onnx
        self._shared = device == CPU and self._memory is None  # what is bound is the host array itself
        self._binding = self._onnx.io_binding()
        self._options = uncaptured = None
        if owner.graphs:
            self._options, uncaptured = onnxruntime.RunOptions(), onnxruntime.RunOptions()
            self._options.add_run_config_entry("gpu_graph_id", str(rows))
            uncaptured.add_run_config_entry("gpu_graph_id", "-1")
        inputs = [blank(array, rows) for array in like]
        outputs = session.run(inputs, uncaptured)
        self._inputs = [self._buffer(array, device) for array in inputs]
        self._outputs = [self._buffer(array, device) for array in outputs]
        for tensor, (_, value) in zip(session.inputs, self._inputs, strict=True):
            self._binding.bind_ortvalue_input(tensor.name, value)
        declared = {tensor.name: tensor.shape for tensor in session.outputs}
        # Converters declare some outputs wrongly (a label of a batch as one number). ONNX Runtime lets that pass unless
        # it is handed a buffer for it, even its own of the run before.
        self._unbound = {
            i: name
            for i, (name, array) in enumerate(zip(session.output_names, outputs, strict=True))
            if not _agrees(declared[name], array.shape)
        }
        if self._unbound and owner.graphs:
            raise Internal("an output has another shape than the file declares, so its run cannot be captured")
        for i, (name, (_, value)) in enumerate(zip(session.output_names, self._outputs, strict=True)):
            if i in self._unbound:
                self._binding.bind_output(name)  # here already, for the order of outputs is that of their first binding
            else:
                self._binding.bind_ortvalue_output(name, value)
        for _ in range(RUNS_BEFORE_REPLAY if owner.graphs else 1):
            self._run()

    def _run(self) -> None:
        for name in self._unbound.values():
            self._binding.bind_output(name)
        self._onnx.run_with_iobinding(self._binding, self._options)

    def _buffer(self, array: Array, device: Device) -> tuple[Array, OrtValue]:
        """A host array of that shape and what is bound for it: the same memory on a CPU, its counterpart on a GPU."""
        if self._shared:
            # Not the array itself, which ONNX Runtime may own: an output that was bound is written again and again.
            host = np.zeros(array.shape, array.dtype)
            return host, OrtValue.ortvalue_from_numpy(host)
        value = OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype, device.kind, device.index)
        host = np.empty_like(array) if self._memory is None else self._memory.empty(array.shape, array.dtype)
        return host, value

    def takes(self, inputs: Sequence[Array]) -> bool:
        """Whether they are of the types and widths that this was made for."""
        return all(
            host.shape[1:] == array.shape[1:] and host.dtype == array.dtype
            for (host, _), array in zip(self._inputs, inputs, strict=True)
        )

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        rows = len(inputs[0])
        for (host, value), array in zip(self._inputs, inputs, strict=True):
            host[:rows] = array
            host[rows:] = 0  # what an earlier batch left there must not decide anything
            self._upload(host, value)
        self._run()
        self._binding.synchronize_outputs()
        results = [self._download(host, value, rows) for host, value in self._outputs]
        if self._unbound:
            allocated = self._binding.get_outputs()
            for i in self._unbound:
                results[i] = allocated[i].numpy()[:rows].copy()
        return results

    def _upload(self, host: Array, value: OrtValue) -> None:
        if self._memory is not None:
            self._memory.copy(value.data_ptr(), host.ctypes.data, host.nbytes)
        elif not self._shared:
            value.update_inplace(host)

    def _download(self, host: Array, value: OrtValue, rows: int) -> Array:
        """The first rows, in memory of their own."""
        if self._memory is not None:
            self._memory.copy(host.ctypes.data, value.data_ptr(), host[:rows].nbytes)
            return host[:rows].copy()
        return (host if self._shared else value.numpy())[:rows].copy()


def _agrees(declared: Sequence[int | None], actual: Sequence[int]) -> bool:
    return len(declared) == len(actual) and all(d in (None, a) for d, a in zip(declared, actual, strict=True))
