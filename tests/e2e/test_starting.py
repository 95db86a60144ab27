"""Errors with which `shorttail serve` does not start."""

import socket
import subprocess

from serving import PREDICT, PREDICTED, SERVE, TIMEOUT_S, Peer, refused


def test_a_port_in_use_is_an_error(start, store):
    port = start().address[1]
    assert refused("--store", str(store), "--port", str(port)) == (
        f"error: port {port} on 127.0.0.1 is in use; stop the other process or choose another with --port\n"
    )


def test_a_unix_socket_in_use_is_an_error_and_a_stale_one_is_replaced(store, start, tmp_path):
    start("--uds", tmp_path / "used")
    said = refused("--store", str(store), "--port", "0", "--uds", str(tmp_path / "used"))
    assert said.startswith(f"error: unix socket {tmp_path}/used is in use; ")
    (tmp_path / "file").write_text("mine")
    said = refused("--store", str(store), "--port", "0", "--uds", str(tmp_path / "file"))
    assert said.startswith(f"error: {tmp_path}/file exists and is not a socket; ")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "stale"))
    start("--uds", str(tmp_path / "stale"))
    with Peer(str(tmp_path / "stale")) as peer:
        assert peer.ask(*PREDICT) == PREDICTED


def test_wrong_addresses_are_errors(store):
    assert "give --token-file or --tls-client-ca" in refused("--store", str(store), "--host", "0.0.0.0", "--port", "0")
    assert "is not known" in refused("--store", str(store), "--host", "no such host", "--port", "0")
    assert "is not a port" in refused("--store", str(store), "--port", "70000")
    assert "cannot listen on unix socket" in refused(
        "--store", str(store), "--port", "0", "--uds", "/nowhere/" + "x" * 200
    )


def test_a_store_that_cannot_be_opened_is_reported_once_and_not_retried(store, tmp_path):
    missing = refused("--store", str(tmp_path / "none"), "--port", "0", "--workers", "2")
    assert missing.startswith("error: ")
    assert str(tmp_path / "none") in missing
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("not a store")
    assert str(tmp_path / "other") in refused("--store", str(tmp_path / "other"), "--port", "0")


def test_check_says_what_would_be_served(store):
    done = subprocess.run([*SERVE, "--store", str(store), "--check"], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok · models: total v1 · views: stats\n", "")
