"""Names of views, models, features and columns: which are valid, and that each works wherever a name is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
from commands import error_of, run_well
from hypothesis import example, given
from hypothesis import strategies as some
from onnx import TensorProto, helper

import shorttail as st
from shorttail._native.metrics import METHODS
from shorttail.cli.bench import make_workload
from shorttail.client.columns import encode_columns
from shorttail.define import names
from shorttail.define.catalog import Catalog
from shorttail.define.names import check_name, check_path_name, split_reference, suggestion
from shorttail.define.text import parse_columns, split_argument
from shorttail.errors import MESSAGE_CHARS, InvalidArgument, NotFound
from shorttail.loadtest.report import html_table
from shorttail.loadtest.traffic import Workload, plan_rpc
from shorttail.observe.logs import format_line
from shorttail.observe.memory import MetricsMemory
from shorttail.store.files import model_path

CHARACTERS = some.characters(exclude_categories=("C", "Z"), include_characters=" ", exclude_characters=":/")
LETTERS = some.characters(categories=("L", "Nd"), include_characters="_").filter(lambda c: f"_{c}".isidentifier())
ODD = [
    "7d_avg", "amount (USD)", "größe", "a=b", "-x", "--store", "a, b", '"q"', "'s'", "a.b", ".a", "x[0]", "{n}", "%s",
    "$x", "<b>&", "日本語", "👍🏽 rate", "❤️", "request", "status", "\\", "nan", "NULL", "#", "@m", "*", "a  b", "..",
    "\\n", "हिन्दी", "x" * 255, "ä" * 127,
]  # fmt: skip
ODD_FOLDERS = ["7d", "nutzer-daten.v2", "größe", "_", "a..b", "日本語", "हिन्दी", "request.x", "unknown", "x" * 255]


def fits(name: str) -> bool:
    return (
        name != "" and name == name.strip() and len(name.encode()) <= 255 and unicodedata.normalize("NFC", name) == name
    )


NAMES = some.sampled_from(ODD) | some.text(CHARACTERS, min_size=1, max_size=60).filter(fits)
FOLDERS = some.sampled_from(ODD_FOLDERS) | some.builds(
    lambda first, middle, last: unicodedata.normalize("NFC", first + middle + last),
    LETTERS,
    some.text(LETTERS | some.sampled_from("-._"), max_size=30),
    LETTERS,
).filter(lambda name: fits(name) and not names.UNSEEN.search(name))

# Text that no name holds: line breaks, terminal codes, bidirectional overrides, lone surrogates, other white space.
BAD_TEXT = ["\n", "\0", "\x1b[2J", "\u202e", "\u200b", "\ud800", "\u00a0", "\u2028", "\ufeff", "\t", ":", "/"]
BAD = some.one_of(
    some.builds("".join, some.tuples(some.text(CHARACTERS), some.sampled_from(BAD_TEXT), some.text(CHARACTERS))),
    some.builds(lambda name, left: f" {name}" if left else f"{name} ", NAMES, some.booleans()),
    some.text(CHARACTERS, min_size=256),
    some.sampled_from(["", " ", "gro\u0308ße", "ä" * 128, "x" * 256, "\u0344", 7, None, b"age", ("a",), 10**5000]),
)  # fmt: skip
ODD_PATHS = [".", "..", ".a", "-a", "a.", "...", "a b", "a\\b", "~", "a*", "$HOME", "a%2fb", "👍", "\u3164", "\u0301a"]
BAD_FOLDERS = BAD | some.sampled_from(ODD_PATHS)


def refusal(name: object, what: str, check: Any) -> str:
    """Return the message of a refused name: one line, which begins with `what` and the name and says a rule."""
    with pytest.raises(InvalidArgument) as caught:
        check(name, what)
    message = caught.value.message
    assert message.isprintable()
    assert len(message) < 2500  # 255 characters, each written as \U000e0100 at most
    if isinstance(name, str) and len(name) <= 255:
        assert message.startswith(f"{what} {name!r}: ")
    else:
        assert message.startswith(f"{what} ")
    assert "name" in message.removeprefix(what)
    return message


# -- which names are valid ---------------------------------------------------------------------------------------------


@given(NAMES)
def test_printable_text_names_features_columns_and_entities(name: str) -> None:
    assert st.Feature(name, st.Float32).name == name
    entity = st.Entity(name, keys={name: st.Int64})
    assert st.Entity.from_json(json.loads(json.dumps(entity.to_json()))) == entity
    assert split_reference(f"request:{name}") == ("request", name)
    model = st.Model("m", "m.onnx", [f"request:{name}"], missing={name: 1.0})
    assert st.Model.from_json(json.loads(json.dumps(model.to_json()))) == model


@given(FOLDERS, NAMES)
def test_letters_of_any_script_name_views_and_models(name: str, feature: str) -> None:
    view = st.FeatureView(name, st.Entity("e", {"a key": st.Int64}), [st.Feature(feature, st.Float32)])
    assert st.FeatureView.from_json(json.loads(json.dumps(view.to_json()))) == view
    assert split_reference(f"{name}:{feature}") == (name, feature)
    assert st.Model(name, "m.onnx", [f"{name}:{feature}"]).references == [f"{name}:{feature}"]
    path = model_path("/store", name, 1)
    assert os.path.normpath(path) == str(path) == f"/store/models/{name}/1/model.onnx"


@given(some.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,63}", fullmatch=True))
def test_names_of_older_stores_stay_valid(name: str) -> None:
    assert check_name(name, "a column") == check_path_name(name, "a model") == name


@given(BAD)
@example("a:b")
def test_other_text_names_no_feature_column_or_entity(name: object) -> None:
    refusal(name, "feature", lambda name, _: st.Feature(name, st.Float32))
    refusal(name, "entity", lambda name, _: st.Entity(name, {"k": st.Int64}))
    refusal(name, "a column", check_name)
    with pytest.raises(InvalidArgument, match="key column") as caught:
        st.Entity("e", {name: st.Int64})  # type: ignore[dict-item]
    assert caught.value.message.isprintable()
    with pytest.raises(InvalidArgument, match="is not a feature reference") as caught:
        split_reference(f"request:{name}" if isinstance(name, str) else name)
    assert caught.value.message.isprintable()


@given(BAD_FOLDERS)
def test_other_text_names_no_view_or_model(name: object) -> None:
    entity = st.Entity("e", {"k": st.Int64})
    refusal(name, "feature view", lambda name, _: st.FeatureView(name, entity, [st.Feature("f", st.Float32)]))
    refusal(name, "model", lambda name, _: st.Model(name, "m.onnx", ["request:a"]))
    refusal(name, "a view", check_path_name)
    with pytest.raises(InvalidArgument):
        model_path("/store", name, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "feature '': a name has at least one character"),
        (" a", "feature ' a': a name has no white space at its ends"),
        ("a\x1b", r"feature 'a\x1b': a name has printable characters only; U+001B is none"),
        ("a:b", "feature 'a:b': a name has no : and no /, because they separate names in references and paths"),
        ("ä" * 128, f"feature '{'ä' * 128}': a name has at most 255 bytes of UTF-8, not 256"),
        ("x" * 10**6, f"feature '{'x' * 60}'... (1000000 characters): a name has at most 255 bytes of UTF-8, not "),
        ("gro\u0308ße", r"(NFC); write 'gr\xf6\xdfe', not 'gro\u0308\xdfe'"),
        (7, "feature 7: a name is a string"),
    ],
)
def test_a_refusal_says_the_rule(name: Any, message: str) -> None:
    assert message in refusal(name, "feature", check_name)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("age", "'age' is not a feature reference; write 'view:feature' or 'request:column'"),
        ("a:v:f:g", "'a:v:f:g' is not a feature reference (it has more than three parts)"),
        ("a:v:f/g", "'a:v:f/g' is not a feature reference (a name has no : and no /"),
        ("a b:v:f", "'a b:v:f' is not a feature reference (the name of a view, an alias or a model has letters"),
        ("request:v:f", "'request:v:f' is not a feature reference (columns of the request have no alias)"),
        ("a:request:f", "'a:request:f' is not a feature reference (columns of the request have no alias)"),
        ("v :a", "'v :a' is not a feature reference (a name has no white space at its ends)"),
        ("v w:a", "'v w:a' is not a feature reference (the name of a view, an alias or a model has letters"),
        (None, "None is not a feature reference; write"),
    ],
)
def test_a_refused_reference_says_the_rule(reference: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        split_reference(reference)
    assert caught.value.message.startswith(message)


def test_a_view_named_request_stays_reserved() -> None:
    with pytest.raises(InvalidArgument, match="'request' is reserved"):
        st.FeatureView("request", st.Entity("e", {"k": st.Int64}), [st.Feature("f", st.Float32)])


def test_names_of_missing_and_outputs_are_texts() -> None:
    with pytest.raises(InvalidArgument, match="missing names 1, which is not one of its columns: 1"):
        st.Model("m", "m.onnx", ["request:1"], missing={1: 2.0})  # type: ignore[dict-item]
    for outputs in ([1], [["a"]], "p"):
        with pytest.raises(InvalidArgument, match="outputs must be a list of different output names"):
            st.Model("m", "m.onnx", ["request:1"], outputs=outputs)  # type: ignore[arg-type]


# -- unknown names -----------------------------------------------------------------------------------------------------


def test_a_long_unknown_name_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [f"feature_{i}_of_many" for i in range(1000)]
    assert suggestion("feature_1_of_man", known[:100], "features") == "; did you mean 'feature_1_of_many'?"
    monkeypatch.setattr(names, "get_close_matches", None)  # to call it would raise
    for name in ("x" * (16 << 20), "feature_1_of_man"):
        assert suggestion(name, known, "features").startswith("; features: feature_0_of_many, ")
    with pytest.raises(NotFound) as caught:
        Catalog().model("\0" * (16 << 20))
    assert len(caught.value.message) < 400


def test_an_unknown_name_in_another_unicode_form_is_explained() -> None:
    assert suggestion("gro\u0308ße", ["größe"], "views") == (
        r"; write it in Unicode's composed form (NFC): 'gr\xf6\xdfe', not 'gro\u0308\xdfe'"
    )


def test_messages_are_cut() -> None:
    assert InvalidArgument("x" * MESSAGE_CHARS).message == "x" * MESSAGE_CHARS
    assert InvalidArgument("x" * (MESSAGE_CHARS + 1)).message == "x" * MESSAGE_CHARS + " ..."


def test_columns_of_frames_that_are_numbers_are_their_text(tmp_path: Path) -> None:
    view = st.FeatureView("v", st.Entity("e", {"k": st.Int64}), [st.Feature("1", st.Float32)])
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([view])
        assert engine.push("v", pd.DataFrame({"k": [7], 1: [2.0]})) == 1
        assert engine.get_online_features(["v:1"], {"k": 7})["v:1"].tolist() == [2.0]
        for rows, message in (
            (pd.DataFrame([[7, 1.0, 2.0]], columns=["k", 1, "1"]), "view 'v': column '1' is there twice"),
            ({"k": [7], 1: [2.0], "1": [3.0]}, "view 'v': column '1' is there twice"),
            ({"k": [7], 2: [2.0]}, "view 'v': column '1' is missing from the rows; they need: ['k', '1']"),
            ({"K": [7], "1": [2.0], "ö": 1}, "view 'v' has no column 'K'; there is 'k', and case matters"),
        ):
            with pytest.raises(InvalidArgument) as caught:
                engine.push("v", rows)
            assert caught.value.message.startswith(message)
        with pytest.raises(InvalidArgument, match=r"^unknown column 7; columns: k"):
            engine.get_online_features(["v:1"], {7: 7})  # type: ignore[dict-item]
        with pytest.raises(InvalidArgument, match=r"^column 'k' is given twice"):
            engine.get_online_features(["v:1"], pd.DataFrame([[7, 8]], columns=["k", "k"]))  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match=r"^7 is not a feature reference"):
            engine.get_online_features([7], {})  # type: ignore[list-item]


def test_requests_take_the_numbers_that_name_columns_of_a_frame(tmp_path: Path) -> None:
    view = st.FeatureView("v", st.Entity("e", {"1": st.Int64}), [st.Feature("f", st.Float32)])
    frames = [pd.DataFrame([[7], [8]], columns=[1]), {1: [7, 8]}, {"1": [7, 8]}]
    for frame in frames:
        assert list(encode_columns(frame)) == ["1"]  # type: ignore[arg-type]
    for twice in (pd.DataFrame([[7, 8]], columns=[1, "1"]), pd.DataFrame([[7, 8]], columns=["1", "1"]), {1: 7, "1": 8}):
        with pytest.raises(InvalidArgument, match=r"^column '1' is given twice"):
            encode_columns(twice)  # type: ignore[arg-type]
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([view])
        engine.push("v", {"1": [7, 8], "f": [1.0, 2.0]})
        for frame in frames:
            assert engine.get_online_features(["v:f"], frame)["v:f"].tolist() == [1.0, 2.0]  # type: ignore[arg-type]


# -- text on the command line ------------------------------------------------------------------------------------------


@given(some.lists(NAMES, min_size=1, max_size=4, unique=True))
@example(["a", "a=b", "a=b=c"])
def test_columns_on_the_command_line(columns: list[str]) -> None:
    dtypes = dict.fromkeys(columns, "Float64")
    arguments = [f"{name}={number}" for number, name in enumerate(columns)]
    assert parse_columns(arguments, dtypes, "x") == {name: float(number) for number, name in enumerate(columns)}


def test_the_longest_column_before_an_equals_sign_counts() -> None:
    assert split_argument("a=b=c", ["a", "a=b"]) == ("a=b", "=", "c")
    assert split_argument('a="b=c"', ["a", "a=b"]) == ("a", "=", '"b=c"')
    assert split_argument("x=y=z", ["a"]) == ("x", "=", "y=z")
    assert split_argument("a", ["a"]) == ("a", "", "")


# -- a store with odd names --------------------------------------------------------------------------------------------

KEYS: dict[str, Any] = {"-kunde=": st.Int64, 'land, "ort"': st.String}
REQUEST = ["betrag (€)", "-y", "a=b=c", "status", "p"]
VIEW, MODEL = "nutzer-daten.v2_größe", "betrug-v2.1_größe"
ROWS: dict[str, Any] = {
    "-kunde=": [1, 2],
    'land, "ort"': ["a", "b"],
    **{name: np.array([number, number + 0.5], np.float32) for number, name in enumerate(ODD)},
}
SUMS = [sum(float(ROWS[name][row]) for name in ODD) + len(REQUEST) for row in range(2)]


def write_sum(path: Path, width: int, input_name: str = "x", output_name: str = "p") -> None:
    """Write a model: float32 [rows, width] -> float32 [rows], the sum of the columns."""
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", [input_name, "axes"], [output_name], keepdims=0)],
        "sum",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, [None, width])],
        [helper.make_tensor_value_info(output_name, TensorProto.FLOAT, [None])],
        [helper.make_tensor("axes", TensorProto.INT64, [1], [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, str(path))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("names")
    write_sum(home / "m.onnx", len(ODD) + len(REQUEST))
    view = st.FeatureView(VIEW, st.Entity("kunde & land", KEYS), [st.Feature(name, st.Float32) for name in ODD])
    inputs = [*(f"{VIEW}:{name}" for name in ODD), *(f"request:{name}" for name in REQUEST)]
    with st.Engine.open(home / "store", create=True) as engine:
        engine.apply([view, st.Model(MODEL, str(home / "m.onnx"), inputs, metrics={"auc (5% = 'best')": 0.5})])
        engine.push(VIEW, ROWS)
    return home


@pytest.mark.parametrize("form", ["parquet", "csv", "arrow", "table"])
def test_files_with_odd_columns_are_loaded(home: Path, tmp_path: Path, form: str) -> None:
    table = pa.table(ROWS)
    data: Any = tmp_path / f"rows.{form}"
    if form == "parquet":
        pa.parquet.write_table(table, data)
    elif form == "csv":
        pa.csv.write_csv(table, data)
    elif form == "arrow":
        pa.feather.write_feather(table, data)
    else:
        data = table
    with st.Engine.open(home / "store") as engine:
        assert engine.load(VIEW, data) == 2
        found = engine.get_online_features([f"{VIEW}:{name}" for name in ODD], {key: ROWS[key] for key in KEYS})
        for name in ODD:
            np.testing.assert_array_equal(found[f"{VIEW}:{name}"], ROWS[name])
        assert found.to_arrow().column_names == [f"{VIEW}:{name}" for name in ODD]
        answer = engine.predict(MODEL, {**{key: ROWS[key] for key in KEYS}, **dict.fromkeys(REQUEST, 1.0)})
        np.testing.assert_allclose(answer.outputs["p"], SUMS)


def test_commands_take_odd_names(home: Path) -> None:
    store = ["--store", str(home / "store"), "--json"]
    keys = ["-kunde==1,2", 'land, "ort"=a,b']
    asked = run_well("predict", MODEL, *store, "--", *keys, *(f"{name}=1" for name in REQUEST)).json
    np.testing.assert_allclose(asked["outputs"]["p"], SUMS)
    found = run_well("features", *(f"{VIEW}:{name}" for name in ODD), *store, "--", *keys).json["features"]
    assert found == {f"{VIEW}:{name}": ROWS[name].tolist() for name in ODD}
    assert run_well("delete", VIEW, *store, "--", "-kunde==9", 'land, "ort"=a').json["rows"] == 0
    for command in (["stat"], ["verify"], ["models", "list"], ["models", "show", MODEL]):
        run_well(*command, *store)
    run_well("models", "canary", f"{MODEL}=off", *store)
    assert run_well("backup", *store[:2], str(home / "copy"), "--json").json["model_versions"] == 1
    assert run_well("verify", "--store", str(home / "copy"), "--json").json["model_versions"] == 1
    deployed = run_well("models", "deploy", MODEL, str(home / "m.onnx"), *store, "--metric", "a=b=0.5").json
    assert deployed["version"] == 1


def test_a_table_shows_columns_of_equal_names(home: Path) -> None:
    """A request column, an output and the notes may all be called the same."""
    columns = ["-kunde==1,7", 'land, "ort"=a,b', *(f"{name}=1" for name in REQUEST)]
    shown = run_well("predict", MODEL, "--store", str(home / "store"), "--", *columns).out.splitlines()
    header = shown[1].split()
    assert header.count("status") == 2
    assert header.count("p") == 2
    assert shown[3].endswith(f"{VIEW} NOT_FOUND")


def test_a_feature_with_an_equals_sign_is_no_key(home: Path) -> None:
    out = run_well("features", f"{VIEW}:a=b", "--store", str(home / "store"), "--", "-kunde==1", 'land, "ort"=a').out
    assert out.splitlines()[0].split("  ")[-1] == f"{VIEW}:a=b"


@pytest.mark.parametrize("name", ["a\x1b[31m", "x\ny", "\udcff", "gro\u0308ße", "a  b", "../../etc"])
def test_an_unknown_name_is_shown_in_one_printable_line(home: Path, name: str) -> None:
    store = ["--store", str(home / "store")]
    for arguments in (["predict", name], ["models", "show", name], ["push", name, "x"], ["materialize", name]):
        line = error_of(*arguments, *store)
        assert line[:-1].isprintable()
        assert repr(name).strip("'") in line
    line = error_of("features", f"{VIEW}:{name}", "-", *store)
    assert line[:-1].isprintable()


def test_terminal_codes_in_rows_are_escaped(tmp_path: Path) -> None:
    view = st.FeatureView("v", st.Entity("e", {"k": st.String}), [st.Feature("f", st.String)])
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([view])
        engine.push("v", {"k": ["a\nb"], "f": ["\x1b[2J"]})
    out = run_well("features", "v:f", 'k="a\nb"', "--store", str(tmp_path / "store")).out
    assert out.splitlines() == ["k     v:f", r"a\nb  \x1b[2J"]


def test_names_that_the_output_cannot_encode_are_escaped(home: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "shorttail", "models", "show", MODEL, "--store", str(home / "store")]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert rb":\u65e5\u672c\u8a9e" in done.stdout
    assert "größe".encode("latin-1") in done.stdout


def test_names_in_the_model_file_may_be_any_text(tmp_path: Path) -> None:
    """TensorFlow writes `StatefulPartitionedCall:0` and `a/b`; the names of the file are not ours to choose."""
    write_sum(tmp_path / "m.onnx", 1, "serving/x (1):0", "\x1b[31mp\n")
    model = st.Model("m", str(tmp_path / "m.onnx"), {"serving/x (1):0": ["request:a"]}, outputs=["\x1b[31mp\n"])
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([model])
        assert engine.predict("m", {"a": [2.0]}).outputs["\x1b[31mp\n"].tolist() == [2.0]
    for command in (["models", "list"], ["models", "show", "m"], ["predict", "m", "a=1"]):
        out = run_well(*command, "--store", str(tmp_path / "store")).out
        assert all(line.isprintable() for line in out.split("\n"))
        assert r"\x1b[31mp\n" in out
    (tmp_path / "d.py").write_text(
        "import shorttail as st\n"
        "m = st.Model('m', 'm.onnx', {'serving/x (1):0': ['request:b']}, outputs=['\\x1b[31mp\\n'])\n"
    )
    assert "\x1b" not in run_well("apply", str(tmp_path / "d.py"), "--store", str(tmp_path / "store"), "--create").out


def test_on_demand_functions_take_odd_columns(tmp_path: Path) -> None:
    @st.on_demand
    def größe_log(höhe: st.Float64, y: st.Float64) -> st.Float32:  # type: ignore[valid-type]
        return höhe * 10.0 + y

    write_sum(tmp_path / "m.onnx", 1)
    view = st.FeatureView("größe-1.5", st.Entity("e", {"k, 1": st.Int64}), [st.Feature("höhe (m)", st.Float32)])
    model = st.Model("m", str(tmp_path / "m.onnx"), [größe_log("größe-1.5:höhe (m)", "request:a, b)")])
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([view, model])
        engine.push("größe-1.5", {"k, 1": 1, "höhe (m)": 2.0})
        assert engine.predict("m", {"k, 1": [1], "a, b)": [3.0]}).outputs["p"].tolist() == [23.0]

    def plain(x: st.Float64) -> st.Float64:  # type: ignore[valid-type]
        return x

    for name in ("<lambda>", "a b", "a-b", "7d"):
        plain.__name__ = name
        with pytest.raises(InvalidArgument, match=r"on-demand function '.+' is not a Python identifier"):
            st.on_demand(plain)


# -- load tests --------------------------------------------------------------------------------------------------------

VIEWS = [{"name": VIEW, "keys": {"-kunde=": "Int64"}, "features": dict.fromkeys(ODD, "Float32")}]
MODELS = [{"name": MODEL, "version": 1, "columns": {"-kunde=": "Int64", **dict.fromkeys(REQUEST, "Float64")}}]


def test_load_tests_take_odd_names() -> None:
    workload = Workload(
        predict=MODEL,
        features=[f"{VIEW}:{name}" for name in ODD],
        push=VIEW,
        keys=["-kunde==uniform:1:9"],
        values=[f"{name}=choice:1,2" for name in REQUEST],
        shared=["a=b=c"],
    )
    traffic = plan_rpc(workload, MODELS, VIEWS)
    assert [template.name for template in traffic.templates] == ["predict", "features", "push"]
    assert traffic.describes["-kunde="] == "uniform:1:9"
    assert {name: traffic.describes[name] for name in REQUEST} == dict.fromkeys(REQUEST, "choice:1,2")


def test_the_features_of_a_load_test_are_a_row_of_csv() -> None:
    options = {"body": None, "mix": None, "overwrite_live_rows": False, "headers": (), "deadline_ms": None}
    options |= dict.fromkeys(("predict", "push", "rows", "push_rows", "keys", "values", "draw", "encoding"))
    options |= {"features": 'v:a, v:b,"v:a, b","v:""q"""', "shared": ()}
    assert make_workload(options, 0, is_http=False).features == ["v:a", "v:b", "v:a, b", 'v:"q"']


def test_a_report_escapes_names() -> None:
    rows = [["<script>alert(1)</script>", '"&<b>']]
    assert html_table(['<img src="x">'], rows) == (
        '<table class=""><tr><th>&lt;img src=&quot;x&quot;&gt;</th></tr>'
        "<tr><td>&lt;script&gt;alert(1)&lt;/script&gt;</td><td>&quot;&amp;&lt;b&gt;</td></tr></table>"
    )


# -- folders -----------------------------------------------------------------------------------------------------------


def test_names_that_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    entity = st.Entity("e", {"k": st.Int64})

    def view(name: str) -> st.FeatureView:
        return st.FeatureView(name, entity, [st.Feature("f", st.Float32), st.Feature("F", st.Float32)])

    write_sum(tmp_path / "m.onnx", 1)
    model, other = (st.Model(name, str(tmp_path / "m.onnx"), ["request:a"]) for name in ("Maß", "MASS"))
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([view("stats"), model])
        for definition, message in (
            ([view("Stats")], "feature view 'Stats' differs from 'stats' only in upper and lower case"),
            ([other], "model 'MASS' differs from 'Maß' only"),
            ([view("a"), view("A")], "feature view 'A' differs from 'a' only"),
        ):
            with pytest.raises(InvalidArgument, match=message):
                engine.apply(definition)
        engine.apply([view("stats"), model])  # those that are there stay
        assert set(engine.store.catalog.views) == {"stats"}


def test_a_catalog_that_names_another_folder_reaches_no_file(tmp_path: Path) -> None:
    """Even a damaged catalog cannot make the engine read outside of its folder."""
    write_sum(tmp_path / "m.onnx", 1)
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([st.Model("m", str(tmp_path / "m.onnx"), ["request:a"])])
        document = engine.store.catalog.to_json().replace(b'"models":{"m":', b'"models":{"../../m":')
        engine.store.catalog.models = Catalog.from_json(document).models
        with pytest.raises(InvalidArgument, match=r"model '\.\./\.\./m': a name has no : and no /"):
            engine.predict("../../m", {"a": 1.0})


# -- metrics and logs --------------------------------------------------------------------------------------------------


def test_metrics_keep_names_of_any_script_apart() -> None:
    memory = MetricsMemory.create(1)
    recorder = memory.claim()
    known = ["größe", "grüße", "日本", "x" * 255, "x" * 254 + "y"]
    predict = METHODS.index("predict")
    slots = [recorder.slot(predict, name) for name in known]
    assert len(set(slots)) == len(known)
    for slot, rows in zip(slots, range(1, 6), strict=True):
        recorder.batch(slot, 0, 1, rows, 1, 2, 0, 0, 0, 0)
    assert {name: memory.slots()["predict", name].rows for name in known} == dict(zip(known, range(1, 6), strict=True))
    # The process that takes the region over finds the same slots.
    again = type(recorder)(memory.words, 1)
    assert [again.slot(predict, name) for name in known] == slots


@pytest.mark.parametrize("name", [*ODD, "\x1b[2J\n", "\ud800"])
def test_a_log_line_is_one_printable_line(name: str) -> None:
    line = format_line("text", "warning", "request failed", {"model": name})
    assert line.isprintable()
    document = json.loads(format_line("json", "warning", "request failed", {"model": name}))
    assert document["model"] == name


def test_an_argument_that_looks_like_an_option_says_what_to_do() -> None:
    assert "(an argument that begins with - comes after --; see `shorttail predict --help`)" in error_of(
        "predict", "m", "-x=1", "--store", "nowhere", code=2
    )
