"""A worker: one process, one event loop, one engine. The supervisor starts it with its sockets already listening.

It tells the supervisor that it is ready by one line of JSON on the control socket, and stops when told to (SIGTERM)
or when that socket closes, which means that the supervisor is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import signal
import socket
import sys
from typing import Any, Final

import uvloop

from shorttail._native.wire import Connection, Router
from shorttail.config import LIMITS
from shorttail.engine import Engine
from shorttail.errors import InvalidArgument, ShorttailError
from shorttail.server.batcher import Batcher
from shorttail.server.faults import FaultLog, one_line
from shorttail.server.writer_link import WriterLink

# A stopping worker reads on for this long, so that requests sent before it stopped listening are answered.
LAST_READS_S: Final = 0.1
# What the supervisor's patience exceeds the worker's by.
STOP_MARGIN_S: Final = 1.0
BACKLOG: Final = 1024


def handlers(engine: Engine) -> dict[str, Any]:
    """The methods that are answered one by one. Each takes the list of params."""

    def ping(params: list[Any]) -> str:
        _no_params("ping", params)
        return "pong"

    def models(params: list[Any]) -> list[dict[str, Any]]:
        _no_params("models", params)
        return engine.models()

    def views(params: list[Any]) -> list[dict[str, Any]]:
        _no_params("views", params)
        return engine.views()

    def auth(params: list[Any]) -> bool:
        if len(params) != 1 or not isinstance(params[0], str):
            raise InvalidArgument("auth takes [token]")
        return True  # this server listens on the loopback only and asks nobody for a token

    return {"models": models, "views": views, "ping": ping, "auth": auth}


def _no_params(method: str, params: list[Any]) -> None:
    if params:
        raise InvalidArgument(f"{method} takes no params: []")


def load(store: str, device: str) -> tuple[Engine, dict[str, Any]]:
    """Open the store and compile every model's plan, so that no request waits for it. Returns what is served."""
    engine = Engine.open(store, device=device)
    models = engine.models()
    for model in models:
        engine.plan_for_model(model["name"])
    served = {
        "models": [{"name": model["name"], "version": model["version"]} for model in models],
        "views": [view["name"] for view in engine.views()],
    }
    return engine, served


async def serve(
    engine: Engine, listeners: list[socket.socket], control: socket.socket, served: dict[str, Any], writer: str
) -> None:
    """Answer requests until SIGTERM, or until the supervisor is gone; then finish what is in flight.

    writer: the path of the writer's socket.
    """
    loop = asyncio.get_running_loop()
    faults = FaultLog()
    router = Router(loop, engine, handlers(engine))
    batcher = Batcher(router, engine, faults)
    link = WriterLink(writer, loop)
    router.forward = link.forward
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_reader(control, stop.set)  # nothing is ever sent: readable means closed

    servers: list[asyncio.AbstractServer] = []
    for listener in listeners:  # uvloop sets TCP_NODELAY on what it accepts
        create: Any = loop.create_unix_server if listener.family == socket.AF_UNIX else loop.create_server
        servers.append(await create(lambda: Connection(router), sock=listener, backlog=BACKLOG))

    async def housekeeping() -> None:
        while True:
            await asyncio.sleep(LIMITS.idle_refresh_ms / 1000)
            try:
                engine.refresh(force=True)  # sees even the commit of a writer that was killed before it counted it
                batcher.follow_catalog()
            except Exception as error:
                faults(error)
            faults.write(loop)

    tasks = [asyncio.create_task(housekeeping()), asyncio.create_task(link.run())]
    gc.collect()
    gc.freeze()  # what lives now lives for good: collections need not look at it
    control.sendall(json.dumps(served).encode() + b"\n")
    await stop.wait()
    for server in servers:
        server.close()
    await drain(router, link)
    for task in tasks:
        task.cancel()
    link.close()
    faults.write(loop)


async def drain(router: Router, link: WriterLink) -> None:
    """Answer what was sent, close every connection; cut those that have not ended in time."""
    loop = asyncio.get_running_loop()
    cut_at = loop.time() + LIMITS.stop_grace_s - STOP_MARGIN_S
    if router.connections:
        await asyncio.sleep(LAST_READS_S)
    for connection in list(router.connections):
        connection.finish()
    while (router.connections or link.outstanding) and loop.time() < cut_at:
        await asyncio.sleep(0.01)
    for connection in list(router.connections):
        connection.abort()
    await asyncio.sleep(0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m shorttail.server.worker", description="started by the supervisor")
    parser.add_argument("store")
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--listen-fd", type=int, action="append", default=[])
    parser.add_argument("--writer", metavar="PATH", default="", help="the writer's socket")
    parser.add_argument("--device", default="cpu", help="where models run that are no forests")
    parser.add_argument("--check", action="store_true", help="load, report, exit")
    args = parser.parse_args()
    control = socket.socket(fileno=args.control_fd)
    try:
        engine, served = load(args.store, args.device)
    except ShorttailError as error:
        print(f"error: {error.message}", file=sys.stderr, flush=True)
        return 1
    except Exception as error:
        print(f"error: store {args.store}: {one_line(error)}", file=sys.stderr, flush=True)
        return 1
    with engine:
        if args.check:
            control.sendall(json.dumps(served).encode() + b"\n")
            return 0
        listeners = [socket.socket(fileno=fd) for fd in args.listen_fd]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(engine, listeners, control, served, args.writer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
