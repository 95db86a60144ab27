"""Definitions check themselves, survive JSON, and are collected from files; errors name the file's line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shorttail.define.catalog import Catalog, ModelEntry, TensorInfo, VersionInfo
from shorttail.define.collect import Definitions, collect
from shorttail.define.dtypes import Bool, Float32, Float64, Int32, Int64, String, Timestamp, Vector
from shorttail.define.entities import Alias, Entity
from shorttail.define.models import Model
from shorttail.define.ondemand import OnDemand, on_demand
from shorttail.define.sources import ParquetSource
from shorttail.define.views import Feature, FeatureView
from shorttail.errors import Internal, InvalidArgument, NotFound

USER = Entity("user", keys={"user_id": Int64})


def view(**changes: Any) -> FeatureView:
    arguments: dict[str, Any] = {
        "name": "stats",
        "entity": USER,
        "features": [Feature("age", Float32, default=0), Feature("taste", Vector(3), default=[1, 2, 3])],
    }
    return FeatureView(**{**arguments, **changes})


@on_demand
def ratio(amount: Float64, average: Float64) -> Float32:  # type: ignore[valid-type]
    """How unusual an amount is."""
    # This comment must not become part of the captured text.
    return amount / max(average, 1.0)


def test_a_view_survives_json() -> None:
    original = view(
        ttl="2d",
        source=ParquetSource("data/x.parquet", timestamp="at"),
        description="what they did",
        features=[Feature("age", Float32, 1), Feature("since", Timestamp, datetime(2026, 1, 1)), Feature("b", Bool)],
    )
    assert FeatureView.from_json(json.loads(json.dumps(original.to_json()))) == original
    assert original.features[1].default == 1_767_225_600_000_000


def test_key_order_survives_json() -> None:
    pair = Entity("pair", keys={"z": String, "a": Int64})
    assert list(Entity.from_json(json.loads(json.dumps(pair.to_json()))).keys) == ["z", "a"]


@pytest.mark.parametrize(
    "inputs", [["stats:age", ratio("request:amount", "stats:age")], {"x": ["stats:age"], "y": ["request:q"]}]
)
def test_a_model_survives_json(inputs: Any) -> None:
    asked = [item.removeprefix("request:") for item in Model("m", "m", inputs).references if "request:" in item]
    model = Model("fraud", "fraud.onnx", inputs, outputs=["p"], owner="risk", missing=dict.fromkeys(asked, 0.5))
    assert Model.from_json(json.loads(json.dumps(model.to_json()))) == model


@pytest.mark.parametrize(
    ("ttl", "ttl_us"),
    [
        (None, 0),
        ("2d", 172_800_000_000),
        ("12h", 43_200_000_000),
        ("30m", 1_800_000_000),
        ("45s", 45_000_000),
        (timedelta(seconds=1), 1_000_000),
    ],
)
def test_ttl_is_converted_to_microseconds(ttl: Any, ttl_us: int) -> None:
    assert view(ttl=ttl).ttl_us == ttl_us


@pytest.mark.parametrize("ttl", ["", "2", "2 days", "-1d", "0s", 3600, timedelta(0)])
def test_a_wrong_ttl_is_refused(ttl: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"feature view 'stats': ttl .* write '2d'"):
        view(ttl=ttl)


@pytest.mark.parametrize(
    ("dtype", "default", "kept"),
    [
        (Bool, True, True),
        (Int32, np.int64(7), 7),
        (Float32, 1, 1.0),
        (String, "x", "x"),
        (Timestamp, datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), 1_000_000),
        (Timestamp, "1970-01-02", 86_400_000_000),
        (Vector(2), np.array([1, 2]), (1.0, 2.0)),
        (Float32, float("nan"), None),
        (String, np.str_("x"), "x"),
    ],
)
def test_a_default_becomes_a_plain_value(dtype: Any, default: Any, kept: Any) -> None:
    assert Feature("f", dtype, default).default == kept


@pytest.mark.parametrize(
    ("dtype", "default"),
    [
        (Bool, 2),
        (Timestamp, timedelta(days=1)),
        (Int32, 1 << 31),
        (Int64, 1.5),
        (Int64, True),
        (Float32, "1"),
        (String, 1),
        (Vector(2), [1]),
        (Vector(2), "ab"),
    ],
)
def test_a_default_of_another_type_is_refused(dtype: Any, default: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Feature("f", dtype, default)
    assert caught.value.message.startswith(f"feature 'f': the default takes {dtype}; got ")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Entity("no/good", {"a": Int64}), "entity 'no/good': a name has no : and no /"),
        (lambda: Entity("e", None), "entity 'e': keys must map"),
        (lambda: Entity("e", {"a": Float32}), "key 'a' is Float32; a key is Int64 or String"),
        (lambda: Feature("f", float), "is not a type; use st.Float32"),
        (lambda: view(name="request"), "the name 'request' is reserved for request columns"),
        (lambda: view(features=[]), "at least one st.Feature"),
        (lambda: view(features=[Feature("a", Bool), Feature("a", Bool)]), "feature 'a' is named twice"),
        (lambda: view(features=[Feature("user_id", Int64)]), "'user_id' is a key of entity 'user'"),
        (lambda: view(entity="user"), "entity must be an st.Entity"),
        (lambda: view(source="x.parquet"), "source must be an st.ParquetSource"),
        (lambda: Model("m", "m.onnx", ["age"]), "'age' is not a feature reference; write 'view:feature'"),
        (lambda: Model("m", "m.onnx", "stats:age"), "model 'm': inputs must be a list"),
        (lambda: Model("m", "m.onnx", []), "model 'm': inputs must be a list"),
        (lambda: Model("m", "m.onnx", [ratio]), "call ratio with its arguments"),
        (lambda: Model("../m", "m.onnx", ["stats:age"]), "model '../m': a name has no : and no /"),
        (lambda: Model("m", "m.onnx", ["request:a"], missing=["a"]), "missing must be {column: value}"),
        (
            lambda: Model("m", "m.onnx", ["request:a", "v:f"], missing={"g": 1}),
            "model 'm': missing names 'g', which is not one of its columns: a, v:f",
        ),
        (lambda: Model("m", "m.onnx", ["stats:age"], outputs=["p", "p"]), "outputs must be a list of different"),
        (lambda: ratio("request:a"), r"ratio\(...\) takes 2 arguments \(amount, average\), not 1"),
        (lambda: ratio("request:a", 1.0), "1.0 is not a feature reference"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        make()
    assert "\n" not in caught.value.message


def test_on_demand_keeps_bare_source() -> None:
    assert ratio.source == "def ratio(amount, average):\n    return amount / max(average, 1.0)\n"
    assert ratio.params == (("amount", Float64), ("average", Float64))
    assert ratio.returns == Float32
    assert OnDemand.from_json(json.loads(json.dumps(ratio.to_json()))) == ratio


def test_on_demand_refuses_functions_that_a_server_could_not_compile() -> None:
    limits = {"upper": 3.0}

    def closes(x: Float64) -> Float64:  # type: ignore[valid-type]
        return min(x, limits["upper"])

    def reads_global(x: Float64) -> Float64:  # type: ignore[valid-type]
        return USER if x else x

    def untyped(x) -> Float64:  # type: ignore[no-untyped-def,valid-type]
        return x

    def text(x: String) -> Float64:  # type: ignore[valid-type]
        return len(x)

    def defaulted(x: Float64 = 1.0) -> Float64:  # type: ignore[valid-type]
        return x

    for function, message in (
        (closes, "uses 'limits', which is a dict"),
        (reads_global, "uses 'USER', which is an Entity"),
        (untyped, "parameter 'x' has no type"),
        (text, "parameter 'x' is String"),
        (defaulted, "plain parameter without a default"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            on_demand(function)


FILE = """
import math
import numpy as np
import shorttail as st
from entities import user

views = [st.FeatureView("stats", entity=user, features=[st.Feature("age", st.Float32)],
                        source=st.ParquetSource("data/stats.parquet"))]

@st.on_demand
def wave(x: st.Float64) -> st.Float32:
    return math.sin(x) + np.exp(x)

models = {"m": st.Model("m", path="m.onnx", inputs=["stats:age", wave("request:x")])}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "entities.py").write_text(
        "import shorttail as st\nuser = st.Entity('user', keys={'user_id': st.Int64})\n"
    )
    (tmp_path / "definitions.py").write_text(FILE)
    return tmp_path


def test_a_file_may_import_modules_of_its_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.parent)
    found = collect(Path(project.name) / "definitions.py")
    assert (list(found.entities), list(found.views), list(found.models)) == (["user"], ["stats"], ["m"])
    assert found.models["m"].path == str(project / "m.onnx")
    assert found.views["stats"].source == ParquetSource(str(project / "data" / "stats.parquet"))


def test_an_edited_file_is_read_again_at_once(project: Path) -> None:
    collect(project / "definitions.py")
    (project / "definitions.py").write_text(FILE.replace('"stats"', '"other"').replace("stats:", "other:"))
    assert list(collect(project / "definitions.py").views) == ["other"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("def f(:", r"definitions.py:1: SyntaxError"),
        ("x = 1 / 0", r"definitions.py:1: ZeroDivisionError: division by zero"),
        ("import nowhere_to_be_found", r"definitions.py:1: ModuleNotFoundError: No module"),
        ("raise SystemExit(3)", r"definitions.py:1: SystemExit: 3"),
        ("import shorttail as st\nst.Entity('a/b', {})", r"definitions.py:2: entity 'a/b'"),
        ("x = 3", r"definitions.py: it defines no entity"),
        (
            "import shorttail as st\na = st.Entity('e', {'k': st.Int64})\nb = st.Entity('e', {'k': st.String})",
            "two different entities are named 'e'",
        ),
    ],
)
def test_a_file_with_a_mistake_is_one_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "definitions.py").write_text(line + "\n")
    with pytest.raises(InvalidArgument, match=message) as caught:
        collect(tmp_path / "definitions.py")
    assert "\n" not in caught.value.message


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no such definitions file"):
        collect(tmp_path / "definitions.py")


def test_the_catalog_survives_json() -> None:
    catalog = Catalog()
    catalog.add(view(ttl="1h"))
    model = Model("m", "/m.onnx", ["stats:age"])
    tensor = TensorInfo("x", "float", (None, 1))
    version = VersionInfo(model, "00ff", 1, (tensor,), (tensor,))
    catalog.models["m"] = ModelEntry(2, 1, {1: version, 2: version})
    assert Catalog.from_json(catalog.to_json()) == catalog
    assert catalog.tables["stats"].id == 1
    assert catalog.new_table(catalog.definition("stats")).id == 2


def test_a_damaged_catalog_is_reported() -> None:
    with pytest.raises(Internal, match="catalog is damaged"):
        Catalog.from_json(b'{"views": 3}')


def test_unknown_names_get_a_suggestion() -> None:
    catalog = Catalog(views={"stats": view()})
    with pytest.raises(NotFound, match="no feature view 'stat'; did you mean 'stats'"):
        catalog.view("stat")
    with pytest.raises(NotFound, match="'stats' has no feature 'zzz'; features: age, taste"):
        catalog.feature("stats:zzz")
    with pytest.raises(NotFound, match="no model 'm'; there are no models yet"):
        catalog.model("m")


def test_definitions_are_the_same_in_another_process(tmp_path: Path) -> None:
    """Every field of every definition survives `to_json`, also those that a catalog does not keep."""
    (tmp_path / "definitions.py").write_text(EVERY_FIELD)
    made = collect(tmp_path / "definitions.py")
    content = (tmp_path / "definitions.py").read_bytes()
    assert made.origin == {
        "file": str(tmp_path / "definitions.py"),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    sent = Definitions.from_json(made.to_json())
    assert sent == made
    assert sent.origin == made.origin
    kinds = ((made.entities, sent.entities), (made.aliases, sent.aliases), (made.views, sent.views))
    seen: set[tuple[str, str]] = set()
    for before, after in (*kinds, (made.models, sent.models)):
        assert list(before) == list(after)
        for one, other in zip(before.values(), after.values(), strict=True):
            parts = [(one, other), *zip(getattr(one, "features", ()), getattr(other, "features", ()), strict=True)]
            for old, new in parts:
                for field in dataclasses.fields(old):
                    if field.init and field.name != "ttl":  # ttl_us is the same in one unit
                        assert getattr(old, field.name) == getattr(new, field.name), field.name
                        if getattr(old, field.name) != field.default:
                            seen.add((type(old).__name__, field.name))
    unset = {
        (kind.__name__, field.name)
        for kind in (Entity, Alias, Feature, FeatureView, Model)
        for field in dataclasses.fields(kind)
        if field.init and field.name != "ttl"
    } - seen
    assert unset == set(), "set them in EVERY_FIELD, so that this test sees whether they are sent"


EVERY_FIELD = """
import shorttail as st

@st.on_demand
def half(amount: st.Float64) -> st.Float64:
    return amount / 2

user = st.Entity("user", keys={"user_id": st.Int64, "country": st.String}, description="a person", tags=["pii"])
buyer = user.alias("buyer", user_id="buyer_id")
one = st.Entity("one", keys={})
stats = st.FeatureView(
    "stats", entity=user, ttl="36h", owner="team", description="what", tags=["a", "b"],
    source=st.ParquetSource("rows.parquet", timestamp="at"),
    features=[
        st.Feature("age", st.Float32, default=float("inf"), description="years", column="Age", tags=["x"],
                   renamed_from="years"),
        st.Feature("tastes", st.Vector(2, st.Float64), default=[0.5, -1.0]),
        st.Feature("at", st.Timestamp),
    ],
)
rates = st.FeatureView("rates", entity=one, features=[st.Feature("usd", st.Float64)])
total = st.Model(
    "total", path="total.onnx", inputs={"b": ["stats:age"], "a": [half("request:amount"), "buyer:stats:age"]},
    outputs=["total"], description="sums", owner="team", run="mlflow:3f", metrics={"auc": 0.5},
    missing={"amount": 1.0}, batching="request", run_timeout="200ms", examples="golden.csv", tags=["t"],
)
raw = st.Model("raw", path="raw.onnx")
"""


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"entities": [{}]}', b'{"entities": 1}'])
def test_documents_of_another_form_are_one_line(data: bytes) -> None:
    with pytest.raises(InvalidArgument, match="definitions of another version of shorttail"):
        Definitions.from_json(data)
