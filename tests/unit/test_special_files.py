"""FIFOs, devices and symbolic links where a file is expected: nothing waits for ever, and nothing is written elsewhere.

Also the modes of what is made under a umask of 0.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import error_of
from row_models import FLOAT, graph, op

import shorttail as st
from shorttail.client.credentials import client_context
from shorttail.define.inputs import read_input
from shorttail.errors import InvalidArgument
from shorttail.server.security import client_token, read_tokens, server_context
from shorttail.server.settings import ServerSettings
from shorttail.store.backup import backup
from shorttail.store.verify import verify

WAIT_S = 120  # ends a wait that would never end
DEFINITIONS = """
import shorttail as st

user = st.Entity("user", keys={"user_id": st.Int64})
stats = st.FeatureView("stats", entity=user, features=[st.Feature("x", st.Float32)])
total = st.Model("total", path="total.onnx", inputs=["stats:x"])
"""
SHORTTAIL = (sys.executable, "-m", "shorttail")


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    def too_long(*_: object) -> None:
        raise TimeoutError("it waits for ever")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(WAIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def write_project(folder: Path) -> Path:
    """Write definitions with a model."""
    graph(folder / "total.onnx", [op("Identity", "x", "y")], {"x": (FLOAT, [None, 1])}, {"y": (FLOAT, [None, 1])})
    (folder / "definitions.py").write_text(DEFINITIONS)
    return folder / "definitions.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    with st.Engine.open(folder / "store", create=True) as engine:
        engine.apply(write_project(folder))
        engine.push("stats", {"user_id": [1], "x": [1.0]})
    return folder / "store"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo.csv")
    return tmp_path / "fifo.csv"


# -- input -----------------------------------------------------------------------------------------------------------


COMMANDS = {
    "load": ["load", "stats", "FIFO", "--store", "STORE"],
    "push": ["push", "stats", "FIFO", "--store", "STORE"],
    "delete": ["delete", "stats", "--file", "FIFO", "--store", "STORE"],
    "definitions": ["apply", "FIFO", "--store", "STORE"],
    "model": ["models", "deploy", "total", "FIFO", "--store", "STORE"],
    "store": ["stat", "--store", "FIFO"],
    "backup": ["backup", "FIFO", "--store", "STORE"],
    "token of a client": ["features", "stats:x", "user_id=1", "--server", "127.0.0.1:1", "--token-file", "FIFO"],
    "CA of a client": ["features", "stats:x", "user_id=1", "--server", "127.0.0.1:1", "--tls-ca", "FIFO"],
    "results": ["bench", "compare", "FIFO", "FIFO"],
    "body": ["bench", "http://127.0.0.1:1/", "--body", "FIFO"],
}


@pytest.mark.parametrize("what", COMMANDS)
@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
def test_a_command_is_given_no_regular_file(store: Path, fifo: Path, what: str, kind: str) -> None:
    named = {"fifo": fifo, "device": Path("/dev/zero"), "socket": fifo.with_name("socket.csv")}[kind]
    if kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(named))
    given = [part.replace("FIFO", str(named)).replace("STORE", str(store)) for part in COMMANDS[what]]
    assert str(named) in error_of(*given)


def test_a_report_is_not_written_to_a_fifo_that_nobody_reads(fifo: Path) -> None:
    command = ["bench", "127.0.0.1:1", "--predict", "total", "--report", str(fifo)]
    assert error_of(*command) == f"error: --report {fifo}: cannot be written: No such device or address\n"


def test_files_of_a_server_are_regular_ones(fifo: Path) -> None:
    """Each worker reads them, so a pipe would be empty for the second."""
    with pytest.raises(InvalidArgument, match="it is a fifo, not a regular file"):
        read_tokens(str(fifo))
    for name in ("tls_cert", "tls_key", "tls_client_ca"):
        settings = ServerSettings(**{"tls_cert": __file__, name: str(fifo)})
        with pytest.raises(
            InvalidArgument, match=f"--{name.replace('_', '-')} {fifo}: it is a FIFO, not a regular file"
        ):
            server_context(settings)


def test_a_folder_of_rows_holds_a_fifo(store: Path, fifo: Path) -> None:
    assert f"{fifo}: it is a FIFO, not a regular file" in error_of(
        "load", "stats", str(fifo.parent / "*.csv"), "--store", str(store)
    )


def test_what_a_command_writes_into_a_pipe_is_read(tmp_path: Path, made: Path) -> None:
    """`<(command)` of a shell is a pipe, which a client reads once: its token and its CA."""
    token = "0123456789abcdef" * 2
    read, write = os.pipe()
    with os.fdopen(write, "w") as file:
        file.write(f"{token}\n")
    assert client_token(f"/dev/fd/{read}") == token
    os.close(read)
    large = os.urandom(300_000)
    (tmp_path / "large").write_bytes(large)
    with subprocess.Popen(["cat", tmp_path / "large"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert read_input(f"/dev/fd/{child.stdout.fileno()}") == large
    assert read_input(tmp_path / "large") == large
    with subprocess.Popen(["sh", "-c", "sleep 0.3; echo late"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert read_input(f"/dev/fd/{child.stdout.fileno()}") == b"late\n"


@pytest.mark.parametrize("text", ["", "  \n", "no certificate", "\N{SNOWMAN}"])
def test_a_ca_file_without_a_certificate_trusts_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / "ca.pem").write_text(text)
    with pytest.raises(InvalidArgument, match="no certificates in PEM form"):
        client_context(tmp_path / "ca.pem")


def test_examples_are_no_regular_file(store: Path, fifo: Path) -> None:
    graph(fifo.with_name("n.onnx"), [op("Neg", "x", "y")], {"x": (FLOAT, [None, 1])}, {"y": (FLOAT, [None, 1])})
    command = ["models", "deploy", "total", str(fifo.with_name("n.onnx")), "--examples", str(fifo)]
    assert "examples: cannot read" in error_of(*command, "--store", str(store))


# -- files of a store ------------------------------------------------------------------------------------------------


def be_fifo(path: Path) -> None:
    os.mkfifo(path)


def be_symlink(path: Path) -> None:
    path.symlink_to(path.parent.parent / "elsewhere")


def be_good_symlink(path: Path) -> None:
    """Such as one to a larger disk. It is refused too: a copy of the folder would lack the file."""
    target = path.parent.parent / f"own.{path.name}"
    moved = path.parent / f"{path.name}.before"
    moved.rename(target)
    path.symlink_to(target)


KINDS: dict[Callable[[Path], None], str] = {
    be_fifo: "a FIFO",
    be_symlink: "a symbolic link",
    be_good_symlink: "a symbolic link",
}


@pytest.mark.parametrize("name", ["data.mdb", "lock.mdb", "generation", "load.lock", "ready.lock", "models"])
@pytest.mark.parametrize("be", KINDS)
def test_a_store_holds_files_of_its_own(store: Path, name: str, be: Callable[[Path], None]) -> None:
    if (store / name).exists():
        (store / name).rename(store / f"{name}.before")
    else:
        (store / f"{name}.before").touch()
    be(store / name)
    if be is not be_good_symlink:
        path = store / f"{name}.before"
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = sorted(store.parent.iterdir())
    expected = f"{store / name} is {KINDS[be]}; a store holds only files and folders of its own"
    for use in (lambda: st.Engine.open(store), lambda: st.Engine.open(store, create=True), lambda: verify(store)):
        with pytest.raises(InvalidArgument) as caught:
            use()
        assert caught.value.message == expected
    assert sorted(store.parent.iterdir()) == before, "nothing was made behind a link"


@pytest.mark.parametrize(
    "place", ["models/total", "models/total/1", "models/total/1/model.onnx", "models/total/1/more"]
)
def test_a_backup_copies_nothing_from_outside(store: Path, tmp_path: Path, place: str) -> None:
    outside = tmp_path / "outside"
    if (store / place).exists():
        (store / place).rename(outside)
    else:
        outside.write_text("secret")
    (store / place).symlink_to(outside)
    with pytest.raises(InvalidArgument, match=rf"{place} is a symbolic link; a store holds only"):
        backup(store, tmp_path / "copy")
    assert not list(tmp_path.glob("*copy*"))


def test_a_version_is_not_written_through_a_link(store: Path, tmp_path: Path) -> None:
    (store / "models" / "total").rename(tmp_path / "outside")
    (store / "models" / "total").symlink_to(tmp_path / "outside")
    graph(tmp_path / "next.onnx", [op("Neg", "x", "y")], {"x": (FLOAT, [None, 1])}, {"y": (FLOAT, [None, 1])})
    before = sorted(tmp_path.rglob("*"))
    with st.Engine.open(store) as engine, pytest.raises(InvalidArgument, match="models/total is a symbolic link"):
        engine.deploy("total", tmp_path / "next.onnx")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_backup_does_not_follow_its_destination(store: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidArgument, match=r"'.*copy' exists; a backup never overwrites anything"):
        backup(store, tmp_path / "copy")
    assert not (tmp_path / "elsewhere").exists()


# -- modes -----------------------------------------------------------------------------------------------------------


def writable_by_others(folder: Path) -> dict[str, str]:
    """Return {path: mode} of what others than the owner may write."""
    found = {path: path.lstat().st_mode for path in folder.rglob("*")}
    return {str(path.relative_to(folder)): oct(mode) for path, mode in found.items() if mode & 0o022}


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_library_makes_nothing_that_others_can_write(open_umask: None, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir(mode=0o755)
    project = tmp_path / "project"
    project.mkdir()
    with st.Engine.open(inside / "deep" / "store", create=True) as engine:
        engine.apply(write_project(project))
        engine.load("stats", {"user_id": [1], "x": [1.0]})
        backup(engine.store, inside / "copy")
    assert writable_by_others(inside) == {}
    assert stat.S_IMODE((inside / "deep" / "store" / "data.mdb").stat().st_mode) == 0o644
    assert stat.S_IMODE((inside / "copy" / "models" / "total" / "1" / "model.onnx").stat().st_mode) == 0o644


def test_commands_make_nothing_that_others_can_write(open_umask: None, tmp_path: Path) -> None:
    write_project(tmp_path)
    (tmp_path / "inside").mkdir(mode=0o755)
    for command in (
        ["apply", "definitions.py", "--create"],
        ["backup", "inside/copy"],
    ):
        done = subprocess.run(
            [*SHORTTAIL, *command, "--store", "inside/store"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert writable_by_others(tmp_path / "inside") == {}
