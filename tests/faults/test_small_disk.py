"""A file system that is really full: no signal ends a process, no acknowledged row is lost, and work goes on.

Each kind of step is tried with room for 0, 1, 2, ... pages until the room suffices.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import workload
from small_disk import ROOM, SmallDisk
from test_disk_full import write_definitions
from zygote import Zygote, build_shim

from shorttail.store.backup import backup

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from serving import SERVE, TIMEOUT_S, Peer, Server, children_of, make_store, until, write_sum

SIZE_BYTES = 8 << 20
SHORTTAIL = (sys.executable, "-m", "shorttail")
MORE = """
import shorttail as st

user = st.Entity("user", keys={"user_id": st.Int64})
more = st.FeatureView("more", entity=user, features=[st.Feature("x", st.Float32)])
"""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    with SmallDisk(tmp_path_factory.mktemp("disk"), SIZE_BYTES) as found:
        if found.problem:
            pytest.skip(found.problem)
        yield found


@pytest.fixture(scope="module")
def inside(disk: SmallDisk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """A zygote that sees the small disk."""
    with Zygote(build_shim(tmp_path_factory.mktemp("shim")), disk.prefix) as running:
        yield running


def until_it_fits(attempt: Callable[[int], dict[str, Any]]) -> list[str]:
    """Attempt it with more and more room. Returns the errors."""
    messages: list[str] = []
    nth = 1
    while (found := attempt(nth))["reached"]:
        messages.append(found["message"])
        nth += 1
    return messages


@pytest.mark.parametrize("kind", workload.KINDS)
def test_a_step_without_enough_room(inside: Zygote, disk: SmallDisk, tmp_path: Path, kind: str) -> None:
    base, path = tmp_path / "base", disk.folder / "store"
    step = workload.create_before(tmp_path / "store", kind)
    backup(tmp_path / "store", base)  # without free pages, so that the step needs room

    def attempt(nth: int) -> dict[str, Any]:
        job = {"work": "survive", "base": str(base), "path": str(path), "step": step, "fault": [ROOM, nth]}
        return inside.start("on_small_disk", **job).result()

    messages = until_it_fits(attempt)
    assert messages
    assert set(messages) == {f"the disk of store '{path}' is full or failing; nothing was written"}


def test_a_creation_without_enough_room(inside: Zygote, disk: SmallDisk) -> None:
    path = disk.folder / "new" / "store"

    def attempt(nth: int) -> dict[str, Any]:
        job = {"work": "survive_creation", "base": None, "path": str(path), "fault": [ROOM, nth]}
        return inside.start("on_small_disk", **job).result()

    messages = until_it_fits(attempt)
    assert len(messages) > 17  # pages of lock.mdb
    assert set(messages) == {f"the disk of store '{path}' is full or failing; nothing was written"}


@pytest.mark.parametrize("missing", [[], ["lock.mdb"], ["generation"], ["lock.mdb", "generation"]])
def test_a_process_opens_a_store_without_enough_room(
    inside: Zygote, disk: SmallDisk, tmp_path: Path, missing: list[str]
) -> None:
    """A copy of a store lacks files that are mapped and written, and has them again once the room suffices."""
    base, path = tmp_path / "base", disk.folder / "store"
    step = workload.create_before(base, "edit")

    def attempt(nth: int) -> dict[str, Any]:
        job = {"work": "survive_opening", "base": str(base), "path": str(path), "step": step, "fault": [ROOM, nth]}
        return inside.start("on_small_disk", missing=missing, **job).result()

    messages = until_it_fits(attempt)
    assert bool(messages) == bool(missing)
    assert set(messages) <= {f"the disk of store '{path}' is full or failing; nothing was written"}


def test_an_apply_without_enough_room(inside: Zygote, disk: SmallDisk, tmp_path: Path) -> None:
    base, path, definitions = tmp_path / "base", disk.folder / "store", write_definitions(tmp_path)
    workload.create(base)

    def attempt(nth: int) -> dict[str, Any]:
        job = {"work": "survive_apply", "base": str(base), "path": str(path), "definitions": str(definitions)}
        return inside.start("on_small_disk", fault=[ROOM, nth], **job).result()

    messages = until_it_fits(attempt)
    assert len(messages) > 2
    for message in messages:
        assert message.startswith(("model 'score': cannot write ", f"the disk of store '{path}' is full or failing; "))


def test_a_backup_without_enough_room(inside: Zygote, disk: SmallDisk, tmp_path: Path) -> None:
    path, destination = tmp_path / "store", disk.folder / "copies" / "copy"
    workload.create_before(path, "edit")

    def attempt(nth: int) -> dict[str, Any]:
        job = {"work": "survive_backup", "base": None, "path": str(destination), "store": str(path)}
        return inside.start("on_small_disk", fault=[ROOM, nth], **job).result()

    messages = until_it_fits(attempt)
    assert len(messages) > 2
    assert set(messages) == {f"the disk of '{destination}' is full or failing; no backup was made"}


def row(user: int) -> dict[str, Any]:
    return {"user_id": user, "age": 1.0, "visits": 1, "tier": f"{user} " * 400, "taste": [1.0, 2.0]}


def tiers(server: Server, users: list[int]) -> list[str | None]:
    with server.connect() as peer:
        _, _, error, result = peer.ask(0, 9, "get_online_features", [["stats:tier"], {"user_id": users}])
    assert error is None
    found: list[str | None] = result["values"][0]
    return found


def test_a_server_on_a_full_disk(disk: SmallDisk, tmp_path: Path) -> None:
    """Lookups go on, also in processes that start on the full disk, and so do pushes as soon as there is room."""
    store, acknowledged = disk.folder / "served", list[int]()
    make_store(tmp_path)
    disk.run("cp", "-r", tmp_path / "store", store)
    full = f"the disk of store '{store}' is full or failing; nothing was written"
    server = Server(store, "--workers", "2", log=tmp_path / "log", prefix=disk.prefix)

    def push(user: int) -> str | None:
        with server.connect() as peer:
            _, _, error, _ = peer.ask(0, 1, "push", ["stats", row(user)])
        if error is None:
            acknowledged.append(user)
            return None
        assert error["code"] in ("RESOURCE_EXHAUSTED", "UNAVAILABLE"), error
        return str(error["message"])

    def all_are_there() -> bool:
        return tiers(server, acknowledged) == [row(user)["tier"] for user in acknowledged]

    try:
        until(lambda: push(100) is None, server)
        for room in range(12):
            disk.fill(room)
            failed = [message for user in range(101 + 50 * room, 151 + 50 * room) if (message := push(user))]
            assert set(failed) == {full}
            assert all_are_there()
        disk.fill()
        killed = [*server.children("writer"), server.workers()[0]]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(server.workers()) == 2 and not set(server.children("writer")) & set(killed), server)
        until(lambda: push(99) == full, server)
        assert all_are_there()
        disk.free()
        assert push(98) is None
        assert all_are_there()
        assert server.stop() == 0
    finally:
        server.kill()
    died = re.findall(r"\(pid (\d+)\) died: (\S+ \S+)", server.log.read_text())
    assert sorted(died) == sorted((str(pid), "signal 9") for pid in killed)
    verified = disk.run(*SHORTTAIL, "verify", "--store", store)
    assert (verified.returncode, verified.stderr) == (0, "")


def test_commands_on_a_full_disk(inside: Zygote, disk: SmallDisk, tmp_path: Path) -> None:
    """Each command that writes ends with one line; those that read work."""
    store, copy = disk.folder / "commands", disk.folder / "copy"
    make_store(tmp_path)
    backup(tmp_path / "store", tmp_path / "compact")
    disk.run("cp", "-r", tmp_path / "compact", store)
    columns = {name: [value] * 5000 for name, value in row(1).items()} | {"user_id": list(range(5000))}
    pq.write_table(pa.table(columns | {"tier": ["gold"] * 5000}), tmp_path / "rows.parquet")
    write_sum(tmp_path / "next.onnx", 2.0)
    (tmp_path / "more.py").write_text(MORE)
    reading: list[list[str | Path]] = [
        ["features", "stats:tier", "user_id=1", "--store", store],
        ["predict", "total", "user_id=1", "amount=1", "--store", store],
        ["stat", "--store", store],
        ["verify", "--store", store],
        ["serve", "--check", "--store", store],
    ]
    writing: list[list[str | Path]] = [
        ["push", "stats", tmp_path / "rows.parquet", "--store", store],
        ["load", "stats", tmp_path / "rows.parquet", "--store", store],
        ["load", "stats", tmp_path / "rows.parquet", "--store", store, "--memory-mib", "16"],
        ["models", "deploy", "total", tmp_path / "next.onnx", "--store", store],
        ["apply", tmp_path / "more.py", "--store", store],
        ["delete", "stats", "user_id=1", "--store", store],
        ["backup", copy, "--store", store],
        ["apply", tmp_path / "definitions.py", "--store", disk.folder / "new", "--create"],
    ]

    def run(command: list[str | Path]) -> tuple[int, str]:
        """Run a command in a process that sees the disk. Returns its exit code and what it wrote to stderr."""
        if command[0] == "serve":
            done = disk.run(*SHORTTAIL, *command)
            return done.returncode, done.stderr
        found = inside.start("command", arguments=[str(word) for word in command]).result()
        return found["code"], found["err"]

    assert run(reading[0]) == (0, "")  # makes the files that a copy lacks
    disk.fill()
    for command in reading:
        assert run(command) == (0, ""), command
    for command in writing:
        code, error = run(command)
        assert code == 1, (command, error)
        assert re.fullmatch(r"error: .*(the disk of|No space left on device|has no room).*\n", error), command
    disk.free()
    for command in [*writing, *reading]:
        assert run(command) == (0, ""), command


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_the_output_of_a_command_on_a_full_disk(tmp_path: Path, unbuffered: str) -> None:
    store = make_store(tmp_path)
    for command in (["stat"], ["features", "stats:age", "user_id=1"], ["verify"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [*SHORTTAIL, *command, "--store", store],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=300,
                env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            )
        assert done.returncode == 1
        assert done.stderr == "error: cannot write the output: No space left on device\n"


def test_a_server_whose_output_and_log_are_on_a_full_disk(tmp_path: Path) -> None:
    store, address = make_store(tmp_path), str(tmp_path / "socket")
    with Path("/dev/full").open("w") as full, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "systemd"))
        systemd.settimeout(TIMEOUT_S)
        options = ["--store", str(store), "--port", "0", "--http-port", "0", "--uds", address]
        env = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "systemd")}
        process = subprocess.Popen([*SERVE, *options], stdout=full, stderr=full, env=env)
        try:
            while b"READY=1" not in systemd.recv(1024):
                pass
            (worker,) = (pid for pid in children_of(process.pid) if "server.worker" in command_line(pid))
            os.kill(worker, signal.SIGKILL)  # which the supervisor reports
            while not answers(address):
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) in (0, 1)  # 1: the new worker was not quite ready, and was cut off
        finally:
            process.kill()
            process.wait()


def answers(address: str) -> bool:
    try:
        with Peer(address) as peer:
            return bool(peer.ask(0, 1, "ping", []) == [1, 1, None, "pong"])
    except OSError:
        return False


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
