"""Parsers and writers of HTTP bodies: functions of plain values, whose results can be pickled."""

import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from shorttail.define.dtypes import Bool, Float32, Int64, String, Vector
from shorttail.errors import InvalidArgument
from shorttail.server.http import invocations, predictions, v2
from shorttail.server.http.literals import parse_document
from shorttail.server.http.media import CSV, JSON, JSON_LINES, NotAcceptable, UnsupportedMedia, answer_type, body_type
from shorttail.server.http.parsed import Answer, ModelColumns

MODEL = ModelColumns(
    "m", None, ("id", "x", "name", "v", "flag"), (Int64, Float32, String, Vector(2), Bool), ("t",), False
)


def find_model(name, version):
    assert name in (None, "m")
    return MODEL


ROW = {"id": 1, "x": "Infinity", "name": "NaN", "v": [1, "-Infinity"], "flag": True}
READ = {"id": [1], "x": [math.inf], "name": ["NaN"], "v": [[1, -math.inf]], "flag": [True]}
TENSORS = [
    {"name": name, "datatype": kind, "shape": shape, "data": data}
    for name, kind, shape, data in (("id", "INT64", [1], [1]), ("x", "FP32", [1, 1], ["Infinity"]),
                                    ("name", "BYTES", [1], ["NaN"]), ("v", "FP64", [1, 2], [1, "-Infinity"]),
                                    ("flag", "BOOL", [1], [True]))
]  # fmt: skip


@pytest.mark.parametrize(
    ("parser", "body"),
    [
        (invocations.parse_json_body, {"instances": [ROW]}),
        (invocations.parse_json_body, {"dataframe_split": {"columns": list(ROW), "data": [list(ROW.values())]}}),
        (invocations.parse_json_body, {"dataframe_records": [ROW]}),
        (invocations.parse_json_body, {"inputs": {name: [value] for name, value in ROW.items()}}),
        (invocations.parse_json_lines, ROW),
        (invocations.parse_csv, "1,inf,NaN,1,-inf,true"),
    ],
)
def test_each_format_gives_the_same_columns(parser, body):
    text = body if isinstance(body, str) else json.dumps(body)
    asked = parser(text.encode(), find_model)
    assert asked.columns == READ
    assert pickle.loads(pickle.dumps(asked)) == asked


def test_tensors_give_the_columns_too_and_can_be_pickled():
    asked = v2.parse_infer(json.dumps({"inputs": TENSORS}).encode(), None, find_model)
    again = pickle.loads(pickle.dumps(asked))
    assert again.wanted == asked.wanted
    assert {name: np.asarray(values).tolist() for name, values in again.values.items()} == READ
    assert pickle.loads(pickle.dumps(MODEL)) == MODEL


def test_writers_take_and_give_what_can_be_pickled():
    values = [np.array([[1.5, np.inf], [np.nan, -np.inf]], np.float32), np.array(["a", None], object)]
    answer = pickle.loads(pickle.dumps(Answer(["p", "label"], values, {"view": np.zeros(2, np.uint8)}, 3, 2)))
    rows = [{"p": [1.5, "Infinity"], "label": "a"}, {"p": [None, "-Infinity"], "label": None}]
    body = predictions.write_predictions(None, answer)
    assert json.loads(body.content) == {"predictions": rows, "version": 3}
    assert [json.loads(line) for line in predictions.write_json_lines(None, answer).content.splitlines()] == rows
    assert predictions.write_csv(["p"], answer).content == b"1.5,inf\nnan,-inf\n"
    wanted = v2.WantedOutputs("m", None, {"p": True, "label": False}, False, True)
    body = pickle.loads(pickle.dumps(v2.write_answer(wanted, answer)))
    head = json.loads(body.content[: int(body.headers[v2.HEADER_BYTES])])
    assert [output["name"] for output in head["outputs"]] == ["statuses:view", "p", "label"]
    assert body.content.endswith(values[0].tobytes())


def test_a_parameter_or_a_model_that_is_unknown_is_an_error():
    with pytest.raises(InvalidArgument, match="the parameter version must be a whole number"):
        invocations.parse_json_body(b'{"instances": [1], "params": {"version": true}}', find_model)


# -- words that JSON does not have -------------------------------------------------------------------------------------

documents = some.recursive(
    some.none() | some.booleans() | some.integers(-(2**53), 2**53) | some.floats() | some.text(),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text(), inner, max_size=4),
    max_leaves=20,
)


def replaced(document):
    """What parse_document makes of a document that Python's json has written."""
    if isinstance(document, float) and not math.isfinite(document):
        return None if math.isnan(document) else "Infinity" if document > 0 else "-Infinity"
    if isinstance(document, list):
        return [replaced(part) for part in document]
    if isinstance(document, dict):
        return {name: replaced(part) for name, part in document.items()}
    return document


@given(documents, some.booleans())
def test_words_for_numbers_are_read_and_texts_stay(document, ascii_only):
    assert parse_document(json.dumps(document, ensure_ascii=ascii_only).encode()) == replaced(document)


@pytest.mark.parametrize(
    "text", ["NaN NaN", "[NaN", '"NaN', '{"a": Infinit}', "Infinity1", "-NaN", '\\"NaN', '"a"NaN', '"\\']
)
def test_what_is_not_json_stays_an_error(text):
    with pytest.raises(InvalidArgument, match="the body is not JSON"):
        parse_document(text.encode())


# -- media types -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (None, JSON),
        ("", JSON),
        ("application/json", JSON),
        ("Application/JSON; charset=UTF-8", JSON),
        ("application/x-www-form-urlencoded", JSON),
        ('text/csv; header=present; charset="utf-8"', CSV),
    ],
)
def test_the_type_of_a_body(header, found):
    assert body_type(header, [JSON, CSV]) == found


@pytest.mark.parametrize("header", ["text/html", "json", "application/json; charset=latin-1", "*/*"])
def test_a_type_that_is_not_taken(header):
    with pytest.raises(UnsupportedMedia):
        body_type(header, [JSON, CSV])


@pytest.mark.parametrize(
    ("accept", "found"),
    [
        (None, JSON),
        ("", JSON),
        ("*/*", JSON),
        ("text/*", CSV),
        ("text/csv, application/json", JSON),
        ("text/csv, application/json;q=0.9", CSV),
        ("*/*;q=0.1, application/x-ndjson", JSON_LINES[2]),
        ("application/json;q=0, */*", CSV),
        ("application/json;q=nonsense", JSON),
        ("TEXT/CSV;header=absent;Q=0.5", CSV),
    ],
)
def test_the_type_of_an_answer(accept, found):
    assert answer_type(accept, [JSON, CSV, *JSON_LINES]) == found


@pytest.mark.parametrize("accept", ["text/html", "*/*;q=0", "application/json;q=0", ",", "text/csv" + " " * 5000])
def test_an_answer_that_nobody_takes(accept):
    with pytest.raises(NotAcceptable):
        answer_type(accept, [JSON, JSON])
