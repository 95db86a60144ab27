"""Sources of the values in requests of a load test: ranges, files, a store, or defaults of a type."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from shorttail.config import LIMITS
from shorttail.define.dtypes import Bool, DType, Float64, Timestamp, parse_dtype
from shorttail.define.names import listed_lookups, plain_name
from shorttail.define.refusal import Refused
from shorttail.define.text import csv_row, parse_field, split_argument
from shorttail.errors import InvalidArgument, NotFound
from shorttail.loadtest.rates import parse_number

DRAWS: Final = ("uniform", "zipf", "in-turn")
KEY_FORMS: Final = "COLUMN=uniform:1:1M, COLUMN=zipf:1:1M:0.99, file:PATH or store:PATH"
VECTORS: Final = 64  # distinct vectors in a column of default values


@dataclass(slots=True)
class Stream:
    """Columns whose values are drawn together: index i is row i of a table, or the integer low + i of a range.

    draw: an entry of DRAWS. exponent: of the Zipf distribution. n: number of rows. tables: column -> n values. lows:
    column -> the lowest integer of its range. text: the --keys option that made the stream.
    """

    draw: str
    exponent: float
    n: int
    tables: dict[str, Sequence[Any]] = field(default_factory=dict)
    lows: dict[str, int] = field(default_factory=dict)
    text: str = ""

    def __contains__(self, column: str) -> bool:
        return column in self.tables or column in self.lows


@dataclass(frozen=True, slots=True)
class Draw:
    kind: str
    exponent: float


def parse_draw(text: str) -> Draw:
    """Parse "uniform", "zipf", "zipf:1.1" or "in-turn". Raises InvalidArgument."""
    kind, _, exponent = text.partition(":")
    if kind not in DRAWS or (exponent and kind != "zipf"):
        raise InvalidArgument(f"draw '{text}' is not understood; write uniform, zipf:0.99 or in-turn")
    return Draw(kind, parse_exponent(exponent, text))


def parse_exponent(text: str, whole: str) -> float:
    try:
        exponent = float(text or "0.99")
    except ValueError:
        exponent = 0.0
    if not 0 < exponent <= 10:
        raise InvalidArgument(f"'{whole}': the exponent of a Zipf distribution lies between 0 and 10, such as 0.99")
    return exponent


def parse_keys(
    specs: Sequence[str], draw: Draw, views: Sequence[Mapping[str, Any]], dtypes: Mapping[str, str]
) -> list[Stream]:
    """Return the streams of --keys options. Raises InvalidArgument, NotFound.

    views: as the server lists them. dtypes: column of the requests -> type, or "" if it is unknown.
    """
    needed = set(dtypes)
    streams: list[Stream] = []
    for spec in specs:
        if spec.startswith("file:"):
            streams.append(file_stream(spec.removeprefix("file:"), draw, dtypes))
        elif spec.startswith("store:"):
            streams += store_streams(spec.removeprefix("store:"), draw, views, needed)
        else:
            streams.append(range_stream(spec, dtypes))
    for stream in streams:
        if stream.lows and not needed & set(stream.lows):
            name = next(iter(stream.lows))
            raise InvalidArgument(f"--keys {stream.text}: no request has a column '{name}'; they have {listed(needed)}")
    return streams


def range_stream(spec: str, columns: Iterable[str]) -> Stream:
    """Parse "user_id=zipf:1:1M:0.99", or "user=uniform:1:1000:user-{}" for strings. Raises InvalidArgument."""
    column, equals, rest = split_argument(spec, columns)
    kind, *parts = rest.split(":")
    if not equals or kind not in DRAWS or len(parts) < 2:
        raise InvalidArgument(f"--keys '{spec}' is not understood; write {KEY_FORMS}")
    low, high = (whole_number(part, spec) for part in parts[:2])
    if high < low:
        raise InvalidArgument(f"--keys '{spec}': {high:,} is less than {low:,}")
    form = parts.pop() if "{}" in parts[-1] else ""
    if len(parts) > (3 if kind == "zipf" else 2):
        raise InvalidArgument(f"--keys '{spec}' is not understood; write {KEY_FORMS}")
    exponent = parse_exponent(parts[2] if len(parts) > 2 else "", spec)
    stream = Stream(kind, exponent, high - low + 1, text=spec)
    if not form:
        stream.lows[column] = low
    elif stream.n > LIMITS.bench_key_rows:
        raise InvalidArgument(f"--keys '{spec}': at most {LIMITS.bench_key_rows:,} strings")
    else:
        stream.tables[column] = [form.replace("{}", str(i)) for i in range(low, high + 1)]
    return stream


def whole_number(text: str, spec: str) -> int:
    if text.lstrip("-").isdigit():
        return int(text)
    return int(parse_number(text, spec, KEY_FORMS))


def file_stream(path: str, draw: Draw, dtypes: Mapping[str, str]) -> Stream:
    """Read rows of a Parquet, Arrow or CSV file, only the columns of the requests, converted to their types."""
    what = f"--keys file:{path}"
    if not Path(path).exists():
        raise NotFound(f"{what}: there is no such file")
    from shorttail.sources.batches import FileSource, first_line
    from shorttail.sources.source import column_names

    source = FileSource(path, dtypes, "--keys")
    known = column_names(source)
    columns: dict[str, list[Any]] = {name: [] for name in known if name in dtypes}
    rows = 0
    try:
        for part in source.parts:
            for batch in part.read([name for name in columns if name in part.names]):
                taken = batch.slice(0, LIMITS.bench_key_rows - rows)
                rows += taken.num_rows
                for name, values in columns.items():
                    if name in part.names:
                        values += column_values(dtypes[name], taken.column(name), partial(part.convert, name))
                    values += [None] * (rows - len(values))
                if rows == LIMITS.bench_key_rows:
                    break
    except (ValueError, OSError) as error:  # Arrow's errors are ValueErrors
        raise InvalidArgument(f"{what}: cannot be read: {first_line(error)}") from None
    except Refused as error:
        raise error.error(f"{what}: column '{name}'", parse_dtype(dtypes[name])) from None
    if not columns or not rows:
        found = f"its columns: {listed(known)}" if not columns else "it has no rows"
        raise InvalidArgument(f"{what}: no column of the requests ({listed(set(dtypes))}); {found}")
    return Stream(draw.kind, draw.exponent, rows, dict(columns), text=f"file:{path}")


def column_values(dtype: str, column: Any, read: Callable[[DType, Any], tuple[Any, Any]]) -> list[Any]:
    """Return the values of a column of a file; None is a missing value. Raises Refused."""
    import pyarrow as pa

    if not dtype:  # a column of an HTTP body has no known type
        if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            dtype = Timestamp.name
        else:
            return [parse_untyped(value) if isinstance(value, str) else value for value in column.to_pylist()]
    values, nulls = read(parse_dtype(dtype), column)
    items: list[Any] = values.tolist() if isinstance(values, np.ndarray) else values.to_pylist()
    if nulls is None:
        return items
    return [None if null else item for item, null in zip(items, nulls.tolist(), strict=True)]


def store_streams(path: str, draw: Draw, views: Sequence[Mapping[str, Any]], needed: set[str]) -> list[Stream]:
    """Return streams of the keys in a store on this machine, for the lookups of the requests.

    A store holds rows in the order of their keys' hashes, so the first rows are a fair sample. Views with more key
    columns come first, because their keys must be drawn together.
    """
    from shorttail.store import Store

    streams: list[Stream] = []
    covered: set[str] = set()
    store = Store.open(path)
    try:
        counts = {view["name"]: len(view["keys"]) for view in views}
        for lookup, keys in sorted(listed_lookups(views).items(), key=lambda item: -len(item[1])):
            name = plain_name(lookup)
            if not keys.keys() <= needed or keys.keys() <= covered or len(keys) < counts[name]:
                continue  # an alias that gives two keys one column finds few rows of the store
            parts, rows = [], 0
            for batch in store.scan(name):
                parts.append(batch.keys)
                rows += len(batch)
                if rows >= LIMITS.bench_key_rows:
                    break
            if not rows:
                raise InvalidArgument(f"--keys store:{path}: view '{name}' has no rows yet")
            columns: list[list[Any]] = [np.concatenate(pieces).tolist() for pieces in zip(*parts, strict=True)]
            tables: dict[str, Sequence[Any]] = {
                key: values for key, values in zip(keys, columns, strict=True) if key not in covered
            }
            streams.append(Stream(draw.kind, draw.exponent, rows, tables, text=f"store:{path}:{lookup}"))
            covered |= keys.keys()
    finally:
        store.close()
    if not streams:
        raise InvalidArgument(f"--keys store:{path}: the requests look up no view of the server by its keys")
    return streams


# -- values ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Values:
    """The values of a column that is not a key: choices, or a range of integers or floats, with both ends included."""

    choices: Sequence[Any] = ()
    whole: tuple[int, int] | None = None
    real: tuple[float, float] | None = None


def parse_values(specs: Sequence[str], columns: Iterable[str]) -> dict[str, str]:
    """Return {column: text after the =} of --value options. columns: of the requests. Raises InvalidArgument."""
    found: dict[str, str] = {}
    for spec in specs:
        column, equals, text = split_argument(spec, columns)
        if not equals or not column:
            raise InvalidArgument(
                f"--value '{spec}' is not understood; write COLUMN=5, COLUMN=uniform:0:100 or COLUMN=choice:a,b"
            )
        if column in found:
            raise InvalidArgument(f"--value '{column}' is given twice")
        found[column] = text
    return found


def make_values(column: str, text: str, dtype: str) -> Values:
    """Return the values of a --value option. dtype: such as "Float32", or "" if unknown. Raises InvalidArgument."""
    kind, _, rest = text.partition(":")
    if kind == "choice" and rest:
        return Values([parse_typed(column, field, dtype) for field in csv_row(column, rest)])
    if kind != "uniform":
        fields = csv_row(column, text) if dtype else [text]  # without a type, text may be JSON that has commas
        return Values([parse_typed(column, field, dtype) for field in fields])
    known = parse_dtype(dtype) if dtype else Float64
    if not (known.is_float or known.is_integer):
        raise InvalidArgument(f"--value {column}={text}: column '{column}' is {dtype}; a range needs numbers")
    ends = [parse_field(column, field or None, known) for field in rest.split(":")]
    if len(ends) != 2 or None in ends or not ends[0] <= ends[1]:
        raise InvalidArgument(f"--value {column}={text}: write uniform:LOW:HIGH, such as uniform:0:100")
    low, high = ends
    if known.is_integer or (not dtype and "." not in rest and low.is_integer() and high.is_integer()):
        return Values(whole=(int(low), int(high)))
    return Values(real=(low, high))


def parse_typed(column: str, field: str | None, dtype: str) -> Any:
    """Return the value of a field; None for an empty field. A / separates the numbers of a vector.

    Raises InvalidArgument.
    """
    if not dtype:
        return None if field is None else parse_untyped(field)
    known = parse_dtype(dtype)
    return parse_field(column, field.replace("/", ",") if field and known.is_vector else field, known)


def parse_untyped(text: str) -> Any:
    """Return the value of text that is JSON; other text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def default_values(dtype: str, seed: int) -> Values:
    """Return values of the right type, for a column without --keys and --value."""
    known = parse_dtype(dtype)
    if known == Timestamp:
        return Values([time.time_ns() // 1000])
    if known.is_integer:
        return Values(whole=(0, 99))
    if known.is_float:
        return Values(real=(0.0, 1.0))
    if known.is_vector:
        vectors = np.random.default_rng(seed).normal(size=(VECTORS, known.width))
        return Values(vectors.astype(np.float32).tolist())
    if known == Bool:
        return Values([False, True])
    return Values(["x"])


def listed(names: Sequence[str] | set[str]) -> str:
    shown = sorted(names) if isinstance(names, set) else list(names)
    return ", ".join(itertools.islice(shown, 8)) + (", ..." if len(shown) > 8 else "") or "none"
