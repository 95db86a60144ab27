"""Where sessions run: "cpu", or "cuda:N". What a GPU needs is looked for before any model is loaded."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import io
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail.errors import InvalidArgument

INSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu"


@dataclass(frozen=True, slots=True)
class Device:
    kind: str  # "cpu" or "cuda"
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> Device:
        """The device of that name: "cpu", "cuda", "cuda:1". Raises InvalidArgument for another."""
        found = re.fullmatch(r"(cpu)|cuda(?::(\d{1,3}))?", text)
        if found is None:
            raise InvalidArgument(f"device '{text}': it must be cpu, cuda or cuda:N")
        return CPU if found[1] else cls("cuda", int(found[2] or 0))


CPU = Device("cpu")


def check_cuda(device: Device) -> None:
    """That ONNX Runtime can use this GPU. Raises InvalidArgument with what is missing.

    ONNX Runtime itself only logs such faults, and then runs the model on the CPU.
    """
    installed = installed_runtimes()
    if "onnxruntime" in installed and "onnxruntime-gpu" in installed:
        raise InvalidArgument(
            f"device '{device}': onnxruntime and onnxruntime-gpu are both installed, and each overwrites files of the"
            f" other: {INSTALL}"
        )
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise InvalidArgument(f"device '{device}': the installed onnxruntime is for CPUs only: {INSTALL}")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise InvalidArgument(
            f"device '{device}': there is no NVIDIA driver on this host (no libcuda.so.1); `nvidia-smi` must work first"
        ) from None
    missing = _preload(onnxruntime)
    if missing:
        raise InvalidArgument(
            f"device '{device}': CUDA's libraries do not load ({missing}): pip install 'shorttail[gpu]', or install"
            " CUDA and cuDNN system-wide"
        )


def installed_runtimes() -> set[str]:
    """Which of the packages that bring the module `onnxruntime` are installed."""
    found = set()
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            found.add(name)
    return found


def _preload(onnxruntime: Any) -> str:
    """Load CUDA's libraries, from pip's packages or the system. Returns what went wrong first: it only prints that."""
    onnxruntime.set_default_logger_severity(4)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls()
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(provider.with_name("libonnxruntime_providers_shared.so")), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(provider))
    except OSError as error:
        return str(error)
    return ""


def cuda_providers(device: Device, graphs: bool) -> Sequence[Any]:
    """The providers of a session on that GPU. graphs: runs are captured once and replayed."""
    options = {"device_id": str(device.index), "enable_cuda_graph": str(int(graphs))}
    # Operators that CUDA lacks run on the CPU; a session with graphs refuses to be made then.
    return (("CUDAExecutionProvider", options), "CPUExecutionProvider")


class CudaMemory:
    """Page-locked host memory, and copies from and to it: CUDA's runtime, as ONNX Runtime has loaded it.

    ONNX Runtime's Python API copies from any array, but only page-locked ones go to the GPU without a stop between.
    Functions return 0 when they succeed (CUDA Runtime API, "Memory Management").
    """

    def __init__(self, device: Device):
        self._cuda = ctypes.CDLL(_loaded_library("libcudart.so"))
        self._cuda.cudaHostAlloc.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_uint]
        self._cuda.cudaFreeHost.argtypes = [ctypes.c_void_p]
        self._cuda.cudaMemcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._check(self._cuda.cudaSetDevice(device.index), "cudaSetDevice")

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array in page-locked memory, which is freed with it."""
        size = max(1, int(np.prod(shape)) * dtype.itemsize)
        address = ctypes.c_void_p()
        self._check(self._cuda.cudaHostAlloc(ctypes.byref(address), size, 0), "cudaHostAlloc")
        memory = (ctypes.c_char * size).from_address(address.value or 0)
        weakref.finalize(memory, self._cuda.cudaFreeHost, address.value).atexit = False
        return np.ndarray(tuple(shape), dtype, memoryview(memory))

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Between host and device addresses, either way; complete when it returns. Drops the GIL."""
        by_address = 4  # cudaMemcpyDefault: the addresses tell where they are
        self._check(self._cuda.cudaMemcpy(target, source, size_bytes, by_address), "cudaMemcpy")

    @staticmethod
    def _check(code: int, what: str) -> None:
        if code != 0:
            raise OSError(f"{what} failed with CUDA error {code}")


def _loaded_library(name: str) -> str:
    """The path of a shared library that this process has loaded. Raises OSError."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if f"/{name}" in path:
            return path
    raise OSError(f"{name} is not loaded")
