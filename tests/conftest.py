"""What all tests share."""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import settings

# Compiled on-demand functions are kept for the run, and nothing is left in the home of whoever runs the tests.
_cache = tempfile.TemporaryDirectory(prefix="shorttail-cache-")
os.environ["SHORTTAIL_CACHE_DIR"] = _cache.name
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests and converters import ONNX Runtime by themselves

# How long an example takes is no failure: machines are busy, and sanitizers slow.
settings.register_profile("shorttail", deadline=None)
settings.load_profile("shorttail")

# What cannot be seen where ASan is (`make asan`), by the start of a test's id.
NOT_UNDER_ASAN = {
    "tests/e2e/test_wheel.py": "builds a wheel of its own, without sanitizers",
    "tests/unit/test_map.py::test_locked_memory_follows_the_file": "ASan makes mlock do nothing",
    "tests/unit/test_map.py::test_memory_that_may_not_be_locked": "ASan makes mlock do nothing",
    "tests/unit/test_session.py::test_memory_does_not_grow": "ASan keeps freed memory for a while",
}


@pytest.fixture
def trials_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try model files in this process, so that what a test has patched holds for the trial too."""
    monkeypatch.setattr("shorttail.models.vetting.try_file", lambda function, *args, **_: function(*args))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        return
    for item in items:
        for start, reason in NOT_UNDER_ASAN.items():
            if item.nodeid.startswith(start):
                item.add_marker(pytest.mark.skip(reason=reason))
