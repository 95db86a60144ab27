"""Settings with which a model version runs on a kind of host. `shorttail tune` measures and stores them in the catalog.

Settings are stored under a description of the host that they were measured on. Other hosts do not use them.
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
    """How a model version is run.

    runner: "auto" uses a compiled forest if the model is a tree ensemble; "onnxruntime" always uses ONNX Runtime.
    threads: ONNX Runtime's threads for a run. padded: batches are padded to powers of two, in buffers bound once.
    """

    runner: str = "auto"
    threads: int = 1
    padded: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


DEFAULT = RunSettings()


def tuned(tuning: Mapping[str, Mapping[str, Any]], device: str = "cpu") -> tuple[RunSettings, str]:
    """Return the settings measured on a host like this one, else the defaults; and a note that says where from.

    tuning: host description -> settings, as the catalog keeps them. The note is "" if the version was never tuned.
    """
    here = host(device)
    if here in tuning:
        return RunSettings(**tuning[here]), f"tuned on {here}"
    if tuning:
        return DEFAULT, f"tuned on {'; '.join(tuning)}, which this host is not ({here})"
    return DEFAULT, ""


def host(device: str = "cpu") -> str:
    """Describe this host as settings are stored by it: "AMD EPYC 9654, avx512, 2 CPUs", for a GPU with ", cuda"."""
    return cpu() if device == "cpu" else f"{cpu()}, {device.partition(':')[0]}"


@cache
def cpu() -> str:
    """Return the CPU's model, its SIMD level and the number of CPUs that this process may use."""
    cpus = len(os.sched_getaffinity(0))
    return f"{_cpu_model()}, {simd_level()}, {cpus} CPU{'s' * (cpus != 1)}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part")))
    return next(names, platform.processor() or platform.machine())
