"""Reading as of a moment: TTLs are judged at it, and a row that is newer is not found. The oracle is plain Python."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from test_keyless import write_model
from test_pages import NOT_FOUND, PRESENT, STALE, Table, make_view

import shorttail as st
from shorttail._native.columns import Columns
from shorttail._native.pages import Lookup, lookup
from shorttail.client import calls
from shorttail.define import clock, dtypes
from shorttail.define.event_times import LATEST_US, as_of_us
from shorttail.errors import InvalidArgument
from shorttail.server.http.invocations import parse_csv, parse_json_body
from shorttail.server.http.parsed import ModelColumns
from shorttail.server.http.v2 import parse_infer

NOW_US = 1_795_000_000_000_000  # 2026-11-18T11:06:40Z
DAY_US = 86_400_000_000
TTL_US = 45_000_000
USER = st.Entity("user", keys={"user_id": st.Int64})
SPEND = st.FeatureView("spend", entity=USER, ttl="2d", features=[st.Feature("sum", st.Float32, default=-1.0)])
NOTES = st.FeatureView("notes", entity=USER, features=[st.Feature("text", st.String), st.Feature("n", st.Int64)])


def status_at(time_us: int | None, as_of_us: int | None, now_us: int, ttl_us: int) -> int:
    """Return the status of a row of this event time (None: there is no row). as_of_us: None: now."""
    if time_us is None or (as_of_us is not None and time_us > as_of_us):
        return NOT_FOUND
    judged_us = now_us if as_of_us is None else as_of_us
    return STALE if ttl_us and time_us < judged_us - ttl_us else PRESENT


# -- the lookup --------------------------------------------------------------------------------------------------------

moments = some.none() | some.integers(0, 200_000_000) | some.just(LATEST_US)
requests = some.lists(some.tuples(some.lists(some.integers(0, 9), min_size=1, max_size=9), moments), max_size=12)
times = some.dictionaries(some.integers(0, 7), some.integers(0, 200_000_000), max_size=8)


@settings(max_examples=200)
@given(times, requests, requests, some.sampled_from([None, "45s"]), some.integers(0, 200_000_000))
def test_a_batch_of_requests_with_and_without_moments(
    rows: dict[int, int], first: Any, second: Any, ttl: str | None, now_us: int
) -> None:
    """Two batches use the same Columns. Each third request is removed again, as one that a canary takes is."""
    view = make_view(
        [dtypes.Int64],
        [st.Feature("a", st.Int64), st.Feature("b", st.Float32, default=7.0), st.Feature("s", st.String)],
        ttl=ttl,
    )
    table = Table(view, {(key,): (time_us, [key, float(key), str(key)]) for key, time_us in rows.items()})
    columns = Columns(["k0"], [dtypes.Int64])
    for batch in (first, second):
        columns.reset()
        want = []
        for keys, as_of in batch:
            columns.append({"k0": keys})
            if as_of is not None:
                columns.judge_at(as_of, len(keys))
            want += [(key, status_at(rows.get(key), as_of, now_us, TTL_US if ttl else 0)) for key in keys]
        n = len(want)
        numbers, floats, texts = np.empty((n, 1), np.int64), np.empty((n, 1), np.float32), np.empty((n, 1), object)
        status, statuses = np.full((1, n), 99, np.uint8), np.full((3, n), 99, np.uint8)
        plan = Lookup(table.layout, [0], [(0, 0, 0, None), (1, 1, 0, 7.0), (2, 2, 0, "-")], view.ttl_us)
        lookup([table.directory if rows else None], [plan], columns, [numbers, floats, texts], status, now_us, statuses)
        found = [code == PRESENT for _, code in want]
        assert status[0].tolist() == [code for _, code in want]
        assert (statuses == status).all()
        assert numbers[:, 0].tolist() == [
            key if is_there else 0 for (key, _), is_there in zip(want, found, strict=True)
        ]
        assert floats[:, 0].tolist() == [
            float(key) if is_there else 7.0 for (key, _), is_there in zip(want, found, strict=True)
        ]
        assert texts[:, 0].tolist() == [
            str(key) if is_there else "-" for (key, _), is_there in zip(want, found, strict=True)
        ]


def test_the_boundaries_of_a_moment() -> None:
    """A row is there from its event time on, and until its TTL has passed; the last microseconds count."""
    view = make_view([dtypes.Int64], [st.Feature("a", st.Int64)], ttl="45s")
    table = Table(view, {(0,): (TTL_US, [1])})
    for as_of, status in (
        (0, NOT_FOUND),
        (TTL_US - 1, NOT_FOUND),
        (TTL_US, PRESENT),
        (2 * TTL_US, PRESENT),
        (2 * TTL_US + 1, STALE),
        (LATEST_US, STALE),
    ):
        columns = Columns(["k0"], [dtypes.Int64])
        columns.append({"k0": 0})
        columns.judge_at(as_of, 1)
        codes = np.empty((1, 1), np.uint8)
        plan = Lookup(table.layout, [0], [(0, 0, 0, None)], view.ttl_us)
        lookup([table.directory], [plan], columns, [np.empty(1, np.int64)], codes, 0)
        assert codes.item() == status, as_of


def test_moments_that_no_row_can_have_are_refused() -> None:
    columns = Columns(["k0"], [dtypes.Int64])
    columns.append({"k0": [1, 2]})
    for as_of, rows in ((-1, 1), (-(2**63), 1), (5, 3), (5, -1)):
        with pytest.raises(ValueError, match="moment"):
            columns.judge_at(as_of, rows)


# -- what is taken as a moment -----------------------------------------------------------------------------------------

UTC_PLUS_2 = datetime.timezone(datetime.timedelta(hours=2))
NOON = datetime.datetime(2026, 11, 17, 12, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    "given",
    [
        NOON,
        NOON.replace(tzinfo=None),
        datetime.datetime(2026, 11, 17, 14, tzinfo=UTC_PLUS_2),
        "2026-11-17T12:00",
        "2026-11-17 14:00:00.000000+02:00",
        np.datetime64("2026-11-17T12:00"),
        pd.Timestamp("2026-11-17T12:00"),
        pa.scalar(NOON),
        int(NOON.timestamp() * 1e6),
        np.int64(NOON.timestamp() * 1e6),
        float(NOON.timestamp() * 1e6),
    ],
)
def test_a_moment_is_what_an_event_time_may_be(given: Any) -> None:
    assert as_of_us(given) == NOON.timestamp() * 1e6
    assert calls.features_params(["v:f"], {"id": 1}, None, given)[2]["as_of"] == "2026-11-17T12:00:00Z"


def test_moments_of_january_1970_and_of_the_future_are_taken() -> None:
    early = datetime.datetime(1970, 1, 1, 0, 20)
    assert as_of_us(early) == 1_200_000_000
    assert as_of_us(calls.features_params(["v:f"], {"id": 1}, None, early)[2]["as_of"]) == 1_200_000_000
    assert as_of_us(datetime.date(2199, 12, 31)) == LATEST_US - DAY_US


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (NOW_US // 10**6, "as_of: 1795000000 is 1970-01-01T00:29:55Z in microseconds since 1970, and "
                          "2026-11-18T11:06:40Z in seconds; give microseconds, or datetimes"),
        (NOW_US // 1000, "in milliseconds; give microseconds, or datetimes"),
        (NOW_US * 1000, "in nanoseconds; give microseconds, or datetimes"),
        (-1, "as_of: 1969-12-31T23:59:59Z is before 1970"),
        ("2201-01-01", "as_of: 2201-01-01T00:00:00Z is after 2200"),
        ("yesterday", "as_of takes a datetime, ISO 8601 text or microseconds since 1970; got 'yesterday' (str)"),
        ("1795000000", "got '1795000000' (str)"),
        (True, "got True (bool)"),
        (float("nan"), "got nan (float)"),
        (np.datetime64("NaT"), "got NaT (datetime64)"),
        ([NOW_US], "got [1795000000000000] (list)"),
        (2**70, "got 1180591620717411303424 (int)"),
    ],
)  # fmt: skip
def test_a_moment_that_cannot_be_right_is_refused(given: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now_us", lambda: NOW_US)
    with pytest.raises(InvalidArgument) as caught:
        as_of_us(given)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


# -- embedded, and the command line ------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    """Rows of days 17, 18 and 19 of November 2026 (the first and the last at noon), and none of user 9."""
    write_model(tmp_path / "spent.onnx", 1)
    spent = st.Model("spent", path=tmp_path / "spent.onnx", inputs=["spend:sum"])
    raw = st.Model("raw", path=tmp_path / "spent.onnx")
    with st.Engine.open(tmp_path / "store", create=True, max_clock_skew="30000d") as engine:
        engine.apply([SPEND, NOTES, spent, raw])
        event_time = ["2026-11-17T12:00", "2026-11-18", "2026-11-19T12:00"]
        engine.push("spend", {"user_id": [1, 2, 3], "sum": [10.0, 20.0, 30.0], "event_time": event_time})
        texts = {"user_id": [1, 2, 3], "text": ["a", "b", "c"], "n": [1, 2, 3], "event_time": event_time}
        engine.push("notes", texts)
        yield engine


ALL = {"user_id": [1, 2, 3, 9]}


def test_lookups_and_predictions_as_of_a_moment(engine: st.Engine) -> None:
    for as_of, statuses, values in (
        ("2026-11-17T11:59:59.999999", [2, 2, 2, 2], [-1.0, -1.0, -1.0, -1.0]),
        (NOON, [0, 2, 2, 2], [10.0, -1.0, -1.0, -1.0]),
        (datetime.date(2026, 11, 19), [0, 0, 2, 2], [10.0, 20.0, -1.0, -1.0]),
        ("2026-11-20", [3, 0, 0, 2], [-1.0, 20.0, 30.0, -1.0]),
        ("2026-12-24", [3, 3, 3, 2], [-1.0, -1.0, -1.0, -1.0]),
    ):
        found = engine.get_online_features(["spend:sum"], ALL, as_of=as_of)
        assert found.statuses["spend"].tolist() == statuses, as_of
        assert found["spend:sum"].tolist() == values, as_of
        answer = engine.predict("spent", ALL, as_of=as_of)
        assert answer.outputs["y"].ravel().tolist() == values, as_of
        assert answer.statuses["spend"].tolist() == statuses, as_of


def test_a_view_without_ttl_has_no_newer_rows_either(engine: st.Engine) -> None:
    found = engine.get_online_features(["notes:text", "notes:n"], ALL, as_of="2026-11-18")
    assert found["notes:text"].tolist() == ["a", "b", None, None]
    assert found.statuses["notes"].tolist() == [0, 0, 2, 2]
    assert engine.get_online_features(["notes:text"], ALL, as_of="2030-01-01").statuses["notes"].tolist() == [
        0,
        0,
        0,
        2,
    ]


def test_without_a_moment_rows_of_the_future_are_there(engine: st.Engine) -> None:
    """As before: only the TTL is judged, now. The Columns are those of a lookup as of a moment, used again."""
    rows = {"user_id": [4], "text": ["d"], "n": [4], "event_time": ["2098-01-01"]}
    engine.push("notes", rows)
    engine.push("spend", {"user_id": [4], "sum": [40.0], "event_time": ["2098-01-01"]})
    references, keys = ["spend:sum", "notes:text"], {"user_id": [4, 9]}
    assert engine.get_online_features(references, keys, as_of="2097-12-31").statuses["spend"].tolist() == [2, 2]
    found = engine.get_online_features(references, keys)
    assert (found["notes:text"].tolist(), found["spend:sum"].tolist()) == (["d", None], [40.0, -1.0])


def test_only_the_newest_row_of_a_key_is_stored(engine: st.Engine) -> None:
    engine.push("notes", {"user_id": [1], "text": ["new"], "n": [9], "event_time": ["2026-11-19"]})
    assert engine.get_online_features(["notes:text"], {"user_id": 1}, as_of="2026-11-18")["notes:text"].tolist() == [
        None
    ]


def test_a_moment_that_cannot_be_right_changes_nothing(engine: st.Engine) -> None:
    for ask in (
        lambda as_of: engine.predict("spent", ALL, as_of=as_of),
        lambda as_of: engine.get_online_features(["spend:sum"], ALL, as_of=as_of),
        lambda as_of: engine.predict("raw", {"x": np.ones((1, 1), np.float32)}, as_of=as_of),
    ):
        with pytest.raises(InvalidArgument, match=r"^as_of: .* in seconds; give microseconds"):
            ask(1_700_000_000)
        ask(NOON)  # a model that takes tensors looks nothing up: its answer is that of every moment


def test_the_command_line(engine: st.Engine, tmp_path: Path) -> None:
    place = ["--store", str(tmp_path / "store")]
    asked = ["features", "spend:sum", "user_id=1,2,3", *place, "--json"]
    for text in (
        "2026-11-18",
        "2026-11-18T01:00+01:00",
        str(int(datetime.datetime(2026, 11, 18, tzinfo=datetime.UTC).timestamp()) * 10**6),
    ):
        answer = json.loads(commands.run_well(*asked, "--as-of", text).out)
        assert answer["statuses"]["spend:sum"] == ["PRESENT", "PRESENT", "NOT_FOUND"]
        assert answer["features"]["spend:sum"] == [10.0, 20.0, -1.0]
    shown = commands.run_well("predict", "spent", "user_id=1,2,3", *place, "--as-of", "2026-11-19T23:00").out
    assert [line.split()[1] for line in shown.splitlines()[-3:]] == ["-1", "20", "30"]
    for text, message in (
        (
            "yesterday",
            "error: as_of takes a datetime, ISO 8601 text or microseconds since 1970; got 'yesterday' (str)\n",
        ),
        ("", "got '' (str)"),
        ("-5", "as_of: 1969-12-31T23:59:59Z is before 1970"),
        ("1700000000", "in seconds; give microseconds, or datetimes"),
    ):
        assert message in commands.error_of(*asked, "--as-of", text)


# -- HTTP bodies -------------------------------------------------------------------------------------------------------


def find_model(name: str | None, version: int | None) -> ModelColumns:
    return ModelColumns("spent", version, ("user_id",), (dtypes.Int64,), ("x",), False)


@pytest.mark.parametrize(
    ("parameters", "moment"),
    [({}, None), ({"as_of": None}, None), ({"as_of": "2026-11-17T12:00"}, NOON), ({"as_of": NOW_US}, NOW_US)],
)
def test_bodies_of_http_name_a_moment(parameters: dict[str, Any], moment: Any) -> None:
    want = None if moment is None else as_of_us(moment)
    rows = [{"user_id": 1}]
    for form in (
        {"instances": rows},
        {"inputs": {"user_id": [1]}},
        {"dataframe_records": rows},
        {"dataframe_split": {"columns": ["user_id"], "data": [[1]]}},
    ):
        for key in ("parameters", "params"):
            assert parse_json_body(json.dumps(form | {key: parameters}).encode(), find_model).moment_us == want
    inputs = [{"name": "user_id", "shape": [1], "datatype": "INT64", "data": [1]}]
    body = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
    assert parse_infer(body, None, find_model).moment_us == want
    assert parse_csv(b"1\n", find_model).moment_us is None


@pytest.mark.parametrize("value", ["soon", [], {}, True, 1.5, 1_700_000_000])
def test_bodies_of_http_with_a_wrong_moment_are_refused(value: Any) -> None:
    inputs = [{"name": "user_id", "shape": [1], "datatype": "INT64", "data": [1]}]
    with pytest.raises(InvalidArgument, match=r"^the parameter as_of"):
        parse_infer(json.dumps({"inputs": inputs, "parameters": {"as_of": value}}).encode(), None, find_model)
    with pytest.raises(InvalidArgument, match=r"^the parameter as_of"):
        parse_json_body(json.dumps({"instances": [[1]], "parameters": {"as_of": value}}).encode(), find_model)
