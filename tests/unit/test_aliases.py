"""Aliases: one view that a request looks up by several columns, each time as another thing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as some
from onnx import TensorProto, helper, numpy_helper

import shorttail as st
from shorttail.define.catalog import Catalog
from shorttail.define.collect import collect
from shorttail.define.entities import Alias
from shorttail.define.names import listed_lookups, lookup_of, plain_name, split_reference
from shorttail.errors import InvalidArgument, NotFound, Unavailable
from shorttail.loadtest.traffic import Workload, plan_rpc
from shorttail.registry import versions as registry
from shorttail.registry.apply import Change
from shorttail.results import Status

USER = st.Entity("user", keys={"user_id": st.Int64})
SHOP = st.Entity("shop", keys={"country": st.String, "shop_id": st.Int64})
PROFILE = st.FeatureView(
    "profile", entity=USER, features=[st.Feature("age", st.Float32), st.Feature("tier", st.String, default="none")]
)
SPEND = st.FeatureView("spend", entity=USER, features=[st.Feature("total", st.Float64)])
RENT = st.FeatureView("rent", entity=SHOP, features=[st.Feature("euros", st.Float32)])
BUYER = USER.alias("buyer", user_id="buyer_id")
SELLER = USER.alias("seller", user_id="seller_id")
ABROAD = SHOP.alias("abroad", country="other_country")


@st.on_demand
def gap(a: st.Float64, b: st.Float64) -> st.Float32:  # type: ignore[valid-type]
    return a - b


def write_model(path: Path, width: int) -> Path:
    """Save a model: y = x, so that what comes out shows what went in."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "one"], ["y"])],
        "same",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, width])],
        [numpy_helper.from_array(np.array([1], np.float32), "one")],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([PROFILE, SPEND, RENT, BUYER, SELLER, ABROAD])
        engine.push("profile", {"user_id": [1, 2, 3], "age": [10.0, 20.0, 30.0], "tier": ["gold", None, "tin"]})
        engine.push("spend", {"user_id": [1, 2], "total": [100.0, 200.0]})
        engine.push("rent", {"country": ["de", "fr"], "shop_id": [1, 1], "euros": [5.0, 7.0]})
        yield engine


# -- references --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "lookup", "name"),
    [
        ("v:f", "v", "f"),
        ("a:v:f", "a:v", "f"),
        ("request:x", "request", "x"),
        ("größe:v.1:amount (USD)", "größe:v.1", "amount (USD)"),
    ],
)
def test_a_reference_is_a_lookup_and_a_name(reference: str, lookup: str, name: str) -> None:
    assert split_reference(reference) == (lookup, name) == (lookup_of(reference), plain_name(reference))


@given(some.text(max_size=30) | some.lists(some.sampled_from(["v", "a b", "request", "", "f:", "x"])).map(":".join))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    found, message = "", ""
    try:
        found = ":".join(split_reference(text))
    except InvalidArgument as error:
        message = error.message
    assert found == ("" if message else text)
    assert not message or ("is not a feature reference" in message and "\n" not in message)
    assert found.count(":") <= 2


# -- definitions -------------------------------------------------------------------------------------------------------

SAME = st.Entity("pair", keys={"a": st.Int64, "b": st.Int64})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: USER.alias("request", user_id="x"), "alias 'request': the name 'request' is reserved"),
        (lambda: USER.alias("a b", user_id="x"), "alias 'a b': the name of a view, an alias or a model has letters"),
        (lambda: USER.alias("a:b", user_id="x"), "alias 'a:b': a name has no : and no /"),
        (lambda: USER.alias("buyer"), "alias 'buyer': name the request column of a key: user.alias('buyer', user_id="),
        (lambda: USER.alias("buyer", user="x"), "alias 'buyer': entity 'user' has no key 'user'; did you mean 'user_i"),
        (lambda: USER.alias("buyer", user_id="a:b"), "alias 'buyer': the request column of key 'user_id' 'a:b': a nam"),
        (lambda: USER.alias("buyer", user_id=7), "alias 'buyer': the request column of key 'user_id' 7: a name is a"),
        (
            lambda: SHOP.alias("other", country="shop_id"),
            "alias 'other': request column 'shop_id' cannot be both key 'country', String, and key 'shop_id', Int64",
        ),
        (lambda: st.Entity("site", keys={}).alias("x"), "alias 'x': entity 'site' has no keys, so there is nothing"),
    ],
)
def test_a_wrong_alias_is_one_line(make: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        make()
    assert caught.value.message.startswith(message)
    assert "\n" not in caught.value.message


def test_keys_of_any_name_are_mapped_and_others_keep_their_columns() -> None:
    entity = st.Entity("e", keys={"name": st.Int64, "Filial-Nr.": st.Int64, "day": st.Int64})
    alias = entity.alias("x", name="n", **{"Filial-Nr.": "nr"})
    assert alias.request_columns(entity.keys) == {"name": "n", "Filial-Nr.": "nr", "day": "day"}


def test_the_catalog_keeps_aliases(engine: st.Engine) -> None:
    catalog = Catalog.from_json(engine.store.catalog.to_json())
    assert catalog == engine.store.catalog
    assert list(catalog.aliases) == ["buyer", "seller", "abroad"]
    assert catalog.aliases["abroad"] == ABROAD
    changed = catalog.copy()
    changed.aliases["third"] = USER.alias("third", user_id="x")
    assert "third" not in catalog.aliases
    document = json.loads(catalog.to_json())
    del document["aliases"]  # a store of an older version
    assert Catalog.from_json(json.dumps(document).encode()).aliases == {}


def test_a_definitions_file_declares_aliases(tmp_path: Path) -> None:
    (tmp_path / "definitions.py").write_text(
        "import shorttail as st\nbuyer = st.Entity('user', {'user_id': st.Int64}).alias('buyer', user_id='buyer_id')\n"
    )
    found = collect(tmp_path / "definitions.py")
    assert found.aliases == {"buyer": BUYER}
    assert found.entities == {"user": USER}
    with pytest.raises(InvalidArgument, match="two different aliases are named 'buyer'"):
        collect([BUYER, USER.alias("buyer", user_id="x")])


# -- apply -------------------------------------------------------------------------------------------------------------


def lines(changes: list[Change]) -> list[str]:
    return [f"{change.kind} {change.what} {change.detail}" for change in changes if change.what.startswith("alias")]


def test_apply_shows_aliases_and_keeps_those_that_a_file_does_not_mention(engine: st.Engine) -> None:
    assert lines(engine.apply([BUYER, ABROAD])) == [
        "= alias buyer user by user_id = buyer_id",
        "= alias abroad shop by country = other_country, shop_id",
    ]
    moved = USER.alias("buyer", user_id="client_id")
    assert lines(engine.apply([moved])) == ["~ alias buyer user by user_id = buyer_id -> user by user_id = client_id"]
    assert lines(engine.apply([USER.alias("third", user_id="x")])) == ["+ alias third user by user_id = x"]
    engine.refresh()
    assert list(engine.store.catalog.aliases) == ["buyer", "seller", "abroad", "third"]
    assert engine.get_online_features(["buyer:profile:age"], {"client_id": 2})["buyer:profile:age"].tolist() == [20.0]


@pytest.mark.parametrize("together", [True, False])
def test_an_alias_and_a_view_share_no_name(engine: st.Engine, together: bool) -> None:
    view = st.FeatureView("third", entity=USER, features=[st.Feature("x", st.Float32)])
    alias = USER.alias("third", user_id="x")
    both: list[list[Alias | st.FeatureView]] = [[view, alias]] if together else [[view], [alias]]
    for first in both[:-1]:
        engine.apply(first)
    before = engine.store.catalog.to_json()
    with pytest.raises(InvalidArgument) as caught:
        engine.apply(both[-1])
    assert caught.value.message == (
        "'third' is the name of both an alias and a feature view; references have either, so rename one"
    )
    engine.refresh()
    assert engine.store.catalog.to_json() == before


def test_an_entity_cannot_drop_a_key_that_an_alias_in_the_store_names(engine: st.Engine) -> None:
    other = st.Entity("user", keys={"uid": st.Int64})
    view = st.FeatureView("later", entity=other, features=[st.Feature("x", st.Float32)])
    with pytest.raises(InvalidArgument) as caught:
        engine.apply([view])
    assert caught.value.message == (
        "alias 'buyer': entity 'user' has no key 'user_id'; did you mean 'uid'? ('buyer' is in the store but not in"
        " these definitions: add it, changed to fit)"
    )
    # With aliases that fit, the views that are applied again have the new keys, and the others have the old ones.
    engine.apply([view, other.alias("buyer", uid="buyer_id"), other.alias("seller", uid="seller_id")])
    engine.push("later", {"uid": [5], "x": [1.5]})
    assert engine.get_online_features(["buyer:later:x"], {"buyer_id": 5})["buyer:later:x"].tolist() == [1.5]
    with pytest.raises(NotFound) as missing:
        engine.get_online_features(["buyer:profile:age"], {"buyer_id": 1})
    assert missing.value.message == (
        "alias 'buyer' is of entity 'user' (uid), and feature view 'profile' of entity 'user' (user_id);"
        " views of the alias: later"
    )
    assert {view["name"]: view["aliases"] for view in engine.views()} == {
        "profile": {},
        "spend": {},
        "rent": {"abroad": {"country": "other_country", "shop_id": "shop_id"}},
        "later": {"buyer": {"uid": "buyer_id"}, "seller": {"uid": "seller_id"}},
    }


# -- lookups -----------------------------------------------------------------------------------------------------------


def test_a_request_looks_a_view_up_by_several_aliases_and_by_its_own_keys(engine: st.Engine) -> None:
    features = ["seller:profile:tier", "profile:age", "buyer:profile:age", "buyer:spend:total", "seller:profile:age"]
    found = engine.get_online_features(features, {"user_id": [3, 9], "buyer_id": [1, 3], "seller_id": [2, None]})
    assert found.to_dict() == {
        "seller:profile:tier": ["none", "none"],
        "profile:age": [30.0, None],
        "buyer:profile:age": [10.0, 30.0],
        "buyer:spend:total": [100.0, None],
        "seller:profile:age": [20.0, None],
    }
    there, null, gone = Status.PRESENT, Status.NULL, Status.NOT_FOUND
    assert {name: codes.tolist() for name, codes in found.statuses.items()} == {
        "seller:profile": [there, gone],
        "profile": [there, gone],
        "buyer:profile": [there, there],
        "buyer:spend": [there, gone],
    }
    assert found.feature_statuses["seller:profile:tier"].tolist() == [null, gone]


def test_an_alias_of_several_keys_maps_some_of_them(engine: st.Engine) -> None:
    asked = {"country": "de", "other_country": ["fr", "de", "it"], "shop_id": 1}
    found = engine.get_online_features(["rent:euros", "abroad:rent:euros"], asked)
    assert found.to_dict() == {"rent:euros": [5.0, 5.0, 5.0], "abroad:rent:euros": [7.0, 5.0, None]}


def test_two_keys_may_have_one_column(engine: st.Engine) -> None:
    view = st.FeatureView("edges", entity=SAME, features=[st.Feature("x", st.Float32)])
    engine.apply([view, SAME.alias("loop", b="a")])
    engine.push("edges", {"a": [1, 1], "b": [1, 2], "x": [11.0, 12.0]})
    found = engine.get_online_features(["loop:edges:x", "edges:x"], {"a": [1, 2], "b": 2})
    assert found.to_dict() == {"loop:edges:x": [11.0, None], "edges:x": [12.0, None]}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("byer:profile:age", "no alias 'byer'; did you mean 'buyer'?"),
        ("buyer:profil:age", "no feature view 'profil'; did you mean 'profile'?"),
        ("buyer:profile:aeg", "feature view 'profile' has no feature 'aeg'; did you mean 'age'?"),
        (
            "buyer:rent:euros",
            "alias 'buyer' is of entity 'user' (user_id), and feature view 'rent' of entity 'shop' (country, shop_id);"
            " views of the alias: profile, spend",
        ),
        (
            "buyer:age",
            "no feature view 'buyer': it is an alias of entity 'user'; its views: buyer:profile, buyer:spend",
        ),
    ],
)
def test_a_wrong_reference_is_one_line(engine: st.Engine, tmp_path: Path, reference: str, message: str) -> None:
    with pytest.raises(NotFound) as caught:
        engine.get_online_features([reference], {"buyer_id": 1})
    assert caught.value.message == message
    model = st.Model("m", str(write_model(tmp_path / "m.onnx", 1)), [reference])
    with pytest.raises(NotFound) as refused:
        engine.apply([model])
    assert refused.value.message == f"model 'm': {message}"


def test_a_column_has_one_type(engine: st.Engine) -> None:
    engine.apply([SHOP.alias("odd", country="buyer_id")])
    with pytest.raises(InvalidArgument) as caught:
        engine.get_online_features(["buyer:profile:age", "odd:rent:euros"], {"buyer_id": 1, "shop_id": 1})
    assert caught.value.message == (
        "key 'buyer_id' is Int64 in view 'buyer:profile' but String in view 'odd:rent'; rename one, so that a request"
        " can carry both"
    )
    assert engine.get_online_features(["odd:rent:euros"], {"buyer_id": "fr", "shop_id": 1}).to_dict() == {
        "odd:rent:euros": [7.0]
    }


def test_rows_are_pushed_to_views_and_not_to_aliases(engine: st.Engine) -> None:
    for name, message in (("buyer", "it is an alias of entity 'user'"), ("buyer:profile", "no feature view")):
        with pytest.raises(NotFound, match=message):
            engine.push(name, {"buyer_id": [1], "age": [1.0], "tier": ["x"]})
        with pytest.raises(NotFound, match=message):
            engine.delete(name, {"buyer_id": [1]})


# -- models ------------------------------------------------------------------------------------------------------------

INPUTS = [
    "buyer:profile:age",
    "seller:profile:age",
    gap("buyer:profile:age", "seller:profile:age"),
    gap("seller:spend:total", "request:buyer_id"),  # a key of an alias may be an argument as well
]


@pytest.fixture
def sale(engine: st.Engine, tmp_path: Path) -> st.Model:
    model = st.Model("sale", str(write_model(tmp_path / "sale.onnx", 4)), INPUTS)
    engine.apply([model])
    return model


def test_a_model_takes_buyer_and_seller_of_one_view(engine: st.Engine, sale: st.Model) -> None:
    answer = engine.predict("sale", {"buyer_id": [1, 3, 9], "seller_id": [2, 1, 2]})
    nan = np.nan
    expected = [[10, 20, -10, 199], [30, 10, 20, 97], [nan, 20, nan, 191]]
    np.testing.assert_array_equal(answer.outputs["y"], np.array(expected, np.float32))
    assert {name: codes.tolist() for name, codes in answer.statuses.items()} == {
        "buyer:profile": [0, 0, 2],
        "seller:profile": [0, 0, 0],
        "seller:spend": [0, 0, 0],
    }
    (listed,) = engine.models()
    assert listed["columns"] == {"buyer_id": "Int64", "seller_id": "Int64"}
    assert registry.describe(engine.store.catalog, "sale")["features"] == [
        "buyer:profile:age",
        "seller:profile:age",
        "seller:spend:total",
    ]


def test_missing_values_are_replaced_for_each_alias(engine: st.Engine, tmp_path: Path) -> None:
    inputs = ["buyer:profile:age", "seller:profile:age", "buyer:spend:total"]
    file = str(write_model(tmp_path / "m.onnx", 3))
    with pytest.raises(InvalidArgument, match="'age', which is buyer:profile:age and seller:profile:age; write one"):
        st.Model("m", file, inputs, missing={"age": 1.0})
    engine.apply([st.Model("m", file, inputs, missing={"seller:profile:age": -1.0, "total": -2.0})])
    answer = engine.predict("m", {"buyer_id": 9, "seller_id": 9})
    np.testing.assert_array_equal(answer.outputs["y"], np.array([[np.nan, -1, -2]], np.float32))


def test_examples_have_columns_of_aliases(engine: st.Engine, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        "buyer:profile:age,seller:profile:age,total,buyer_id,y_0,y_1,y_2,y_3\n1,2,300,7,1,2,-1,293\n"
    )
    file = str(write_model(tmp_path / "m.onnx", 4))
    engine.apply([st.Model("m", file, INPUTS, examples=str(tmp_path / "rows.csv"))])
    (tmp_path / "rows.csv").write_text(
        "buyer:profile:age,seller:profile:age,total,buyer_id,y_0,y_1,y_2,y_3\n1,2,300,7,2,1,1,293\n"
    )
    with pytest.raises(InvalidArgument, match="examples"):
        engine.apply([st.Model("m", file, INPUTS, examples=str(tmp_path / "rows.csv"))])


def test_a_plan_follows_an_alias_that_changes(engine: st.Engine, sale: st.Model) -> None:
    assert engine.predict("sale", {"buyer_id": 1, "seller_id": 2}).outputs["y"][0, :2].tolist() == [10, 20]
    engine.apply([USER.alias("buyer", user_id="seller_id"), USER.alias("seller", user_id="buyer_id")])
    assert engine.predict("sale", {"buyer_id": 1, "seller_id": 2}).outputs["y"][0, :2].tolist() == [20, 10]
    engine.apply([USER.alias("buyer", user_id="client_id")])
    with pytest.raises((InvalidArgument, Unavailable)):
        engine.predict("sale", {"buyer_id": 1, "seller_id": 2})
    assert engine.predict("sale", {"buyer_id": 1, "client_id": 3}).outputs["y"][0, :2].tolist() == [30, 10]


def test_a_batch_read_before_two_aliases_change_places_is_not_answered_by_the_new_plan(
    engine: st.Engine, sale: st.Model
) -> None:
    plan = engine.plan_for_model("sale")
    columns = plan.new_columns()
    columns.append({"buyer_id": 1, "seller_id": 2})
    engine.apply([USER.alias("buyer", user_id="seller_id"), USER.alias("seller", user_id="buyer_id")])
    engine.refresh()
    after = engine.plan_for_model("sale")
    assert after.names == ("seller_id", "buyer_id")
    assert not after.takes(columns)


def test_a_canary_splits_by_the_alias_that_comes_first(engine: st.Engine, sale: st.Model, tmp_path: Path) -> None:
    engine.deploy("sale", tmp_path / "sale.onnx")
    other = write_model(tmp_path / "other.onnx", 4)
    other.write_bytes(other.read_bytes() + b"\x72\x00")  # another file of the same answers: an empty doc_string
    assert engine.deploy("sale", other, promote=False) == 2
    registry.set_canary(engine.store, "sale", 50.0, 2)
    split = engine.plan_for_model("sale").split
    assert split is not None
    versions = [engine.predict("sale", {"buyer_id": buyer, "seller_id": 1}).version for buyer in range(200)]
    assert {*versions} == {1, 2}
    again = [engine.predict("sale", {"buyer_id": buyer, "seller_id": 2}).version for buyer in range(200)]
    assert again == versions, "the buyer alone decides"


# -- what clients see --------------------------------------------------------------------------------------------------


def test_lookups_are_found_in_the_list_of_views(engine: st.Engine) -> None:
    assert listed_lookups(engine.views()) == {
        "profile": {"user_id": "Int64"},
        "buyer:profile": {"buyer_id": "Int64"},
        "seller:profile": {"seller_id": "Int64"},
        "spend": {"user_id": "Int64"},
        "buyer:spend": {"buyer_id": "Int64"},
        "seller:spend": {"seller_id": "Int64"},
        "rent": {"country": "String", "shop_id": "Int64"},
        "abroad:rent": {"other_country": "String", "shop_id": "Int64"},
    }
    assert listed_lookups([{"name": "v", "keys": {"k": "Int64"}}]) == {"v": {"k": "Int64"}}  # of an older server


def test_a_load_test_looks_up_by_aliases(engine: st.Engine) -> None:
    asked = ["buyer:profile:age", "profile:age"]
    keys = ["buyer_id=uniform:1:9", "user_id=uniform:1:9"]
    plan_rpc(Workload(features=asked, keys=keys), [], engine.views())
    with pytest.raises(InvalidArgument, match="column 'buyer_id' is a key: say where its values come from"):
        plan_rpc(Workload(features=asked, keys=keys[1:]), [], engine.views())
    traffic = plan_rpc(Workload(features=asked, keys=[f"store:{engine.store.path}"]), [], engine.views())
    where = f"store:{engine.store.path}:"
    assert [(stream.text.removeprefix(where), *stream.tables) for stream in traffic.streams] == [
        ("profile", "user_id"),
        ("buyer:profile", "buyer_id"),
    ]
    with pytest.raises(NotFound, match="no feature view 'byer:profile'; did you mean 'buyer:profile'"):
        plan_rpc(Workload(features=["byer:profile:age"]), [], engine.views())
