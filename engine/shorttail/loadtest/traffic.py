"""Plans the requests of a load test: templates and columns, from the user's options and the catalog of the server."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from shorttail import protocol
from shorttail.define.dtypes import Int32, Int64, Timestamp, parse_dtype
from shorttail.define.names import listed_lookups, lookup_of, plain_name, suggestion
from shorttail.define.values import Refused, as_value
from shorttail.errors import InvalidArgument, NotFound
from shorttail.loadtest.own_keys import OwnKeys
from shorttail.loadtest.streams import (
    Stream,
    Values,
    default_values,
    listed,
    make_values,
    parse_draw,
    parse_keys,
    parse_values,
)
from shorttail.loadtest.target import Target
from shorttail.loadtest.templates import (
    NO_GROUP,
    EncodedColumn,
    Group,
    Template,
    array_header,
    table_column,
    tensor_header,
)

PLACEHOLDER = re.compile(r'"\{\{\s*([^{}"]+?)\s*\}\}"|\{\{\s*([^{}"]+?)\s*\}\}')
NUMPY = {"Int32": "<i4", "Int64": "<i8", "Timestamp": "<i8", "Float32": "<f4", "Float64": "<f8", "Bool": "?"}
EACH_ROW = "..."  # {{column...}} in a body stands for a value per row
CONTENT_TYPE = "application/json"


@dataclass(frozen=True, slots=True)
class Workload:
    """The options of a load test.

    predict: a model; features: references; push: a view. overwrite: pushes use `keys`, and so overwrite rows; else they
    have keys of their own. mix: weights of "predict", "features" and "push". rows, push_rows: rows per request. shared:
    columns that have a single value per request. keys, values: the texts of --keys and --value. body: the template of
    an HTTP body.
    """

    predict: str | None = None
    features: Sequence[str] = ()
    push: str | None = None
    overwrite: bool = False
    mix: Mapping[str, float] = field(default_factory=dict)
    rows: int = 1
    push_rows: int = 1
    shared: Sequence[str] = ()
    keys: Sequence[str] = ()
    values: Sequence[str] = ()
    draw: str = "uniform"
    encoding: str = "tensor"
    deadline_ms: float | None = None
    body: str | None = None
    headers: Sequence[str] = ()
    method: str = "POST"
    seed: int = 0


@dataclass(slots=True)
class Traffic:
    """The requests of a load test: templates with places for values, and the columns that give those values."""

    templates: list[Template]
    columns: list[EncodedColumn] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    describes: dict[str, str] = field(default_factory=dict)  # column -> the source of its values, for the report
    own_keys: OwnKeys | None = None  # of the pushes


class Builder:
    """Adds columns to a Traffic when a request first needs them. dtypes: column -> type, or "" if it is unknown."""

    def __init__(
        self,
        workload: Workload,
        dtypes: Mapping[str, str],
        views: Sequence[Mapping[str, Any]],
        own_keys: OwnKeys | None = None,
    ):
        self.workload = workload
        self.own_keys = own_keys
        self.dtypes = dict(dtypes)
        draw = parse_draw(workload.draw)
        self.streams = parse_keys(workload.keys, draw, views, dtypes)
        if own_keys is not None:
            self.dtypes |= {own_keys.name(column): dtype for column, dtype in own_keys.types.items()}
            self.streams.append(own_keys.stream())
        self.texts = parse_values(workload.values, dtypes)
        self.keys = {column for columns in listed_lookups(views).values() for column in columns}
        groups = [Group(stream.draw, stream.n, stream.exponent) for stream in self.streams]
        self.traffic = Traffic([], groups=groups, streams=self.streams, own_keys=own_keys)
        self._numbers: dict[tuple[str, str], int] = {}
        self._check_names()

    def _check_names(self) -> None:
        for column in (*self.texts, *self.workload.shared):
            if column not in self.dtypes:
                known = suggestion(column, self.dtypes, "columns")
                raise InvalidArgument(f"no request has a column '{column}'{known}")
        for column in self.texts:
            if any(column in stream for stream in self.streams):
                raise InvalidArgument(f"'{column}' has values from --keys and from --value; keep one")

    def pushed(self, name: str) -> str:
        """Return the column of the plan that pushes send as `name`."""
        return self.own_keys.name(name) if self.own_keys is not None and name in self.own_keys.types else name

    def column(self, name: str, form: str) -> int:
        """Return the number of a column in an encoding: "msgpack", "raw" or "json"."""
        if (name, form) not in self._numbers:
            self._numbers[name, form] = len(self.traffic.columns)
            self.traffic.columns.append(self._make(name, form))
        return self._numbers[name, form]

    def _make(self, name: str, form: str) -> EncodedColumn:
        dtype = self.dtypes[name]
        for group, stream in enumerate(self.streams):
            if name in stream.lows:
                self.traffic.describes[name] = stream.text.removeprefix(f"{name}=")
                check_range(name, stream, dtype)
                return EncodedColumn("int", form, group, low=stream.lows[name])
            if name in stream.tables:
                self.traffic.describes[name] = f"{stream.text} ({self.workload.draw}, {stream.n:,} rows)"
                return self._table(name, table_values(name, stream, dtype), form, group)
        if name in self.texts:
            self.traffic.describes[name] = self.texts[name]
            return self._from_values(name, make_values(name, self.texts[name], dtype), form)
        if name in self.keys:
            raise InvalidArgument(
                f"column '{name}' is a key: say where its values come from, --keys {name}=uniform:1:100000, "
                "--keys file:PATH or --keys store:PATH"
            )
        if not dtype:
            raise InvalidArgument(f"the body has {{{{{name}}}}}: give its values by --keys or --value {name}=...")
        self.traffic.describes[name] = f"default for {dtype}"
        return self._from_values(name, default_values(dtype, self.workload.seed), form)

    def _from_values(self, name: str, values: Values, form: str) -> EncodedColumn:
        if values.whole is not None:
            low, high = values.whole
            return EncodedColumn("int", form, low=low, span=high - low + 1)
        if values.real is not None:
            return EncodedColumn("float", form, from_=values.real[0], to=values.real[1])
        return self._table(name, values.choices, form, NO_GROUP)

    def _table(self, name: str, values: Sequence[Any], form: str, group: int) -> EncodedColumn:
        if form == "raw":
            return table_column(list(np.asarray(values, self.tensor_dtype(name))), form, group)
        return table_column(values, form, group)

    def _values(self, name: str) -> Values:
        """Return the values of a column that is in no stream."""
        dtype = self.dtypes[name]
        if name in self.texts:
            return make_values(name, self.texts[name], dtype)
        return default_values(dtype, self.workload.seed)

    def is_range(self, name: str) -> bool:
        """Return whether the generator computes the numbers of a column. Such numbers have eight bytes."""
        if any(name in stream.lows for stream in self.streams):
            return True
        return not any(name in stream.tables for stream in self.streams) and not self._values(name).choices

    def tensor_dtype(self, name: str) -> str:
        dtype = self.dtypes[name]
        if dtype.startswith("Vector("):
            return "<f8" if dtype.endswith("Float64)") else "<f4"
        if self.is_range(name):
            return "<f8" if dtype.startswith("Float") else "<i8"
        return NUMPY[dtype]

    def has_null(self, name: str) -> bool:
        """Return whether a value of the column may be missing."""
        for stream in self.streams:
            if name in stream:
                return None in stream.tables.get(name, ())
        return None in self._values(name).choices


def check_range(name: str, stream: Stream, dtype: str) -> None:
    """Check that the column's type takes the integers of a range. Raises InvalidArgument."""
    if not dtype:
        return
    known = parse_dtype(dtype)
    if known not in (Int32, Int64, Timestamp):
        raise InvalidArgument(
            f"--keys {stream.text}: column '{name}' is {dtype}; for strings add a form, {name}=uniform:1:1000:A{{}}"
        )
    try:
        for value in (stream.lows[name], stream.lows[name] + stream.n - 1):
            as_value(known, value)
    except Refused as error:
        raise error.error(f"--keys {stream.text}: column '{name}'", known) from None


def table_values(name: str, stream: Stream, dtype: str) -> list[Any]:
    """Return the values of a table, converted to the column's type; None is missing. Raises InvalidArgument."""
    if not dtype:
        return list(stream.tables[name])
    known = parse_dtype(dtype)
    try:
        return [as_value(known, value) for value in stream.tables[name]]
    except Refused as error:
        raise error.error(f"--keys {stream.text}: column '{name}'", known) from None


# -- MessagePack-RPC ---------------------------------------------------------------------------------------------------


def put_columns(builder: Builder, template: Template, columns: Mapping[str, str], rows: int, tables: bool) -> None:
    """Add the map of columns to a template.

    tables: write every column as an array, as push needs it. Else a column with a single value is a scalar.
    """
    template.literal(bytes(msgpack.Packer().pack_map_header(len(columns))))
    for wire_name, dtype in columns.items():
        template.literal(bytes(msgpack.packb(wire_name)))
        name = builder.pushed(wire_name) if tables else wire_name
        vector = dtype.startswith("Vector(")
        is_scalar = not tables and not vector and (rows == 1 or name in builder.workload.shared)
        count = 1 if is_scalar else rows
        numeric = dtype != "String" and not builder.has_null(name)
        if is_scalar:
            template.values(builder.column(name, "msgpack"), 1)
        elif builder.workload.encoding == "tensor" and numeric:
            shape = [count, parse_dtype(dtype).width] if vector else [count]
            template.literal(tensor_header(builder.tensor_dtype(name), shape))
            template.values(builder.column(name, "raw"), count)
        else:
            template.literal(array_header(count))
            template.values(builder.column(name, "msgpack"), count)


def rpc_template(
    builder: Builder, kind: str, method: str, first: Any, columns: Mapping[str, str], rows: int
) -> Template:
    template = Template(kind, builder.workload.mix.get(kind, 1.0))
    template.literal(b"\x94\x00")
    template.nonce()
    options: dict[str, Any] = {}
    if kind != "push" and builder.workload.encoding == "tensor":
        options["encoding"] = "tensor"
    if builder.workload.deadline_ms is not None:
        options["deadline_ms"] = builder.workload.deadline_ms
    template.literal(msgpack.packb(method) + array_header(3 if options else 2) + msgpack.packb(first))
    put_columns(builder, template, columns, rows, tables=kind == "push")
    if options:
        template.literal(msgpack.packb(options))
    return template


def plan_rpc(workload: Workload, models: Sequence[Mapping[str, Any]], views: Sequence[Mapping[str, Any]]) -> Traffic:
    """Plan MessagePack-RPC requests. models, views: as the server lists them. Raises InvalidArgument, NotFound."""
    by_model = {str(item["name"]): item for item in models}
    by_view = {str(item["name"]): item for item in views}
    asked: list[tuple[str, str, Any, dict[str, str], int]] = []
    if workload.predict is not None:
        if workload.predict not in by_model:
            raise NotFound(f"no model '{workload.predict}'{suggestion(workload.predict, by_model, 'models')}")
        if "tensors" in by_model[workload.predict]:
            raise InvalidArgument(f"model '{workload.predict}' takes tensors, and a load test sends columns")
        columns = dict(by_model[workload.predict]["columns"])
        asked.append(("predict", "predict", workload.predict, columns, workload.rows))
    if workload.features:
        columns = feature_keys(workload.features, by_view)
        asked.append(("features", "get_online_features", list(workload.features), columns, workload.rows))
    if workload.push is not None:
        if workload.push not in by_view:
            raise NotFound(f"no feature view '{workload.push}'{suggestion(workload.push, by_view, 'views')}")
        view = by_view[workload.push]
        renamed = view.get("columns", {})  # older servers have none
        columns = {**view["keys"], **{renamed.get(name, name): dtype for name, dtype in view["features"].items()}}
        asked.append(("push", "push", workload.push, columns, workload.push_rows))
    if not asked:
        known = f"; models: {listed(list(by_model))}" if by_model else ""
        raise InvalidArgument(
            f"say what to ask for: --predict MODEL, --features VIEW:FEATURE,... or --push VIEW{known}"
        )
    for kind in workload.mix:
        if kind not in [item[0] for item in asked]:
            raise InvalidArgument(f"--mix {kind}: give --{kind} too")
    dtypes = {name: dtype for item in asked for name, dtype in item[3].items()}
    own_keys = None
    if workload.push is not None and not workload.overwrite:
        view = by_view[workload.push]
        if not view["keys"]:
            raise InvalidArgument(
                f"--push {workload.push}: the view has no keys, so a push replaces its only row: say"
                " --overwrite-live-rows to do that"
            )
        own_keys = OwnKeys(workload.push, dict(view["keys"]), next(iter(view["features"])), workload.seed)
    builder = Builder(workload, dtypes, views, own_keys)
    traffic = builder.traffic
    traffic.templates = [rpc_template(builder, *item) for item in asked if workload.mix.get(item[0], 1.0) > 0]
    return traffic


def feature_keys(references: Sequence[str], by_view: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the key columns (name -> type) of the lookups in references. Raises InvalidArgument, NotFound."""
    keys: dict[str, str] = {}
    lookups = listed_lookups(by_view.values())
    for reference in references:
        if ":" not in reference:
            raise InvalidArgument(f"--features '{reference}' is not a reference; write VIEW:FEATURE")
        lookup, feature = lookup_of(reference), plain_name(reference)
        if lookup not in lookups:
            raise NotFound(f"no feature view '{lookup}'{suggestion(lookup, lookups, 'views')}")
        name = plain_name(lookup)
        if feature not in by_view[name]["features"]:
            known = suggestion(feature, by_view[name]["features"], "features")
            raise NotFound(f"feature view '{name}' has no feature '{feature}'{known}")
        keys |= lookups[lookup]
    return keys


def plan_raw(request_bytes: int) -> Traffic:
    """Plan requests of zero bytes, for an echo server. request_bytes: the length of a request."""
    template = Template("raw", 1.0)
    template.literal(bytes(request_bytes))
    return Traffic([template])


# -- HTTP --------------------------------------------------------------------------------------------------------------


def plan_http(workload: Workload, target: Target) -> Traffic:
    """Plan HTTP requests: all have the body template, or are GET without a body. Raises InvalidArgument."""
    body = workload.body or ""
    names = [(found[1] or found[2]).removesuffix(EACH_ROW).strip() for found in PLACEHOLDER.finditer(body)]
    builder = Builder(workload, {name: "" for name in names if name != "nonce"}, ())
    method = workload.method if workload.body is not None else "GET"
    template = Template(f"{method} {target.path}", 1.0)
    headers = [f"{method} {target.path} HTTP/1.1", f"Host: {target.host_header}", "Accept: */*", *workload.headers]
    if workload.body is not None:
        if not any(header.lower().startswith("content-type:") for header in workload.headers):
            headers.append(f"Content-Type: {CONTENT_TYPE}")
        headers.append(f"Content-Length: {0:8}")
    template.literal("\r\n".join([*headers, "", ""]).encode())
    if workload.body is not None:
        template.body()
        put_body(builder, template, body)
    check_json(body)
    builder.traffic.templates = [template]
    return builder.traffic


def put_body(builder: Builder, template: Template, body: str) -> None:
    at = 0
    for found in PLACEHOLDER.finditer(body):
        template.literal(body[at : found.start()].encode())
        name = found[1] or found[2]
        if name == "nonce":
            template.literal(b'"' if found[1] else b"")
            template.nonce()
            template.literal(b'"' if found[1] else b"")
        else:
            count = builder.workload.rows if name.endswith(EACH_ROW) else 1
            template.values(builder.column(name.removesuffix(EACH_ROW).strip(), "json"), count)
        at = found.end()
    template.literal(body[at:].encode())


def check_json(body: str) -> None:
    """Check that a body is JSON, before the load test starts. Raises InvalidArgument."""
    if not body.strip():
        return
    try:
        json.loads(PLACEHOLDER.sub("0", body))
    except ValueError as error:
        raise InvalidArgument(f"--body is not JSON with {{{{column}}}} placeholders: {error}") from None


def list_catalog(address: str, timeout_s: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (models, views) of a server. Raises the errors of Client."""
    from shorttail.client import Client

    protocol.parse_address(address)
    with Client(address, timeout_s=timeout_s) as client:
        return client.models(), client.views()
