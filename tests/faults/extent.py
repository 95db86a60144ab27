"""The extent of the fault tests: a short version, or all of it if SHORTTAIL_FAULT_CYCLES is set (`make soak`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import product

SOAK = "SHORTTAIL_FAULT_CYCLES" in os.environ
CYCLES = int(os.environ.get("SHORTTAIL_FAULT_CYCLES", "40"))  # number of random kills


def pairs(kinds: Iterable[str], modes: Iterable[str], short: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    """Return all pairs of a kind of step and a mode of fault; in a short run only those of `short`, {kind: modes}."""
    return list(product(kinds, modes)) if SOAK else [(kind, mode) for kind in kinds for mode in short[kind]]
