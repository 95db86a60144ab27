"""`engine.views` and `engine.models`: mappings, rows, and cards in a notebook; and tags."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import commands
import pytest
from test_cli import write_model
from views_store import EVIL, N, by_key, expected, make_folder, nan_is_none, ok

import shorttail as st
from shorttail.errors import InvalidArgument, NotFound

pytest.importorskip("pandas")
import pyarrow.parquet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of two views and a model. Its tests only read the store."""
    return make_folder(tmp_path_factory.mktemp("views"))


# -- engine.views and engine.models ------------------------------------------------------------------------------------


def test_mappings_of_an_engine(folder: Path) -> None:
    with st.Engine.open(folder / "store") as engine:
        assert (list(engine.views), len(engine.views), "stats" in engine.views) == (["stats", "empty"], 2, True)
        assert (list(engine.models), len(engine.models), "stats" in engine.models) == (["delay"], 1, False)
        assert engine.views.get("statz") is None
        for mapping, name in ((engine.views, "statz"), (engine.models, "dellay")):
            for kind in (NotFound, KeyError):
                with pytest.raises(kind, match=r"did you mean '(stats|delay)'") as raised:
                    mapping[name]  # type: ignore[index]
                assert str(raised.value).startswith("no ")
        assert [view["name"] for view in engine.views()] == ["stats", "empty"]
        assert engine.views()[0]["keys"] == {"user_id": "Int64", "site": "String"}
        assert [model["name"] for model in engine.models()] == ["delay"]
        assert repr(engine.views["stats"]) == "StoredView('stats')"
        assert engine.views["stats"].definition.tags == ("pii", "daily")
        assert repr(engine.views) == "StoredViews(['stats', 'empty'])"
        engine.push("empty", {"id": [7], "x": [1.5]})
        try:
            assert engine.views["empty"].to_pandas()["x"].tolist() == [1.5]
        finally:
            engine.delete("empty", {"id": [7]})


def test_rows_as_arrow_and_pandas(folder: Path) -> None:
    with st.Engine.open(folder / "store") as engine:
        stats = engine.views["stats"]
        assert by_key(nan_is_none(stats.to_arrow().to_pylist())) == expected()
        stats.to_arrow().validate(full=True)
        gold = stats.to_arrow(where=["tier=gold", "score<1"])
        gold.validate(full=True)
        assert by_key(nan_is_none(gold.to_pylist())) == expected(
            holds=lambda row: row["tier"] == "gold" and row["score"] is not None and row["score"] < 1
        )
        assert (stats.to_arrow(limit=3).num_rows, stats.to_arrow(limit=0).num_rows) == (3, 0)
        assert stats.to_arrow(columns=["tier", "since"], limit=1).column_names == ["tier", "since"]
        frame = stats.to_pandas(where="tier=gold").sort_values("user_id")
        assert {name: str(kind) for name, kind in frame.dtypes.items()} == {
            "user_id": "Int64", "site": "string", "age": "Int32", "tier": "string", "score": "float32",
            "taste": "object", "new": "boolean", "since": "datetime64[us, UTC]", "updated_at": "datetime64[us, UTC]",
        }  # fmt: skip
        wanted = expected(holds=lambda row: row["tier"] == "gold")
        assert frame["age"].isna().tolist() == [row["age"] is None for row in wanted]
        assert frame["since"].tolist() == [row["since"] for row in wanted]
        assert len(stats.to_pandas(limit=20)) == 20
        assert stats.to_pandas(limit=0).dtypes.equals(stats.to_pandas().dtypes)
        whole = stats.to_pandas().sort_values("user_id")
        assert whole["score"].isna().tolist() == [row["score"] is None for row in expected()]
        assert whole["taste"].isna().tolist() == [row["taste"] is None for row in expected()]
        with stats.rows(where="new=true") as rows:
            assert sum(len(batch) for batch in rows) == N // 2
        with pytest.raises(InvalidArgument, match="column 'age' takes Int32"):
            stats.to_arrow(where="age=x")
        assert engine.views["empty"].to_arrow().schema.names == ["id", "x", "event_time"]
        got = stats.get({"user_id": [3, 99], "site": "a"})
        assert [item["status"] for item in got] == ["PRESENT", "NOT_FOUND"]
        assert got[0]["row"]["since"] == 1_577_847_600_000_003
        assert [(item["kind"], item["name"]) for item in engine.search("billing")] == [("feature", "stats:tier")]


def test_names_and_times_at_the_edges(tmp_path: Path) -> None:
    """Columns that bear the names of others, and times of years that Arrow's CSV cannot write."""
    names = ["status", "event_time", "event_time_", "a=b", "x.y", 'q"c']
    features = [*(st.Feature(name, st.Int64) for name in names), st.Feature("at", st.Timestamp)]
    view = st.FeatureView("v", entity=st.Entity("e", keys={"id": st.Int64}), features=features)
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([view])
        rows = {"id": [1, 2], **{name: [i, None] for i, name in enumerate(names)}, "at": [2**62, -(2**60)]}
        engine.push("v", rows)
        found = engine.views["v"].get({"id": 1})
    row = found[0]["row"]
    assert list(row) == ["id", *names, "at", "event_time__"]
    assert [row[name] for name in names] == list(range(6))
    scan = ["views", "scan", "v", "--where", "a=b=3"]
    (line,) = ok(tmp_path, *scan, "--json").json
    assert (line["a=b"], line["at"]) == (3, "148108-07-06T14:00:27.387904Z")
    out = ok(tmp_path, *scan, "--format", "csv", "--columns", 'at,"q""c",x.y').out
    assert out == '"at","q""c","x.y"\n"148108-07-06T14:00:27.387904Z",5,4\n'
    ok(tmp_path, *scan, "--output", str(tmp_path / "v.parquet"))
    assert pyarrow.parquet.read_table(tmp_path / "v.parquet").column_names[1:7] == names
    (got,) = ok(tmp_path, "views", "get", "v", "id=2", "--json").json
    assert (got["status"], got["row"]["status"]) == ("PRESENT", None)


class Checked(HTMLParser):
    """Collects the tags and the text of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


def test_cards_escape_all_that_they_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "m.onnx", bias=0.0)
    text = "<b>&\"' \x1b[31m"
    item = st.Entity("<i>&", keys={"<id>": st.Int64}, description=text, tags=["<u>"])
    feature = st.Feature("<s>", st.String, default="<img>", description=text)
    others = [st.Feature(name, st.Float32) for name in ("a", "b")]
    view = st.FeatureView("v", entity=item, features=[feature, *others], description=text, owner=text, tags=["<em>"])
    inputs = ["v:a", "v:b", "request:<q>"]
    model = st.Model("m", str(tmp_path / "m.onnx"), inputs, description=text, owner=text, tags=["<em>"])
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([item, view, model])
        engine.push("v", {"<id>": [1], "<s>": [EVIL], "a": [0.5], "b": [1.0]})
        cards = [engine.views["v"], engine.views, engine.models["m"], engine.models]
        for card in cards:
            html = card._repr_html_()
            found = Checked(html)
            assert found.tags == {"table", "thead", "tbody", "tr", "th", "td"}, html
            assert "\x1b" not in html
            assert "<em>" in found.text
        shown = Checked(engine.views["v"]._repr_html_()).text
        for part in ("<script>alert('x')</script>", "<img>", "<i>&", "<u>", "<id> Int64"):
            assert part in shown
        engine.views["v"].show()
        engine.models["m"].show()
        printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "view:        v\n" in printed
    assert "model:       m version 1\n" in printed
    assert "tags:        <em>" in printed


# -- tags --------------------------------------------------------------------------------------------------------------


def test_tags_are_documentation(tmp_path: Path) -> None:
    def views(tags: list[str]) -> list[Any]:
        item = st.Entity("item", keys={"id": st.Int64}, tags=tags)
        return [item, st.FeatureView("v", entity=item, features=[st.Feature("x", st.Float64, tags=tags)], tags=tags)]

    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply(views([]))
        engine.push("v", {"id": [1], "x": [2.0]})
        assert [c.kind for c in engine.apply(views([]))] == ["=", "="]
        changes = engine.apply(views(["a", "b c"]))
        shown = engine.store.catalog.definition("v").rows_id[:4]
        assert [(c.kind, c.detail) for c in changes] == [("~", "id Int64"), ("~", f"{shown}  tags")]
        found = engine.views["v"].describe()
        assert (found["tags"], found["entity"]["tags"], found["features"][0]["tags"]) == (["a", "b c"],) * 3
        assert found["rows"] == 1, "tags do not touch rows"


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("pii", "tags must be a list of names, not 'pii'"),
        (7, "tags must be a list of names, not 7"),
        ([7], "tag 7: a name is a string"),
        ([""], "tag '': a name has at least one character"),
        (["a", "a"], "a tag is given twice: a, a"),
        (["a\nb"], "a name has printable characters only"),
    ],
)
def test_wrong_tags(tags: Any, message: str) -> None:
    item = st.Entity("item", keys={"id": st.Int64})
    feature = st.Feature("x", st.Float64)
    makers: list[Any] = [
        lambda: st.Entity("item", keys={"id": st.Int64}, tags=tags),
        lambda: st.Feature("x", st.Float64, tags=tags),
        lambda: st.FeatureView("v", entity=item, features=[feature], tags=tags),
        lambda: st.Model("m", "m.onnx", ["v:x"], tags=tags),
    ]
    for make, what in zip(makers, ["entity 'item'", "feature 'x'", "feature view 'v'", "model 'm'"], strict=True):
        with pytest.raises(InvalidArgument) as raised:
            make()
        assert message in str(raised.value)
        assert str(raised.value).startswith(what)


def test_a_catalog_without_tags_is_read() -> None:
    from shorttail.define.catalog import Catalog

    item = st.Entity("item", keys={"id": st.Int64}, tags=["a"])
    view = st.FeatureView("v", entity=item, features=[st.Feature("x", st.Float64, tags=["b"])], tags=["c"])
    catalog = Catalog()
    catalog.add(view)

    def without_tags(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without_tags(part) for name, part in value.items() if name != "tags"}
        return [without_tags(part) for part in value] if isinstance(value, list) else value

    read = Catalog.from_json(json.dumps(without_tags(json.loads(catalog.to_json()))).encode())
    assert (read.entities["item"].tags, read.views["v"].tags, read.views["v"].features[0].tags) == ((), (), ())
    assert Catalog.from_json(catalog.to_json()) == catalog


def test_models_show_and_deploy_tags(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "store", tmp_path / "store")
    assert (
        "tags:        gold\n" in commands.run_well("models", "show", "delay", "--store", "store", folder=tmp_path).out
    )
    for bias, tags, shown in ((1.0, [], ["gold"]), (2.0, ["--tag", "x", "--tag", "y"], ["x", "y"])):
        write_model(tmp_path / "delay.onnx", bias)
        deploy = ["models", "deploy", "delay", "delay.onnx", "--store", "store", *tags]
        commands.run_well(*deploy, folder=tmp_path)
        listed = commands.run_well("models", "list", "--store", "store", "--json", folder=tmp_path).json
        assert listed[0]["tags"] == shown
