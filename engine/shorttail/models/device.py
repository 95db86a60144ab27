"""Names the device that sessions run on ("cpu" or "cuda:N"), and checks a GPU's libraries before a model is loaded."""

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
    """A device that ONNX Runtime runs models on."""

    kind: str  # "cpu" or "cuda"
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> Device:
        """Return the device with that name: "cpu", "cuda" (the first GPU) or "cuda:1". Raises InvalidArgument."""
        found = re.fullmatch(r"(cpu)|cuda(?::(\d{1,3}))?", text)
        if found is None:
            raise InvalidArgument(f"device '{text}': it must be cpu, cuda or cuda:N")
        return CPU if found[1] else cls("cuda", int(found[2] or 0))


CPU = Device("cpu")


def check_cuda(device: Device) -> None:
    """Check that ONNX Runtime can use this GPU. Raises InvalidArgument that says what is missing.

    Without this check ONNX Runtime only logs the problem and runs the model on the CPU.
    """
    installed = installed_runtimes()
    if "onnxruntime" in installed and "onnxruntime-gpu" in installed:
        raise InvalidArgument(
            f"device '{device}': onnxruntime and onnxruntime-gpu are both installed, and each overwrites files of the"
            f" other; run: {INSTALL}"
        )
    from shorttail.models.runtime import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise InvalidArgument(f"device '{device}': the installed onnxruntime is for CPUs only; run: {INSTALL}")
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
    """Return the installed packages that provide the module `onnxruntime`: onnxruntime, onnxruntime-gpu, or both."""
    found = set()
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            found.add(name)
    return found


def _preload(onnxruntime: Any) -> str:
    """Load CUDA's libraries, from pip's packages or the system. Returns the first error as text, "" if all load."""
    onnxruntime.set_default_logger_severity(4)
    # preload_dlls only prints its errors; loading the provider below reports them.
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(provider.with_name("libonnxruntime_providers_shared.so")), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(provider))
    except OSError as error:
        return str(error)
    return ""


def cuda_providers(device: Device, graphs: bool) -> Sequence[Any]:
    """Return ONNX Runtime's execution providers for that GPU. graphs: runs are captured once and then replayed."""
    options = {"device_id": str(device.index), "enable_cuda_graph": str(int(graphs))}
    # Operators that CUDA lacks run on the CPU. With graphs, ONNX Runtime refuses to load such a model.
    return (("CUDAExecutionProvider", options), "CPUExecutionProvider")


class CudaMemory:
    """Allocates page-locked host memory and copies between it and the GPU, with the libcudart that ONNX Runtime loaded.

    ONNX Runtime's Python API copies from any array, but only page-locked memory goes to the GPU without a staging copy.
    CUDA's functions return 0 when they succeed (CUDA Runtime API, "Memory Management"). Raises OSError if they do not.
    """

    def __init__(self, device: Device):
        self._cuda = ctypes.CDLL(_loaded_library("libcudart.so"))
        self._cuda.cudaHostAlloc.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_uint]
        self._cuda.cudaFreeHost.argtypes = [ctypes.c_void_p]
        self._cuda.cudaMemcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._check(self._cuda.cudaSetDevice(device.index), "cudaSetDevice")

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an uninitialized array in page-locked memory, which is freed together with the array."""
        size = max(1, int(np.prod(shape)) * dtype.itemsize)
        address = ctypes.c_void_p()
        self._check(self._cuda.cudaHostAlloc(ctypes.byref(address), size, 0), "cudaHostAlloc")
        memory = (ctypes.c_char * size).from_address(address.value or 0)
        weakref.finalize(memory, self._cuda.cudaFreeHost, address.value).atexit = False
        return np.ndarray(tuple(shape), dtype, memoryview(memory))

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Copy between a host and a device address, in either direction, and wait for the end. Drops the GIL."""
        by_address = 4  # cudaMemcpyDefault: CUDA finds the direction from the addresses
        self._check(self._cuda.cudaMemcpy(target, source, size_bytes, by_address), "cudaMemcpy")

    @staticmethod
    def _check(code: int, function: str) -> None:
        if code != 0:
            raise OSError(f"{function} failed with CUDA error {code}")


def _loaded_library(name: str) -> str:
    """Return the path of a shared library that this process has loaded. Raises OSError if it has not."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if f"/{name}" in path:
            return path
    raise OSError(f"{name} is not loaded")
