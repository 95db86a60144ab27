"""What all tests share."""

from __future__ import annotations

import os
import tempfile

# Compiled on-demand functions are kept for the run, and nothing is left in the home of whoever runs the tests.
_cache = tempfile.TemporaryDirectory(prefix="shorttail-cache-")
os.environ["SHORTTAIL_CACHE_DIR"] = _cache.name
