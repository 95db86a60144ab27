"""Sends every kind of value through every interface into a column of every type: all interfaces give the same outcome.

kinds.py has the kinds of values and their outcomes. An interface is a function here: it sends a value, and returns what
the column then holds. It raises NotExpressible for a value that it cannot express; docs/types.md lists those.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import onnx
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet
import pytest
import tritonclient.http as triton
from click.testing import CliRunner
from http_asking import ask, ask_json, http_port
from kinds import KINDS, NAN, TEXTS, TYPES, Kind
from onnx import TensorProto, helper
from serving import Server
from tritonclient.utils import InferenceServerException

import shorttail as st
from shorttail.cli import cli
from shorttail.config import LIMITS
from shorttail.define.dtypes import parse_dtype
from shorttail.define.views import Feature
from shorttail.loadtest.traffic import Workload, plan_rpc
from shorttail.sources.batches import open_source, row_batches

TENSORS = {
    "Bool": TensorProto.BOOL,
    "Int32": TensorProto.INT32,
    "Int64": TensorProto.INT64,
    "Float32": TensorProto.FLOAT,
    "Float64": TensorProto.DOUBLE,
    "String": TensorProto.STRING,
    "Timestamp": TensorProto.INT64,
    "Vector(2)": TensorProto.FLOAT,
}
KEYS = ("Int64", "String")


class NotExpressible(Exception):
    """Raised by an interface that cannot express a value."""


@dataclass
class Served:
    engine: st.Engine
    server: Server
    client: st.Client
    folder: Path
    number: int = 0

    def keys(self, count: int) -> list[int]:
        """Return ids that no row has yet."""
        self.number += count
        return list(range(self.number - count, self.number))


@st.on_demand
def ticks(t: st.Timestamp) -> st.Int64:
    return t


def plain_name(dtype: str) -> str:
    return dtype.replace("(", "").replace(")", "")


def write_identity(path: Path, kind: int, width: int) -> None:
    """Write a model that returns its input [rows, width]."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "identity",
        [helper.make_tensor_value_info("x", kind, [None, width])],
        [helper.make_tensor_value_info("y", kind, [None, width])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, str(path))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("types")
    user = st.Entity("user", keys={"id": st.Int64})
    objects: list[Any] = []
    for dtype, tensor in TENSORS.items():
        name = plain_name(dtype)
        write_identity(home / f"{name}.onnx", tensor, 2 if dtype == "Vector(2)" else 1)
        given = ticks("request:x") if dtype == "Timestamp" else "request:x"
        objects.append(st.Model(f"m{name}", path=str(home / f"{name}.onnx"), inputs=[given]))
        feature = Feature("x", parse_dtype(dtype))
        objects += [st.FeatureView(view + name, entity=user, features=[feature]) for view in ("v", "loaded")]
    for dtype in KEYS:
        entity = st.Entity(f"of{dtype}", keys={"key": parse_dtype(dtype)})
        feature = Feature("n", st.Int64)
        objects += [st.FeatureView(view + dtype, entity=entity, features=[feature]) for view in ("k", "r")]
    with st.Engine.open(home / "store", create=True) as engine:
        engine.apply(objects)
        server = Server(home / "store", log=home / "log")
        try:
            with st.Client(f"127.0.0.1:{server.address[1]}") as client:
                yield Served(engine, server, client, home)
            assert server.stop() == 0
            assert server.log.read_text() == ""
        finally:
            server.kill()


# -- what is expected --------------------------------------------------------------------------------------------------

# (served, type, value, expected number of rows) -> rows that the column holds
Interface = Callable[[Served, str, Any, int], list[Any]]


def rounded(dtype: str, rows: list[Any]) -> list[Any]:
    """Return outcomes rounded to the precision of the type."""
    if dtype not in ("Float32", "Vector(2)"):
        return rows
    with np.errstate(over="ignore"):
        return [None if row is None else np.float32(row).tolist() for row in rows]


def stored(dtype: str, rows: list[Any] | None) -> list[Any] | None:
    """Return the values that a feature must hold afterwards; None: the value must be refused."""
    return None if rows is None else rounded(dtype, rows)


def requested(dtype: str, rows: list[Any] | None) -> list[Any] | None:
    """Return the values that a model must get. A missing value is NaN, or is refused if the type has no NaN."""
    if rows is None or (None in rows and dtype not in ("Float32", "Float64", "Vector(2)")):
        return None
    nothing = [NAN, NAN] if dtype == "Vector(2)" else NAN
    return rounded(dtype, [nothing if row is None else row for row in rows])


# Other errors: for a missing value, and for a body or tensor that cannot hold the value.
CLIENT_ERROR = "takes numbers, bools, text, times or vectors; got"  # a client does not know the column's type
OTHER_ERRORS = ("is null", "missing", "not JSON", "data must be an array of", "has the shape", CLIENT_ERROR)


def check(
    served: Served,
    interface: Interface,
    dtype: str,
    kinds: list[Kind],
    expect: Callable[[str, list[Any] | None], list[Any] | None],
) -> None:
    """Check that every kind of value has its outcome through an interface."""
    wrong, tried = [], 0
    for kind in kinds:
        rows = kind.outcomes.get(dtype)
        expected = expect(dtype, rows)
        try:
            outcome: Any = interface(served, dtype, kind.value, 1 if rows is None else len(rows))
        except NotExpressible:
            continue
        except (st.ShorttailError, InferenceServerException) as error:
            outcome = message = str(error)
            # A model's request column is Float64 where its input is Float32.
            takes = [f"takes {name}; got" for name in (dtype, dtype.replace("32", "64"))]
            right = expected is None and any(words in message for words in (*takes, *OTHER_ERRORS))
        except Exception as error:
            outcome, right = f"{type(error).__name__}: {error}", False
        else:
            right = expected is not None and repr(outcome) == repr(expected)
        tried += 1
        if not right:
            wrong.append(f"{kind.name}: {outcome!r:.200}, where {expected!r:.100} is expected")
    assert tried > 0
    assert not wrong, "\n".join([f"{interface.__name__}, {dtype}:", *wrong])


# -- stored ------------------------------------------------------------------------------------------------------------


def read(served: Served, view: str, ids: list[int]) -> list[Any]:
    served.engine.refresh()
    found = served.engine.get_online_features([f"{view}:x"], {"id": ids})
    assert set(found.feature_statuses[f"{view}:x"]) <= {st.Status.PRESENT, st.Status.NULL}
    rows: list[Any] = found.to_dict()[f"{view}:x"]
    return rows


def engine_push(served: Served, dtype: str, value: Any, rows: int) -> list[Any]:
    view, ids = f"v{plain_name(dtype)}", served.keys(rows)
    served.engine.push(view, {"id": ids if rows > 1 else ids[0], "x": value})
    return read(served, view, ids)


def client_push(served: Served, dtype: str, value: Any, rows: int) -> list[Any]:
    view, ids = f"v{plain_name(dtype)}", served.keys(rows)
    served.client.push(view, {"id": ids if rows > 1 else ids[0], "x": value})
    return read(served, view, ids)


def as_table(ids: list[int], dtype: str, value: Any) -> Any:
    """Return the columns as Arrow data. Raises NotExpressible for a value that Arrow would change."""
    if dtype == "Vector(2)" and not has_vector_rows(value):
        raise NotExpressible  # a single vector, but a file has rows
    if isinstance(value, pa.Array | pa.ChunkedArray):
        return pa.table({"id": ids[:1] * len(value) if len(ids) < len(value) else ids, "x": value})
    if isinstance(value, pd.Series) and value.dtype != object:
        frame = pd.DataFrame({"id": ids[:1] * len(value) if len(ids) < len(value) else ids, "x": value})
        return pa.Table.from_pandas(frame, preserve_index=False)
    if isinstance(value, pl.Series):
        return pl.DataFrame({"id": ids[:1] * len(value) if len(ids) < len(value) else ids, "x": value})
    native = isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.isnative
    if native and not isinstance(value, np.ma.MaskedArray) and value.dtype.kind in "biufM":
        if value.dtype.kind == "M" and np.datetime_data(value.dtype)[1] != 1:
            raise NotExpressible
        try:
            return as_table(ids, dtype, pa.array(value))
        except (pa.ArrowException, ValueError):
            raise NotExpressible from None
    raise NotExpressible


def has_vector_rows(value: Any) -> bool:
    kind = str(getattr(value, "type", getattr(value, "dtype", "")))
    return "ist" in kind or "Array" in kind or "null" in kind.lower()


def arrow_load(served: Served, dtype: str, value: Any, rows: int) -> list[Any]:
    view, ids = f"loaded{plain_name(dtype)}", served.keys(rows)
    served.engine.load(view, as_table(ids, dtype, value))
    return read(served, view, ids)


def parquet_file(served: Served, dtype: str, value: Any, rows: int) -> list[Any]:
    """Write a Parquet file, and read it as `shorttail push FILE` does."""
    view, ids = f"v{plain_name(dtype)}", served.keys(rows)
    table = as_table(ids, dtype, value)
    path = served.folder / "rows.parquet"
    try:
        pyarrow.parquet.write_table(table.to_arrow() if isinstance(table, pl.DataFrame) else table, path)
    except (pa.ArrowException, NotImplementedError):
        raise NotExpressible from None
    definition = served.engine.store.catalog.view(view)
    for batch in row_batches(open_source(path, definition), definition, None, LIMITS.max_clock_skew_us):
        served.engine.store.upsert(view, batch)
    return read(served, view, ids)


def csv_file(served: Served, dtype: str, value: str, rows: int) -> list[Any]:
    view, ids = f"loaded{plain_name(dtype)}", served.keys(rows)
    path = served.folder / "rows.csv"
    path.write_text(f"id,x\n{ids[0]},{value}\n")
    served.engine.load(view, path)
    return read(served, view, ids)


def default(served: Served, dtype: str, value: Any, rows: int) -> list[Any]:
    if rows != 1:
        raise NotExpressible
    kept = Feature("x", parse_dtype(dtype), value).default
    if dtype == "Vector(2)" and kept is not None:
        kept = list(kept)
    return rounded(dtype, [kept])


def is_one_value(value: Any) -> bool:
    """Return whether a kind's value is a single value, as a default must be, not a column of values."""
    return not hasattr(value, "__len__") or isinstance(value, str | bytes | dict | set)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("interface", [engine_push, client_push, arrow_load, parquet_file])
def test_stored_values(served: Served, interface: Interface, dtype: str) -> None:
    check(served, interface, dtype, KINDS, stored)


@pytest.mark.parametrize("dtype", TYPES)
def test_defaults(served: Served, dtype: str) -> None:
    check(served, default, dtype, [kind for kind in KINDS if is_one_value(kind.value)], stored)


@pytest.mark.parametrize("dtype", TYPES[:-1])
def test_fields_of_a_csv_file(served: Served, dtype: str) -> None:
    check(served, csv_file, dtype, TEXTS, stored)


# -- requests ----------------------------------------------------------------------------------------------------------


def answered(outputs: Any) -> list[Any]:
    rows = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in np.asarray(outputs).tolist()]
    return [row.decode() if isinstance(row, bytes) else row for row in rows]


def engine_predict(served: Served, dtype: str, value: Any, rows: int) -> list[Any]:
    return answered(served.engine.predict(f"m{plain_name(dtype)}", {"x": value}).outputs["y"])


def client_predict(served: Served, dtype: str, value: Any, rows: int) -> list[Any]:
    return answered(served.client.predict(f"m{plain_name(dtype)}", {"x": value}).outputs["y"])


def is_json(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(is_json, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return value.bit_length() < 1024
    return value is None or type(value) in (bool, str) or (type(value) is float and math.isfinite(value))


def json_rows(value: Any) -> list[Any]:
    if not is_json(value):
        raise NotExpressible
    return value if isinstance(value, list) else [value]


def post_json(served: Served, path: str, body: Any) -> Any:
    status, answer = ask_json(served.server, "POST", path, body)
    if status == 400:
        raise st.ShorttailError(answer["error"])
    assert status == 200, answer
    return answer


def instances(served: Served, dtype: str, value: Any, rows: int) -> list[Any]:
    given = json_rows(value)
    if dtype == "Vector(2)" and rows == 1 and given != [None] and not isinstance(given[0], list):
        given = [given]  # a single vector is a single instance
    body = {"instances": [{"x": row} for row in given], "parameters": {"model": f"m{plain_name(dtype)}"}}
    predictions = post_json(served, "/invocations", body)["predictions"]
    return answered(from_json(dtype, predictions))


def from_json(dtype: str, rows: Any) -> Any:
    """Return an array of JSON rows. null becomes NaN; infinities are texts, which NumPy converts."""
    if dtype not in ("Float32", "Float64", "Vector(2)"):
        return np.array(rows, object)
    return np.array(rows, np.float32 if dtype != "Float64" else np.float64)


def as_tensor(value: Any) -> tuple[str, list[int], list[Any]]:
    """Return (datatype, shape, elements) of a list. Raises NotExpressible if a tensor would change its values."""
    given = json_rows(value)
    nested = any(isinstance(row, list) for row in given)
    if nested and not all(isinstance(row, list) for row in given):
        raise NotExpressible
    flat = [item for row in given for item in row] if nested else given
    if any(isinstance(item, list) for item in flat) or (nested and len({len(row) for row in given}) > 1):
        raise NotExpressible
    kinds = {type(item) for item in flat} - {type(None)}
    shape = [len(given), len(given[0])] if nested else [len(given)]
    if kinds == {int}:
        if all(-(2**63) <= item < 2**63 for item in flat if item is not None):
            return "INT64", shape, flat
        if all(item is not None and 0 <= item < 2**64 for item in flat):
            return "UINT64", shape, flat
        raise NotExpressible
    named = {frozenset({bool}): "BOOL", frozenset({float}): "FP64", frozenset({str}): "BYTES", frozenset(): "FP64"}
    if frozenset(kinds) not in named:
        raise NotExpressible
    return named[frozenset(kinds)], shape, flat


def tensor_json(served: Served, dtype: str, value: Any, rows: int) -> list[Any]:
    datatype, shape, flat = as_tensor(value)
    if dtype == "Vector(2)" and set(flat) == {None} and len(shape) == 1:
        raise NotExpressible  # a tensor has no missing rows
    if dtype == "Vector(2)" and rows == 1 and len(shape) == 1:
        shape = [1, *shape]
    tensor = {"name": "x", "datatype": datatype, "shape": shape, "data": flat}
    (output,) = post_json(served, f"/v2/models/m{plain_name(dtype)}/infer", {"inputs": [tensor]})["outputs"]
    return answered(np.reshape(from_json(dtype, output["data"]), output["shape"]))


BINARY = {"b1": "BOOL", "i1": "INT8", "i2": "INT16", "i4": "INT32", "i8": "INT64", "u1": "UINT8", "u2": "UINT16",
          "u4": "UINT32", "u8": "UINT64", "f2": "FP16", "f4": "FP32", "f8": "FP64"}  # fmt: skip


def tensor_binary(served: Served, dtype: str, value: Any, rows: int) -> list[Any]:
    if isinstance(value, np.ndarray) and value.ndim and not isinstance(value, np.ma.MaskedArray):
        array, datatype = value, BINARY.get(value.dtype.str[1:], "")
    else:
        datatype, shape, flat = as_tensor(value)
        if None in flat:
            raise NotExpressible
        numpy = {name: code for code, name in BINARY.items()}
        array = np.array(flat, object if datatype == "BYTES" else numpy[datatype]).reshape(shape)
    if not datatype or array.dtype.str[0] == ">":
        raise NotExpressible
    if dtype == "Vector(2)" and rows == 1 and array.ndim == 1:
        array = array.reshape(1, -1)
    tensor = triton.InferInput("x", list(array.shape), datatype)
    try:
        tensor.set_data_from_numpy(np.ascontiguousarray(array), binary_data=True)
    except (InferenceServerException, UnicodeEncodeError):
        raise NotExpressible from None
    with triton.InferenceServerClient(f"127.0.0.1:{http_port(served.server)}") as client:
        output = client.infer(f"m{plain_name(dtype)}", [tensor]).as_numpy("y")
    return answered(output)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("interface", [engine_predict, client_predict, instances, tensor_json, tensor_binary])
def test_requested_values(served: Served, interface: Interface, dtype: str) -> None:
    check(served, interface, dtype, KINDS, requested)


# -- keys --------------------------------------------------------------------------------------------------------------


def as_keys(dtype: str, rows: list[Any] | None) -> list[Any] | None:
    """Return the features that a lookup must find: 5 for every key, None for a missing key."""
    return None if rows is None else [None if row is None else 5 for row in rows]


def look_up(source: Any, served: Served, dtype: str, value: Any, rows: int) -> list[Any]:
    found = source.get_online_features([f"k{dtype}:n"], {"key": value})
    statuses = dict.fromkeys(found.feature_statuses[f"k{dtype}:n"].tolist())
    assert set(statuses) <= {st.Status.PRESENT, st.Status.NOT_FOUND}
    numbers: list[Any] = found.to_dict()[f"k{dtype}:n"]
    return numbers


def engine_keys(served: Served, dtype: str, value: Any, rows: int) -> list[Any]:
    return look_up(served.engine, served, dtype, value, rows)


def client_keys(served: Served, dtype: str, value: Any, rows: int) -> list[Any]:
    return look_up(served.client, served, dtype, value, rows)


@pytest.mark.parametrize("dtype", KEYS)
@pytest.mark.parametrize("interface", [engine_keys, client_keys])
def test_keys_of_lookups(served: Served, interface: Interface, dtype: str) -> None:
    keys = {row for kind in KINDS for row in kind.outcomes.get(dtype, ()) if row is not None}
    served.engine.push(f"k{dtype}", {"key": list(keys), "n": 5})
    served.engine.refresh()
    check(served, interface, dtype, KINDS, as_keys)


def as_row_keys(dtype: str, rows: list[Any] | None) -> list[Any] | None:
    """Return the keys that a push must store; None: it must be refused, because a key is missing."""
    return None if rows is None or None in rows else sorted(set(rows))


def engine_rows(served: Served, dtype: str, value: Any, rows: int) -> list[Any]:
    return stored_and_deleted(served.engine, served, dtype, value)


def client_rows(served: Served, dtype: str, value: Any, rows: int) -> list[Any]:
    return stored_and_deleted(served.client, served, dtype, value)


def stored_and_deleted(target: Any, served: Served, dtype: str, value: Any) -> list[Any]:
    """Push rows and delete them again. Returns the keys that the push stored; the delete must leave none."""
    target.push(f"r{dtype}", {"key": value, "n": 1})
    keys = keys_of(served, f"r{dtype}")
    assert target.delete(f"r{dtype}", {"key": value}) == len(keys)
    assert keys_of(served, f"r{dtype}") == []
    return keys


def keys_of(served: Served, view: str) -> list[Any]:
    served.engine.refresh()
    return sorted(key for batch in served.engine.store.scan(view) for key in batch.keys[0].tolist())


@pytest.mark.parametrize("dtype", KEYS)
@pytest.mark.parametrize("interface", [engine_rows, client_rows])
def test_keys_of_rows(served: Served, interface: Interface, dtype: str) -> None:
    check(served, interface, dtype, KINDS, as_row_keys)


@pytest.mark.parametrize("source", ["engine", "client"])
def test_a_delete_refuses_what_a_push_refuses(served: Served, source: str) -> None:
    target = getattr(served, source)
    for kind in KINDS:
        for dtype in KEYS:
            if as_row_keys(dtype, kind.outcomes.get(dtype)) is None:
                with pytest.raises(st.InvalidArgument):
                    target.delete(f"r{dtype}", {"key": kind.value})
            else:
                target.delete(f"r{dtype}", {"key": kind.value})


# -- text --------------------------------------------------------------------------------------------------------------


def csv_body(served: Served, dtype: str, value: str, rows: int) -> list[Any]:
    headers = {
        "Content_Type": "text/csv",
        "X_Amzn_SageMaker_Target_Model": f"m{plain_name(dtype)}",
        "Accept": "application/json",
    }
    status, answer = ask(served.server, "POST", "/invocations", f"{value}\n".encode(), **headers)
    if status == 400:
        raise st.ShorttailError(json.loads(answer)["error"])
    return answered(from_json(dtype, json.loads(answer)["predictions"]))


def command_line(served: Served, dtype: str, value: str, rows: int) -> list[Any]:
    address = f"127.0.0.1:{served.server.address[1]}"
    arguments = ["predict", f"m{plain_name(dtype)}", f"x={value}", "--server", address, "--json"]
    done = CliRunner().invoke(cli, arguments)
    if isinstance(done.exception, st.ShorttailError):
        raise done.exception
    assert done.exception is None, done.exception
    return answered(from_json(dtype, json.loads(done.output)["outputs"]["y"]))


def bench_value(served: Served, dtype: str, value: str, rows: int) -> list[Any]:
    """Return the value that the load generator sends."""
    models = [{"name": "m", "columns": {"x": dtype}}]
    plan = plan_rpc(Workload(predict="m", values=[f"x={value}"], encoding="list"), models, [])
    (column,) = plan.columns
    return [msgpack.unpackb(column.table)]


@pytest.mark.parametrize("dtype", TYPES[:-1])
@pytest.mark.parametrize("interface", [csv_body, command_line])
def test_texts_of_requests(served: Served, interface: Interface, dtype: str) -> None:
    check(served, interface, dtype, TEXTS, requested)


@pytest.mark.parametrize("dtype", TYPES[:-1])
def test_texts_of_bench(served: Served, dtype: str) -> None:
    check(served, bench_value, dtype, TEXTS, lambda dtype, rows: rows)


VECTORS = [  # in a CSV body, on the command line, in a CSV file, for `bench`, and the vector (None: refused)
    ("1.5,-2", "1.5,-2", '"1.5,-2"', "1.5/-2", [1.5, -2.0]),
    ("1.5,", "1.5,", '"1.5,"', "1.5/", [1.5, NAN]),
    ("1e3,inf", "1e3,inf", '"1e3,inf"', "1e3/inf", [1000.0, math.inf]),
    ("1.5", "1.5", "1.5", "1.5", None),
    ("1,2,3", "1,2,3", '"1,2,3"', "1/2/3", None),
    ("a,2", "a,2", '"a,2"', "a/2", None),
    ("1, 2", "1, 2", '"1, 2"', "1/ 2", None),
]


@pytest.mark.parametrize(("body", "line", "file", "bench", "vector"), VECTORS)
def test_vectors_as_text(served: Served, body: str, line: str, file: str, bench: str, vector: Any) -> None:
    interfaces = {csv_body: body, command_line: line, csv_file: file, bench_value: bench}
    for interface, text in interfaces.items():
        if vector is None:
            with pytest.raises(st.ShorttailError, match=r"takes (Vector|Float)|the columns take 2"):
                interface(served, "Vector(2)", text, 1)
            continue
        assert repr(interface(served, "Vector(2)", text, 1)) == repr([vector]), interface.__name__
