"""The steps of commands that a server takes, without a server: wrong steps, files, and a disk that is full."""

import asyncio
import errno
import hashlib
from unittest import mock

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from shorttail.config import COMMANDS_VERSION, LIMITS
from shorttail.errors import InvalidArgument, NotFound, ResourceExhausted, ShorttailError
from shorttail.server import commands as module
from shorttail.server.commands import Commands, ReceivedFile
from shorttail.server.errorlog import ErrorLog
from shorttail.server.settings import ServerSettings

TOKEN = "a" * 32
ID = "0" * 32
BEGIN = {"id": ID, "token": TOKEN, "login": "me", "version": COMMANDS_VERSION}


@pytest.fixture(autouse=True)
def tokens(tmp_path, monkeypatch):
    """A token file, and a temporary folder of the test."""
    path = tmp_path / "tokens"
    path.write_text(f"admin {TOKEN} ci\n")
    path.chmod(0o600)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "tmp"))
    return path


class Session:
    """The commands of a server. step: takes a step like a request, and returns its result or its error."""

    def __init__(self, tokens, loop):
        self.faults = ErrorLog()
        self.commands = Commands("store", ServerSettings(token_file=str(tokens)), loop, self.faults)

    async def step(self, name, **given):
        return await self.send(msgpack.packb([name, given]))

    async def send(self, params):
        answers = asyncio.Queue()
        self.commands.take(params, answers.put_nowait)
        return await answers.get()


def run(tokens, test):
    async def main():
        session = Session(tokens, asyncio.get_running_loop())
        try:
            return await test(session)
        finally:
            session.commands.close()
            await asyncio.sleep(0)
            assert session.faults.total == 0, session.faults.seen

    return asyncio.run(main())


def test_a_full_disk_refuses_a_piece_and_the_next_may_fit(tokens):
    async def test(session):
        assert await session.step("begin", **BEGIN) == {}
        assert await session.step("send", id=ID, file="x", offset=0, data=b"abc") == {}
        with mock.patch.object(ReceivedFile, "append", side_effect=OSError(errno.ENOSPC, "No space left on device")):
            for name, offset in (("x", 3), ("y", 0)):
                refused = await session.step("send", id=ID, file=name, offset=offset, data=b"def")
                assert isinstance(refused, ResourceExhausted)
                assert "cannot keep the files of a command: No space left on device" in refused.message
        assert await session.step("send", id=ID, file="x", offset=3, data=b"def") == {}
        [folder] = (tokens.parent / "tmp").iterdir()
        assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("x", b"abcdef")]
        assert (folder.stat().st_mode & 0o777, (folder / "x").stat().st_mode & 0o777) == (0o700, 0o600)

    run(tokens, test)
    assert not list((tokens.parent / "tmp").iterdir())


def test_a_piece_that_was_written_in_part_is_written_again(tokens, tmp_path):
    file = ReceivedFile(tmp_path / "file")
    file.append(b"abc")
    (tmp_path / "file").write_bytes(b"abcde")  # the disk was full after two bytes
    file.append(b"defg")
    assert (tmp_path / "file").read_bytes() == b"abcdefg"
    assert (file.size, file.digest.hexdigest()) == (7, hashlib.sha256(b"abcdefg").hexdigest())


def test_a_link_in_place_of_a_file_is_not_followed(tokens, tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "file").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic"):
        ReceivedFile(tmp_path / "file").append(b"x")
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_no_process_and_no_folder_for_a_command_is_told(tokens):
    async def test(session):
        assert await session.step("begin", **BEGIN) == {}
        with mock.patch.object(module.subprocess, "Popen", side_effect=OSError(errno.EAGAIN, "try again")):
            refused = await session.step("run", id=ID, sums={})
            assert refused.message == "no process can be started for the command: try again"
        with mock.patch.object(module.tempfile, "mkdtemp", side_effect=OSError(errno.EROFS, "read-only")):
            refused = await session.step("begin", **BEGIN | {"id": "1" * 32})
            assert refused.message == "the server cannot make a folder for a command: read-only"
        assert isinstance(await session.step("alive", id="1" * 32), NotFound)

    run(tokens, test)


def test_a_silent_client_loses_its_command(tokens):
    async def test(session):
        await session.step("begin", **BEGIN)
        session.commands.look()
        await asyncio.sleep(0)
        assert await session.step("alive", id=ID) == {}
        late_s = session.commands.loop.time() + LIMITS.command_silence_s + 1
        with mock.patch.object(session.commands.loop, "time", return_value=late_s):
            session.commands.look()
        assert isinstance(await session.step("alive", id=ID), NotFound)

    run(tokens, test)


def test_a_token_that_was_taken_out_of_the_file_begins_nothing(tokens):
    async def test(session):
        tokens.write_text(f"admin {'b' * 32}\n")
        assert "need an admin token" in (await session.step("begin", **BEGIN)).message
        tokens.unlink()
        assert isinstance(await session.step("begin", **BEGIN), InvalidArgument)

    run(tokens, test)


VALUES = some.one_of(
    some.none(),
    some.integers(-(2**63), 2**64 - 1),
    some.text(max_size=40),
    some.binary(max_size=40),
    some.dictionaries(some.text(max_size=5) | some.integers(-5, 5), some.text(max_size=5), max_size=3),
    some.sampled_from([ID, TOKEN, "x", 0, 1, b"abc"]),
)
KEYS = some.sampled_from(["id", "token", "login", "version", "file", "offset", "data", "sums", "seen"])
STEPS = some.tuples(
    some.sampled_from(["begin", "send", "output", "alive", "end", "nothing", ""]), some.dictionaries(KEYS, VALUES)
)


@given(steps=some.lists(STEPS, max_size=8))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_step_is_an_unexpected_error(tokens, steps):
    async def test(session):
        with mock.patch.object(module, "POLL_S", 0.001):
            await session.step("begin", **BEGIN)
            for name, given_ in steps:
                for more in ({}, {"id": ID}):
                    answer = await session.step(name, **{**given_, **more})
                    assert isinstance(answer, dict | ShorttailError)

    run(tokens, test)
    assert not list((tokens.parent / "tmp").iterdir())


@given(params=some.binary(max_size=60))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_are_an_unexpected_error(tokens, params):
    async def test(session):
        assert isinstance(await session.send(b"\x92\xa5begin\x81\xa2id" + params), ShorttailError)

    run(tokens, test)
