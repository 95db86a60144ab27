"""Changes of definitions while rows are there: what changes in place, what makes a new table, and what models keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import commands
import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper

import shorttail as st
from shorttail.errors import InvalidArgument, NotFound
from shorttail.registry.planning import Options
from shorttail.results import Status
from shorttail.server.writer import make_edit
from shorttail.store.environment import table_pages
from shorttail.store.verify import verify

USER = st.Entity("user", keys={"user_id": st.Int64})
AGE, VISITS, TIER = st.Feature("age", st.Float32), st.Feature("visits", st.Int32), st.Feature("tier", st.String)
ROWS = {"user_id": [1, 2, 3], "age": [10.0, 20.0, 30.0], "visits": [1, 2, 3], "tier": ["a", "b", None]}


def view(*features: st.Feature, **options: Any) -> st.FeatureView:
    return st.FeatureView("stats", entity=USER, features=list(features or (AGE, VISITS, TIER)), **options)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([view()])
        engine.push("stats", ROWS)
        yield engine


def identity(path: Path, columns: int) -> str:
    """Save a model that returns its matrix."""
    shape = [None, columns]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", ends[:1], ends[1:])
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return str(path)


def answers(engine: st.Engine, *names: str, ids: tuple[int, ...] = (1, 2, 3)) -> list[list[Any]]:
    """Return a list per feature."""
    found = engine.get_online_features([f"stats:{name}" for name in names], {"user_id": list(ids)}).to_dict()
    return [found[f"stats:{name}"] for name in names]


def predicted(engine: st.Engine, model: str, user: int, version: int | None = None) -> list[float]:
    row: list[float] = engine.predict(model, {"user_id": user}, version=version).outputs["y"][0].tolist()
    return row


def table(engine: st.Engine) -> int:
    engine.refresh()
    return engine.store.catalog.tables["stats"].id


def is_sound(engine: st.Engine) -> bool:
    return verify(engine.store.path).ok


def change(engine: st.Engine, *definitions: Any, **options: Any) -> list[str]:
    """Apply definitions, and return the lines about the view."""
    found = [each for each in engine.apply(list(definitions), **options) if each.what == "view stats"]
    return [text for each in found for text in (each.detail, *each.more)]


# -- in place ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        (view(TIER, AGE, VISITS), "answers change: features in another order"),
        (view(AGE, TIER), "answers change: removed visits"),
        (view(AGE, replace(VISITS, name="n", renamed_from="visits"), TIER), "answers change: renamed visits -> n"),
        (view(AGE, replace(VISITS, default=7), TIER), "answers change: default of visits None -> 7"),
        (view(ttl="2d"), "answers change: ttl none -> 2d"),
        (view(owner="us"), "owner"),
        (view(description="of users"), "descriptions"),
        (view(tags=["pii"]), "tags"),
        (
            replace(view(), entity=st.Entity("user", keys={"id": st.Int64})),
            "answers change: keys named id instead of user_id",
        ),
    ],
)
def test_what_changes_no_rows_makes_no_table(engine: st.Engine, changed: st.FeatureView, wanted: str) -> None:
    before = table(engine)
    [line] = change(engine, changed)
    assert line.endswith(f"  {wanted}")
    assert table(engine) == before
    assert change(engine, changed) == [engine.store.catalog.definition("stats").rows_id[:4]], "nothing is left to do"
    key = next(iter(changed.keys))
    for feature in changed.features:
        old = feature.renamed_from or feature.name
        found = engine.get_online_features([f"stats:{feature.name}"], {key: [1, 2, 9]}).to_dict()
        assert found[f"stats:{feature.name}"] == [*ROWS[old][:2], feature.default]  # type: ignore[index]


def test_what_was_removed_does_not_come_back(engine: st.Engine) -> None:
    change(engine, view(AGE))
    engine.push("stats", {"user_id": [4], "age": [40.0]})
    change(engine, view(AGE, VISITS))
    assert answers(engine, "age", "visits", ids=(1, 4)) == [[10.0, 40.0], [None, None]]


def test_a_rename_is_done_once(engine: st.Engine) -> None:
    renamed = view(AGE, replace(VISITS, name="n", renamed_from="visits"), TIER)
    change(engine, renamed)
    engine.push("stats", {"user_id": [1], "n": [11]}, partial=True)
    assert change(engine, renamed) == [engine.store.catalog.definition("stats").rows_id[:4]]
    assert answers(engine, "n", "age") == [[11, 2, 3], [10.0, 20.0, 30.0]]
    with pytest.raises(NotFound) as caught:
        engine.apply([view(replace(AGE, name="years", renamed_from="ages"))])
    assert caught.value.message == (
        "feature view 'stats': feature 'years' is renamed from 'ages', which is not in the store; did you mean 'age'?"
    )
    with pytest.raises(InvalidArgument, match="feature 'x' is renamed from 'age', which is still there"):
        view(AGE, replace(AGE, name="x", renamed_from="age"))


@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
@pytest.mark.parametrize(
    "changed", [view(VISITS, AGE, TIER), view(st.Feature("score", st.Float32), AGE, TIER, VISITS)], ids=["order", "new"]
)
def test_a_push_that_was_read_before_a_change_gives_each_feature_its_value(
    engine: st.Engine, changed: st.FeatureView, partial: bool
) -> None:
    """A server reads a push, lets it wait for a commit, and definitions may change in between."""
    rows = {"user_id": [1, 4], "age": [11.0, 40.0], "visits": [12, 41], "tier": ["c", "d"]}
    edit = make_edit(engine.store, "push", "stats", rows, {"partial": partial})
    change(engine, changed)
    assert engine.store.commit([edit]) == [2]
    assert answers(engine, "age", "visits", "tier", ids=(1, 4)) == [rows["age"], rows["visits"], rows["tier"]]


def test_a_push_that_gives_a_feature_that_is_gone_says_so(engine: st.Engine) -> None:
    edit = make_edit(engine.store, "push", "stats", ROWS, {})
    change(engine, view(AGE, TIER))
    [error] = engine.store.commit([edit])
    assert str(error) == "feature view 'stats' has no feature 'visits', which the rows give"


# -- new tables ----------------------------------------------------------------------------------------------------


def test_a_feature_is_added(engine: st.Engine) -> None:
    before = table(engine)
    lines = change(engine, view(AGE, st.Feature("score", st.Float64, default=0.5), VISITS, TIER))
    assert lines[0].endswith("rows change: new feature score")
    assert "is built beside" in lines[1]
    assert "3 stored rows kept" in lines[1]
    assert table(engine) != before
    assert answers(engine, "age", "score", "visits", "tier") == [ROWS["age"], [0.5] * 3, ROWS["visits"], ROWS["tier"]]
    engine.push("stats", {"user_id": [2], "age": [21.0], "score": [9.0], "visits": [22], "tier": ["z"]})
    assert answers(engine, "age", "score", ids=(2,)) == [[21.0], [9.0]]
    assert is_sound(engine)


@pytest.mark.parametrize(
    ("old", "new", "values"),
    [
        (st.Bool, st.Int32, [True, False, None]),
        (st.Bool, st.Float64, [True, False, None]),
        (st.Int32, st.Int64, [-(2**31), 2**31 - 1, None]),
        (st.Int32, st.Float64, [-(2**31), 2**31 - 1, None]),
        (st.Float32, st.Float64, [1.5, -0.0, None]),
    ],
    ids=repr,
)
def test_a_type_is_widened(tmp_path: Path, old: Any, new: Any, values: list[Any]) -> None:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([view(AGE, st.Feature("x", old), TIER)])
        rows = {**{name: ROWS[name] for name in ("user_id", "age", "tier")}, "x": values}
        engine.push("stats", rows)
        lines = change(engine, view(AGE, st.Feature("x", new), TIER))
        assert lines[0].endswith(f"rows change: widened x {old} -> {new}")
        assert answers(engine, "age", "x", "tier") == [ROWS["age"], values, ROWS["tier"]]


def test_a_source_fills_what_is_new(engine: st.Engine, tmp_path: Path) -> None:
    """Of a key that the store and the source have, the later event time wins; what was only pushed stays."""
    times = pa.array([1_000_000_000_000_000, 4_000_000_000_000_000, 1_000_000_000_000_000], pa.timestamp("us", "UTC"))
    rows = {
        "user_id": [1, 2, 9],
        "age": [-1.0, -2.0, -9.0],
        "visits": [-1, -2, -9],
        "tier": ["s"] * 3,
        "score": [0.1, 0.2, 0.9],
    }
    path = tmp_path / "stats.parquet"
    pq.write_table(pa.table({**rows, "at": times}), path)
    source = st.ParquetSource(str(path), timestamp="at")
    changed = view(AGE, VISITS, TIER, st.Feature("score", st.Float64), source=source)
    with pytest.raises(InvalidArgument, match=r"at row 1: .* ahead of this host"):
        engine.apply([changed])
    assert engine.store.count("stats") == 3
    times = pa.array([1_000_000_000_000_000] * 3, pa.timestamp("us", "UTC"))
    pq.write_table(pa.table({**rows, "at": times}), path)
    engine.apply([changed])
    assert answers(engine, "age", "score", ids=(1, 2, 3, 9)) == [[10.0, 20.0, 30.0, -9.0], [None, None, None, 0.9]]


def test_keys_change_with_a_source(engine: st.Engine, tmp_path: Path) -> None:
    other = replace(view(AGE), entity=st.Entity("user", keys={"user_id": st.String}))
    with pytest.raises(InvalidArgument, match=r"holds 3 rows, its keys change .* --prune drops these rows"):
        engine.apply([other])
    path = tmp_path / "stats.parquet"
    pq.write_table(pa.table({"user_id": ["a", "b"], "age": [1.0, 2.0]}), path)
    lines = change(engine, replace(other, source=st.ParquetSource(str(path))))
    assert "3 stored rows dropped" in lines[1]
    found = engine.get_online_features(["stats:age"], {"user_id": ["a", "b", "c"]}).to_dict()
    assert found["stats:age"] == [1.0, 2.0, None]


def test_keys_change_without_a_source_if_the_rows_may_go(engine: st.Engine) -> None:
    other = replace(view(AGE), entity=st.Entity("user", keys={"user_id": st.String}))
    engine.apply([other], prune=True)
    assert engine.store.count("stats") == 0
    engine.push("stats", {"user_id": ["a"], "age": [1.0]})


def test_a_failed_change_leaves_all_as_it_was(engine: st.Engine, tmp_path: Path) -> None:
    path = tmp_path / "stats.parquet"
    pq.write_table(pa.table({"user_id": [1], "age": ["old"], "score": [1.0]}), path)
    before = engine.store.catalog.to_json()
    with pytest.raises(InvalidArgument, match="column 'age'"):
        engine.apply([view(AGE, st.Feature("score", st.Float64), source=st.ParquetSource(str(path)))])
    engine.refresh()
    after = engine.store.catalog
    assert (after.filling, after.coming) == ({}, {})
    assert replace(after, next_table_id=0).to_json() == replace(st_catalog(before), next_table_id=0).to_json()
    assert answers(engine, "age", "visits") == [ROWS["age"], ROWS["visits"]]


def st_catalog(document: bytes) -> Any:
    from shorttail.define.catalog import Catalog

    return Catalog.from_json(document)


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(engine: st.Engine, tmp_path: Path) -> st.Model:
    made = st.Model("m", path=identity(tmp_path / "m.onnx", 2), inputs=["stats:age", "stats:visits"])
    engine.apply([view(), made])
    return made


def test_a_model_moves_if_its_answers_stay(engine: st.Engine, model: st.Model) -> None:
    wider = view(AGE, replace(VISITS, dtype=st.Int64), TIER, st.Feature("score", st.Float64))
    assert change(engine, wider)[-1] == "model m v1 moves: compatible"
    assert predicted(engine, "m", 2) == [20.0, 2.0]
    engine.push("stats", {"user_id": [2], "visits": [200]}, partial=True)
    assert predicted(engine, "m", 2) == [20.0, 200.0]
    assert engine.store.catalog.definitions == {}
    assert change(engine, view(AGE, replace(VISITS, dtype=st.Int64)))[-1] == "model m v1 moves: compatible"


@pytest.mark.parametrize(
    ("changed", "kept", "before", "after"),
    [
        (view(replace(AGE, default=5.0), VISITS), "default None of 'age'", None, 5.0),
        (view(VISITS), "'age'", 10.0, None),
        (view(replace(AGE, name="years", renamed_from="age"), VISITS), "'age'", 10.0, None),
    ],
)
def test_a_model_keeps_its_answers_until_the_change_is_accepted(
    engine: st.Engine, model: st.Model, changed: st.FeatureView, kept: str, before: float | None, after: float | None
) -> None:
    user = 1 if before is not None else 99
    assert change(engine, changed)[-1] == f"model m v1 keeps {kept} until it is deployed or accepted"
    found = predicted(engine, "m", user)[0]
    assert found == before or (before is None and np.isnan(found))
    engine.push("stats", {"user_id": [1], "visits": [100]}, partial=True)
    assert predicted(engine, "m", 1) == [10.0, 100.0], "pushes reach a table that has more columns than the view"
    if after is None:
        with pytest.raises(NotFound, match="has no feature 'age'"):
            engine.apply([changed], accept=True)
        assert predicted(engine, "m", 1) == [10.0, 100.0]
        return
    assert change(engine, changed, accept=True)[-1] == "model m v1 moves: accepted"
    assert predicted(engine, "m", user)[0] == after
    assert engine.store.catalog.definitions == {}


def test_a_model_that_keeps_a_removed_feature_has_it_in_new_tables(engine: st.Engine, model: st.Model) -> None:
    change(engine, view(VISITS))
    change(engine, view(VISITS, st.Feature("score", st.Float64)))
    assert predicted(engine, "m", 2) == [20.0, 2.0]
    engine.push("stats", {"user_id": [2], "visits": [200], "score": [1.0]})
    assert predicted(engine, "m", 2) == [20.0, 200.0]
    with pytest.raises(NotFound, match="has no feature 'age'"):
        engine.get_online_features(["stats:age"], {"user_id": [2]})
    assert is_sound(engine)


def test_a_load_fills_what_only_a_model_keeps(engine: st.Engine, model: st.Model, tmp_path: Path) -> None:
    rows = {"user_id": [1, 2, 4], "age": [1.0, 2.0, 4.0], "visits": [1, 2, 4], "tier": ["a", "b", "d"]}
    pq.write_table(pa.table(rows), tmp_path / "whole.parquet")
    pq.write_table(pa.table({name: rows[name] for name in ("user_id", "visits")}), tmp_path / "fewer.parquet")
    change(engine, view(VISITS))
    engine.load("stats", str(tmp_path / "whole.parquet"))
    assert predicted(engine, "m", 4) == [4.0, 4.0]
    change(engine, view(VISITS, st.Feature("more", st.Bool), source=st.ParquetSource(str(tmp_path / "whole.parquet"))))
    assert predicted(engine, "m", 4) == [4.0, 4.0]
    change(engine, view(VISITS))
    engine.load("stats", str(tmp_path / "fewer.parquet"))
    assert predicted(engine, "m", 4)[1] == 4.0
    assert np.isnan(predicted(engine, "m", 4)[0]), "the source has it no more"
    with pytest.raises(InvalidArgument, match="no column 'visits'"):
        engine.load("stats", pa.table({"user_id": [1], "age": [1.0]}))


def test_a_feature_read_from_another_column_has_its_values_beside_those_that_a_model_keeps(
    engine: st.Engine, model: st.Model, tmp_path: Path
) -> None:
    rows = {**ROWS, "older": [-1.0, -2.0, -3.0]}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    source = st.ParquetSource(str(tmp_path / "rows.parquet"))
    change(engine, view(source=source))
    engine.delete("stats", {"user_id": [1, 2, 3]})
    engine.materialize("stats")
    other = view(replace(AGE, column="older"), VISITS, TIER, source=source)
    assert change(engine, other)[-1].startswith("model m v1 keeps the values of 'age'")
    assert answers(engine, "age") == [[-1.0, -2.0, -3.0]]
    assert predicted(engine, "m", 2) == [20.0, 2.0]
    engine.materialize("stats")
    assert (answers(engine, "age"), predicted(engine, "m", 2)) == ([[-1.0, -2.0, -3.0]], [20.0, 2.0])


def test_a_deployed_model_takes_the_newest(engine: st.Engine, model: st.Model, tmp_path: Path) -> None:
    change(engine, view(AGE, VISITS, ttl="1s"))
    old = {"user_id": [1], "age": [1.0], "visits": [1], "event_time": [1_000_000_000_000_000]}
    engine.delete("stats", {"user_id": [1]})
    engine.push("stats", old)
    assert engine.predict("m", {"user_id": 1}).statuses["stats"][0] == Status.PRESENT
    engine.deploy("m", identity(tmp_path / "two.onnx", 2))  # the same bytes: no new version
    assert engine.predict("m", {"user_id": 1}).statuses["stats"][0] == Status.PRESENT
    path = tmp_path / "two.onnx"
    onnx_model = onnx.load(path)
    onnx_model.doc_string = "another file"
    onnx.save(onnx_model, path)
    assert engine.deploy("m", path) == 2
    assert engine.predict("m", {"user_id": 1}).statuses["stats"][0] == Status.STALE
    assert engine.predict("m", {"user_id": 1}, version=1).statuses["stats"][0] == Status.PRESENT


# -- plans and pruning -----------------------------------------------------------------------------------------------


def test_a_plan_is_carried_out_or_refused(engine: st.Engine) -> None:
    plan = engine.plan([view(ttl="2d")])
    assert [change.kind for change in plan.changes] == ["=", "~"]
    assert engine.plan([view(ttl="2d")]).id == plan.id
    assert engine.plan([view(ttl="3d")]).id != plan.id
    engine.apply([view(owner="us")])
    with pytest.raises(InvalidArgument, match=f"plan {plan.id[:8]} is not what would be done now"):
        engine.apply([view(ttl="2d")], plan=plan.id[:8])
    again = engine.plan([view(ttl="2d")])
    engine.apply([view(ttl="2d")], plan=again.id[:8])
    assert engine.store.catalog.views["stats"].ttl_us == 2 * 86_400_000_000
    with pytest.raises(InvalidArgument, match="plan nothing is not what would be done now"):
        engine.apply([view()], plan="nothing")


def test_a_plan_shows_all_errors(engine: st.Engine, tmp_path: Path) -> None:
    other = st.FeatureView("Stats", entity=USER, features=[AGE])
    plan = engine.plan(
        [view(replace(AGE, dtype=st.Int32)), other, st.Model("m", identity(tmp_path / "m.onnx", 1), ["stats:ages"])]
    )
    assert [(each.what, each.detail[:42]) for each in plan.changes if each.kind == "!"] == [
        ("view stats", "feature view 'stats': feature 'age' is Flo"),
        ("model m", "model 'm': feature view 'stats' has no fea"),
        ("views", "feature view 'Stats' differs from 'stats' "),
    ]
    assert len(plan.errors) == 3


def test_views_and_models_are_removed_only_if_asked(engine: st.Engine, model: st.Model) -> None:
    other = st.FeatureView("other", entity=USER, features=[AGE])
    plan = engine.plan([other])
    assert "-" not in {each.kind for each in engine.apply([other])}
    assert [(each.kind, each.what, each.detail) for each in plan.kept] == [
        ("-", "view stats", "in the store, not in the file: kept; model m uses it"),
        ("-", "model m", "in the store, not in the file: kept; --prune removes it"),
    ]
    assert predicted(engine, "m", 1) == [10.0, 1.0]
    with pytest.raises(InvalidArgument) as caught:
        engine.apply([other, model], prune=True)
    assert "stats" in caught.value.message or "no feature view 'stats'" in caught.value.message
    assert predicted(engine, "m", 1) == [10.0, 1.0]
    found = engine.apply([other], prune=True)
    assert [(each.what, each.detail) for each in found if each.kind == "-"] == [
        ("model m", "removed with 1 version"),
        ("view stats", "removed with its rows"),
    ]
    for ask in (lambda: engine.predict("m", {"user_id": 1}), lambda: answers(engine, "age")):
        with pytest.raises(NotFound):
            ask()
    engine.apply([view()])
    assert engine.store.count("stats") == 0


def test_a_model_that_comes_back_is_not_the_one_that_was_removed(engine: st.Engine, model: st.Model) -> None:
    assert predicted(engine, "m", 2) == [20.0, 2.0]
    engine.apply([view()], prune=True)
    assert not (Path(engine.store.path) / "models" / "m").exists()
    path = Path(model.path)
    shape = [None, 2]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negative", ends[:1], ends[1:])
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    with st.Engine.open(engine.store.path) as other:
        other.apply([view(), model])
    assert predicted(engine, "m", 2) == [-20.0, -2.0]
    assert engine.predict("m", {"user_id": 2}).version == 1


def test_a_rename_that_keeps_its_source_column_is_done_in_place(engine: st.Engine, tmp_path: Path) -> None:
    pq.write_table(pa.table(ROWS), tmp_path / "stats.parquet")
    source = st.ParquetSource(str(tmp_path / "stats.parquet"))
    engine.apply([view(source=source)])
    before = table(engine)
    renamed = replace(AGE, name="years", renamed_from="age", column="age")
    change(engine, view(renamed, VISITS, TIER, source=source))
    assert table(engine) == before
    engine.materialize("stats")
    assert answers(engine, "years") == [ROWS["age"]]


def test_explain_says_which_id_changes(engine: st.Engine) -> None:
    from shorttail.registry.apply import plan

    wanted = view(AGE, VISITS, TIER, st.Feature("x", st.Bool), ttl="1d", owner="us")
    [found] = [
        each for each in plan(engine.store, [wanted], Options(explain=True)).changes if each.what == "view stats"
    ]
    assert found.more[-3:] == (
        "new feature x: changes rows and answers",
        "ttl none -> 1d: changes answers",
        "owner: changes no id",
    )


# -- going back ------------------------------------------------------------------------------------------------------


def test_a_view_goes_back_to_the_table_before_its_last_load(engine: st.Engine) -> None:
    with pytest.raises(InvalidArgument, match="feature view 'stats' has no earlier table"):
        engine.store.rollback("stats")
    engine.load("stats", {name: values[:2] for name, values in ROWS.items()})
    engine.push("stats", {"user_id": [7], "age": [70.0], "visits": [7], "tier": ["p"]})
    engine.delete("stats", {"user_id": [1]})
    assert answers(engine, "age", ids=(1, 2, 3, 7)) == [[None, 20.0, None, 70.0]]
    assert engine.store.rollback("stats") == (2, 2)
    assert answers(engine, "age", ids=(1, 2, 3, 7)) == [[None, 20.0, 30.0, None]], "it takes deletes, and no pushes"
    event = engine.history("stats")[-1]
    assert (event.action, event.subject, event.detail) == ("rolled back", "view stats", {"rows": 2})
    assert is_sound(engine)
    engine.store.rollback("stats")
    assert answers(engine, "age", ids=(1, 2, 3, 7)) == [[None, 20.0, None, 70.0]]
    change(engine, view(TIER, AGE, VISITS))
    engine.store.rollback("stats")
    assert answers(engine, "tier", "age", ids=(2, 3)) == [["b", None], [20.0, 30.0]]
    change(engine, view(AGE, st.Feature("new", st.Bool)))
    with pytest.raises(InvalidArgument, match="has no earlier table"):
        engine.store.rollback("stats")


def test_a_damaged_earlier_table_keeps_no_row_from_being_deleted(engine: st.Engine) -> None:
    engine.load("stats", ROWS)
    engine.refresh()
    table_id = engine.store.catalog.previous["stats"].id
    with engine.store.environment.write() as writer:
        [(bucket, page)] = [(key, bytes(found)) for key, found in table_pages(writer.txn, table_id)]
        writer.put_page(table_id, bucket, page[:9] + bytes([page[9] ^ 1]) + page[10:])
    assert engine.delete("stats", {"user_id": [2]}) == 1
    assert answers(engine, "age") == [[10.0, None, 30.0]]
    with pytest.raises(InvalidArgument, match="has no earlier table"):
        engine.store.rollback("stats")
    assert is_sound(engine)


def test_the_command_says_what_is_left_out(engine: st.Engine) -> None:
    old = {**ROWS, "event_time": [1_000_000_000_000_000] * 3}
    engine.load("stats", old)
    engine.load("stats", old)
    engine.push("stats", {"user_id": [7], "age": [70.0], "visits": [7], "tier": ["p"]})
    shown = commands.run_well("views", "rollback", "stats", "--store", engine.store.path).out
    assert shown.splitlines() == [
        "stats: 3 rows instead of 4",
        "1 row with event times after that load left out; what was pushed since is to be pushed again",
    ]
    found = commands.run_well("views", "rollback", "stats", "--store", engine.store.path, "--json").json
    assert found == {"view": "stats", "rows": 4, "rows_before": 3, "newer_rows_left_out": 0}
    assert "no feature view 'stat'" in commands.error_of("views", "rollback", "stat", "--store", engine.store.path)


def test_plans_that_a_change_does_not_concern_stay(engine: st.Engine, model: st.Model) -> None:
    plan = engine.plan_for_model("m")
    features = engine.plan_for_features(("stats:age",))
    engine.apply([st.FeatureView("other", entity=USER, features=[AGE]), view(owner="us")])
    again = engine.plan_for_model("m")
    assert again.lookups[0] is plan.lookups[0]
    assert again.catalog_version > plan.catalog_version
    assert engine.plan_for_features(("stats:age",)).lookups[0] is features.lookups[0]
    engine.apply([view(TIER, AGE, VISITS), model])
    assert engine.plan_for_model("m").lookups[0] is not plan.lookups[0]
    assert predicted(engine, "m", 2) == [20.0, 2.0]


def test_a_plan_reads_the_inputs_of_models_as_often_for_many_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a plan of 200 views and 100 models takes seconds."""
    path, references = identity(tmp_path / "m.onnx", 2), st.Model.references
    reads: dict[int, list[str]] = {2: [], 20: []}
    for count, read in reads.items():
        views = [st.FeatureView(f"v{i}", entity=USER, features=[AGE]) for i in range(count)]
        models = [st.Model(f"m{i}", path, ["v0:age", "v1:age"]) for i in range(3)]
        counted = property(lambda model, read=read: read.append(model.name) or references.__get__(model))
        with st.Engine.open(tmp_path / str(count), create=True) as engine, monkeypatch.context() as patch:
            engine.apply([*views, *models])
            patch.setattr(st.Model, "references", counted)
            engine.plan([replace(views[0], features=[AGE, VISITS]), *views[1:], *models])
    assert len(reads[2]) == len(reads[20]) > 0
