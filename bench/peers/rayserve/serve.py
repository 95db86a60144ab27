"""Run Ray Serve: WORKERS replicas that serve HTTP themselves, behind the HAProxy that comes with Ray.

python serve.py FOLDER PORT WORKERS REDIS_URL

This process starts and ends a Ray cluster on this machine. Requests are answered after HAProxy has found all replicas.
Until then it passes requests to a much slower proxy, and when it switches, it closes its connections.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from pathlib import Path

KEEP_ALIVE_S = 3600
IN_FLIGHT = 1000  # per replica, so that no request waits in the proxy
CONTROL_LOOP_S = 0.5  # by default the controller polls the replicas ten times per second, which takes half a core
OBJECT_STORE_BYTES = 80 << 20  # the minimum of Ray; requests do not pass through it
READY_S, STOP_S = 120, 6
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def settings(stats_port: int, folder: str) -> dict[str, str]:
    """Return Ray's environment variables. Ray reads them at import, and its processes inherit them."""
    peers = Path(__file__).parents[1]
    return {
        "PYTHONPATH": f"{peers}:{peers / 'rayserve'}",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # otherwise Ray leaves one in the home directory
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # means: one machine, everything on 127.0.0.1
        "RAY_enable_metrics_collection": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/haproxy/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": f"{folder}/haproxy",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/haproxy/server-state",
        "RAY_SERVE_HTTP_KEEP_ALIVE_TIMEOUT_S": str(KEEP_ALIVE_S),
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": str(CONTROL_LOOP_S),
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def main() -> None:
    """Run Ray in a child process and wait for its end, because a signal during the start of Ray is lost."""
    if len(sys.argv) != 5:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER PORT WORKERS REDIS_URL")
    folder, port, workers, redis_url = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphaned processes become children of this one
    made = tempfile.mkdtemp(prefix="ray-")  # a short path, because Ray's sockets are in this folder
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    child = os.fork()
    if child == 0:
        run(str(Path(folder).absolute()), port, workers, redis_url, made)
        os._exit(0)
    try:
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end(child)
        shutil.rmtree(made, ignore_errors=True)


def run(folder: str, port: int, workers: int, redis_url: str, made: str) -> None:
    stats_port = free_port()
    os.environ.update(settings(stats_port, made))
    ended = threading.Event()
    try:
        start(folder, port, workers, redis_url, made)
        signal.signal(signal.SIGTERM, lambda *_: ended.set())  # only now, because Ray sets its own handler
        wait_for_servers(stats_port, workers)
        Path(made, "open").touch()
        ended.wait()
        stop()
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def end(child: int) -> None:
    """Ask the child to end, and kill processes that remain."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGTERM)
    polite_until = time.monotonic() + STOP_S
    while time.monotonic() < polite_until + STOP_S:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = descendants(os.getpid())
        if not left:
            return
        if child not in left or time.monotonic() > polite_until:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the process has ended
            for child in map(int, children.read_text().split()):
                found += [child, *descendants(child)]
    return found


def start(folder: str, port: int, workers: int, redis_url: str, made: str) -> None:
    sys.path.append(str(Path(__file__).parents[1]))
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig
    from replica import Scores

    ray.init(
        num_cpus=workers,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": "loopback.bind"},
        _temp_dir=made,
    )
    logs = LoggingConfig(enable_access_log=False, log_level="ERROR")
    options = HTTPOptions(host="127.0.0.1", port=port, keep_alive_timeout_s=KEEP_ALIVE_S)
    serve.start(http_options=options, logging_config=logs)
    deployment = serve.deployment(
        Scores, num_replicas=workers, max_ongoing_requests=IN_FLIGHT, ray_actor_options={"num_cpus": 0}
    )
    serve.run(deployment.bind(folder, redis_url, f"{made}/open"), logging_config=logs)


def wait_for_servers(stats_port: int, workers: int) -> None:
    """Wait until HAProxy passes requests to all replicas."""
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        # HAProxy may be switching.
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"http://127.0.0.1:{stats_port}/stats;csv") as answer:
                rows = list(csv.DictReader(answer.read().decode().removeprefix("# ").splitlines()))
            up = [row for row in rows if row["svname"] not in ("FRONTEND", "BACKEND") and row["status"] == "UP"]
            if sum(row["bck"] == "0" for row in up) == workers:
                return
        time.sleep(0.1)
    sys.exit(f"rayserve: HAProxy does not see {workers} replicas after {READY_S} s")


def stop() -> None:
    import ray
    from ray import serve

    serve.shutdown()
    ray.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
