"""A worker: one process with one event loop and one engine. The supervisor starts it and hands it listening sockets.

The worker sends one line of JSON on the control socket when it is ready. It stops on SIGTERM, or when that socket
closes, which means that the supervisor has ended. When it reads RETIRE from that socket, it gives its connections to
the supervisor, which hands them to other workers, and ends.

`serve` is where the parts of a server are made and connected; read it to see which part knows which.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import math
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvloop

from shorttail._native import runs
from shorttail._native.wire import Connection, Router
from shorttail.config import LIMITS
from shorttail.engine import Engine
from shorttail.errors import InvalidArgument, ShorttailError
from shorttail.models.raw import refusal
from shorttail.observe import logs, stderr
from shorttail.observe.memory import BULK
from shorttail.server import bulk, bulk_link, handover, limits, security, spare_memory
from shorttail.server.accepting import Entrance, Room, SpareFile
from shorttail.server.batcher import Batcher
from shorttail.server.errorlog import ErrorLog, one_line
from shorttail.server.listen import start_listening
from shorttail.server.settings import ServerSettings
from shorttail.server.signals import only_sigterm
from shorttail.server.telemetry import Sources, Telemetry
from shorttail.server.writer_link import WriterLink

if TYPE_CHECKING:
    from shorttail.pipeline import Plan
    from shorttail.server.http.app import HttpServer

# A worker that stops reads from each connection for this long, so that requests that were sent before are answered.
LAST_READS_S: Final = 0.1
# The supervisor waits this much longer for a worker than the worker waits for its connections.
STOP_MARGIN_S: Final = 1.0


class RpcPlans:
    """The plans that MessagePack-RPC asks for. Its requests carry columns, so models that take tensors are refused."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.plan_for_features = engine.plan_for_features

    def plan_for_model(self, name: str, version: int | None = None) -> Plan:
        """The plan of a model. Raises NotFound, and InvalidArgument for a model that takes tensors."""
        plan = self.engine.plan_for_model(name, version)
        if plan.tensors is not None:
            raise InvalidArgument(refusal(name))
        return plan


def handlers(engine: Engine, describe: Callable[[], list[dict[str, Any]]]) -> dict[str, Any]:
    """The methods that are answered one by one. Each takes the list of params. describe: answers `models`."""

    def ping(params: list[Any]) -> str:
        _no_params("ping", params)
        return "pong"

    def models(params: list[Any]) -> list[dict[str, Any]]:
        _no_params("models", params)
        return describe()

    def views(params: list[Any]) -> list[dict[str, Any]]:
        _no_params("views", params)
        return engine.views()

    def auth(params: list[Any]) -> bool:
        security.auth_token(params)
        return True  # with a token file the router checks the token itself, and never calls this

    return {"models": models, "views": views, "ping": ping, "auth": auth}


def _no_params(method: str, params: list[Any]) -> None:
    if params:
        raise InvalidArgument(f"{method} takes no params: []")


def load(
    store: str, device: str, pretouch: bool = False, lock_memory: bool = False, code: bool = True
) -> tuple[Engine, dict[str, Any]]:
    """Open the store and compile the plan of every model, so that no request waits for that.

    Returns the engine, and what it serves: {"models": [{"name", "version"}], "views": [name], "unavailable": {name of a
    model that cannot be served: why}}.
    """
    engine = Engine.open(store, device=device, pretouch=pretouch, lock_memory=lock_memory, code=code)
    engine.ban(runs.banned())
    models, unavailable = [], {}
    for model in engine.models():
        try:
            engine.plan_for_model(model["name"])
            models.append({"name": model["name"], "version": model["version"]})
        except ShorttailError as error:
            unavailable[model["name"]] = error.message
    return engine, {"models": models, "views": [view["name"] for view in engine.views()], "unavailable": unavailable}


async def serve(
    engine: Engine,
    listeners: list[socket.socket],
    control: socket.socket,
    channel_end: socket.socket,
    served: dict[str, Any],
    sockets: Path,
    is_bulk: bool,
    settings: ServerSettings,
    telemetry: Telemetry,
    http_listeners: list[socket.socket],
) -> None:
    """Answer requests until SIGTERM or the end of the supervisor, then finish the requests in flight.

    control: the socket to the supervisor. channel_end: the socket by which the supervisor hands over connections.
    served: what `load` returned. sockets: the folder of the sockets of the writer and the bulk worker. is_bulk: this is
    the bulk worker.
    """
    loop = asyncio.get_running_loop()
    runs.limit_thread(LIMITS.loop_run_s)
    faults = ErrorLog(telemetry.log.form)
    router = Router(loop, RpcPlans(engine), handlers(engine, lambda: batcher.shadows.describe(engine.models())))
    bulk_http = None if is_bulk else sockets / "bulk-http"
    spare = SpareFile()
    rpc_connections, http_connections = limits.connections_of(settings, http=bool(http_listeners))
    http = None
    if http_listeners:
        http = http_server(engine, router, telemetry, faults, settings, bulk_http, http_connections)
    batcher = Batcher(router, engine, faults, telemetry, http.batches if http is not None else None)
    engine.load_in_background(lambda: batcher.model_threads.tell(batcher.follow_catalog))
    link = WriterLink(str(sockets / "writer"), loop, telemetry.wrote)
    router.connect(forward=link.forward)
    large = bulk_link.BulkLink(str(sockets / "bulk"), loop)
    if not is_bulk:
        router.connect(bulk=large.forward if settings.bulk else bulk_link.refuse)
    limits.configure(router, settings, rpc_connections)
    tls = security.server_context(settings)
    room = Room(router.connections, rpc_connections + limits.refused_at_once(settings, http=http is not None))
    channel = handover.Channel(channel_end, loop, router, tls, room)
    if settings.busy_poll_us != 0:
        proxy = http.bulk if http is not None else None
        router.connect(
            run=limits.BusyPoll(
                loop,
                batcher.run,
                lambda: bool(engine.is_loading or large.calls or (proxy is not None and proxy.in_flight)),
                settings.busy_poll_us,
            ).run
        )
    stop, retire = asyncio.Event(), asyncio.Event()
    idle = bulk.Idle(stop, router)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_reader(control, told, loop, control, stop, retire)
    entrances = [listen(loop, listener, router, tls, spare, room) for listener in listeners]
    if http is not None:
        for listener in http_listeners:
            start_listening(listener, "--http-port")
        entrances += await http.start(http_listeners, tls, spare)
    telemetry.watch_gc()
    sources = Sources(engine, router, http, batcher.shadows, large, channel, entrances, spare, room, faults)

    async def housekeeping() -> None:
        while True:
            await asyncio.sleep(LIMITS.idle_refresh_ms / 1000)
            try:
                engine.ban(runs.banned())
                # The writer says so in the log. It may have been started again, with the store that is at the path now.
                changed = engine.store.changed
                link.refuse(changed)
                if not changed:
                    # This sees also the commit of a writer that was killed before it could count the commit.
                    engine.refresh(force=True)
                    batcher.follow_catalog()
                limits.sweep(router)
                channel.report()
                telemetry.tick(sources)
                if is_bulk:
                    idle.look(http)
            except Exception as error:
                faults(error)
            faults.write(loop)
            telemetry.log.write(loop)

    tasks = [asyncio.create_task(housekeeping()), asyncio.create_task(link.run())]
    gc.collect()
    gc.freeze()  # the objects of now live until the end: the garbage collector need not visit them
    # Wait for the writer, so that clients can push as soon as the server says that it is ready. Serving needs no
    # writer.
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(link.ready.wait(), LIMITS.writer_start_wait_s)
    control.sendall(json.dumps(served).encode() + b"\n")
    await stop.wait()
    if http is not None:
        http.drain()
    for entrance in entrances:
        entrance.close()
    if retire.is_set():
        await channel.hand_over_all(loop.time() + LIMITS.stop_grace_s / 2)
    await asyncio.gather(drain(router, link), *([http.stop(LIMITS.stop_grace_s - STOP_MARGIN_S)] if http else []))
    telemetry.tick(sources)
    for task in tasks:
        task.cancel()
    batcher.close()
    link.close()
    large.close()
    channel.close()
    faults.write(loop)
    telemetry.log.write(loop)
    telemetry.close()


def http_server(
    engine: Engine,
    router: Router,
    telemetry: Telemetry,
    faults: ErrorLog,
    settings: ServerSettings,
    bulk_path: Path | None,
    connections: int,
) -> HttpServer:
    """The HTTP server of this worker, with its routes. It needs the extra `http`, so it is imported only here.

    bulk_path: of the bulk worker's socket for HTTP; None in the bulk worker itself. connections: how many there may be.
    """
    from shorttail.server.http.app import HttpServer
    from shorttail.server.http.batches import HttpBatches
    from shorttail.server.http.bulk import BulkProxy
    from shorttail.server.http.routes import add_routes

    tokens = None if settings.trust_network else settings.token_file
    access = security.Tokens.read(tokens).access if tokens else None
    batches = HttpBatches(engine, router)
    proxy = None if bulk_path is None else BulkProxy(str(bulk_path) if settings.bulk else None)
    return HttpServer(
        engine,
        batches,
        telemetry.memory,
        telemetry.recorder,
        telemetry.log,
        faults,
        add_routes,
        access,
        proxy,
        connections,
    )


def told(loop: asyncio.AbstractEventLoop, control: socket.socket, stop: asyncio.Event, retire: asyncio.Event) -> None:
    """Handle the control socket: the supervisor has sent RETIRE, or has ended."""
    try:
        said = control.recv(64)
    except BlockingIOError:
        return
    except OSError:
        said = b""
    if said:
        retire.set()
    else:
        loop.remove_reader(control)
    stop.set()


def listen(
    loop: asyncio.AbstractEventLoop,
    listener: socket.socket,
    router: Router,
    tls: ssl.SSLContext | None,
    spare: SpareFile,
    room: Room,
) -> Entrance:
    """Accept connections of MessagePack-RPC from a bound socket."""
    start_listening(listener)
    secure = tls is not None and listener.family != socket.AF_UNIX
    return Entrance(loop, listener, lambda: Connection(router, secure), tls, spare, room)


async def drain(router: Router, link: WriterLink) -> None:
    """Answer the requests that were sent, and close every connection; cut those that have not ended in time.

    Connections that were on their way when the worker stopped may still arrive.
    """
    loop = asyncio.get_running_loop()
    cut_at = loop.time() + LIMITS.stop_grace_s - STOP_MARGIN_S
    read_until: dict[Connection, float] = {}
    while (router.connections or link.outstanding) and loop.time() < cut_at:
        for connection in list(router.connections):
            if loop.time() >= read_until.setdefault(connection, loop.time() + LAST_READS_S):
                connection.finish()
                read_until[connection] = math.inf
        await asyncio.sleep(0.01)
    for connection in list(router.connections):
        connection.abort()
    await asyncio.sleep(0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m shorttail.server.worker", description="started by the supervisor")
    parser.add_argument("store")
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--listen-fd", type=int, action="append", default=[])
    parser.add_argument("--sockets", metavar="FOLDER", required=True, help="of the writer and the bulk worker")
    parser.add_argument("--bulk", action="store_true", help="answer the large requests of the other workers")
    parser.add_argument("--device", default="cpu", help="where models run that are no forests")
    parser.add_argument("--pretouch", action="store_true", help="map the store's file before serving")
    parser.add_argument("--lock-memory", action="store_true", help="and keep it in memory")
    parser.add_argument("--no-code", action="store_true", help="run no on-demand functions")
    parser.add_argument("--check", action="store_true", help="load, report, exit")
    parser.add_argument("--channel-fd", type=int, required=True)
    parser.add_argument("--runs-fd", type=int, default=-1, help="the page in which each model run is noted")
    parser.add_argument("--metrics-fd", type=int, default=-1, help="the memory for counters that all processes share")
    parser.add_argument("--http-fd", type=int, action="append", default=[])
    parser.add_argument("--settings", metavar="JSON", required=True)
    parser.add_argument("--cpu", type=int, help="the CPU to run on")
    only_sigterm()
    args = parser.parse_args()
    settings = ServerSettings.from_json(args.settings)
    if args.bulk:
        settings = bulk.settings_of(settings)
        bulk.lower_priority()
    else:
        limits.go_first()
    stderr.log_as_json(settings.log)
    if args.cpu is not None:
        limits.pin(args.cpu)
    limits.allow_files(settings, http=bool(args.http_fd))
    spare_memory.return_memory()
    if args.runs_fd >= 0:
        runs.share(args.runs_fd)
    control = socket.socket(fileno=args.control_fd)
    try:
        engine, served = load(args.store, args.device, args.pretouch, args.lock_memory, not args.no_code)
    except ShorttailError as error:
        logs.log_now(settings.log, "error", error.message)
        return 1
    except Exception as error:
        logs.log_now(settings.log, "error", f"store {args.store}: {one_line(error)}")
        return 1
    with engine:
        if args.check:
            control.sendall(json.dumps(served).encode() + b"\n")
            return 0
        listeners = [socket.socket(fileno=fd) for fd in args.listen_fd]
        channel = socket.socket(fileno=args.channel_fd)
        http = [socket.socket(fileno=fd) for fd in args.http_fd]
        telemetry = Telemetry(args.metrics_fd, settings, region=BULK if args.bulk else None)
        sockets = Path(args.sockets)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(
                    serve(engine, listeners, control, channel, served, sockets, args.bulk, settings, telemetry, http)
                )
        except ShorttailError as error:  # another process has the port
            logs.log_now(settings.log, "error", error.message)
            return 1
    control.detach()  # the supervisor takes a closed control socket for the end of this process: the system closes it
    return 0


if __name__ == "__main__":
    sys.exit(main())
