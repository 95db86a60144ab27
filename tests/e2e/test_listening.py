"""When a server listens, on which addresses, and for whom; containers that SageMaker and Vertex AI start."""

import contextlib
import os
import re
import select
import socket
import subprocess
import sys

import pytest
from http_asking import ask, ask_json, http_port
from serving import PREDICT, PREDICTED, SERVE, TIMEOUT_S, Peer, environment_after, refused, until

# A worker that waits for a file before it loads the store.
WAIT = """
import os, sys, time
while "shorttail.server.worker" in sys.orig_argv and not os.path.exists({path!r}):
    time.sleep(0.01)
"""
ROWS = {"instances": [{"user_id": 1, "amount": 0.5}]}


def free_ports(count):
    """Return ports that are free now."""
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in taken]


class Starting:
    """A `shorttail serve` that is not waited for. Its workers load the store only after `go`."""

    def __init__(self, folder, *options):
        folder.mkdir()
        self.go_file, self.log = folder / "go", folder / "log"
        environment = environment_after(folder, WAIT.format(path=str(self.go_file)))
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [*SERVE, *map(str, options)], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )

    def go(self):
        self.go_file.touch()

    def line(self):
        """Wait for the announcement, and return it; "" if the server ends without one."""
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_S)
        assert ready
        return self.process.stdout.readline()

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        code = self.process.wait(TIMEOUT_S)
        self.process.stdout.close()
        return code


@pytest.fixture
def starting(tmp_path):
    started = []

    def start(*options):
        started.append(Starting(tmp_path / f"start{len(started)}", *options))
        return started[-1]

    yield start
    for one in started:
        one.end()


def is_bound(port):
    """Whether a process has bound a port, also if it does not listen."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def connect(address):
    with Peer(address):
        pass


@pytest.mark.parametrize("workers", [1, 2])
def test_connections_are_refused_until_a_worker_can_answer(store, starting, tmp_path, workers):
    port, http = free_ports(2)
    uds = tmp_path / "socket"
    server = starting("--store", store, "--port", port, "--http-port", http, "--uds", uds, "--workers", workers)
    until(lambda: is_bound(port) and is_bound(http) and uds.exists(), server)
    for address in (("127.0.0.1", port), ("127.0.0.1", http), str(uds)):
        with pytest.raises(ConnectionRefusedError):
            connect(address)
    said = refused("--store", str(store), "--port", "0", "--http-port", "0", "--uds", str(uds))
    assert said.startswith(f"error: unix socket {uds} is in use; ")  # though nobody listens on it yet
    server.go()
    assert server.line().startswith(f"serving on 127.0.0.1:{port} (unix:{uds} too) · http on 127.0.0.1:{http} · ")
    for address in (("127.0.0.1", port), str(uds)):
        with Peer(address) as peer:
            assert peer.ask(*PREDICT) == PREDICTED
    connect(("127.0.0.1", http))


@pytest.mark.parametrize(("workers", "option"), [(1, "--port"), (2, "--port"), (1, "--http-port")])
def test_of_two_that_start_on_a_port_one_says_that_it_is_in_use(store, starting, workers, option):
    (port,) = free_ports(1)
    other = "--http-port" if option == "--port" else "--port"
    first, second = (starting("--store", store, option, port, other, 0, "--workers", workers) for _ in range(2))
    until(lambda: is_bound(port), first)
    first.go()
    assert f"127.0.0.1:{port}" in first.line()
    second.go()
    assert second.line() == ""
    assert second.end() == 1
    assert second.log.read_text() == (
        f"error: port {port} on 127.0.0.1 is in use; stop the other process or choose another with {option}\n"
    )


# -- whom a server trusts ----------------------------------------------------------------------------------------------


def test_trust_network_opens_http_and_nothing_else(start):
    server = start("--host", "0.0.0.0", "--trust-network")
    assert re.fullmatch(
        r"serving on 127\.0\.0\.1:\d+ · http on 0\.0\.0\.0:\d+, which asks for no token \(--trust-network\) · .*\n",
        server.line,
    )
    http, rpc = int(re.search(r"0\.0\.0\.0:(\d+)", server.line)[1]), server.address[1]
    connect(("127.0.0.2", http))
    with pytest.raises(ConnectionRefusedError):
        connect(("127.0.0.2", rpc))


def test_with_tokens_trust_network_opens_http_alone(start, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("admin 0123456789abcdef-admin\n")
    tokens.chmod(0o600)
    server = start("--trust-network", "--token-file", tokens)
    assert ask_json(server, "POST", "/invocations", ROWS) == (200, {"predictions": [11.5], "version": 1})
    assert ask(server, "GET", "/metrics")[0] == 200
    assert ask(server, "GET", "/metrics", Authorization="Bearer unknown")[0] == 200
    with server.connect() as peer:
        assert peer.ask(*PREDICT)[2]["code"] == "UNAUTHENTICATED"


def test_trust_network_without_http_is_an_error(store):
    assert "--trust-network opens HTTP, and --no-http" in refused(
        "--store", str(store), "--port", "0", "--trust-network", "--no-http"
    )
    assert "--trust-network opens HTTP alone" in refused("--store", str(store), "--host", "0.0.0.0", "--port", "0")


class Platform:
    """A container that a platform starts: only its arguments and its environment say anything."""

    def __init__(self, log, *arguments, **environment):
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "shorttail", *arguments],
                stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | environment,
            )  # fmt: skip
        self.line = self.process.stdout.readline().replace("0.0.0.0", "127.0.0.1")

    def stop(self):
        self.process.terminate()
        code = self.process.wait(TIMEOUT_S)
        self.process.stdout.close()
        return code


@pytest.mark.parametrize("platform", ["sagemaker", "vertex"])
def test_a_platform_starts_a_container_and_asks_it(store, tmp_path, platform):
    (port,) = free_ports(1)
    ours = {"SHORTTAIL_STORE": str(store), "SHORTTAIL_HOST": "0.0.0.0", "SHORTTAIL_TRUST_NETWORK": "1",
            "SHORTTAIL_PORT": "0"}  # fmt: skip
    if platform == "sagemaker":  # docker run IMAGE serve
        theirs = {"SAGEMAKER_BIND_TO_PORT": str(port)}
        health, predict = "/ping", "/invocations"
    else:
        health, predict = "/v1/endpoints/1/deployedModels/2", "/v1/endpoints/1/deployedModels/2:predict"
        theirs = {"AIP_HTTP_PORT": str(port), "AIP_HEALTH_ROUTE": health, "AIP_PREDICT_ROUTE": predict}
    container = Platform(tmp_path / "log", "serve", **ours, **theirs)
    try:
        assert http_port(container) == port, container.log.read_text()
        assert ask(container, "GET", health) == (200, b"")
        headers = {"Content_Type": "application/json", "Accept": "application/json"}
        assert ask_json(container, "POST", predict, ROWS, **headers) == (200, {"predictions": [11.5], "version": 1})
        headers = {"Content_Type": "application/jsonlines", "Accept": "application/jsonlines"}
        assert ask(container, "POST", predict, '{"user_id": 1, "amount": 0.5}\n', **headers) == (200, b"11.5\n")
        _, document = ask_json(container, "GET", "/openapi.json")
        assert {health, predict} <= document["paths"].keys()
    finally:
        assert container.stop() == 0


@pytest.mark.parametrize(("variable", "value"), [("AIP_HEALTH_ROUTE", "health"), ("AIP_PREDICT_ROUTE", "/{x}"),
                                                 ("AIP_HTTP_PORT", "http")])  # fmt: skip
def test_a_wrong_variable_of_a_platform_is_an_error(store, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert refused("--store", str(store), "--port", "0").startswith(f"error: the environment's {variable} is '{value}'")
