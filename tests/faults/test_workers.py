"""Workers killed, stopped and replaced under load, as clients see it.

With SHORTTAIL_FAULT_CYCLES=1000 (`make soak`) there are 50 rolling replacements, and more kills.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import under_load
from extent import CYCLES, SOAK
from serving import Server, make_store
from under_load import (
    Blocking,
    Caller,
    OnSocket,
    Pipelined,
    Pushing,
    calling,
    connections_of,
    go_on,
    own_port,
    question,
    serves,
    until,
)

import shorttail as st

REPLACEMENTS = max(1, CYCLES // 20) if SOAK else 1  # rolling replacements of all workers
KILLS = max(1, CYCLES // 200)  # kills of each worker; the pause before each restart doubles
WORKERS = 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("served"))


# No request is refused for overload; this test is not about latency on a busy machine.
OPTIONS = ("--workers", str(WORKERS), "--p99-budget-ms", "1e6")


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    running = Server(store, *OPTIONS, log=store.with_name("log"))
    try:
        yield running
        assert running.stop() == 0
    finally:
        running.kill()


def address(server: Server) -> str:
    return f"127.0.0.1:{server.address[1]}"


def clients(server_address: str, **options: Any) -> list[Caller]:
    return [Blocking(server_address, **options), Pipelined(server_address, **options)]


def assert_unhurt(callers: list[Caller]) -> None:
    assert [(caller.wrong, caller.errors) for caller in callers] == [([], [])] * len(callers)


def wait_for_workers(server: Server, gone: list[int]) -> None:
    """Wait until other workers serve in place of those that have ended."""

    def are_there() -> bool:
        workers = server.workers()
        return len(workers) == WORKERS and not set(gone) & set(workers) and all(map(serves, workers))

    until(are_there, "workers are started again")


def test_clients_do_not_notice_the_kill_of_a_worker(server: Server) -> None:
    callers = clients(address(server), retries=4)
    pushing = Pushing(address(server), retries=4)
    with calling(*callers, pushing):
        go_on([*callers, pushing])
        for _ in range(KILLS):
            for victim in server.workers():
                os.kill(victim, signal.SIGKILL)
                go_on(callers)
                wait_for_workers(server, [victim])
            go_on([*callers, pushing])
    assert_unhurt(callers)
    assert {type(error) for error in pushing.errors} <= {st.Unavailable}  # a push that was sent is not retried
    with st.Client(address(server)) as client:
        keys = {"user_id": [1000 + number for number in pushing.stored]}
        visits = client.get_online_features(["stats:visits"], keys).to_dict()["stats:visits"]
    assert visits == pushing.stored, "what was answered was stored"


def test_clients_do_not_notice_the_kill_of_all_workers(server: Server) -> None:
    callers = clients(address(server), retries=4)
    with calling(*callers):
        go_on(callers)
        victims = server.workers()
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        go_on(callers)
        wait_for_workers(server, victims)
    assert_unhurt(callers)


@pytest.mark.parametrize("retries", [0, 4])
def test_a_killed_worker_loses_only_its_unanswered_requests(server: Server, retries: int) -> None:
    async def run() -> tuple[list[Any], list[bool]]:
        options: dict[str, Any] = {"timeout_s": under_load.TIMEOUT_S, "retries": retries}
        connected: list[st.AsyncClient] = []
        victim = server.workers()[0]
        are_lost: list[bool] = []
        while len(connected) < 8 or all(are_lost) or not any(are_lost):  # until both workers have connections
            connected.append(await st.AsyncClient.connect(address(server), **options))
            await connected[-1].ping()
            are_lost.append(own_port(connected[-1]) in connections_of(victim))
        os.kill(victim, signal.SIGSTOP)
        asked = [asyncio.create_task(client.predict("total", question(n)[0])) for n, client in enumerate(connected)]
        await asyncio.gather(*(task for task, is_lost in zip(asked, are_lost, strict=True) if not is_lost))
        assert not any(task.done() for task, is_lost in zip(asked, are_lost, strict=True) if is_lost)
        os.kill(victim, signal.SIGKILL)
        results = await asyncio.gather(*asked, return_exceptions=True)
        for client in connected:
            await client.close()
        wait_for_workers(server, [victim])
        return results, are_lost

    results, are_lost = asyncio.run(asyncio.wait_for(run(), 2 * under_load.TIMEOUT_S))
    for n, (result, is_lost) in enumerate(zip(results, are_lost, strict=True)):
        if is_lost and not retries:
            assert type(result) is st.Unavailable
        else:
            assert result.outputs["total"].tolist() == question(n)[1].tolist()


def test_rolling_replacements_break_nothing(server: Server) -> None:
    """Even clients without retries do not notice it: connections move from worker to worker."""
    before = server.log.read_text()
    callers = clients(address(server), retries=0)
    with calling(*callers):
        for done in range(1, REPLACEMENTS + 1):
            server.process.send_signal(signal.SIGHUP)
            said = before + done * "reloaded: 2 workers replaced\n"
            until(
                lambda said=said: server.log.read_text() == said, "the workers are replaced, and nothing else happens"
            )
            go_on(callers)
    assert_unhurt(callers)


def test_a_server_is_restarted_on_the_same_socket(store: Path, tmp_path: Path) -> None:
    """As systemd does it: connections that arrive while no server runs wait in the queue of the socket."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        listening = f"127.0.0.1:{listener.getsockname()[1]}"
        callers = clients(listening, retries=4)
        without_retries = clients(listening, retries=0, until_lost=True)
        first = second = OnSocket(store, listener.fileno(), *OPTIONS, log=tmp_path / "first")
        try:
            with calling(*callers):
                with calling(*without_retries):
                    go_on([*callers, *without_retries])
                    assert first.stop() == 0
                    second = OnSocket(store, listener.fileno(), *OPTIONS, log=tmp_path / "second")
                go_on(callers)
            assert second.stop() == 0
        finally:
            first.kill()
            second.kill()
    assert_unhurt(callers)
    for caller in without_retries:
        assert caller.wrong == []
        assert {type(error) for error in caller.errors} <= {st.Unavailable}
    assert first.log.read_text() == second.log.read_text() == ""
