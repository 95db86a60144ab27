"""A session that pads batches to powers of two and runs them in buffers that are bound once. GPUs are used this way.

On a GPU each batch size has its own page-locked host buffers, its own device buffers and, if CUDA runs every operator,
its own captured CUDA graph. A run then copies the inputs in, replays the graph and copies the outputs back. One thread
owns the session, its buffers and its graphs. The same code runs on a CPU, without copies and graphs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail.config import LIMITS
from shorttail.errors import Internal, InvalidArgument, ShorttailError
from shorttail.models.device import CPU, CudaMemory, Device, cuda_providers
from shorttail.models.runtime import onnxruntime
from shorttail.models.session import (
    FAILED,
    ON_CPU,
    ModelFailed,
    Session,
    check_rows,
    one_line,
    padded,
    run_in_pieces,
)

Array = NDArray[Any]
RUNS_BEFORE_REPLAY = 3  # two runs that ONNX Runtime needs before it captures a graph, and the first replay


class BucketSession:
    """Does the work of shorttail.models.session.Session with batches padded to powers of two.

    owned: True: one thread, `executor`, makes all runs; False: the calling threads make them, one at a time.
    graphs: whether runs are captured as CUDA graphs and replayed.
    Raises InvalidArgument if the file cannot be loaded, or has string inputs or outputs, which cannot be bound.
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
        """For example "ONNX Runtime, cuda:0, with CUDA graphs, pinned buffers"."""
        if self.device.kind == "cpu":
            return f"{self._session.description}, padded batches"
        graphs = "with CUDA graphs" if self.graphs else "without CUDA graphs"
        pinned = "pinned" if self._memory is not None else "pageable"
        return f"ONNX Runtime, {self.device}, {graphs}, {pinned} buffers"

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run a batch of any size.

        inputs: an array for each of `self.inputs`, in order. Returns a new array for each of `output_names`, in order.
        Raises Internal if the model fails.
        """
        results: list[Array] = self._in_owner(run_in_pieces, self._run_padded, inputs, self._rows_max)
        return results

    def _in_owner(self, function: Any, *arguments: Any) -> Any:
        """Call the function in the thread that owns the session, or under the lock if no thread does."""
        if self.executor is None:
            with self._lock:
                return function(*arguments)
        if threading.get_ident() == self._owner:
            return function(*arguments)
        return self.executor.submit(function, *arguments).result()

    def _open(self, graphs: bool) -> Session:
        session = open_session(self._path, self._outputs, self._threads, self.device, graphs)
        if any(tensor.dtype == "string" for tensor in (*session.inputs, *session.outputs)):
            raise InvalidArgument(f"{self._path.name}: strings cannot be bound to buffers")
        if self.device.kind == "cuda":
            # Without page-locked memory copies are slower; the answers stay the same.
            with contextlib.suppress(OSError, AttributeError):
                self._memory = self._memory or CudaMemory(self.device)
        return session

    def _open_first(self) -> Session:
        """Open the session, with CUDA graphs where the model allows them."""
        if self.device.kind == "cuda":
            with contextlib.suppress(InvalidArgument):  # raised if CUDA lacks an operator of the model
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
        except ShorttailError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ModelFailed(f"{FAILED}{one_line(error)}") from error

    def _new_bucket(self, size: int, inputs: Sequence[Array]) -> Bucket:
        try:
            return Bucket(self, size, inputs)
        except Exception as error:
            if not self.graphs or isinstance(error, InvalidArgument):
                raise
        # Some models load with graphs and still cannot be captured: an operator waits for the GPU, or the file declares
        # an output with a wrong shape.
        self.graphs = False
        self._buckets.clear()
        self._session = self._open(graphs=False)
        return Bucket(self, size, inputs)


def open_session(
    path: Path, outputs: Sequence[str] | None, threads: int, device: Device, graphs: bool = False, **options: Any
) -> Session:
    """Load a file on a device. graphs: for runs that are captured. options: of Session. Raises InvalidArgument."""
    providers = ON_CPU if device == CPU else cuda_providers(device, graphs)
    session = Session(path, outputs, threads, providers, **options)
    if device.kind == "cuda":
        if "CUDAExecutionProvider" not in session.onnx.get_providers():
            raise InvalidArgument(f"device '{device}': ONNX Runtime found no usable GPU with that number")
        # If a run fails on the GPU, ONNX Runtime must not repeat it in a CPU session.
        session.onnx.disable_fallback()
    return session


class Bucket:
    """The bound input and output buffers of one padded batch size.

    rows: the padded size. like: the inputs of the first batch, whose widths and dtypes the buffers take.
    """

    def __init__(self, owner: BucketSession, rows: int, like: Sequence[Array]):
        session, device, self._memory = owner._session, owner.device, owner._memory
        self._onnx = session.onnx
        self._shared = device == CPU and self._memory is None  # True: the bound memory is the host array itself
        self._binding = self._onnx.io_binding()
        self._options = uncaptured = None
        if owner.graphs:
            self._options, uncaptured = onnxruntime.RunOptions(), onnxruntime.RunOptions()
            self._options.add_run_config_entry("gpu_graph_id", str(rows))
            uncaptured.add_run_config_entry("gpu_graph_id", "-1")
        inputs = [padded(array, rows) for array in like]
        outputs = session.run(inputs, uncaptured)
        check_rows(session.output_names, outputs, rows)
        self._inputs = [self._buffer(array, device) for array in inputs]
        for host, value in self._inputs:
            self._upload(host, value)  # the first runs are on these rows: a model may refuse rows of zeros
        self._outputs = [self._buffer(array, device) for array in outputs]
        for tensor, (_, value) in zip(session.inputs, self._inputs, strict=True):
            self._binding.bind_ortvalue_input(tensor.name, value)
        declared = {tensor.name: tensor.shape for tensor in session.outputs}
        # Converters declare some outputs wrongly (the labels of a batch as a single number). ONNX Runtime accepts that
        # only if no buffer is bound to the output, not even the buffer that it returned from an earlier run.
        self._unbound = {
            i: name
            for i, (name, array) in enumerate(zip(session.output_names, outputs, strict=True))
            if not _agrees(declared[name], array.shape)
        }
        if self._unbound and owner.graphs:
            raise Internal("an output's shape differs from the file's declaration, so runs cannot be captured")
        for i, (name, (_, value)) in enumerate(zip(session.output_names, self._outputs, strict=True)):
            if i in self._unbound:
                # _run binds it again; it is bound here too because outputs come in the order of their first binding.
                self._binding.bind_output(name)
            else:
                self._binding.bind_ortvalue_output(name, value)
        for _ in range(RUNS_BEFORE_REPLAY if owner.graphs else 1):
            self._run()

    def _run(self) -> None:
        for name in self._unbound.values():
            self._binding.bind_output(name)
        self._onnx.run_with_iobinding(self._binding, self._options)

    def _buffer(self, array: Array, device: Device) -> tuple[Array, onnxruntime.OrtValue]:
        """Return a copy of `array`, and the value to bind: the same memory on a CPU, GPU memory else."""
        if self._shared:
            # `array` itself may belong to ONNX Runtime, and every run writes into a bound output.
            host = np.array(array)
            return host, onnxruntime.OrtValue.ortvalue_from_numpy(host)
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            list(array.shape), array.dtype, device.kind, device.index
        )
        host = np.empty_like(array) if self._memory is None else self._memory.empty(array.shape, array.dtype)
        host[...] = array
        return host, value

    def takes(self, inputs: Sequence[Array]) -> bool:
        """Return whether the inputs have the dtypes and widths of these buffers."""
        return all(
            host.shape[1:] == array.shape[1:] and host.dtype == array.dtype
            for (host, _), array in zip(self._inputs, inputs, strict=True)
        )

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run a batch of at most the padded size. Returns new arrays with as many rows as the inputs."""
        rows = len(inputs[0])
        for (host, value), array in zip(self._inputs, inputs, strict=True):
            host[:rows] = array
            host[rows:] = array[-1] if rows else 0  # rows of an earlier batch must not influence this one
            self._upload(host, value)
        self._run()
        self._binding.synchronize_outputs()
        results = [self._download(host, value, rows) for host, value in self._outputs]
        if self._unbound:
            allocated = self._binding.get_outputs()
            for i in self._unbound:
                results[i] = allocated[i].numpy()[:rows].copy()
        return results

    def _upload(self, host: Array, value: onnxruntime.OrtValue) -> None:
        if self._memory is not None:
            self._memory.copy(value.data_ptr(), host.ctypes.data, host.nbytes)
        elif not self._shared:
            value.update_inplace(host)

    def _download(self, host: Array, value: onnxruntime.OrtValue, rows: int) -> Array:
        """Return a copy of the first rows of an output."""
        if self._memory is not None:
            self._memory.copy(host.ctypes.data, value.data_ptr(), host[:rows].nbytes)
            return host[:rows].copy()
        return (host if self._shared else value.numpy())[:rows].copy()


def _agrees(declared: Sequence[int | None], actual: Sequence[int]) -> bool:
    """Return whether an output's shape is the declared shape, in which None stands for any size."""
    return len(declared) == len(actual) and all(d in (None, a) for d, a in zip(declared, actual, strict=True))
