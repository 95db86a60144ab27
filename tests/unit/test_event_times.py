"""Which event times are refused: in a wrong unit, before 1970, after 2200, ahead of the clock. The clock is fixed."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as values

import shorttail as st
from shorttail.define import clock
from shorttail.define.durations import duration_text, parse_duration
from shorttail.define.event_times import LATEST_US, ImpossibleTime, check_event_times
from shorttail.errors import InvalidArgument
from shorttail.sources.batches import open_source, row_batches
from shorttail.sources.rows import column_batch

NOW_US = 1_795_000_000_000_000  # 2026-11-18T11:06:40Z
HOUR_US = 3_600_000_000
VIEW = st.FeatureView("v", entity=st.Entity("e", keys={"id": st.Int64}), features=[st.Feature("x", st.Int64)])
UNITS = {"seconds": 10**6, "milliseconds": 10**3}


@pytest.fixture(autouse=True)
def fixed_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now_us", lambda: NOW_US)


def refusal(times: Any, skew_us: int | None = HOUR_US) -> tuple[int, str] | None:
    """Return (row, reason) of the refused one of these int64 times, given as plain numbers; None if all are taken."""
    array = np.asarray(times, np.int64)
    try:
        check_event_times(array, array, skew_us)
    except ImpossibleTime as error:
        return error.row, str(error)
    return None


@pytest.mark.parametrize(
    ("time_us", "reason"),
    [
        (-1, "1969-12-31T23:59:59Z is before 1970"),
        (-(2**63), "-290308-12-21T19:59:05Z is before 1970"),
        (LATEST_US + 1, "2200-01-01T00:00:00Z is after 2200"),
        (2**63 - 1, "294247-01-10T04:00:54Z is after 2200"),
        (
            NOW_US + HOUR_US + 1,
            "2026-11-18T12:06:40Z is 1h ahead of this host's clock (2026-11-18T11:06:40Z), and max_clock_skew is 1h; "
            "is it a local time? Event times are UTC",
        ),
        (
            NOW_US + 36 * HOUR_US,
            "2026-11-19T23:06:40Z is 1.5d ahead of this host's clock (2026-11-18T11:06:40Z), and max_clock_skew is 1h",
        ),
        (
            NOW_US // 10**6,
            "1795000000 is 1970-01-01T00:29:55Z in microseconds since 1970, and 2026-11-18T11:06:40Z in seconds; "
            "give microseconds, or datetimes",
        ),
        (
            NOW_US // 1000,
            "1795000000000 is 1970-01-21T18:36:40Z in microseconds since 1970, and 2026-11-18T11:06:40Z in "
            "milliseconds; give microseconds, or datetimes",
        ),
        (
            NOW_US * 1000,
            "1795000000000000000 is 58851-04-14T23:06:40Z in microseconds since 1970, and 2026-11-18T11:06:40Z in "
            "nanoseconds; give microseconds, or datetimes",
        ),
    ],
)
def test_a_time_that_cannot_be_right_is_named_with_its_reason(time_us: int, reason: str) -> None:
    assert refusal([5, NOW_US, time_us, -7]) == (2, reason)


@pytest.mark.parametrize("time_us", [0, 1, 10**6, 86_400 * 10**6, NOW_US, NOW_US + HOUR_US])
def test_the_other_times_are_taken(time_us: int) -> None:
    assert refusal([time_us]) is None
    assert refusal([]) is None


def test_without_a_skew_only_the_other_bounds_hold() -> None:
    assert refusal([NOW_US + 2 * HOUR_US, LATEST_US], None) is None
    assert refusal([LATEST_US + 1], None) == (0, "2200-01-01T00:00:00Z is after 2200")
    assert refusal([-1], None) is not None
    assert refusal([NOW_US // 1000], None) is not None


@given(
    values.lists(
        values.one_of(
            values.integers(-(2**63), 2**63 - 1),
            values.sampled_from([0, NOW_US, NOW_US + HOUR_US, LATEST_US, *(NOW_US // unit for unit in UNITS.values())])
            .flatmap(lambda middle: values.integers(middle - 3 * HOUR_US, middle + 3 * HOUR_US))
            .filter(lambda time_us: -(2**63) <= time_us < 2**63),
        ),
        max_size=5,
    ),
    values.sampled_from([None, 1, HOUR_US, 90 * 24 * HOUR_US, LATEST_US]),
)  # fmt: skip
def test_the_first_wrong_time_is_the_one_that_the_rule_says(times: list[int], skew_us: int | None) -> None:
    start_us = 946_684_800_000_000  # 2000

    def is_wrong(time_us: int) -> bool:
        newest_us = NOW_US + (skew_us or 0)
        if any(start_us // unit_us <= time_us <= newest_us // unit_us for unit_us in UNITS.values()):
            return True
        return not 0 <= time_us <= LATEST_US or (skew_us is not None and time_us > newest_us)

    found = refusal(times, skew_us)
    assert (None if found is None else found[0]) == next((i for i, t in enumerate(times) if is_wrong(t)), None)


def numbers(time: int) -> dict[str, Any]:
    """Return a number as a column of two rows, and alone, in every form in which it may be pushed."""
    return {
        "alone": time,
        "list": [5, time],
        "tuple": (5, time),
        "numpy": np.array([5, time]),
        "NumPy scalar": np.int64(time),
        "no dimension": np.array(time),
        "uint64": np.array([5, time], np.uint64),
        "float": np.array([5.0, time]),
        "floats": [5.0, float(time)],
        "Decimal": [Decimal(5), Decimal(time)],
        "objects": np.array([5, time], object),
        "mixed": [datetime.datetime(2020, 1, 1), time],
        "pandas": pd.Series([5, time], index=[8, 9]),
        "nullable": pd.Series([5, time], dtype="Int64"),
        "pandas of Arrow": pd.Series([5, time], dtype="int64[pyarrow]"),
        "Index": pd.Index([5, time]),
        "arrow": pa.array([5, time]),
        "chunked": pa.chunked_array([[5], [time]]),
        "dictionary": pa.array([5, time]).dictionary_encode(),
        "decimal": pa.array([Decimal(5), Decimal(time)]),
        "polars": pl.Series([5, time]),
    }


def datetimes(time: datetime.datetime) -> dict[str, Any]:
    """Return a time as a column of one row, and alone, in every form that says its unit."""
    moment = np.datetime64(time.replace(tzinfo=None), "us")
    return {
        "alone": time,
        "list": [time],
        "text": [time.isoformat()],
        "one text": time.isoformat(),
        "numpy": np.array([moment]),
        "NumPy scalar": moment,
        "ns": np.array([moment]).astype("M8[ns]"),
        "pandas": pd.Series([time]),
        "Timestamp": pd.Timestamp(time),
        "objects": pd.Series([time], dtype=object),
        "arrow": pa.array([moment]),
        "Arrow text": pa.array([time.isoformat()]),
        "dictionary": pa.array([time.isoformat()]).dictionary_encode(),
        "polars": pl.Series([time]),
    }


@pytest.mark.parametrize("form", numbers(1))
@pytest.mark.parametrize("unit", UNITS)
def test_a_number_in_another_unit_is_refused_in_every_form(unit: str, form: str) -> None:
    given = numbers(NOW_US // UNITS[unit])[form]
    size = 1 if "alone" in form or "NumPy" in form or "no dim" in form else 2
    with pytest.raises(InvalidArgument, match=f"view 'v': column 'event_time' at row {size - 1}: .*Z in {unit}; give"):
        column_batch(VIEW, {"id": list(range(size)), "x": 0, "event_time": given}, HOUR_US)


@pytest.mark.parametrize("form", datetimes(datetime.datetime(1970, 1, 15)))
def test_a_datetime_of_january_1970_is_taken_in_every_form(form: str) -> None:
    time = datetime.datetime(1970, 1, 21, 18, tzinfo=datetime.UTC)
    batch = column_batch(VIEW, {"id": [1], "x": 0, "event_time": datetimes(time)[form]}, HOUR_US)
    assert batch.event_time_us.tolist() == [int(time.timestamp()) * 10**6]
    early = {"id": [1], "x": 0, "event_time": datetimes(datetime.datetime(1969, 12, 31, tzinfo=datetime.UTC))[form]}
    with pytest.raises(InvalidArgument, match="is before 1970"):
        column_batch(VIEW, early, HOUR_US)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv", "table"])
@pytest.mark.parametrize("unit", ["seconds", "milliseconds", "nanoseconds"])
def test_a_load_names_the_file_the_row_and_the_unit(tmp_path: Path, unit: str, kind: str) -> None:
    sent = NOW_US * 1000 if unit == "nanoseconds" else NOW_US // UNITS[unit]
    rows = pa.table({"id": [1, 2, 3], "x": [0, 0, 0], "event_time": [NOW_US, NOW_US, sent]})
    path: Any = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(rows, path, row_group_size=2)
    elif kind == "arrow":
        pyarrow.feather.write_feather(rows, path)
    elif kind == "csv":
        rows.to_pandas().to_csv(path, index=False)
    else:
        path = rows
    with pytest.raises(InvalidArgument) as caught:
        list(row_batches(open_source(path, VIEW), VIEW, None, HOUR_US))
    origin = "rows for view 'v'" if kind == "table" else str(path)
    assert caught.value.message.startswith(f"{origin}: column 'event_time' at row 2: {sent} is ")
    assert f" in {unit}; give microseconds" in caught.value.message


@pytest.mark.parametrize("form", ["timestamp", "text"])
def test_a_file_of_datetimes_of_the_seventies_is_loaded(tmp_path: Path, form: str) -> None:
    days = pd.date_range("1970-01-01", "1970-03-01", tz="UTC")
    path = tmp_path / ("rows.parquet" if form == "timestamp" else "rows.csv")
    frame = pd.DataFrame({"id": range(len(days)), "x": 0, "event_time": days})
    frame.to_parquet(path) if form == "timestamp" else frame.to_csv(path, index=False)
    [batch] = row_batches(open_source(str(path), VIEW), VIEW, None, HOUR_US)
    assert batch.event_time_us.tolist() == [day * 86_400 * 10**6 for day in range(len(days))]


@pytest.mark.parametrize(
    ("text", "shown"), [("1h", "1h"), ("60m", "1h"), ("90m", "90m"), ("7d", "7d"), ("1w", "7d"), ("500ms", "500ms")]
)
def test_a_duration_is_shown_as_people_write_it(text: str, shown: str) -> None:
    assert duration_text(parse_duration(text, "t", "'1h'")) == shown
    assert parse_duration(shown, "t", "'1h'") == parse_duration(text, "t", "'1h'")
    assert duration_text(1500) == "1500 us"
