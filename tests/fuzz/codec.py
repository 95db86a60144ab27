"""The codec for a fuzzer: sends bytes that a peer could send to a router without sockets, store or models.

The name of a model is its list of columns, so a fuzzer that mutates names reaches all types and their combinations. The
outputs of a model are its columns, so values that were decoded are encoded too.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np

from shorttail import Bool, Float32, Float64, Int32, Int64, String, Timestamp, Vector
from shorttail._native import wire
from shorttail._native.columns import Columns
from shorttail.errors import NotFound, Unauthenticated

DTYPES = {
    "key": Int64,
    "small": Int32,
    "amount": Float64,
    "single": Float32,
    "name": String,
    "taste": Vector(2),
    "new": Bool,
    "at": Timestamp,
}
WRITTEN = msgpack.packb(None) + msgpack.packb({"rows": 1})
TOKEN = "a-token-of-sixteen"
REPLY_BYTES = 64 << 20


class Plan(SimpleNamespace):
    row_values = row_work = 1

    def new_columns(self) -> Columns:
        return Columns(self.names, self.dtypes)


class Engine:
    """Model "key,name" has these two columns; a feature is the key itself."""

    def plan_for_model(self, name: str, version: int | None = None) -> Plan:
        names = tuple(dict.fromkeys(name.split(",")))
        if not set(names) <= set(DTYPES) or version not in (None, 1):
            raise NotFound(f"unknown model {name!r} version {version}")
        return plan("predict", name, names, lookup_names=("view",), feature_names=())

    def plan_for_features(self, references: tuple[str, ...]) -> Plan:
        if not references or not all(reference.startswith("view:") for reference in references):
            raise NotFound(f"unknown features {references!r}")
        return plan("features", "", ("key",), lookup_names=("view",), feature_names=references)

    def run(self, plan: Plan, columns: Columns) -> SimpleNamespace:
        statuses = np.arange(columns.n_rows, dtype=np.uint8) % 4
        if plan.kind == "predict":
            outputs = [(name, columns.column(name)) for name in plan.names]
            return SimpleNamespace(outputs=outputs, view_statuses=statuses[None], feature_statuses=None, version=1)
        outputs = [(reference, columns.column("key")) for reference in plan.feature_names]
        return SimpleNamespace(
            outputs=outputs,
            view_statuses=statuses[None],
            feature_statuses=np.stack([statuses] * len(outputs)),
            version=0,
        )


def plan(kind: str, model: str, names: tuple[str, ...], **more: Any) -> Plan:
    return Plan(
        kind=kind,
        model=model,
        version=int(kind == "predict"),
        names=names,
        dtypes=tuple(DTYPES[name] for name in names),
        feature_types=tuple(DTYPES["key"].name for _ in more["feature_names"]),
        has_default=tuple(position % 2 == 0 for position in range(len(more["feature_names"]))),
        split=None,
        runner=None,
        shadow=None,
        **more,
    )


class Transport:
    """Records what is written. It is also the event loop: callbacks run only when the test calls them."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def nothing(self, *arguments: Any, **options: Any) -> None:
        pass

    set_write_buffer_limits = write_eof = close = abort = pause_reading = resume_reading = nothing
    get_extra_info = nothing
    call_soon = call_later = nothing


def replies(stream: bytes, access: int, cut: int) -> list[list[Any]]:
    """Send a stream in pieces of `cut` bytes and return the replies. Raises exceptions that no input may cause."""
    transport = Transport()
    router = wire.Router(transport, Engine(), {"ping": lambda params: "pong", "echo": lambda params: params})
    forwarded: list[tuple[Any, int]] = []

    def fault(error: Exception) -> None:
        raise AssertionError("the codec met with an error that is not the peer's") from error

    def forward(connection: Any, msgid: int, method: str, params: bytes, *more: Any) -> None:
        assert wire.scan(params) == len(params)
        forwarded.append((connection, msgid))

    def auth(params: list[Any]) -> int:
        if params != [TOKEN]:
            raise Unauthenticated("not the token")
        return 2

    router.fault, router.forward, router.auth, router.access = fault, forward, auth, access
    connection = wire.Connection(router)
    connection.connection_made(transport)  # type: ignore[arg-type]
    for start in range(0, len(stream), cut):
        connection.data_received(stream[start : start + cut])
    for batch in router.take():
        if batch.drop_expired():
            batch.reply(router.engine.run(batch.route.plan, batch.columns))
    for peer, msgid in forwarded:
        if peer is not None:
            peer.relay(msgid, WRITTEN)
    router.flush()
    assert connection.in_flight == 0
    connection.connection_lost(None)
    unpacker = msgpack.Unpacker(max_buffer_size=REPLY_BYTES, strict_map_key=False, unicode_errors="surrogateescape")
    unpacker.feed(b"".join(transport.written))
    return list(unpacker)


def check(data: bytes) -> None:
    """Check one input. Its first byte is the access of the peer, the second the size of the pieces."""
    if len(data) < 3:
        return
    access, cut, stream = data[0] % 3, data[1] + 1, data[2:]
    whole, pieces = replies(stream, access, len(stream)), replies(stream, access, cut)
    late = set()
    for answer in (*whole, *pieces):
        assert len(answer) == 4, answer
        assert answer[0] == 1, answer
        assert answer[2] is None or answer[2]["code"] != "INTERNAL", answer
        if answer[2] is not None and answer[2]["code"] == "DEADLINE_EXCEEDED":
            late.add(answer[1])  # may have been in time in the other run
    counts = [Counter(repr(answer) for answer in answers if answer[1] not in late) for answers in (whole, pieces)]
    assert counts[0] == counts[1], f"cut into pieces of {cut} bytes it is answered otherwise"
