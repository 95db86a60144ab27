"""Lineage: from sources to versions of models, both ways, as text, for Graphviz, for Mermaid and as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import commands
import pytest
from hypothesis import given
from hypothesis import strategies as some
from test_engine import write_model

import shorttail as st
from shorttail.errors import NotFound
from shorttail.registry import versions
from shorttail.registry.lineage import Lineage, LineageNode

USER = st.Entity("user", keys={"user_id": st.Int64})
BUYER = USER.alias("buyer", user_id="buyer_id")


@st.on_demand
def gap(a: st.Float64, b: st.Float64) -> st.Float32:  # type: ignore[valid-type]
    return a - b


@st.on_demand
def twice(a: st.Float64) -> st.Float64:  # type: ignore[valid-type]
    return 2 * a


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    profile = st.FeatureView(
        "profile",
        entity=USER,
        source=st.ParquetSource(str(tmp_path / "users.parquet")),
        features=[st.Feature("age", st.Float32), st.Feature("tenure", st.Float32), st.Feature("unread", st.String)],
    )
    spend = st.FeatureView("spend", entity=USER, features=[st.Feature("total", st.Float64)])
    first = st.Model("fraud", str(write_model(tmp_path / "two.onnx", 2)), ["profile:age", "profile:tenure"])
    inputs = ["profile:age", gap(twice("spend:total"), "request:amount"), "buyer:profile:age"]
    second = st.Model("fraud", str(write_model(tmp_path / "three.onnx", 3)), inputs)
    churn = st.Model("churn", str(write_model(tmp_path / "one.onnx", 1)), ["profile:tenure"])
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([profile, spend, BUYER, first, churn])
        engine.apply([profile, spend, BUYER, second])
        yield engine


def tree(engine: st.Engine, name: str) -> list[str]:
    return engine.lineage(name).text().splitlines()


def test_a_feature_leads_only_to_the_versions_that_read_it(engine: st.Engine, tmp_path: Path) -> None:
    assert tree(engine, "profile:tenure") == [
        "feature profile:tenure",
        "from:",
        "  view profile",
        f"    source {tmp_path / 'users.parquet'}",
        "    entity user",
        "to:",
        "  model fraud",
        "    version fraud@1 (previous)",
        "  model churn",
        "    version churn@1 (current)",
    ]
    assert tree(engine, "profile:age")[-3:] == [
        "  model fraud",
        "    version fraud@1 (previous)",
        "    version fraud@2 (current)",
    ]
    assert "to:" not in tree(engine, "profile:unread")
    assert tree(engine, "buyer:profile:age") == tree(engine, "profile:age")


def test_a_version_comes_only_from_what_it_reads(engine: st.Engine, tmp_path: Path) -> None:
    first = [
        "version fraud@1 (previous)",
        "from:",
        "  model fraud",
        "    feature profile:age",
        "      view profile",
        f"        source {tmp_path / 'users.parquet'}",
        "        entity user",
        "    feature profile:tenure",
        "      view profile ...",
    ]
    assert tree(engine, "fraud@1") == first
    assert tree(engine, "fraud@2") == [
        "version fraud@2 (current)",
        *first[1:7],
        "    function gap",
        "      function twice",
        "        feature spend:total",
        "          view spend",
        "            entity user",
        "      request amount",
        "    alias buyer",
        "      entity user",
    ]


def test_a_model_has_the_ways_of_all_its_versions(engine: st.Engine) -> None:
    lines = tree(engine, "fraud")
    assert lines[-3:] == ["to:", "  version fraud@1 (previous)", "  version fraud@2 (current)"]
    assert {"  feature profile:tenure", "  function gap", "  alias buyer"} <= set(lines)


def test_everything_else_is_found_by_its_name(
    engine: st.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(tmp_path / "users.parquet")
    assert tree(engine, source)[:3] == [f"source {source}", "to:", "  view profile"]
    monkeypatch.chdir(tmp_path)
    assert tree(engine, "users.parquet") == tree(engine, source)
    assert tree(engine, "user")[:4] == ["entity user", "to:", "  alias buyer", "    model fraud"]
    assert tree(engine, "buyer")[-3:] == ["to:", "  model fraud", "    version fraud@2 (current)"]
    assert tree(engine, "twice")[-4:] == ["to:", "  function gap", "    model fraud", "      version fraud@2 (current)"]
    assert tree(engine, "request:amount")[:3] == ["request amount", "to:", "  function gap"]
    assert str(engine.lineage("spend")) == engine.lineage("spend").text()


def test_things_that_share_a_name_are_all_shown(engine: st.Engine) -> None:
    engine.apply([st.FeatureView("user", entity=USER, features=[st.Feature("n", st.Int64)])])
    assert [line for line in tree(engine, "user") if line[:1] not in " ft"] == ["entity user", "view user"]


def test_functions_of_one_name_and_different_code(engine: st.Engine, tmp_path: Path) -> None:
    @st.on_demand
    def twice(a: st.Float64) -> st.Float64:  # type: ignore[valid-type]
        return a + a

    engine.apply([st.Model("other", str(write_model(tmp_path / "other.onnx", 1)), [twice("spend:total")])])
    starts = engine.lineage("twice").starts
    assert [node.kind for node in starts] == ["function", "function"]
    assert all(re.fullmatch("twice [0-9a-f]{8}", node.name) for node in starts)
    uses = {line.split()[-1] for line in tree(engine, "twice") if line.startswith("  model")}
    assert uses == {"other"}  # the other one leads there by `gap`
    assert [line for line in tree(engine, "other@1") if "function" in line] == [f"    function {starts[1].name}"]


def test_roles_of_versions(engine: st.Engine, tmp_path: Path) -> None:
    for scale in (2.0, 3.0):
        engine.deploy("churn", write_model(tmp_path / "next.onnx", 1, scale), promote=False)
    versions.set_canary(engine.store, "churn", 5.0, version=2)
    versions.set_shadow(engine.store, "churn", 3, percent=10.0)
    assert tree(engine, "churn")[-3:] == [
        "  version churn@1 (current)",
        "  version churn@2 (canary 5%)",
        "  version churn@3 (shadow 10%)",
    ]
    assert engine.lineage("fraud").to_dict()["nodes"][-1] == {
        "id": "version fraud@2",
        "kind": "version",
        "name": "fraud@2",
        "note": "current",
    }


def test_a_feature_that_only_old_versions_read_is_gone(engine: st.Engine, tmp_path: Path) -> None:
    profile = st.FeatureView("profile", entity=USER, features=[st.Feature("age", st.Float32)])
    churn = st.Model("churn", str(write_model(tmp_path / "one.onnx", 1, 2.0)), ["profile:age"])
    engine.apply([profile, churn])
    assert tree(engine, "profile:tenure") == [
        "feature profile:tenure (gone)",
        "to:",
        "  model fraud",
        "    version fraud@1 (previous)",
        "  model churn",
        "    version churn@1 (previous)",
    ]
    assert "gone" not in engine.lineage("profile:age").text()


def test_a_name_that_is_not_there(engine: st.Engine, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nothing in the store is named 'profile:aeg'; did you mean 'profile:age'\?"):
        engine.lineage("profile:aeg")
    with pytest.raises(NotFound, match=r"nothing in the store is named 'fraud@9'; did you mean 'fraud@[12]'\?"):
        engine.lineage("fraud@9")
    for odd in ("", "\0", "a" * 5000, "x:y:z", "../.."):
        with pytest.raises(NotFound, match="nothing in the store is named"):
            engine.lineage(odd)
    with (
        st.Engine.open(tmp_path / "empty", create=True) as empty,
        pytest.raises(NotFound, match="there are no names yet"),
    ):
        empty.lineage("x")


# -- formats -----------------------------------------------------------------------------------------------------------


def test_dot_and_mermaid_have_the_edges_of_json(engine: st.Engine) -> None:
    store = ("--store", engine.store.path)
    found = commands.run_well("lineage", "fraud@2", *store, "--json").json
    edges = {(edge["from"], edge["to"]) for edge in found["edges"]}
    assert ("function twice", "function gap") in edges
    assert found["of"] == ["version fraud@2"]
    assert len(found["edges"]) == len(edges)
    notes = {node["id"]: node["note"] for node in found["nodes"]}
    assert all({a, b} <= notes.keys() for a, b in edges)
    labels = {node: f"{node} ({note})" if note else node for node, note in notes.items()}
    wanted = {(labels[a], labels[b]) for a, b in edges}
    assert read_dot(commands.run_well("lineage", "fraud@2", *store, "--format", "dot").out) == wanted
    assert read_mermaid(commands.run_well("lineage", "fraud@2", *store, "--format", "mermaid").out) == wanted
    assert commands.run_well("lineage", "fraud@2", *store).out == f"{engine.lineage('fraud@2')}\n"
    assert "contradict" in commands.error_of("lineage", "x", *store, "--json", "--format", "dot", code=2)
    assert commands.error_of("lineage", "frod", *store) == (
        "error: nothing in the store is named 'frod'; did you mean 'fraud'?\n"
    )


@given(some.lists(some.text(min_size=1), min_size=2, max_size=5, unique=True))
def test_names_are_escaped(names: list[str]) -> None:
    nodes = [LineageNode("feature", name) for name in names]
    steps = {(node, None): [(after, None)] for node, after in pairwise(nodes)} | {(nodes[-1], None): []}
    found = Lineage([nodes[0]], {}, {(nodes[0], None): []}, steps)  # type: ignore[arg-type]
    labels = [found.label(node) for node in nodes]
    wanted = set(pairwise(labels))
    for text, read in ((found.dot(), read_dot), (found.mermaid(), read_mermaid)):
        assert read(text) == wanted
        assert all(line.isprintable() for line in text.split("\n"))
    assert len(found.text().split("\n")) == len(names) + 1


def read_dot(text: str) -> set[tuple[str, str]]:
    """Return the edges of a graph in Graphviz's language, by labels. Fails for a line that is not of the usual form."""
    head, *lines, end, _ = f"{text.rstrip()}\n".split("\n")
    assert (head, end) == ("digraph lineage {", "}")
    labels, edges = {}, set()
    for line in lines:
        if node := re.fullmatch(r'  (n\d+) \[label="((?:[^"\\]|\\["\\])*)"(?:, style=bold)?\];', line):
            labels[node[1]] = re.sub(r"\\(.)", r"\1", node[2])
        elif edge := re.fullmatch(r"  (n\d+) -> (n\d+);", line):
            edges.add((labels[edge[1]], labels[edge[2]]))
        else:
            assert line in ("  rankdir=LR;", "  node [shape=box];"), line
    return edges


def read_mermaid(text: str) -> set[tuple[str, str]]:
    """Return the edges of a flow chart in Mermaid's language, by labels. Fails as read_dot."""
    head, *lines = text.rstrip("\n").split("\n")
    assert head == "flowchart LR"
    labels, edges = {}, set()
    for line in lines:
        if node := re.fullmatch(r'  (n\d+)\["((?:[^\x00-\x7f]|[\w .:/@%(),-]|#\d+;)*)"\]', line):
            labels[node[1]] = re.sub(r"#(\d+);", lambda code: chr(int(code[1])), node[2])
        elif edge := re.fullmatch(r"  (n\d+) --> (n\d+)", line):
            edges.add((labels[edge[1]], labels[edge[2]]))
        else:
            assert re.fullmatch(r"  style n\d+ stroke-width:3px", line), line
    return edges
