"""Fixtures for tests of a running server: a store per module, and servers that a test may change or kill."""

import shutil
import socket
import subprocess

import pytest
from serving import Server, make_store

from shorttail.loadtest import stages


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("served"))


@pytest.fixture
def start(store, tmp_path):
    """Return start(*options, of=store), which starts a server. Servers that still run after the test are killed."""
    servers = []

    def start_server(*options, of=store):
        servers.append(Server(of, *map(str, options), log=tmp_path / f"log{len(servers)}"))
        return servers[-1]

    yield start_server
    for one in servers:
        one.kill()


@pytest.fixture(scope="module")
def unused_port():
    """A closed port, which the load generator of this process uses for metrics unless it is given another.

    A developer's own server may listen on the usual port.
    """
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "DEFAULT_HTTP_PORT", port)
        yield port


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A folder with a CA, and certificates for the server (127.0.0.1) and a client: NAME.pem, with the key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *ec, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test ca", "-days", "2")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("server", "client"):
        openssl("req", *ec, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-out", f"{name}.crt", "-days", "2", "-extfile", "san")  # fmt: skip
        (folder / f"{name}.pem").write_text((folder / f"{name}.key").read_text() + (folder / f"{name}.crt").read_text())
    return folder
