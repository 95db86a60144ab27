"""Rows with the outputs that are expected for them (`Model(examples=...)`): kept with a version, compared at each load.

They find what no check of types can: columns in another order than in training, a model that was exported wrongly, and
a host that computes other numbers.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail.define.inputs import read_input
from shorttail.errors import InvalidArgument, ShorttailError

Array = NDArray[Any]
Run = Callable[[Sequence[Array]], list[Array]]
FILE: Final = "examples.npz"  # in the folder of a version
TOLERANCE: Final = 1e-4  # of floats, relative to the larger of the expected number and its output's median
PIECE_ROWS: Final = 1024
SWAPS: Final = 400  # pairs of columns that are tried in place of each other
SWAP_ROWS: Final = 32  # rows on which a pair is tried first


@dataclass(frozen=True)
class GoldenRows:
    """inputs: an array for each input of the model. expected: the outputs that are known, [rows] or [rows, width]."""

    inputs: list[Array]
    expected: dict[str, Array]

    @property
    def rows(self) -> int:
        return len(self.inputs[0])

    def to_bytes(self) -> bytes:
        """Return the content of FILE. Texts are kept as JSON, because NumPy's own would need pickle, or drop zeros."""
        named = {f"input:{i}": array for i, array in enumerate(self.inputs)}
        named |= {f"output:{name}": array for name, array in self.expected.items()}
        held: Any = {name: _as_json(array) if array.dtype.hasobject else array for name, array in named.items()}
        texts = json.dumps([name for name, array in named.items() if array.dtype.hasobject])
        file = io.BytesIO()
        np.savez(file, texts=np.frombuffer(texts.encode(), np.uint8), **held)
        return file.getvalue()

    @classmethod
    def read(cls, path: Path) -> GoldenRows:
        """Read a version's FILE. Raises InvalidArgument if it is gone or damaged."""
        try:
            with np.load(io.BytesIO(read_input(path)), allow_pickle=False) as held:
                texts = json.loads(held["texts"].tobytes())
                named = {name: _from_json(held[name]) if name in texts else held[name] for name in held.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InvalidArgument(f"its examples cannot be read: {path.name}: {error}") from None
        inputs = [named[f"input:{i}"] for i in range(sum(name.startswith("input:") for name in named))]
        outputs = {name.removeprefix("output:"): a for name, a in named.items() if name.startswith("output:")}
        return cls(inputs, outputs)

    def compare(
        self, run: Run, names: Sequence[str], labels: Sequence[Sequence[str]], exact_rows: int | None = None
    ) -> None:
        """Run the model on all rows, and compare. names: of its outputs. labels: of the columns of each input.

        exact_rows: how many rows each run must have; rows that do not fill the last run are left out then.

        A model whose rows depend on each other may pass row by row. Raises InvalidArgument that names the first row and
        output that differ, and the errors of the model.
        """
        if exact_rows is not None:
            found = self._difference(run, names, exact_rows, rows=self.rows // exact_rows * exact_rows)
            if found is not None:
                raise InvalidArgument(found)
            return
        found = self._difference(run, names, PIECE_ROWS)
        if found is not None and self._difference(run, names, 1) is not None:
            raise InvalidArgument(found + self._guess(run, names, labels))

    def _difference(
        self, run: Run, names: Sequence[str], piece: int, inputs: Sequence[Array] | None = None, rows: int | None = None
    ) -> str | None:
        """Return what is wrong with the first row that differs, None if none does.

        piece: rows in a run. rows: how many are compared, None for all.
        """
        inputs = inputs or self.inputs
        last = self.rows if rows is None else min(rows, self.rows)
        for first in range(0, last, piece):
            got = dict(zip(names, run([array[first : min(first + piece, last)] for array in inputs]), strict=True))
            for name, known in self.expected.items():
                if said := _differs(name, known, np.asarray(got[name]), first):
                    return said
        return None

    def _guess(self, run: Run, names: Sequence[str], labels: Sequence[Sequence[str]]) -> str:
        """Return a question if two columns in each other's place would give what is expected, else ""."""
        tried = 0
        for number, array in enumerate(self.inputs):
            width = array.shape[1] if array.ndim == 2 else 1
            for a in range(width):
                for b in range(a + 1, width):
                    tried += 1
                    if tried > SWAPS:
                        return ""
                    order = list(range(width))
                    order[a], order[b] = b, a
                    swapped = [*self.inputs[:number], np.ascontiguousarray(array[:, order]), *self.inputs[number + 1 :]]
                    try:
                        few = self._difference(run, names, PIECE_ROWS, swapped, rows=SWAP_ROWS)
                        if few is None and self._difference(run, names, PIECE_ROWS, swapped) is None:
                            both = f"{labels[number][a]} and {labels[number][b]}"
                            return f"; with {both} swapped all rows agree: are the columns in the order of training?"
                    except ShorttailError:
                        continue
        return ""


def _differs(name: str, known: Array, got: Array, first: int) -> str | None:
    """Compare the rows of an output from `first` on. Returns what is wrong with the first row that differs, or None."""
    expected = known[first : first + len(got)]
    flat, ours = expected.reshape(len(expected), -1), got.reshape(len(got), -1)
    if flat.shape != ours.shape:
        return f"examples: output '{name}' has {ours.shape[1]} columns, and the file has {flat.shape[1]}"
    if got.dtype.kind == "f":
        wanted = flat.astype(np.float64)
        sizes = np.abs(known[np.isfinite(known)]) if known.dtype.kind == "f" else np.abs(known)
        scale = np.maximum(np.abs(wanted), np.median(sizes) if sizes.size else 0.0)
        with np.errstate(invalid="ignore"):
            equal = (np.abs(ours - wanted) <= TOLERANCE * scale) | (ours == wanted)
        equal |= np.isnan(ours) & np.isnan(wanted)
    else:
        equal = ours == flat
    if equal.all():
        return None
    row = int(np.argmin(equal.all(axis=1)))
    shown = [part[row].tolist()[:8] for part in (flat, ours)]
    wrote, gave = (part[0] if len(part) == 1 else part for part in shown)
    return f"examples: output '{name}' of row {first + row} is expected to be {wrote!r} and is {gave!r}"


def _as_json(array: Array) -> Array:
    return np.frombuffer(json.dumps(array.tolist()).encode(), np.uint8)


def _from_json(held: Array) -> Array:
    texts = json.loads(held.tobytes())
    array = np.array(texts, object)
    return array
