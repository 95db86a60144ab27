"""Describes a run as a JSON object: its options, its machine and its steps. `shorttail bench compare` reads it back."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shorttail.config import VERSION
from shorttail.define.inputs import read_input
from shorttail.errors import InvalidArgument, NotFound
from shorttail.loadtest.findings import findings, server
from shorttail.loadtest.result import FORMAT, Step
from shorttail.loadtest.runner import Capacity, Load
from shorttail.loadtest.stages import StageWatch
from shorttail.loadtest.target import Target
from shorttail.loadtest.traffic import Traffic, Workload
from shorttail.loadtest.verify import Verified


def machine() -> dict[str, Any]:
    """Describe the generator's machine. The server's machine is unknown; users can name it with --label."""
    return {
        "host": platform.node(),
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def make_document(
    *,
    label: str,
    target: Target,
    workload: Workload,
    plan: Traffic,
    load: Load,
    command: str,
    started_s: float,
    steps: Sequence[Step],
    capacity: Capacity | None,
    verified: Verified | None,
    watch: StageWatch | None = None,
    own_keys: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the JSON object of a run. command: as the user typed it. started_s: seconds since 1970 UTC.

    own_keys: what OwnKeys.remove() returned, None if no pushes had keys of their own.
    """
    document: dict[str, Any] = {
        "tool": "shorttail bench",
        "format": FORMAT,
        "version": VERSION,
        "label": label,
        "command": command,
        "started": datetime.fromtimestamp(started_s, UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "target": {"address": target.text, "protocol": target.protocol},
        "workload": {
            "requests": {template.name: template.weight for template in plan.templates},
            "model": workload.predict,
            "features": list(workload.features),
            "push": workload.push,
            "own_keys": own_keys,
            "rows": workload.rows,
            "columns": plan.describes,
        },
        "load": describe_load(load, target),
        "steps": [step.to_dict() for step in steps],
        "capacity": None
        if capacity is None
        else {
            "percentile": capacity.objective.percentile,
            "limit_us": capacity.objective.limit_s * 1e6,
            "rate_per_s": round(capacity.rate_per_s, 3),
            "reason": capacity.reason,
        },
        "verified": None if verified is None else verified._asdict(),
    }
    found = None if watch is None else {"url": watch.url, "note": watch.note, "finding": server(document["steps"])}
    return {**document, "metrics": found, "findings": findings(document)}


def describe_load(load: Load, target: Target) -> dict[str, Any]:
    return {
        "loop": "closed" if load.closed else "open",
        "arrivals": None if load.closed else "Poisson" if load.poisson else "constant",
        "connections": load.connections,
        "in_flight_a_connection": 1 if target.protocol == "http" else load.pipeline,
        "warmup_s": load.warmup_s,
        "timeout_s": load.timeout_s,
        "threads": load.threads,
        "seed": load.seed,
        "spin_us": load.spin_us,
    }


def read_document(path: str) -> dict[str, Any]:
    """Read a run that `--json` printed. Raises NotFound, InvalidArgument."""
    try:
        document = json.loads(read_input(path))
    except FileNotFoundError:
        raise NotFound(f"{path}: there is no such file; write one with `shorttail bench ... --json > {path}`") from None
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path}: cannot be read as JSON: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(document, Mapping) or document.get("tool") != "shorttail bench" or not document.get("steps"):
        raise InvalidArgument(f"{path} is not a result of `shorttail bench --json`")
    if document["format"] != FORMAT:
        raise InvalidArgument(f"{path} has format {document['format']}, and this version reads {FORMAT}; run it again")
    return {**document, "label": document["label"] or Path(path).stem}
