"""Entities without keys: a view of one row, which every row of a request gets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import commands
import numpy as np
import onnx
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from onnx import TensorProto, helper, numpy_helper

import shorttail as st
from shorttail._native.pages import crc32c
from shorttail.config import LIMITS
from shorttail.define import dtypes
from shorttail.errors import InvalidArgument
from shorttail.loadtest.traffic import Workload, plan_rpc
from shorttail.registry import versions as registry
from shorttail.results import Status
from shorttail.server.http.invocations import parse_json_body
from shorttail.server.http.parsed import ModelColumns
from shorttail.store import Store
from shorttail.store import load as load_module
from shorttail.store.environment import table_pages
from shorttail.store.table import ColumnBatch
from shorttail.store.verify import verify

SITE = st.Entity("site", keys={})
USER = st.Entity("user", keys={"user_id": st.Int64})
RATES = st.FeatureView(
    "rates",
    entity=SITE,
    ttl="1h",
    features=[
        st.Feature("usd", st.Float32, default=1.0),
        st.Feature("n", st.Int64),
        st.Feature("note", st.String),
        st.Feature("curve", st.Vector(3)),
    ],
)
STATS = st.FeatureView("stats", entity=USER, features=[st.Feature("age", st.Float32)])
ROW = {"usd": 1.25, "n": 7, "note": "é" * 3000, "curve": [[1, 2, 3]]}
SEED = 20261128


def write_model(path: Path, width: int, scale: float = 1.0) -> Path:
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "scale"], ["y"])],
        "scaled",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, width])],
        [numpy_helper.from_array(np.array([scale], np.float32), "scale")],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([RATES, STATS])
        engine.push("stats", {"user_id": [1, 2, 3], "age": [10.0, 20.0, 30.0]})
        yield engine


def usd(engine: st.Engine) -> float:
    return float(engine.get_online_features(["rates:usd"], {})["rates:usd"][0])


# -- rows --------------------------------------------------------------------------------------------------------------


def test_a_lookup_needs_no_column(engine: st.Engine) -> None:
    features = ["rates:usd", "rates:note", "rates:n", "rates:curve"]
    missing = engine.get_online_features(features, {})
    assert missing.to_dict() == {"rates:usd": [1.0], "rates:note": [None], "rates:n": [None], "rates:curve": [None]}
    assert missing.statuses["rates"].tolist() == [Status.NOT_FOUND]
    engine.push("rates", ROW)
    found = engine.get_online_features(features, {})
    assert found.to_dict() == {
        "rates:usd": [1.25],
        "rates:note": ["é" * 3000],
        "rates:n": [7],
        "rates:curve": [[1.0, 2.0, 3.0]],
    }
    assert found.statuses["rates"].tolist() == [Status.PRESENT]


def test_every_row_of_a_request_gets_the_row(engine: st.Engine) -> None:
    engine.push("rates", ROW)
    asked = {"user_id": [*range(1, 1001)]}
    found = engine.get_online_features(["rates:n", "stats:age", "rates:note"], asked)
    assert found["rates:n"].tolist() == [7] * 1000
    assert found["rates:note"].tolist() == ["é" * 3000] * 1000
    assert found["stats:age"].tolist()[:3] == [10.0, 20.0, 30.0]
    assert set(found.statuses["rates"].tolist()) == {Status.PRESENT}


def test_a_column_that_no_view_needs_is_refused(engine: st.Engine) -> None:
    with pytest.raises(InvalidArgument, match="'user_id'"):
        engine.get_online_features(["rates:usd"], {"user_id": [1, 2]})


def test_pushes_replace_the_row_unless_they_are_older(engine: st.Engine) -> None:
    now = pd.Timestamp.now("UTC")
    times = [now - pd.Timedelta(s, "s") for s in (50, 20, 40)]
    rows = {"usd": [1.0, 2.0, 3.0], "n": 1, "note": "x", "curve": [[0, 0, 0]] * 3, "event_time": times}
    count = engine.push("rates", rows)
    assert (int(count), count.given, count.older, count.duplicate) == (1, 3, 2, 0)
    assert usd(engine) == 2.0
    frame = pd.DataFrame({**ROW, "usd": [9.0], "event_time": [now - pd.Timedelta("30s")]})
    assert engine.push("rates", frame).older == 1
    assert usd(engine) == 2.0
    assert engine.push("rates", ROW | {"usd": 4.0}) == 1
    assert usd(engine) == 4.0
    assert engine.store.count("rates") == 1


def test_the_row_grows_stale_and_is_deleted(engine: st.Engine) -> None:
    engine.push("rates", {**ROW, "event_time": pd.Timestamp.now("UTC") - pd.Timedelta("2h")})
    found = engine.get_online_features(["rates:usd", "rates:n"], {})
    assert (found.to_dict(), found.statuses["rates"].tolist()) == (
        {"rates:usd": [1.0], "rates:n": [None]},
        [Status.STALE],
    )
    with pytest.raises(InvalidArgument) as caught:
        engine.delete("rates", {"user_id": [1]})
    assert caught.value.message == "view 'rates' has no key 'user_id'; keys: none"
    assert engine.delete("rates", {}) == 1
    assert engine.delete("rates", {}) == 0
    assert engine.store.count("rates") == 0


def test_a_view_with_keys_is_not_deleted_without_them(engine: st.Engine) -> None:
    with pytest.raises(InvalidArgument, match="key column 'user_id' is missing"):
        engine.delete("stats", {})
    with pytest.raises(InvalidArgument, match="give its 1 key columns"):
        engine.store.delete("stats", [])
    assert engine.store.count("stats") == 3


@pytest.mark.parametrize("memory_kib", [None, 64])
def test_of_a_load_the_latest_row_stays(
    engine: st.Engine, monkeypatch: pytest.MonkeyPatch, memory_kib: int | None
) -> None:
    if memory_kib is not None:  # the rows do not fit: they go through the file, and all have the same hash
        limits = replace(LIMITS, load_memory_bytes=memory_kib << 10, load_memory_bytes_min=memory_kib << 10)
        monkeypatch.setattr(load_module, "LIMITS", limits)
        monkeypatch.setattr(load_module, "PARTITION_BITS", 2)
    spills: list[load_module.Partitions] = []
    spill = load_module.Partitions.spill

    def counted(partitions: load_module.Partitions) -> None:
        spills.append(partitions)
        spill(partitions)

    monkeypatch.setattr(load_module.Partitions, "spill", counted)
    random, n = np.random.default_rng(SEED), 20_000
    order = random.permutation(n)
    start = pd.Timestamp.now("UTC") - pd.Timedelta("50min")
    rows = {
        "usd": order.astype(np.float32),
        "n": order,
        "note": [f"{'x' * 40}{i}" for i in order.tolist()],
        "curve": np.repeat(order[:, None], 3, 1).astype(np.float32),
        "event_time": start + pd.to_timedelta(order, "ms"),
    }
    count = engine.load("rates", rows)
    assert (int(count), count.given, count.older, count.duplicate) == (1, n, n - 1, 0), SEED
    assert bool(spills) == (memory_kib is not None)
    found = engine.get_online_features(["rates:n", "rates:note", "rates:curve"], {})
    assert found.to_dict() == {
        "rates:n": [n - 1],
        "rates:note": [f"{'x' * 40}{n - 1}"],
        "rates:curve": [[n - 1.0] * 3],
    }
    with pytest.raises(InvalidArgument):
        engine.load("rates", {name: [] for name in rows})
    assert engine.store.count("rates") == 1


def test_files_need_no_key_columns(engine: st.Engine, tmp_path: Path) -> None:
    frame = pd.DataFrame({"usd": [2.5, 3.5], "n": [1, 2], "note": ["a", "b"], "curve": [[1.0, 2, 3], [4.0, 5, 6]]})
    frame.to_parquet(tmp_path / "rates.parquet")
    view = replace_source(RATES, tmp_path / "rates.parquet")
    engine.apply([view])
    count = engine.materialize("rates")
    assert (int(count), count.duplicate) == (1, 1)
    assert usd(engine) == 3.5
    (batch,) = engine.store.scan("rates")
    assert (batch.keys, batch.features[2][0].tolist()) == ([], ["b"])


def replace_source(view: st.FeatureView, path: Path) -> st.FeatureView:
    return st.FeatureView(view.name, view.entity, view.features, view.ttl, st.ParquetSource(str(path)))


STEPS = some.lists(
    some.tuples(some.sampled_from(["push", "push", "push", "delete", "load", "reopen"]), some.integers(0, 6)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_any_edits_leave_what_a_plain_variable_holds(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    view = st.FeatureView("one", entity=SITE, features=[st.Feature("x", dtypes.Int64), st.Feature("s", dtypes.String)])
    path = tmp_path_factory.mktemp("steps") / "store"
    store = Store.open(path, create=True)
    with store.edit_catalog() as catalog:
        catalog.add(view)
    held: tuple[int, int] | None = None  # (event time, number)
    for number, (step, time) in enumerate(steps):
        batch = ColumnBatch(
            [],
            np.array([time], np.int64),
            [(np.array([number]), None), (np.array(["y" * 900 * time], object), None)],
        )
        if step == "push":
            store.upsert("one", batch)
            held = (time, number) if held is None or time >= held[0] else held
        elif step == "delete":
            assert store.delete("one", []) == (held is not None)
            held = None
        elif step == "load":
            assert store.load("one", [batch, batch]) == 1
            held = (time, number)
        else:
            store.close()
            store = Store.open(path)
        rows = [
            (int(found.event_time_us[row]), int(found.features[0][0][row]), len(found.features[1][0][row]))
            for found in store.scan("one")
            for row in range(len(found))
        ]
        assert rows == ([] if held is None else [(*held, 900 * held[0])])
    store.close()


def test_verify_checks_the_row(engine: st.Engine) -> None:
    engine.push("rates", ROW)
    report = verify(engine.store.path)
    assert (report.problems, report.rows) == ([], 4)
    table, layout = engine.store.catalog.tables["rates"], engine.store.layout("rates")
    with engine.store.environment.write() as writer:
        ((key, found),) = table_pages(writer.txn, table.id)
        page = bytearray(found)
        first, n = 8 + int.from_bytes(page[2:4], "little"), layout.row_bytes
        page[first + n : first + 2 * n] = page[first : first + n]
        page[0], page[9] = 2, page[8]  # the number of rows, and the tag of the second
        page[-4:] = crc32c(bytes(page[:-4])).to_bytes(4, "little")
        writer.put_page(table.id, key, bytes(page))
    assert verify(engine.store.path).problems == [
        f"view 'rates' (table {table.id}): 2 rows in a view without keys, which has one"
    ]


# -- definitions -------------------------------------------------------------------------------------------------------


def test_apply_says_that_there_are_no_keys(tmp_path: Path) -> None:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        changes = [f"{change.kind} {change.what} {change.detail}" for change in engine.apply([RATES])]
        assert changes == ["+ entity site no keys", "+ view rates no keys -> 4 features"]
        engine.push("rates", ROW)
        keyed = st.FeatureView("rates", st.Entity("site", {"country": st.String}), RATES.features)
        with pytest.raises(InvalidArgument, match=r"its keys change \(no keys -> country String\)"):
            engine.apply([keyed])
        assert usd(engine) == 1.25
        document = json.loads(engine.store.catalog.to_json())
        assert document["entities"][0]["keys"] == []


# -- models ------------------------------------------------------------------------------------------------------------


def test_models_take_the_row_beside_others(engine: st.Engine, tmp_path: Path) -> None:
    engine.push("rates", ROW)
    model = st.Model("m", str(write_model(tmp_path / "m.onnx", 3)), ["rates:usd", "stats:age", "request:amount"])
    engine.apply([model])
    answer = engine.predict("m", {"user_id": [1, 3], "amount": [5, 6]})
    assert answer.outputs["y"].tolist() == [[1.25, 10, 5], [1.25, 30, 6]]
    assert {name: codes.tolist() for name, codes in answer.statuses.items()} == {"rates": [0, 0], "stats": [0, 0]}


@pytest.mark.parametrize(
    ("inputs", "request_of", "decides"),
    [
        (
            ["rates:usd", "stats:age", "request:amount"],
            lambda i, j: {"user_id": i, "amount": j},
            "the first view's keys",
        ),
        (["rates:usd", "rates:n", "request:amount"], lambda i, j: {"amount": i}, "all columns"),
    ],
)
def test_a_canary_splits_by_the_first_view_that_has_keys(
    engine: st.Engine, tmp_path: Path, inputs: Any, request_of: Any, decides: str
) -> None:
    engine.push("rates", ROW)
    engine.apply([st.Model("m", str(write_model(tmp_path / "m.onnx", 3)), inputs)])
    engine.deploy("m", write_model(tmp_path / "m2.onnx", 3, 2.0), canary_percent=50.0)
    first, second = ([engine.predict("m", request_of(i, j)).version for i in range(100)] for j in (1, 2))
    assert first == second, decides
    assert 20 < first.count(2) < 80


def test_a_model_without_request_columns_answers_one_row_and_has_no_canary(engine: st.Engine, tmp_path: Path) -> None:
    engine.push("rates", ROW)
    engine.apply([st.Model("m", str(write_model(tmp_path / "m.onnx", 2)), ["rates:usd", "rates:n"])])
    assert engine.predict("m", {}).outputs["y"].tolist() == [[1.25, 7]]
    (listed,) = engine.models()
    assert listed["columns"] == {}
    other = write_model(tmp_path / "m2.onnx", 2, 2.0)
    with pytest.raises(InvalidArgument) as caught:
        engine.deploy("m", other, canary_percent=50.0)
    assert caught.value.message == (
        "model 'm' takes no columns of the request, so all requests are the same and a canary cannot get a share of"
        " them; try the version as a shadow, or promote it"
    )
    engine.deploy("m", other, promote=False)
    with pytest.raises(InvalidArgument, match="takes no columns of the request"):
        registry.set_canary(engine.store, "m", 50.0)
    registry.set_shadow(engine.store, "m", 2)
    assert engine.predict("m", {}).version == 1


# -- interfaces --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "rows"),
    [
        ({"instances": [{}]}, 1),
        ({"instances": [[]]}, 1),
        ({"instances": [{}, {}]}, 2),
        ({"dataframe_records": [{}, {}, {}]}, 3),
        ({"dataframe_split": {"columns": [], "data": [[], []]}}, 2),
        ({"inputs": {}}, 1),
    ],
)
def test_a_body_has_one_row_if_the_model_takes_no_columns(document: Any, rows: int) -> None:
    model = ModelColumns("m", None, (), (), ("x",), False)
    body = json.dumps(document).encode()
    if rows == 1:
        assert parse_json_body(body, lambda name, version: model).columns == {}
        return
    with pytest.raises(InvalidArgument, match=f"model 'm' takes no columns, so a request has one row; got {rows}"):
        parse_json_body(body, lambda name, version: model)


def test_commands(engine: st.Engine, tmp_path: Path) -> None:
    store = ["--store", str(engine.store.path)]
    (tmp_path / "row.csv").write_text('usd,n,note,curve\n1.5,3,"a b","1,2,3"\n')
    assert "1 row" in commands.run_well("push", "rates", str(tmp_path / "row.csv"), *store).out
    assert commands.run_well("features", "rates:usd", "rates:n", *store).out.split() == [
        "rates:usd",
        "rates:n",
        "1.5",
        "3",
    ]
    assert commands.run_well("features", "rates:usd", "stats:age", "user_id=1,2", "--json", *store).json[
        "features"
    ] == {
        "rates:usd": [1.5, 1.5],
        "stats:age": [10.0, 20.0],
    }
    assert "'user_id'" in commands.error_of("features", "rates:usd", "user_id=1", *store)
    assert "has no keys: delete its only row without --file" in commands.error_of(
        "delete", "rates", "--file", str(tmp_path / "row.csv"), *store
    )
    assert "'x'" in commands.error_of("delete", "rates", "x=1", *store)
    assert "give either KEY=VALUE... or --file FILE" in commands.error_of("delete", "stats", *store, code=2)
    assert commands.run_well("delete", "rates", *store).out == "rates: 1 row deleted\n"
    assert commands.run_well("delete", "rates", "--json", *store).json == {"view": "rates", "keys": 1, "rows": 0}
    assert "rates" in commands.run_well("stat", *store).out
    assert commands.run_well("delete", "stats", "user_id=1", *store).out == "stats: 1 row deleted of 1 key\n"


def test_a_load_test_does_not_replace_the_only_row_unasked(engine: st.Engine) -> None:
    with pytest.raises(InvalidArgument) as caught:
        plan_rpc(Workload(push="rates"), [], engine.views())
    assert caught.value.message == (
        "--push rates: the view has no keys, so a push replaces its only row: say --overwrite-live-rows to do that"
    )
    plan_rpc(Workload(push="rates", overwrite=True), [], engine.views())
    plan_rpc(Workload(features=["rates:usd"]), [], engine.views())
