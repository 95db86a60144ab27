"""The rows of one table: conversion of columns to and from the row format of docs/format.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from shorttail._native.pages import Layout, first_bad_string
from shorttail.config import LIMITS
from shorttail.define.dtypes import WIDE_VECTOR_CODE, DType, Int64, String
from shorttail.define.tables import Stored
from shorttail.define.views import FeatureView
from shorttail.errors import InvalidArgument

HEADER_BYTES = 8
DEPTH_MARGIN = 3  # a full bucket this many levels deeper than most gets a longer page instead of a split

UNTIMED: Final = -(2**63)  # the event time of a row that has none; ST_UNTIMED of native/page.h

Array = NDArray[Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Texts:
    """n UTF-8 strings in Arrow's layout: string i is data[offsets[i]:offsets[i + 1]].

    offsets: int32 or int64 [n + 1]. data: a buffer of bytes. Both may be read-only.
    """

    offsets: Array
    data: Any

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: slice) -> Texts:
        start, stop, _ = rows.indices(len(self))
        return Texts(self.offsets[start : max(start, stop) + 1], self.data)

    def tolist(self) -> list[str]:
        """Return the strings as a list. Raises UnicodeDecodeError."""
        data, ends = memoryview(self.data), self.offsets.tolist()
        return [str(data[start:end], "utf-8") for start, end in pairwise(ends)]


@dataclass
class ColumnBatch:
    """n rows of a view, as columns.

    keys: one column per key of the entity, which may have none. An Int64 key is an int64 array [n]; a String key is an
    object array [n] of str, or Texts of length n. event_time_us: int64 [n], microseconds since 1970 UTC; UNTIMED where
    the store makes the time: the present time, or 1 us more than the time of the row that it replaces. features: per
    feature of the view (values, mask). values: an array [n] of the NumPy type of the feature's dtype, [n, width] for
    vectors, or strings as in keys. mask: bool [n], True where the feature is null, or None. None in an object array and
    NaN in a Float32 or Float64 feature are null too. Values under a mask are ignored. Arrays may be read-only.

    given: the names of the features, in the order of `features`, if the rows are partial: in an upsert, the other
    features of the view keep the values of the row that is replaced, and are null in a new row. None: all features.
    """

    keys: Sequence[Array | Texts]
    event_time_us: NDArray[np.int64]
    features: Sequence[tuple[Array | Texts, NDArray[np.bool_] | None]]
    given: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.event_time_us)

    def slice(self, start: int, stop: int) -> ColumnBatch:
        """Return rows start to stop - 1 as views of the same arrays."""
        return ColumnBatch(
            [column[start:stop] for column in self.keys],
            self.event_time_us[start:stop],
            [(values[start:stop], None if mask is None else mask[start:stop]) for values, mask in self.features],
            self.given,
        )

    def numbers(self, view: FeatureView) -> Sequence[int]:
        """Return the number in the view of each feature of the batch. Raises InvalidArgument for an unknown name."""
        if self.given is None:
            return range(len(view.features))
        for name in self.given:
            if name not in view.feature_index:
                raise InvalidArgument(f"feature view '{view.name}' has no feature '{name}', which the rows give")
        return [view.feature_index[name] for name in self.given]

    def check(self, view: FeatureView) -> None:
        """Raise InvalidArgument unless the columns fit the view and all columns have n values."""
        numbers = self.numbers(view)
        if len(self.keys) != len(view.keys) or len(self.features) != len(numbers):
            raise InvalidArgument(
                f"feature view '{view.name}' has {len(view.keys)} keys and {len(numbers)} features, but the rows "
                f"have {len(self.keys)} and {len(self.features)}"
            )
        columns = dict(zip(view.keys, self.keys, strict=True))
        columns |= {view.features[f].name: values for f, (values, _) in zip(numbers, self.features, strict=True)}
        for name, values in columns.items():
            if len(values) != len(self):
                raise InvalidArgument(
                    f"feature view '{view.name}': column '{name}' has {len(values)} values for {len(self)} rows"
                )


class _NotJoinable(Exception):
    """Raised when batches have columns that cannot be concatenated."""


def join_batches(batches: Sequence[ColumnBatch]) -> ColumnBatch | None:
    """Return the rows of all batches as one batch, in order; None if their columns differ in number, type or width.

    All batches give the same features.
    """
    try:
        return ColumnBatch(
            [_join(columns, batches) for columns in _column_groups([batch.keys for batch in batches])],
            _join([batch.event_time_us for batch in batches], batches),
            [_join_feature(columns, batches) for columns in _column_groups([batch.features for batch in batches])],
            batches[0].given,
        )
    except _NotJoinable:
        return None


def _column_groups(columns: Sequence[Sequence[T]]) -> Iterator[tuple[T, ...]]:
    """Yield per column the arrays of all batches. Raises _NotJoinable if batches have different numbers of columns."""
    if any(len(each) != len(columns[0]) for each in columns):
        raise _NotJoinable
    return zip(*columns, strict=True)


def _join(columns: Sequence[Array | Texts], batches: Sequence[ColumnBatch]) -> Array:
    first, arrays = columns[0], []
    for column, batch in zip(columns, batches, strict=True):
        if isinstance(column, Texts) or isinstance(first, Texts) or column.dtype != first.dtype:
            raise _NotJoinable
        if column.shape != (len(batch), *first.shape[1:]):
            raise _NotJoinable
        arrays.append(column)
    return np.concatenate(arrays)


def _join_feature(
    columns: Sequence[tuple[Array | Texts, NDArray[np.bool_] | None]], batches: Sequence[ColumnBatch]
) -> tuple[Array, NDArray[np.bool_] | None]:
    values = _join([values for values, _ in columns], batches)
    masks = [mask for _, mask in columns]
    if all(mask is None for mask in masks):
        return values, None
    given = [np.zeros(len(b), np.bool_) if mask is None else mask for mask, b in zip(masks, batches, strict=True)]
    return values, _join(given, batches)


def make_layout(stored: Stored) -> Layout:
    """Return the row layout of a view's table. Raises InvalidArgument if its rows are too long."""
    table = stored.table
    keys = bytes(dtype.code for dtype in table.keys)
    columns = [(column.dtype.code, column.dtype.width) for column in table.columns]
    try:
        return Layout(keys, columns, table.seed, table.page_bytes, table.page_format)
    except ValueError as error:
        raise InvalidArgument(f"feature view '{stored.view.name}': {error}") from None


def row_dtype(layout: Layout) -> np.dtype[Any]:
    """Return the NumPy record type of a row without string bytes: fields k0.., time, nulls, f0...

    A string is (offset, length), uint32 each.
    """
    scalar = {1: "u1", 2: "<i4", 3: "<i8", 4: "<f4", 5: "<f8", 6: ("<u4", (2,)), 7: "<i8", 10: ("<u4", (2,))}
    fields: list[tuple[str, Any, int]] = [
        (f"k{k}", scalar[code], layout.key_offsets[k]) for k, code in enumerate(layout.key_codes)
    ]
    fields.append(("time", "<i8", layout.time_offset))
    if layout.null_bytes:
        fields.append(("nulls", ("u1", (layout.null_bytes,)), layout.null_offset))
    for f, (code, width) in enumerate(layout.features):
        vector = ("<f8" if code == WIDE_VECTOR_CODE else "<f4", (width,))
        fields.append((f"f{f}", scalar.get(code, vector), layout.feature_offsets[f]))
    names, formats, offsets = zip(*fields, strict=True)
    return np.dtype(
        {"names": list(names), "formats": list(formats), "offsets": list(offsets), "itemsize": layout.row_bytes}
    )


# -- writing -------------------------------------------------------------------------------------------------------

Source = tuple[Any, Any, Any]  # a column for RowPartitions.add(): (values, string offsets or None, nulls or None)


def source_columns(view: FeatureView, batch: ColumnBatch) -> list[Source]:
    """Return keys, event time and the features given as native code takes them. Copies only what needs conversion.

    Raises InvalidArgument for wrong columns.
    """
    batch.check(view)
    columns = key_sources(view, batch.keys)
    where = f"feature view '{view.name}': event times"
    columns.append((_numbers(batch.event_time_us, Int64, len(batch), where), None, None))
    for f, (values, mask) in zip(batch.numbers(view), batch.features, strict=True):
        feature = view.features[f]
        where = f"feature view '{view.name}': column '{feature.name}'"
        nulls = None if mask is None else np.ascontiguousarray(mask, np.bool_)
        if nulls is not None and nulls.shape != (len(batch),):
            raise InvalidArgument(f"{where}: the mask has shape {nulls.shape}, but there are {len(batch)} rows")
        if feature.dtype == String:
            columns.append(_strings(values, nulls, where))
        else:
            columns.append((_numbers(values, feature.dtype, len(batch), where), None, nulls))
    return columns


def table_columns(stored: Stored, batch: ColumnBatch) -> list[Source]:
    """Return keys, event time and the columns of the table as native code takes them; null where no feature gives one.

    Raises InvalidArgument for wrong columns.
    """
    given = source_columns(stored.view, batch)
    n_before = len(stored.view.keys) + 1
    columns: list[Source | None] = [None] * len(stored.table.columns)
    for f, column in zip(batch.numbers(stored.view), given[n_before:], strict=True):
        for place in stored.places[f]:
            own = stored.table.columns[place]
            if columns[place] is None or own.number == stored.definition.columns[f]:  # not that it is widened from
                columns[place] = widened(column, own.dtype)
    return given[:n_before] + [
        null_column(column.dtype, len(batch)) if found is None else found
        for column, found in zip(stored.table.columns, columns, strict=True)
    ]


def widened(column: Source, dtype: DType) -> Source:
    """Return a column in a type that each of its values fits."""
    values, offsets, nulls = column
    return (values, offsets, nulls) if offsets is not None else (np.ascontiguousarray(values, dtype.numpy), None, nulls)


def null_column(dtype: DType, n: int) -> Source:
    """Return a column of n nulls."""
    if dtype == String:
        return b"", np.zeros(n + 1, np.int32), np.ones(n, np.bool_)
    return np.zeros((n, dtype.width) if dtype.is_vector else n, dtype.numpy), None, np.ones(n, np.bool_)


def key_sources(view: FeatureView, keys: Sequence[Array | Texts]) -> list[Source]:
    """Return key columns as native code takes them. Raises InvalidArgument for wrong ones."""
    columns: list[Source] = []
    for (name, dtype), values in zip(view.keys.items(), keys, strict=True):
        where = f"feature view '{view.name}': key '{name}'"
        if dtype == String:
            columns.append(_strings(values, None, where, key=True))
        else:
            columns.append((_numbers(values, dtype, len(values), where), None, None))
    return columns


def _numbers(values: Array | Texts, dtype: DType, n: int, where: str) -> Array:
    """Return the values as a C-contiguous array of dtype's NumPy type.

    Only casts that lose nothing are allowed, except that floats may be rounded. Raises InvalidArgument.
    """
    if isinstance(values, Texts):
        raise InvalidArgument(f"{where}: expected {dtype!r}, but got strings")
    values = np.asarray(values)
    shape = (n, dtype.width) if dtype.is_vector else (n,)
    if values.shape != shape:
        raise InvalidArgument(f"{where}: values of shape {values.shape} do not fit {n} rows of {dtype!r}")
    wanted = np.dtype(dtype.numpy)
    if not np.can_cast(values.dtype, wanted, "same_kind" if wanted.kind == "f" else "safe"):
        raise InvalidArgument(f"{where}: expected {dtype!r}, but got values of type {values.dtype}")
    return np.ascontiguousarray(values, wanted)


def _strings(values: Array | Texts, nulls: NDArray[np.bool_] | None, where: str, key: bool = False) -> Source:
    """Return a column of strings as a Source. Raises InvalidArgument for a string that cannot be stored."""
    if not isinstance(values, Texts):
        values, nulls = _encode_texts(values, nulls, where, key)
    offsets = np.ascontiguousarray(values.offsets)
    bad = first_bad_string(values.data, offsets, nulls, len(values), LIMITS.string_bytes)
    if bad is not None:
        start, end = int(offsets[bad]), int(offsets[bad + 1])
        if not 0 <= start <= end <= memoryview(values.data).nbytes:
            raise InvalidArgument(f"{where}: the offsets of the string in row {bad} lie outside its data")
        if end - start > LIMITS.string_bytes:
            raise InvalidArgument(f"{where}: a string of {end - start} bytes; at most {LIMITS.string_bytes}")
        raise InvalidArgument(f"{where}: the string in row {bad} is not valid UTF-8")
    return values.data, offsets, nulls


def _encode_texts(
    values: Array, nulls: NDArray[np.bool_] | None, where: str, key: bool
) -> tuple[Texts, NDArray[np.bool_] | None]:
    """Return an array of str objects as Texts, and the mask of nulls: those given and, except in keys, each None."""
    strings = list(values)
    if not key and (nulls is not None or None in strings):
        absent = np.fromiter((value is None for value in strings), np.bool_, len(strings))
        nulls = absent if nulls is None else absent | nulls
        strings = ["" if null else value for value, null in zip(strings, nulls.tolist(), strict=True)]
    try:
        text = "".join(strings)
        if text.isascii():
            data, lengths = text.encode(), np.fromiter(map(len, strings), np.int64, len(strings))
        else:
            encoded = [value.encode() for value in strings]
            data, lengths = b"".join(encoded), np.fromiter(map(len, encoded), np.int64, len(encoded))
    except TypeError:
        wrong = next(value for value in strings if not isinstance(value, str))
        raise InvalidArgument(f"{where}: {wrong!r} is not a string") from None
    except UnicodeEncodeError:
        raise InvalidArgument(f"{where}: a string holds a lone surrogate, which UTF-8 cannot encode") from None
    offsets = np.zeros(len(strings) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Texts(offsets, data), nulls


class _Arena:
    """The string bytes of a batch, concatenated."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.bytes = 0

    def add(self, column: Source, where: str) -> NDArray[np.uint32]:
        """Append a column's strings. Return their (offset, length) as uint32 [n, 2]."""
        data, offsets, nulls = column
        first, last = int(offsets[0]), int(offsets[-1])
        starts = offsets[:-1].astype(np.int64) - first + self.bytes
        lengths = np.diff(offsets)
        if nulls is not None:
            starts[nulls], lengths[nulls] = 0, 0
        self.parts.append(bytes(memoryview(data)[first:last]))
        self.bytes += last - first
        if self.bytes >= 1 << 32:
            raise InvalidArgument(f"{where}: the strings of one batch exceed 4 GiB; give fewer rows at a time")
        return np.stack([starts, lengths], axis=1).astype(np.uint32)


def encode_rows(layout: Layout, stored: Stored, batch: ColumnBatch) -> tuple[NDArray[np.void], bytes]:
    """Return (rows in the row format of the table, arena of their strings). What the batch does not give is null.

    Raises InvalidArgument for wrong columns.
    """
    view = stored.view
    columns = source_columns(view, batch)
    n_keys = len(view.keys)
    rows, arena = _encode_keys(layout, view, columns[:n_keys], len(batch))
    rows["time"] = columns[n_keys][0]
    if (given := given_columns(stored, batch)) is not None:
        rows["nulls"] = np.packbits(~given, bitorder="little")
    for f, column in zip(batch.numbers(view), columns[n_keys + 1 :], strict=True):
        feature, (values, _, nulls) = view.features[f], column
        if feature.dtype == String:
            values = arena.add(column, f"feature view '{view.name}': column '{feature.name}'")
        elif feature.dtype.is_float and (nan := np.isnan(values)).any():
            nulls = nan if nulls is None else nan | nulls
        for place in stored.places[f]:
            rows[f"f{place}"] = values  # in the type of the column, which may be wider
            if nulls is not None:
                rows[f"f{place}"][nulls] = 0
                rows["nulls"][:, place // 8] |= nulls.astype(np.uint8) << (place % 8)
    return rows, b"".join(arena.parts)


def given_columns(stored: Stored, batch: ColumnBatch) -> NDArray[np.bool_] | None:
    """Return which columns of the table a batch gives, as a bool each; None if it gives all."""
    if batch.given is None and stored.is_whole:
        return None
    given = np.zeros(len(stored.table.columns), np.bool_)
    for f in batch.numbers(stored.view):
        given[list(stored.places[f])] = True
    return None if given.all() else given


def encode_keys(layout: Layout, view: FeatureView, keys: Sequence[Array]) -> tuple[NDArray[np.void], _Arena]:
    """Return rows in which only the keys are set, and the arena of their strings. Raises InvalidArgument."""
    return _encode_keys(layout, view, key_sources(view, keys), count_keys(keys))


def count_keys(keys: Sequence[Array | Texts]) -> int:
    """Return how many rows key columns name: without key columns one, the only row of a view without keys."""
    return len(keys[0]) if keys else 1


def _encode_keys(
    layout: Layout, view: FeatureView, columns: Sequence[Source], n: int
) -> tuple[NDArray[np.void], _Arena]:
    arena = _Arena()
    rows = np.zeros(n, row_dtype(layout))
    for k, ((name, dtype), column) in enumerate(zip(view.keys.items(), columns, strict=True)):
        values = column[0]
        where = f"feature view '{view.name}': key '{name}'"
        rows[f"k{k}"] = values if dtype != String else arena.add(column, where)
    return rows, arena


# -- reading -------------------------------------------------------------------------------------------------------


def decode_keys(layout: Layout, dtype: np.dtype[Any], page: memoryview) -> list[Array]:
    """Return a copy of the key columns of a page, which must have passed Layout.check(). dtype: row_dtype(layout)."""
    rows = _rows_of(dtype, page)
    return [_decode_column(page, rows[f"k{k}"], code) for k, code in enumerate(layout.key_codes)]


def count_rows(page: memoryview) -> int:
    """Return the number of rows of a page."""
    return int.from_bytes(page[0:2], "little")


def _rows_of(dtype: np.dtype[Any], page: memoryview) -> Array:
    n = count_rows(page)
    tag_bytes = int.from_bytes(page[2:4], "little")
    return np.frombuffer(page, dtype, n, HEADER_BYTES + tag_bytes)


def _decode_column(page: memoryview, column: Array, code: int) -> Array:
    if code == String.code:
        values = np.empty(len(column), np.object_)
        values[:] = [str(page[at : at + length], "utf-8") for at, length in column.tolist()]
        return values
    return column.astype(np.bool_) if code == 1 else column.copy()


def split_batches(batches: Iterable[ColumnBatch], rows: int) -> Iterator[ColumnBatch]:
    """Yield the batches in order, split into batches of at most `rows` rows."""
    for batch in batches:
        for start in range(0, len(batch), rows):
            yield batch.slice(start, start + rows)


def depth_to_grow(n_buckets: int) -> int:
    """Return the local depth at which a full bucket gets a longer page instead of a split.

    n_buckets: the number of buckets of the table. A split is normal up to DEPTH_MARGIN levels above the average depth.
    """
    return max(n_buckets - 1, 1).bit_length() + DEPTH_MARGIN
