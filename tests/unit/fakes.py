"""Servers of MessagePack-RPC and of HTTP that behave as a test wants, in a thread, and a quick load to put on them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack

from shorttail import protocol
from shorttail.loadtest import target
from shorttail.loadtest.rates import Rate
from shorttail.loadtest.result import Step
from shorttail.loadtest.runner import Load, run_step
from shorttail.loadtest.traffic import Traffic, Workload, plan_rpc

MODELS = [{"name": "m", "version": 1, "columns": {"user_id": "Int64", "amount": "Float64"}, "outputs": ["y"]}]
VIEWS = [{"name": "v", "keys": {"user_id": "Int64"}, "features": {"age": "Float32", "tier": "String"}}]

USERS = "user_id=uniform:1:1000"
QUICK = Load(connections=4, pipeline=16, duration_s=0.25, warmup_s=0.03, timeout_s=2.0, spin_us=0, events=100_000)
QUICK_PER_S = 1600.0  # 400 requests

Answer = Callable[[list[Any]], bytes]  # of a request [0, msgid, method, params]; b"" is none


def reply(msgid: Any, result: Any = None, error: Any = None) -> bytes:
    return bytes(msgpack.packb([1, msgid, error, result]))


def good(request: list[Any]) -> bytes:
    return reply(request[1], {"outputs": {"y": [0.5]}, "version": 1})


class Fake:
    """address; requests: all that came, decoded; stalls: (start, end) of each, monotonic seconds."""

    def __init__(self) -> None:
        self.address = ""
        self.requests: list[list[Any]] = []
        self.stalls: list[tuple[float, float]] = []
        self.n_connections = 0
        self.transports: set[Any] = set()


@contextlib.contextmanager
def rpc_server(
    answer: Answer = good,
    *,
    path: str | None = None,
    stall_every_s: float = 0.0,
    stall_s: float = 0.0,
    close_after: int = 0,
    keep: int = 5000,
) -> Iterator[Fake]:
    """A server that answers `models` and `views` by MODELS and VIEWS, and everything else by `answer`.

    stall_every_s, stall_s: how often it does nothing, and for how long. close_after: requests until it closes a
    connection. keep: how many requests it keeps for the test to read.
    """
    fake = Fake()

    class Server(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            self.unpacker = protocol.new_unpacker()
            self.count = 0
            fake.n_connections += 1
            fake.transports.add(transport)

        def connection_lost(self, error: Exception | None) -> None:
            fake.transports.discard(self.transport)

        def data_received(self, data: bytes) -> None:
            self.unpacker.feed(data)
            out = []
            for request in self.unpacker:
                if request[2] in ("models", "views"):
                    out.append(reply(request[1], MODELS if request[2] == "models" else VIEWS))
                    continue
                self.count += 1
                if len(fake.requests) < keep:
                    fake.requests.append(request)
                if close_after and self.count > close_after:
                    self.transport.abort()
                    return
                out.append(answer(request))
            self.transport.write(b"".join(out))

    with running(fake, Server, path, stall_every_s, stall_s):
        yield fake


@contextlib.contextmanager
def http_server(answer: Callable[[bytes, bytes], bytes]) -> Iterator[Fake]:
    """A server whose responses, in bytes, answer(head, body) gives; after one that ends in b"<close>" it closes."""
    fake = Fake()

    class Server(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            self.data = b""
            fake.n_connections += 1
            fake.transports.add(transport)

        def connection_lost(self, error: Exception | None) -> None:
            fake.transports.discard(self.transport)

        def data_received(self, data: bytes) -> None:
            self.data += data
            while b"\r\n\r\n" in self.data:
                head, _, rest = self.data.partition(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
                if len(rest) < length:
                    return
                body, self.data = rest[:length], rest[length:]
                fake.requests.append([head, body])
                response = answer(head, body)
                self.transport.write(response.removesuffix(b"<close>"))
                if response.endswith(b"<close>"):
                    self.transport.close()

    with running(fake, Server, None, 0.0, 0.0):
        yield fake


@contextlib.contextmanager
def running(fake: Fake, factory: Any, path: str | None, stall_every_s: float, stall_s: float) -> Iterator[None]:
    loop = asyncio.new_event_loop()
    create = loop.create_unix_server(factory, path) if path else loop.create_server(factory, "127.0.0.1", 0)
    server = loop.run_until_complete(create)
    fake.address = f"unix:{path}" if path else f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    def stall() -> None:
        start = time.monotonic()
        loop.call_at(loop.time() + stall_every_s, stall)
        time.sleep(stall_s)
        fake.stalls.append((start, time.monotonic()))

    if stall_s:
        loop.call_later(stall_every_s, stall)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(asyncio.sleep(0.005))  # what was being accepted is a transport then
        server.close()
        for transport in list(fake.transports):
            transport.abort()
        while fake.transports:
            loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def predict(**given: Any) -> Workload:
    """Predictions of model "m" for random users, changed as given."""
    return Workload(**{"predict": "m", "keys": [USERS], **given})


def with_load(**changes: Any) -> Load:
    """QUICK, changed as given."""
    return dataclasses.replace(QUICK, **changes)


def load_on(address: str, load: Load = QUICK, rate: float | None = QUICK_PER_S, plan: Traffic | None = None) -> Step:
    """What one step of that load measures at this address. rate: requests per second; None for a closed loop."""
    plan = plan or plan_rpc(predict(), MODELS, VIEWS)
    return run_step(plan, target.find(address), load, None if rate is None else Rate(rate, rate))
