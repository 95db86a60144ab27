"""How a version of a model is run on a kind of host. `shorttail tune` measures it and keeps it in the catalog.

A choice holds for the CPU it was measured on: it is found by that host's description, and elsewhere it is not used.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from shorttail._native.forest import simd_level


@dataclass(frozen=True, slots=True)
class RunSettings:
    """runner: "auto" takes a compiled forest where the model is one, "onnxruntime" does not.

    threads: of ONNX Runtime for one run. padded: batches are padded to powers of two, in buffers bound once.
    """

    runner: str = "auto"
    threads: int = 1
    padded: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


DEFAULT = RunSettings()


def tuned(tuning: Mapping[str, Mapping[str, Any]], device: str = "cpu") -> tuple[RunSettings, str]:
    """The settings measured on a host like this one, or the default; and a note on choices that are not used."""
    here = host(device)
    if here in tuning:
        return RunSettings(**tuning[here]), f"tuned on {here}"
    if tuning:
        return DEFAULT, f"tuned on {'; '.join(tuning)}, which this host is not ({here})"
    return DEFAULT, ""


def host(device: str = "cpu") -> str:
    """What a choice depends on: "AMD EPYC 9654, avx512, 2 CPUs", and the device unless it is the CPU."""
    return cpu() if device == "cpu" else f"{cpu()}, {device.partition(':')[0]}"


@cache
def cpu() -> str:
    cpus = len(os.sched_getaffinity(0))
    return f"{_cpu_model()}, {simd_level()}, {cpus} CPU{'s' * (cpus != 1)}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part")))
    return next(names, platform.processor() or platform.machine())
