"""Rows of one table: columns to and from the row format of docs/format.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail._native.pages import Layout
from shorttail.config import LIMITS
from shorttail.definitions import FeatureView
from shorttail.dtypes import DType, String
from shorttail.errors import InvalidArgument
from shorttail.store.catalog import TableInfo

HEADER_BYTES = 8
DEPTH_MARGIN = 3  # a bucket this much deeper than most gets a longer page instead of being split once more

Array = NDArray[Any]


@dataclass
class ColumnBatch:
    """n rows of a view as columns.

    keys: a column for each key of the entity: int64 [n], or objects (str) [n]. event_time_us: int64 [n], microseconds
    since 1970 UTC. features: for each feature of the view its values, of the NumPy type of its dtype ([n, width] for
    vectors, objects (str) for strings), and a mask [n] that is True where it is null, or None. In a string feature None
    is null as well. Values under a mask do not matter.
    """

    keys: Sequence[Array]
    event_time_us: NDArray[np.int64]
    features: Sequence[tuple[Array, NDArray[np.bool_] | None]]

    def __len__(self) -> int:
        return len(self.event_time_us)

    def slice(self, start: int, stop: int) -> ColumnBatch:
        return ColumnBatch(
            [column[start:stop] for column in self.keys],
            self.event_time_us[start:stop],
            [(values[start:stop], None if mask is None else mask[start:stop]) for values, mask in self.features],
        )

    def check(self, view: FeatureView) -> None:
        """Raise InvalidArgument unless the columns are those of the view, in number and in length."""
        if len(self.keys) != len(view.keys) or len(self.features) != len(view.features):
            raise InvalidArgument(
                f"feature view '{view.name}' has {len(view.keys)} keys and {len(view.features)} features, but the rows "
                f"have {len(self.keys)} and {len(self.features)}"
            )
        columns = dict(zip(view.keys, self.keys, strict=True))
        columns |= {f.name: values for f, (values, _) in zip(view.features, self.features, strict=True)}
        for name, values in columns.items():
            if len(values) != len(self):
                raise InvalidArgument(
                    f"feature view '{view.name}': column '{name}' has {len(values)} values for {len(self)} rows"
                )


def make_layout(view: FeatureView, table: TableInfo) -> Layout:
    """The layout of the view's table. Raises InvalidArgument when its rows would be too long."""
    keys = bytes(dtype.code for dtype in view.keys.values())
    features = [(feature.dtype.code, feature.dtype.width) for feature in view.features]
    try:
        return Layout(keys, features, table.seed, table.page_bytes)
    except ValueError as error:
        raise InvalidArgument(f"feature view '{view.name}': {error}") from None


def row_dtype(layout: Layout) -> np.dtype[Any]:
    """The fixed part of a row as a NumPy record: k0.., time, nulls, f0... Strings are (offset, length)."""
    scalar = {1: "u1", 2: "<i4", 3: "<i8", 4: "<f4", 5: "<f8", 6: ("<u4", (2,)), 7: "<i8"}
    fields: list[tuple[str, Any, int]] = [
        (f"k{k}", scalar[code], layout.key_offsets[k]) for k, code in enumerate(layout.key_codes)
    ]
    fields.append(("time", "<i8", layout.time_offset))
    if layout.null_bytes:
        fields.append(("nulls", ("u1", (layout.null_bytes,)), layout.null_offset))
    for f, (code, width) in enumerate(layout.features):
        fields.append((f"f{f}", scalar.get(code, ("<f4", (width,))), layout.feature_offsets[f]))
    names, formats, offsets = zip(*fields, strict=True)
    return np.dtype(
        {"names": list(names), "formats": list(formats), "offsets": list(offsets), "itemsize": layout.row_bytes}
    )


# -- writing -------------------------------------------------------------------------------------------------------


class _Arena:
    """The strings of a batch, one after the other."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.bytes = 0

    def add(self, values: list[str], where: str) -> NDArray[np.uint32]:
        """References [n, 2] to the values, which are appended."""
        try:
            text = "".join(values)
            if text.isascii():
                data, lengths = text.encode(), np.fromiter(map(len, values), np.int64, len(values))
            else:
                encoded = [value.encode() for value in values]
                data, lengths = b"".join(encoded), np.fromiter(map(len, encoded), np.int64, len(encoded))
        except TypeError:
            wrong = next(value for value in values if not isinstance(value, str))
            raise InvalidArgument(f"{where}: {wrong!r} is not a string") from None
        except UnicodeEncodeError:
            raise InvalidArgument(f"{where}: a string holds half of a surrogate pair and cannot be stored") from None
        if len(lengths) and lengths.max() > LIMITS.string_bytes:
            raise InvalidArgument(f"{where}: a string of {lengths.max()} bytes; at most {LIMITS.string_bytes}")
        ends = self.bytes + np.cumsum(lengths)
        self.parts.append(data)
        self.bytes += len(data)
        if self.bytes >= 1 << 32:
            raise InvalidArgument(f"{where}: the strings of one batch pass 4 GiB; give fewer rows at a time")
        return np.stack([ends - lengths, lengths], axis=1).astype(np.uint32)


def encode_rows(layout: Layout, view: FeatureView, batch: ColumnBatch) -> tuple[NDArray[np.void], bytes]:
    """Rows in the row format, and the arena that their strings refer to. Raises InvalidArgument for wrong columns."""
    batch.check(view)
    rows, arena = encode_keys(layout, view, batch.keys)
    rows["time"] = batch.event_time_us
    for f, (feature, (values, mask)) in enumerate(zip(view.features, batch.features, strict=True)):
        where = f"feature view '{view.name}': column '{feature.name}'"
        if feature.dtype == String:
            texts, mask = _without_nulls(values, mask)
            rows[f"f{f}"] = arena.add(texts, where)
        else:
            column = rows[f"f{f}"]
            _copy_numbers(column, values, feature.dtype, where)
            if mask is not None:
                column[mask] = 0
        if mask is not None:
            rows["nulls"][:, f // 8] |= mask.astype(np.uint8) << (f % 8)
    return rows, b"".join(arena.parts)


def encode_keys(layout: Layout, view: FeatureView, keys: Sequence[Array]) -> tuple[NDArray[np.void], _Arena]:
    """Rows of which only the keys are set."""
    rows = np.zeros(len(keys[0]), row_dtype(layout))
    arena = _Arena()
    for k, ((name, dtype), values) in enumerate(zip(view.keys.items(), keys, strict=True)):
        where = f"feature view '{view.name}': key '{name}'"
        if dtype == String:
            rows[f"k{k}"] = arena.add(list(values), where)
        else:
            _copy_numbers(rows[f"k{k}"], values, dtype, where)
    return rows, arena


def _copy_numbers(column: Array, values: Array, dtype: DType, where: str) -> None:
    values = np.asarray(values)
    if values.shape != column.shape:
        raise InvalidArgument(f"{where}: values of shape {values.shape} do not fit {len(column)} rows of {dtype!r}")
    wanted = np.dtype(dtype.numpy)
    if not np.can_cast(values.dtype, wanted, "same_kind" if wanted.kind == "f" else "safe"):
        raise InvalidArgument(f"{where}: values of type {values.dtype} given for {dtype!r}")
    column[...] = values


def _without_nulls(values: Array, mask: NDArray[np.bool_] | None) -> tuple[list[str], NDArray[np.bool_] | None]:
    """The strings with "" for nulls, and the mask of the nulls if there are any."""
    absent = np.fromiter((value is None for value in values), np.bool_, len(values))
    if mask is not None:
        absent |= mask
    if not absent.any():
        return list(values), None
    return ["" if null else value for value, null in zip(values, absent, strict=True)], absent


# -- reading -------------------------------------------------------------------------------------------------------


def decode_page(layout: Layout, dtype: np.dtype[Any], page: memoryview) -> ColumnBatch:
    """The rows of a page that Layout.check() has passed, copied. dtype: row_dtype(layout)."""
    n = int.from_bytes(page[0:2], "little")
    tag_bytes = int.from_bytes(page[2:4], "little")
    rows = np.frombuffer(page, dtype, n, HEADER_BYTES + tag_bytes)
    keys = [_decode_column(page, rows[f"k{k}"], code) for k, code in enumerate(layout.key_codes)]
    features: list[tuple[Array, NDArray[np.bool_] | None]] = []
    for f, (code, _) in enumerate(layout.features):
        mask = (rows["nulls"][:, f // 8] >> (f % 8) & 1).astype(np.bool_)
        values = _decode_column(page, rows[f"f{f}"], code)
        if code == String.code:
            values[mask] = None
        features.append((values, mask if mask.any() else None))
    return ColumnBatch(keys, rows["time"].astype(np.int64), features)


def _decode_column(page: memoryview, column: Array, code: int) -> Array:
    if code == String.code:
        values = np.empty(len(column), np.object_)
        values[:] = [str(page[at : at + length], "utf-8") for at, length in column.tolist()]
        return values
    return column.astype(np.bool_) if code == 1 else column.copy()


def pieces(batches: Iterable[ColumnBatch], rows: int) -> Iterator[ColumnBatch]:
    """The batches in pieces of at most so many rows."""
    for batch in batches:
        for start in range(0, len(batch), rows):
            yield batch.slice(start, start + rows)


def depth_to_grow(n_buckets: int) -> int:
    """The local depth from which on a full bucket of a table of so many gets a longer page."""
    return max(n_buckets - 1, 1).bit_length() + DEPTH_MARGIN
