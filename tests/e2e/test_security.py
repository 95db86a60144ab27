"""Tokens and TLS, and what a server refuses without them."""

import asyncio
import ssl
import stat
import subprocess
import sys

import msgpack
import pytest
from commands import error_of, run_well
from serving import PREDICT, PREDICTED, TIMEOUT_S, Server, hang_up

import shorttail as st
from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument, PermissionDenied, Unauthenticated, Unavailable
from shorttail.server.security import ADMIN, NONE, SERVE, Tokens, client_token

SERVE_TOKEN, ADMIN_TOKEN = "s" * 32, "a" * 32
KEYS = {"user_id": [1], "amount": [0.5]}


def token_file(folder, text=f"# two\nserve {SERVE_TOKEN}\nadmin {ADMIN_TOKEN}  # of the loader\n", mode=0o600):
    path = folder / "tokens"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture(scope="module")
def guarded(store):
    """A server that requires tokens."""
    server = Server(store, "--token-file", str(token_file(store.parent)), log=store.parent / "guarded")
    yield server
    assert server.stop() == 0
    assert server.log.read_text() == ""


# -- the file ------------------------------------------------------------------------------------------------------


def test_each_token_has_its_access(tmp_path):
    tokens = Tokens.read(str(token_file(tmp_path)))
    assert [tokens.access(token) for token in (SERVE_TOKEN, ADMIN_TOKEN)] == [SERVE, ADMIN]
    for wrong in ("", "s", SERVE_TOKEN[:-1], SERVE_TOKEN + "s", SERVE_TOKEN.upper(), "serve", "\ud800"):
        assert tokens.access(wrong) == NONE
    assert client_token(str(tmp_path / "tokens")) == ADMIN_TOKEN
    (tmp_path / "mine").write_text(SERVE_TOKEN + "\n")
    assert client_token(str(tmp_path / "mine")) == SERVE_TOKEN


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("", 0o600, "has no token"),
        ("# nothing\n", 0o600, "has no token"),
        ("serve\n", 0o600, "line 1: write `serve TOKEN`"),
        (f"root {SERVE_TOKEN}\n", 0o600, "line 1: write `serve TOKEN`"),
        ("\nadmin 123456789012345\n", 0o600, "line 2: a token of fewer than 16"),
        (f"serve {SERVE_TOKEN}\n", 0o644, "chmod 600"),
        (f"serve {SERVE_TOKEN}\n", 0o620, "chmod 600"),
    ],
)
def test_bad_token_files_are_refused(tmp_path, text, mode, said):
    with pytest.raises(InvalidArgument, match=said) as caught:
        Tokens.read(str(token_file(tmp_path, text, mode)))
    assert SERVE_TOKEN not in caught.value.message  # the error may be logged


def test_a_group_may_read_the_token_file_and_a_missing_file_is_named(tmp_path):
    Tokens.read(str(token_file(tmp_path, mode=0o640)))
    with pytest.raises(InvalidArgument, match="absent: no such file"):
        Tokens.read(str(tmp_path / "absent"))


# -- tokens on the wire --------------------------------------------------------------------------------------------


def test_before_a_token_only_ping_and_auth_are_answered(guarded):
    with guarded.connect() as peer:
        assert peer.ask(0, 1, "ping", []) == [1, 1, None, "pong"]
        for method, params in (
            ("predict", PREDICT[3]),
            ("get_online_features", [["stats:age"], {"user_id": 1}]),
            ("push", ["stats", {"user_id": 1}]),
            ("models", []),
            ("views", []),
            ("nothing", []),
        ):
            assert peer.ask(0, 2, method, params)[2]["code"] == "UNAUTHENTICATED"


def test_the_serve_token_reads_and_the_admin_token_writes(guarded):
    push = {"user_id": [7], "age": [1.0], "visits": [1], "tier": ["x"], "taste": [[0.0, 1.0]]}
    with guarded.connect() as peer:
        assert peer.ask(0, 1, "auth", [SERVE_TOKEN]) == [1, 1, None, True]
        assert peer.ask(*PREDICT) == PREDICTED
        for method, params in (("push", ["stats", push]), ("delete", ["stats", {"user_id": [7]}])):
            assert peer.ask(0, 3, method, params)[2]["code"] == "PERMISSION_DENIED"
        peer.send(msgpack.packb([2, "push", ["stats", push]]))  # nor as a notification
        assert peer.ask(0, 4, "get_online_features", [["stats:age"], {"user_id": 7}])[3]["statuses"] == [[2]]
        assert peer.ask(0, 5, "auth", [ADMIN_TOKEN]) == [1, 5, None, True]
        assert peer.ask(0, 6, "push", ["stats", push]) == [1, 6, None, {"rows": 1, "older": 0}]
        assert peer.ask(0, 7, "auth", [SERVE_TOKEN]) == [1, 7, None, True]
        assert peer.ask(0, 8, "delete", ["stats", {"user_id": [7]}]) == [1, 8, None, {"rows": 1}]


def test_wrong_tokens_get_an_error_a_limited_number_of_times(guarded):
    with guarded.connect() as peer:
        codes = [peer.ask(0, n, "auth", [f"{n:032}"])[2]["code"] for n in range(LIMITS.stranger_requests)]
        assert codes == ["UNAUTHENTICATED"] * LIMITS.stranger_requests
        assert "connect again" in peer.ask(0, 99, "auth", [ADMIN_TOKEN])[2]["message"]
        assert peer.reply() is None
    with guarded.connect() as peer:
        assert peer.ask(0, 1, "auth", [])[2]["code"] == "INVALID_ARGUMENT"
        assert peer.ask(0, 2, "auth", [3])[2]["code"] == "INVALID_ARGUMENT"


@pytest.mark.parametrize("over", [0, 1])
def test_messages_before_authentication_must_be_small(guarded, over):
    empty = len(msgpack.packb([0, 1, "auth", ["x" * 1000]])) - 1000
    frame = msgpack.packb([0, 1, "auth", ["x" * (LIMITS.stranger_frame_bytes - empty + over)]])
    assert len(frame) == LIMITS.stranger_frame_bytes + over
    with guarded.connect() as peer:
        peer.send(frame)
        msgid, error = peer.reply()[1:3]
        assert error["code"] == "UNAUTHENTICATED"
        assert (msgid is None) == bool(over)
        if over:
            assert peer.reply() is None
    with guarded.connect() as peer:
        assert peer.ask(0, 1, "auth", [SERVE_TOKEN])[3] is True
        assert peer.ask(0, 2, "ping", ["x" * 2 * LIMITS.stranger_frame_bytes])[2]["code"] == "INVALID_ARGUMENT"


def test_clients_send_their_token(guarded):
    address = "{}:{}".format(*guarded.address)
    with st.Client(address, token=SERVE_TOKEN) as client:
        assert client.predict("total", KEYS).outputs["total"].tolist() == [11.5]
        with pytest.raises(PermissionDenied):
            client.delete("stats", {"user_id": [99]})
    with st.Client(address, token=ADMIN_TOKEN) as client:
        assert client.delete("stats", {"user_id": [99]}) == 0
    with st.Client(address) as client, pytest.raises(Unauthenticated, match="auth"):
        client.models()
    with st.Client(address, token="wrong") as client, pytest.raises(Unauthenticated, match="not known"):
        client.ping()

    async def asynchronously():
        async with await st.AsyncClient.connect(address, token=SERVE_TOKEN) as client:
            results = await asyncio.gather(*(client.predict("total", KEYS) for _ in range(20)))
            assert {result.outputs["total"][0] for result in results} == {11.5}
        with pytest.raises(Unauthenticated):
            await st.AsyncClient.connect(address, token="wrong")

    asyncio.run(asynchronously())


def test_commands_take_a_token_file(guarded, store):
    address = "{}:{}".format(*guarded.address)
    ask = ["predict", "total", "user_id=1", "amount=0.5", "--server", address]
    assert "11.5" in run_well(*ask, "--token-file", str(store.parent / "tokens")).out
    assert error_of(*ask).startswith("error: this server requires a token")


# -- where it may listen -------------------------------------------------------------------------------------------


def test_listening_for_other_machines_requires_a_token(store, start, tmp_path):
    command = [sys.executable, "-m", "shorttail", "serve", "--store", str(store), "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "give --token-file or --tls-client-ca" in done.stderr
    command += ["--token-file", str(token_file(tmp_path)), "--check"]
    assert subprocess.run(command, capture_output=True, timeout=TIMEOUT_S).returncode == 0


def test_a_wrong_file_is_an_error_at_the_start(store, tmp_path):
    command = [sys.executable, "-m", "shorttail", "serve", "--store", str(store), "--port", "0"]
    for options, said in (
        (["--token-file", str(tmp_path / "absent")], "absent: no such file"),
        (["--tls-client-ca", "ca.pem"], "--tls-client-ca needs --tls-cert"),
        (["--tls-cert", str(tmp_path / "absent.pem")], "absent.pem"),
        (["--tls-cert", __file__], "PEM files that belong together"),
    ):
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=TIMEOUT_S)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert said in done.stderr


def test_the_mode_of_the_unix_socket(start, tmp_path):
    path = tmp_path / "s"
    start("--uds", path, "--uds-mode", "660")
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    start("--uds", tmp_path / "t")
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o600


# -- TLS -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_tls_clients_are_served_and_others_are_refused(start, certificates, workers):
    server = start("--tls-cert", certificates / "server.pem", "--workers", workers)
    address = "{}:{}".format(*server.address)
    with st.Client(address, tls=certificates / "ca.pem") as client:
        for _ in range(3):
            assert client.predict("total", KEYS).outputs["total"].tolist() == [11.5]
        [connection] = client._pool._idle
        client.ping()
        assert client._pool._idle == [connection]  # session tickets of TLS are not taken for an unexpected reply
        assert connection.socket.version() in ("TLSv1.2", "TLSv1.3")

    async def asynchronously():
        async with await st.AsyncClient.connect(address, tls=str(certificates / "ca.pem")) as client:
            results = await asyncio.gather(*(client.predict("total", KEYS) for _ in range(50)))
            assert {result.outputs["total"][0] for result in results} == {11.5}

    asyncio.run(asynchronously())
    with st.Client(address, tls=True) as client, pytest.raises(Unavailable, match="not trusted"):
        client.ping()
    with st.Client(address, timeout_s=0.3) as client, pytest.raises((Unavailable, st.errors.DeadlineExceeded)):
        client.ping()
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(certificates / "ca.pem")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with st.Client(address, tls=old) as client, pytest.raises(Unavailable, match="TLS"):
        client.ping()
    with st.Client(address, tls=certificates / "ca.pem") as client:
        client.ping()
    assert server.stop() == 0
    assert server.log.read_text() == ""


def test_a_client_certificate_can_be_required(start, certificates):
    server = start("--tls-cert", certificates / "server.pem", "--tls-client-ca", certificates / "ca.pem")
    address = "{}:{}".format(*server.address)
    with st.Client(address, tls=certificates / "ca.pem") as client, pytest.raises(Unavailable):
        client.ping()
    context = ssl.create_default_context(cafile=certificates / "ca.pem")
    context.load_cert_chain(certificates / "client.pem")
    with st.Client(address, tls=context) as client:
        assert client.predict("total", KEYS).outputs["total"].tolist() == [11.5]
        assert client.delete("stats", {"user_id": [99]}) == 0
    assert server.stop() == 0


def test_an_answer_after_an_error_still_comes_over_tls(start, certificates):
    """TLS has no half-closed connections, so the error is sent before the connection is closed."""
    server = start("--tls-cert", certificates / "server.pem")
    context = ssl.create_default_context(cafile=certificates / "ca.pem")
    with server.connect() as peer:
        peer.socket = context.wrap_socket(peer.socket, server_hostname="127.0.0.1")
        peer.send(msgpack.packb(PREDICT) + b"\xc1")
        replies = {reply[1]: reply for reply in (peer.reply(), peer.reply())}
        assert replies[1] == PREDICTED
        assert replies[None][2]["code"] == "INVALID_ARGUMENT"
        assert peer.reply() is None


# -- reload --------------------------------------------------------------------------------------------------------


def test_new_tokens_are_valid_after_sighup(start, tmp_path):
    path = token_file(tmp_path)
    server = start("--token-file", path)
    with server.connect() as peer:
        assert peer.ask(0, 1, "auth", ["n" * 32])[2]["code"] == "UNAUTHENTICATED"
    with server.connect() as old:
        assert old.ask(0, 1, "auth", [SERVE_TOKEN])[3] is True
        path.write_text(f"serve {'n' * 32}\n")
        assert hang_up(server) == "reloaded: 1 worker replaced\n"
        with server.connect() as peer:
            assert peer.ask(0, 1, "auth", [SERVE_TOKEN])[2]["code"] == "UNAUTHENTICATED"
            assert peer.ask(0, 2, "auth", ["n" * 32])[3] is True
            assert peer.ask(*PREDICT) == PREDICTED
        assert old.ask(*PREDICT) == PREDICTED  # a connection keeps the access that it has
    path.chmod(0o644)
    assert hang_up(server).startswith("reload refused: token file")
    with server.connect() as peer:
        assert peer.ask(0, 1, "auth", ["n" * 32])[3] is True
