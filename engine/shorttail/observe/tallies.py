"""Counters whose labels the catalog decides: of a view, of a model or its version, of an on-demand function.

They lie in the memory that all processes of a server share (memory.py), in a table for each process:

    table:  ENTRIES entries
    entry:  1 + the kind's number (0: the entry is free), bytes of the labels, the labels, VALUES values

A table outlives its process, as the region does that it belongs to. Labels are those of the catalog, so their number is
bounded; those that find no room in a table are counted together as "unknown".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shorttail._native.metrics import UNKNOWN

ENTRIES: Final = 256
LABEL_WORDS: Final = 64  # room for two names of LIMITS.name_bytes
VALUES: Final = 6
ENTRY_WORDS: Final = 2 + LABEL_WORDS + VALUES
TABLE_WORDS: Final = ENTRIES * ENTRY_WORDS


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of entries: the names of its labels and of its values."""

    number: int
    labels: tuple[str, ...]
    values: tuple[str, ...]


# Of each view, the rows that the writer was given, and the rows that it deleted.
WRITES: Final = Kind(0, ("view",), ("stored", "older", "duplicate", "deleted"))
# Of each on-demand function of a model, the rows for which it gave no value.
FUNCTIONS: Final = Kind(1, ("model", "function"), ("error", "length"))
# Of each model, the fields of models.load.RunCounts.
RUNS: Final = Kind(2, ("model",), ("failed", "timed_out", "left_loop", "in_parts", "refused_again"))
# Of each version that was a shadow, the fields of server.shadow.ShadowCounts; a difference as `float_bits`.
SHADOWS: Final = Kind(
    3, ("model", "version"), ("batches", "rows", "rows_differing", "errors", "skipped", "largest_difference")
)
KINDS: Final = (WRITES, FUNCTIONS, RUNS, SHADOWS)
LARGEST_DIFFERENCE: Final = SHADOWS.values.index("largest_difference")

Labels = tuple[str, ...]


def float_bits(value: float) -> int:
    """Return a float64 as an unsigned word. For values from 0 up, a larger float is a larger word."""
    return int.from_bytes(struct.pack("<d", value), "little")


def float_of(word: int) -> float:
    """Return the float64 of `float_bits`."""
    return float(struct.unpack("<d", word.to_bytes(8, "little"))[0])


class Tallies:
    """The table of one process. words: of the table, a writable view of uint64. It goes on with what is there."""

    def __init__(self, words: memoryview):
        self._words = words
        self._at: dict[tuple[int, Labels], int] = {}  # of the first value of an entry
        self._used = 0
        for kind, labels, at in _entries(words):
            self._at[kind.number, labels] = at
            self._used += 1

    def add(self, kind: Kind, labels: Labels, values: Sequence[int]) -> None:
        """Add to the counters of an entry, in the order of `kind.values`. The entry is made at its first count."""
        at = self._find(kind, labels)
        for i, value in enumerate(values, at):
            self._words[i] += value

    def put(self, kind: Kind, labels: Labels, number: int, value: int) -> None:
        """Set the value of that number."""
        self._words[self._find(kind, labels) + number] = value

    def _find(self, kind: Kind, labels: Labels) -> int:
        at = self._at.get((kind.number, labels))
        return self._make(kind, labels) if at is None else at

    def _make(self, kind: Kind, labels: Labels) -> int:
        unknown = (UNKNOWN,) * len(labels)
        if self._used >= ENTRIES - len(KINDS) and labels != unknown:  # the last entries are for `unknown`
            return self._find(kind, unknown)
        text = "\0".join(labels).encode("utf-8", "replace")[: 8 * LABEL_WORDS]
        start = self._used * ENTRY_WORDS
        padded = memoryview(text.ljust(8 * LABEL_WORDS, b"\0")).cast("Q")
        self._words[start + 1] = len(text)
        self._words[start + 2 : start + 2 + LABEL_WORDS] = padded
        self._words[start] = 1 + kind.number  # last: from now on others read the entry
        self._used += 1
        self._at[kind.number, labels] = at = start + 2 + LABEL_WORDS
        return at


def _entries(words: memoryview) -> list[tuple[Kind, Labels, int]]:
    """Return (kind, labels, place of the first value) of each entry that is used."""
    found = []
    for start in range(0, TABLE_WORDS, ENTRY_WORDS):
        if not words[start]:
            break
        text = words[start + 2 : start + 2 + LABEL_WORDS].tobytes()[: words[start + 1]]
        labels = tuple(text.decode("utf-8", "replace").split("\0"))
        found.append((KINDS[words[start] - 1], labels, start + 2 + LABEL_WORDS))
    return found


def summed(tables: Sequence[memoryview]) -> dict[tuple[int, Labels], list[int]]:
    """Return {(the kind's number, labels): values} of all tables together: sums, and the largest of differences."""
    found: dict[tuple[int, Labels], list[int]] = {}
    for words in tables:
        for kind, labels, at in _entries(words):
            values = words[at : at + VALUES].tolist()
            before = found.get((kind.number, labels))
            if before is not None:
                both = [a + b for a, b in zip(before, values, strict=True)]
                if kind is SHADOWS:
                    both[LARGEST_DIFFERENCE] = max(before[LARGEST_DIFFERENCE], values[LARGEST_DIFFERENCE])
                values = both
            found[kind.number, labels] = values
    return found
