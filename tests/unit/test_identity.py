"""Ids of definitions: what each field of each class changes, rows, answers or neither."""

from dataclasses import fields, replace

import pytest

import shorttail as st
from shorttail.define.identity import Definition, define, shown

USER = st.Entity("user", keys={"user_id": st.Int64, "country": st.String})
VIEW = st.FeatureView(
    "stats",
    entity=USER,
    features=[
        st.Feature("age", st.Float32, default=1.5, description="years"),
        st.Feature("visits", st.Int32, column="n"),
        st.Feature("tier", st.String),
    ],
    ttl="2d",
    source=st.ParquetSource("stats.parquet", timestamp="at"),
    description="of users",
    owner="team",
)

# class -> field -> what a change of it changes, and a changed view.
EFFECTS = {
    st.Entity: {
        "name": ("neither", lambda: replace(VIEW, entity=replace(USER, name="customer"))),
        "keys": (
            "rows",
            lambda: replace(VIEW, entity=replace(USER, keys={"user_id": st.String, "country": st.String})),
        ),
        "description": ("neither", lambda: replace(VIEW, entity=replace(USER, description="who"))),
        "tags": ("neither", lambda: replace(VIEW, entity=replace(USER, tags=["pii"]))),
    },
    st.ParquetSource: {
        "path": ("neither", lambda: replace(VIEW, source=st.ParquetSource("moved.parquet", timestamp="at"))),
        "timestamp": ("rows", lambda: replace(VIEW, source=st.ParquetSource("stats.parquet", timestamp="seen"))),
    },
    st.Feature: {
        "name": ("answers", lambda: with_feature(name="years")),
        "dtype": ("rows", lambda: with_feature(dtype=st.Float64)),
        "default": ("answers", lambda: with_feature(default=2.5)),
        "description": ("neither", lambda: with_feature(description="in years")),
        "column": ("rows", lambda: with_feature(column="years")),
        "tags": ("neither", lambda: with_feature(tags=["pii"])),
        "renamed_from": ("neither", lambda: with_feature(renamed_from="years")),
    },
    st.FeatureView: {
        "name": ("neither", lambda: replace(VIEW, name="profile")),
        "entity": ("rows", lambda: replace(VIEW, entity=st.Entity("user", keys={"user_id": st.Int64}))),
        "features": ("rows", lambda: replace(VIEW, features=[*VIEW.features, st.Feature("more", st.Bool)])),
        "ttl": ("answers", lambda: replace(VIEW, ttl="3d")),
        "source": ("rows", lambda: replace(VIEW, source=None)),
        "description": ("neither", lambda: replace(VIEW, description="")),
        "owner": ("neither", lambda: replace(VIEW, owner="")),
        "tags": ("neither", lambda: replace(VIEW, tags=["pii"])),
    },
}
CASES = [(kind, name) for kind, effects in EFFECTS.items() for name in effects]


def with_feature(**changes):
    return replace(VIEW, features=[replace(VIEW.features[0], **changes), *VIEW.features[1:]])


def changed(before, after):
    if before.rows_id != after.rows_id:
        assert before.id != after.id
        return "rows"
    return "answers" if before.id != after.id else "neither"


@pytest.mark.parametrize("kind", EFFECTS, ids=lambda kind: kind.__name__)
def test_the_table_names_every_field(kind):
    assert {field.name for field in fields(kind) if field.init} == set(EFFECTS[kind])


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda part: getattr(part, "__name__", part))
def test_what_a_field_changes(kind, name):
    wanted, change = EFFECTS[kind][name]
    before = define(VIEW, None, 0)
    after = change()
    # A feature of another name is another feature, unless it says which one it was.
    columns = before.columns if len(after.features) == len(VIEW.features) else define(after, before, 3).columns
    assert changed(before, Definition(after, columns)) == wanted


def test_names_of_keys_change_answers_and_their_types_rows():
    before = define(VIEW, None, 0)
    renamed = replace(VIEW, entity=replace(USER, keys={"id": st.Int64, "country": st.String}))
    turned = replace(VIEW, entity=replace(USER, keys={"country": st.String, "user_id": st.Int64}))
    assert changed(before, define(renamed, before, 3)) == "answers"
    assert changed(before, define(turned, before, 3)) == "rows"


def test_features_keep_their_columns():
    before = define(VIEW, None, 0)
    assert before.columns == (0, 1, 2)
    turned = define(replace(VIEW, features=VIEW.features[::-1]), before, 3)
    assert turned.columns == (2, 1, 0)
    assert turned.rows_id == before.rows_id
    less = define(replace(VIEW, features=VIEW.features[1:]), before, 3)
    assert less.columns == (1, 2)
    wider = define(with_feature(dtype=st.Float64), before, 3)
    assert wider.columns == (3, 1, 2)
    again = define(VIEW, less, 4)
    assert again.columns == (4, 1, 2)  # it was removed and is added again: its old values do not come back


def test_ids_are_the_same_in_every_process():
    """They are stored: a change of how they are made would make every view of every store look changed."""
    assert define(VIEW, None, 0).rows_id[:16] == "f6e0010a8422cf1e"
    assert define(VIEW, None, 0).id[:16] == "313bbacb0b5fefef"


def test_a_default_that_is_nan_is_equal_to_itself():
    one, other = (define(with_feature(default=float("nan")), None, 0) for _ in range(2))
    assert one.id == other.id


def test_a_definition_survives_json():
    before = define(VIEW, None, 7)
    again = Definition.from_json(before.to_json())
    assert (again, again.id, again.rows_id) == (before, before.id, before.rows_id)


def test_ids_are_shown_as_short_as_they_can_be():
    assert shown([]) == {}
    assert shown(["a41f" + "0" * 60, "9c02" + "0" * 60]) == {"a41f" + "0" * 60: "a41f", "9c02" + "0" * 60: "9c02"}
    assert list(shown(["a41f0" + "0" * 59, "a41f1" + "0" * 59]).values()) == ["a41f0", "a41f1"]
