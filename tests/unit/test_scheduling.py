"""What workers ask of the system's scheduler."""

import os
import platform
import struct
import subprocess
import sys

import pytest

from shorttail.server import limits

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


def attributes(*lines):
    """Run lines in a new process and then go_first. Returns the policy, the nice value and the slice in ns."""
    script = [
        "import ctypes, os, sys",
        "from shorttail.server import limits",
        *lines,
        "limits.go_first()",
        "room = ctypes.create_string_buffer(48)",
        f"assert ctypes.CDLL(None).syscall({SCHED_GETATTR[platform.machine()]}, 0, room, 48, 0) == 0",
        "sys.stdout.buffer.write(room.raw)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], capture_output=True, check=True)
    _, policy, _, nice, _, slice_ns, *_ = struct.unpack("=IIQiIQQQ", done.stdout)
    return policy, nice, slice_ns


@pytest.mark.skipif(platform.machine() not in limits.SCHED_SETATTR, reason="another machine")
def test_workers_ask_for_short_slices():
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    policy, nice, slice_ns = attributes("os.nice(3)")
    assert (policy, nice) == (os.SCHED_OTHER, os.getpriority(os.PRIO_PROCESS, 0) + 3)
    if release >= (6, 12):
        assert slice_ns == limits.SLICE_NS


@pytest.mark.skipif(platform.machine() not in limits.SCHED_SETATTR, reason="another machine")
def test_what_an_operator_has_chosen_stays():
    policy, _, _ = attributes("os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))")
    assert policy == os.SCHED_BATCH
