"""Imports ONNX Runtime, with its telemetry off. No other module of this package imports it.

From version 1.29 on ONNX Runtime sends telemetry from Linux too: it keeps a device id below the home directory and
connects to a host of Microsoft. It reads the variable below when it is imported, so the variable is set before. A value
that the user has set is kept.
"""

from __future__ import annotations

import os
from typing import Final

DISABLE: Final = "ORT_DISABLE_TELEMETRY"
os.environ.setdefault(DISABLE, "1")

import onnxruntime  # noqa: E402

if os.environ[DISABLE] != "0":
    # For a program that imported ONNX Runtime before this package: the device id is written, but nothing more is sent.
    getattr(onnxruntime, "disable_telemetry_events", lambda: None)()

__all__ = ["onnxruntime"]
