"""The embedded engine: what it answers, and that it follows the store while others change it."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pyarrow as pa
import pytest
from onnx import TensorProto, helper, numpy_helper

import shorttail as st
from shorttail._native.route import Route
from shorttail.errors import InvalidArgument, NotFound, Unavailable
from shorttail.results import Status

USER = st.Entity("user", keys={"user_id": st.Int64})
SHOP = st.Entity("shop", keys={"country": st.String, "shop_id": st.Int64})
STATS = st.FeatureView(
    "stats",
    entity=USER,
    ttl="1h",
    features=[
        st.Feature("age", st.Float32, default=30.0),
        st.Feature("visits", st.Int64),
        st.Feature("tier", st.String, default="none"),
        st.Feature("taste", st.Vector(2)),
    ],
)
SHOPS = st.FeatureView("shops", entity=SHOP, features=[st.Feature("open", st.Bool), st.Feature("rent", st.Float64)])


@st.on_demand
def share(amount: st.Float64, rent: st.Float64) -> st.Float32:  # type: ignore[valid-type]
    if rent == 0.0:
        return -1.0
    return amount / rent


MODEL_INPUTS = [
    "stats:age",
    "stats:visits",
    "request:amount",
    "stats:taste",
    "shops:open",
    share("request:amount", "shops:rent"),
]
ROWS = {
    "user_id": [1, 2, 3],
    "age": [20.0, None, 40.0],
    "visits": [5, 6, None],
    "tier": ["gold", None, "é"],
    "taste": [[1, 2], [3, 4], None],
}
SHOP_ROWS = {"country": ["de", "de", "fr"], "shop_id": [1, 2, 1], "open": [True, False, None], "rent": [10.0, 0.0, 2.5]}


def write_model(path: Path, width: int, scale: float = 1.0) -> Path:
    """y = scale * x for a matrix of that width: what comes out shows what went in."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "scale"], ["y"])],
        "scaled",
        [value("x", TensorProto.FLOAT, [None, width])],
        [value("y", TensorProto.FLOAT, [None, width])],
        [numpy_helper.from_array(np.array([scale], np.float32), "scale")],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    model = st.Model("echo", path=str(write_model(tmp_path / "echo.onnx", 7)), inputs=MODEL_INPUTS)
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([USER, SHOP, STATS, SHOPS, model])
        engine.push("stats", ROWS)
        engine.push("shops", SHOP_ROWS)
        yield engine


def test_a_prediction_takes_every_value_from_its_place(engine: st.Engine) -> None:
    answer = engine.predict(
        "echo",
        {
            "user_id": [1, 2, 3, 99],
            "country": ["de", "de", "fr", "de"],
            "shop_id": [1, 2, 1, 9],
            "amount": [5, 6.0, 7.5, 8],
        },
    )
    nan = np.nan
    expected = [
        [20, 5, 5, 1, 2, 1, 0.5],
        [30, 6, 6, 3, 4, 0, -1],  # a null age is its default; a rent of 0 takes the function's own branch
        [40, nan, 7.5, nan, nan, nan, 3],
        [30, nan, 8, nan, nan, nan, nan],  # neither user nor shop
    ]
    np.testing.assert_allclose(answer.outputs["y"], expected, rtol=1e-6)
    assert answer.version == 1
    assert answer.statuses["stats"].tolist() == [Status.PRESENT] * 3 + [Status.NOT_FOUND]
    assert answer.statuses["shops"].tolist() == [Status.PRESENT] * 3 + [Status.NOT_FOUND]


def test_features_come_in_the_order_asked_for_with_their_statuses(engine: st.Engine) -> None:
    features = ["stats:tier", "shops:rent", "stats:taste", "stats:age"]
    answer = engine.get_online_features(features, {"user_id": [2, 3, 99], "country": "de", "shop_id": [1, 7, 2]})
    assert answer.to_dict() == {
        "stats:tier": ["none", "é", "none"],
        "shops:rent": [10.0, None, 0.0],
        "stats:taste": [[3.0, 4.0], None, None],
        "stats:age": [30.0, 40.0, 30.0],
    }
    present, null, missing = Status.PRESENT, Status.NULL, Status.NOT_FOUND
    assert {name: row.tolist() for name, row in answer.feature_statuses.items()} == {
        "stats:tier": [null, present, missing],
        "shops:rent": [present, missing, present],
        "stats:taste": [present, null, missing],
        "stats:age": [null, present, missing],
    }
    assert answer.statuses["stats"].tolist() == [present, present, missing]
    assert answer.to_pandas()["stats:age"].tolist() == [30.0, 40.0, 30.0]
    assert answer.to_arrow().column("stats:tier").to_pylist() == ["none", "é", "none"]
    assert answer["shops:rent"].dtype == np.float64


def test_rows_older_than_the_ttl_are_stale_and_give_the_default(engine: st.Engine) -> None:
    old = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=2)
    engine.push("stats", {"user_id": 7, "age": 1.0, "visits": 1, "tier": "x", "taste": [[1, 1]], "event_time": [old]})
    answer = engine.get_online_features(["stats:age", "stats:visits"], {"user_id": [7]})
    assert answer.statuses["stats"].tolist() == [Status.STALE]
    assert answer.to_dict() == {"stats:age": [30.0], "stats:visits": [None]}


def test_a_null_key_matches_nothing(engine: st.Engine) -> None:
    answer = engine.get_online_features(["stats:age"], {"user_id": [None, 1]})
    assert answer.statuses["stats"].tolist() == [Status.NOT_FOUND, Status.PRESENT]


def test_the_later_event_time_wins_whatever_the_order_of_pushes(engine: st.Engine) -> None:
    now = time.time_ns() // 1000
    for event_time, visits in ((now, 100), (now - 10, 1), (now, 101)):
        row = ROWS | {"visits": [visits] * 3, "event_time": [event_time] * 3}
        engine.push("stats", row)
    answer = engine.get_online_features(["stats:visits"], {"user_id": [1, 2, 3]})
    assert answer["stats:visits"].tolist() == [101, 101, 101]


def test_deleted_rows_are_gone(engine: st.Engine) -> None:
    assert engine.delete("shops", {"country": ["de", "de"], "shop_id": [1, 77]}) == 1
    answer = engine.get_online_features(["shops:rent"], {"country": "de", "shop_id": [1, 2]})
    assert answer.statuses["shops"].tolist() == [Status.NOT_FOUND, Status.PRESENT]


@pytest.mark.parametrize("kind", ["pandas", "pyarrow", "numpy"])
def test_rows_are_taken_from_any_frame(engine: st.Engine, kind: str) -> None:
    columns = {"country": ["it", "es"], "shop_id": [1, 2], "open": [True, False], "rent": [1.5, np.nan]}
    rows = {
        "pandas": lambda: pd.DataFrame(columns),
        "pyarrow": lambda: pa.table(columns | {"rent": pa.array([1.5, None])}),
        "numpy": lambda: {name: np.array(values) for name, values in columns.items()},
    }[kind]()
    assert engine.push("shops", rows) == 2
    answer = engine.get_online_features(["shops:open", "shops:rent"], {"country": ["it", "es"], "shop_id": [1, 2]})
    assert answer.to_dict() == {"shops:open": [True, False], "shops:rent": [1.5, None]}


@pytest.mark.parametrize(
    ("view", "rows", "message"),
    [
        ("stats", {"user_id": [1]}, "view 'stats': column 'age' is missing from the rows"),
        ("stats", ROWS | {"Event_Time": 1}, "view 'stats' has no column 'Event_Time'; there is 'event_time', and case"),
        ("stats", ROWS | {"user_id": [1, None, 2]}, "key 'user_id' is null at row 1"),
        ("stats", ROWS | {"user_id": ["a", "b", "c"]}, "key 'user_id' takes Int64; got 'a' (str) at row 0"),
        ("stats", ROWS | {"visits": [1.5, 2, 3]}, "column 'visits' takes Int64; got 1.5 (float) at row 0"),
        ("stats", ROWS | {"age": [1.0]}, "column 'age' has 1 values where others have 3"),
        ("stats", ROWS | {"taste": [[1, 2, 3]] * 3}, "column 'taste' takes Vector(2); got 3 numbers at row 0"),
        ("stats", ROWS | {"event_time": [1, None, 2]}, "column 'event_time' has no time at row 1"),
        ("shops", SHOP_ROWS | {"open": [1, 0, 2]}, "column 'open' takes Bool; got 2 (int) at row 2"),
        ("shops", [1, 2], "view 'shops': rows of type list"),
        ("shops", {name: [] for name in SHOP_ROWS}, "view 'shops': no rows; send at least one"),
    ],
)
def test_wrong_rows_are_named_and_change_nothing(engine: st.Engine, view: str, rows: object, message: str) -> None:
    before = engine.store.count(view)
    with pytest.raises(InvalidArgument) as caught:
        engine.push(view, rows)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    engine.refresh()
    assert engine.store.count(view) == before


def test_unknown_names_are_named_with_what_there_is(engine: st.Engine) -> None:
    with pytest.raises(NotFound, match="no model 'ecko'; did you mean 'echo'"):
        engine.predict("ecko", {})
    with pytest.raises(NotFound, match="no feature view 'stat'"):
        engine.get_online_features(["stat:age"], {"user_id": 1})
    with pytest.raises(NotFound, match="feature view 'stats' has no feature 'agge'"):
        engine.get_online_features(["stats:agge"], {"user_id": 1})
    with pytest.raises(InvalidArgument, match="no features asked for"):
        engine.get_online_features([], {"user_id": 1})
    with pytest.raises(InvalidArgument, match="missing column 'user_id'"):
        engine.get_online_features(["stats:age"], {})
    with pytest.raises(NotFound, match="model 'echo' has no version 9"):
        engine.predict("echo", {}, version=9)


def test_a_new_version_is_served_from_the_next_request_on_and_the_old_one_stays(
    engine: st.Engine, tmp_path: Path
) -> None:
    ask = {"user_id": 1, "country": "de", "shop_id": 1, "amount": 5}
    first = engine.predict("echo", ask)
    assert engine.deploy("echo", write_model(tmp_path / "double.onnx", 7, scale=2.0)) == 2
    second = engine.predict("echo", ask)
    assert (first.version, second.version) == (1, 2)
    np.testing.assert_array_equal(second.outputs["y"], 2 * first.outputs["y"])
    np.testing.assert_array_equal(engine.predict("echo", ask, version=1).outputs["y"], first.outputs["y"])


def test_a_batch_that_waits_while_definitions_change_is_run_by_the_new_plan_or_refused(engine: st.Engine) -> None:
    plan = engine.plan_for_features(("stats:age",))
    columns = plan.new_columns()
    columns.append({"user_id": [1]})
    defaults = st.FeatureView("other", entity=USER, features=[st.Feature("x", st.Float32)])
    engine.apply([USER, defaults])
    assert engine.run(Route(plan), columns)[1].outputs[0][1].tolist() == [20.0]

    other = st.FeatureView("late", entity=USER, features=[st.Feature("x", st.Float32)])
    engine.apply([USER, other])
    late = engine.plan_for_features(("late:x",))
    waiting = late.new_columns()
    waiting.append({"user_id": [1]})
    engine.apply([USER, st.FeatureView("late", entity=USER, features=[st.Feature("x", st.Int64)])])
    assert engine.run(Route(late), waiting)[0].feature_types == ("Int64",)  # the reply names the type of the new plan
    member = st.Entity("user", keys={"member": st.String})
    rekeyed = st.FeatureView("late", entity=member, features=[st.Feature("x", st.Float32)])
    engine.apply([member, rekeyed])
    with pytest.raises(Unavailable, match="definitions changed"):
        engine.run(Route(late), waiting)


def test_a_list_of_features_that_is_used_again_is_read_again(engine: st.Engine) -> None:
    asked = ["stats:age"]
    assert engine.get_online_features(asked, {"user_id": 1}).feature_names == ["stats:age"]
    asked.append("stats:visits")
    assert engine.get_online_features(asked, {"user_id": 1}).feature_names == ["stats:age", "stats:visits"]
    assert engine.get_online_features(tuple(asked), {"user_id": 1}).feature_names == ["stats:age", "stats:visits"]

    again = ["late:x"]
    late = st.FeatureView("late", entity=USER, features=[st.Feature("x", st.Float32)])
    engine.apply([USER, late])
    assert len(engine.get_online_features(again, {"user_id": 1})) == 1
    member = st.Entity("user", keys={"member": st.String})
    engine.apply([member, st.FeatureView("late", entity=member, features=[st.Feature("x", st.Float32)])])
    assert len(engine.get_online_features(again, {"member": ["a", "b"]})) == 2  # takes the columns of now


def test_threads_share_an_engine_while_rows_are_pushed(engine: st.Engine) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        last = 0
        try:
            while not stop.is_set():
                visits = engine.get_online_features(["stats:visits"], {"user_id": [1, 2, 3]})["stats:visits"]
                assert len(set(visits.tolist())) == 1, "a push was seen in part"
                assert visits[0] >= last, "a push was seen and then unseen"
                last = visits[0]
        except BaseException as error:
            failures.append(error)

    start = 1_000_000
    engine.push("stats", ROWS | {"visits": [start] * 3})
    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(1, 30):
        engine.push("stats", ROWS | {"visits": [start + number] * 3})
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures
    assert engine.get_online_features(["stats:visits"], {"user_id": 1})["stats:visits"].tolist() == [start + 29]


def test_models_and_views_tell_what_a_request_needs(engine: st.Engine) -> None:
    assert engine.models() == [
        {
            "name": "echo",
            "version": 1,
            "columns": {"user_id": "Int64", "country": "String", "shop_id": "Int64", "amount": "Float64"},
            "outputs": ["y"],
            "runs": None,  # nobody has asked it yet
            "batching": "rows",
            "batching_why": None,
            "canary": None,
            "shadow": None,
            "problem": None,
        }
    ]
    assert engine.views()[1] == {
        "name": "shops",
        "keys": {"country": "String", "shop_id": "Int64"},
        "features": {"open": "Bool", "rent": "Float64"},
        "columns": {},
        "timestamp": None,
        "aliases": {},
    }
