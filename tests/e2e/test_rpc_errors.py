"""Errors of MessagePack-RPC as strings and lists, for clients that cannot read a map in the place of an error."""

import asyncio
import os
import signal

import msgpack
import pytest
from serving import FEATURED, FEATURES, PREDICT, PREDICTED, until

import shorttail as st
from shorttail.errors import InvalidArgument, NotFound, Unauthenticated

PUSH = ["stats", {"user_id": [77], "age": [1.0], "visits": [1], "tier": ["tin"], "taste": [[1, 2]]}]
NUMBERS = {"INVALID_ARGUMENT": 3, "DEADLINE_EXCEEDED": 4, "NOT_FOUND": 5, "UNAVAILABLE": 14}  # of gRPC


@pytest.fixture(params=["string", "list"])
def form(request):
    return request.param


@pytest.fixture
def server(start, form):
    server = start("--rpc-errors", form)
    with server.connect() as peer:  # the writer may be ready later than the worker
        until(lambda: peer.ask(0, 1, "push", PUSH)[2] is None, server)
    return server


def text_of(error, form):
    """The string of an error, which a list has after the number of the code."""
    if form == "string":
        return error
    number, text = error
    assert NUMBERS[text.partition(":")[0]] == number
    return text


def test_every_error_is_a_string_of_its_code_and_message(server, form):
    with server.connect() as peer:
        for method, params, said in [
            ("nothing", [], "NOT_FOUND: unknown method 'nothing'"),
            ("predict", ["nope", {}], "NOT_FOUND: no model 'nope'"),
            ("predict", ["total", {"user_id": 1}], "INVALID_ARGUMENT: missing column 'amount'"),
            ("predict", [], "INVALID_ARGUMENT: predict takes [model"),
            ("predict", [*PREDICT[3], {"deadline_ms": -1}], "DEADLINE_EXCEEDED: deadline_ms -1"),
            ("get_online_features", [["stats:nope"], {"user_id": 1}], "NOT_FOUND: feature view 'stats' has no feature"),
            ("ping", [1], "INVALID_ARGUMENT: ping takes no params"),
            ("push", ["nope", {}], "NOT_FOUND: no feature view 'nope'"),  # from the writer
            ("delete", ["stats", {"user_id": ["x"]}], "INVALID_ARGUMENT: "),
        ]:
            kind, msgid, error, result = peer.ask(0, 7, method, params)
            assert (kind, msgid, result) == (1, 7, None)
            assert text_of(error, form).startswith(said), error
        assert peer.ask(*PREDICT) == PREDICTED
        assert peer.ask(*FEATURES) == FEATURED
        peer.send(b"\xc1")
        kind, msgid, error, result = peer.reply()
        assert (kind, msgid, result) == (1, None, None)
        assert text_of(error, form) == "INVALID_ARGUMENT: not MessagePack: byte 0xc1 is never used"


def test_a_push_that_the_writer_never_answers_is_one_too(server, form):
    (writer,) = server.children("writer")
    os.kill(writer, signal.SIGSTOP)
    with server.connect() as peer:
        peer.send(msgpack.packb([0, 1, "push", PUSH]))
        assert peer.ask(*PREDICT) == PREDICTED  # so the push was forwarded
        os.kill(writer, signal.SIGKILL)
        assert text_of(peer.reply()[2], form).startswith("UNAVAILABLE: the writer died before it answered")
        until(lambda: server.children("writer") not in ([], [writer]), server)


@pytest.mark.parametrize("form", ["map", "string", "list"])
def test_the_clients_read_all_forms(start, tmp_path, form):
    tokens = tmp_path / "tokens"
    tokens.write_text("admin 0123456789abcdef-admin\n")
    tokens.chmod(0o600)
    server = start("--rpc-errors", form, "--token-file", tokens)
    address = "{}:{}".format(*server.address)
    with pytest.raises(Unauthenticated, match="requires a token"), st.Client(address) as client:
        client.predict("total", {"user_id": 1, "amount": 1.0})
    with st.Client(address, token="0123456789abcdef-admin") as client:
        with pytest.raises(NotFound, match=r"^no model 'nope'"):
            client.predict("nope", {"user_id": 1})
        with pytest.raises(InvalidArgument, match=r"^missing column 'amount'"):
            client.predict("total", {"user_id": 1})

    async def ask():
        async with await st.AsyncClient.connect(address, token="0123456789abcdef-admin") as client:
            with pytest.raises(NotFound, match=r"^no model 'nope'"):
                await client.predict("nope", {"user_id": 1})

    asyncio.run(ask())
