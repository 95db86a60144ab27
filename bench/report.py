"""Print the result of a benchmark: the machine, the commit, figures with their spread, and bars."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Return the median of the rounds, with the lowest and the highest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def at_most(bar: str, value: float, limit: float, unit: str) -> dict[str, Any]:
    return {"bar": bar, "value": value, "limit": limit, "unit": unit, "ok": bool(value <= limit)}


def at_least(bar: str, value: float, limit: float, unit: str) -> dict[str, Any]:
    return {"bar": bar, "value": value, "limit": limit, "unit": unit, "ok": bool(value >= limit)}


def machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """Return the commit, with "+" if tracked files differ from it; None outside a repository."""
    try:
        revision = _git("rev-parse", "--short=12", "HEAD")
        return revision + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def print_json(figures: dict[str, Any], bars: list[dict[str, Any]]) -> None:
    print(json.dumps({"machine": machine(), "commit": commit(), "figures": figures, "bars": bars}, indent=2))


def print_bars(bars: list[dict[str, Any]]) -> None:
    for bar in bars:
        print(
            f"{'ok  ' if bar['ok'] else 'MISS'} {bar['bar']}: {bar['value']:.3g} {bar['unit']} (limit {bar['limit']})"
        )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
