"""A project, and a server of a copy of its store, for tests of commands with --server."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import commands
import msgpack
import pyarrow as pa
import pyarrow.parquet as pq
from serving import TIMEOUT_S, Server, until, write_sum

DEFINITIONS = """
import shorttail as st

@st.on_demand
def half(amount: st.Float64) -> st.Float64:
    return amount / 2

user = st.Entity("user", keys={"user_id": st.Int64})
buyer = user.alias("buyer", user_id="buyer_id")
stats = st.FeatureView("stats", entity=user, ttl="2d", owner="team", features=[
    st.Feature("age", st.Float32, default=1.5, description="years"),
    st.Feature("visits", st.Int64),
    st.Feature("tier", st.String, tags=["words"]),
], source=st.ParquetSource("rows.parquet", timestamp="at"))
total = st.Model(
    "total", path="total.onnx", inputs=["stats:age", "stats:visits", half("request:amount")], examples="examples.csv"
)
"""
OTHER = '\nother = st.Model("other", path="other.onnx", inputs=["buyer:stats:age", "stats:visits", "request:amount"])\n'
TOKENS = {"admin": "a" * 32, "unlabelled": "u" * 32, "serve": "s" * 32}


def make_project(home: Path) -> Path:
    """Make the folder `home` with definitions, models, rows, and a store with all of them and two versions."""
    home.mkdir()
    (home / "definitions.py").write_text(DEFINITIONS)
    (home / "changed.py").write_text(DEFINITIONS.replace("2d", "9d") + OTHER)
    (home / "dropped.py").write_text(DEFINITIONS.replace('st.Feature("visits", st.Int64),', ""))
    (home / "raises.py").write_text("1 / 0\n")
    (home / "compiles.py").write_text(DEFINITIONS.replace("amount / 2", "amount + (1,)"))
    (home / "lost.py").write_text(DEFINITIONS.replace("total.onnx", "lost.onnx"))
    (home / "unlike.py").write_text(DEFINITIONS.replace("examples.csv", "unlike.csv"))
    (home / "no_csv.py").write_text(DEFINITIONS.replace("examples.csv", "no.csv"))
    (home / "examples.csv").write_text("age,visits,amount,total\n1,2,4,5\n-1,0,8,3\n")
    (home / "unlike.csv").write_text("age,visits,amount,total\n1,2,4,6\n")
    (home / "twice.csv").write_text("age,visits,amount,total\n1,2,4,10\n")
    (home / "thrice.csv").write_text("age,visits,amount,total\n1,2,4,15\n")
    (home / "no.csv").write_text('age,visits\n1,2\n3,4,5,6\n"')
    for name, factor in (("total", 1.0), ("other", 1.0), ("new", 2.0), ("newer", 3.0)):
        write_sum(home / f"{name}.onnx", factor)
    (home / "text.onnx").write_text("not ONNX")
    rows = {"user_id": [1, 2, 3], "age": [10.0, None, 30.0], "visits": [1, 2, 3], "tier": ["gold", None, "tin, old"]}
    times = pa.array([1_700_000_000_000_000, 1_700_000_001_000_000, 1_700_000_002_000_000], pa.timestamp("us"))
    pq.write_table(pa.table(rows | {"at": times}), home / "rows.parquet")
    for words in (
        ["apply", "definitions.py", "--create"],
        ["materialize"],
        ["models", "deploy", "total", "new.onnx", "--examples", "twice.csv"],
    ):
        commands.run_well(*words, "--store", "store", "--by", "founder", folder=home)
    return home


def token_files(folder: Path) -> Path:
    """Write the token file of a server, and a file for each token alone, and return the former."""
    folder.mkdir(exist_ok=True)
    lines = [f"admin {TOKENS['admin']} ci", f"admin {TOKENS['unlabelled']}", f"serve {TOKENS['serve']}"]
    for name, text in {"tokens": "\n".join(lines), **TOKENS}.items():
        (folder / name).write_text(text + "\n")
        (folder / name).chmod(0o600)
    return folder / "tokens"


class Remote:
    """A server of a copy of the project's store. The server runs in another folder than its clients.

    options, env: of the server. peers: connections that `steps` has made. temporary: the folders of commands lie there.
    """

    peers: ClassVar = []

    def __init__(self, project: Path, home: Path, *options: str, env=None):
        self.project = project
        self.home = home
        self.temporary = home / "tmp"
        self.tokens = token_files(home / "secrets").parent
        shutil.copytree(project / "store", home / "store")
        self.temporary.mkdir(exist_ok=True)
        self.env = {**(env or os.environ), "TMPDIR": str(self.temporary)}
        self.options = ["--token-file", str(self.tokens / "tokens"), *options]
        self.start()

    def start(self):
        log = self.home / "log"
        prefix = ("env", "-C", str(self.home))
        self.server = Server("store", *self.options, log=log, env=self.env, prefix=prefix)
        self.address = "{}:{}".format(*self.server.address)

    def words(self, token="admin"):
        """The words that a command line needs to run on this server."""
        return ["--server", self.address, "--token-file", str(self.tokens / token)]

    def run(self, *words, token="admin"):
        """Run a command with --server in this process, in the project's folder."""
        return commands.run(*words, *self.words(token), folder=self.project)

    def popen(self, *words, **options):
        """Start a command with --server in a process of its own."""
        command = [sys.executable, "-m", "shorttail", *words, *self.words()]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=self.project, text=True, **pipes | options)

    def served(self):
        """The process ids of the commands that the server runs."""
        found = []
        for place in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = place.read_text().split("\0")
                if "shorttail.cli.served" in words and words[-2].startswith(f"{self.temporary}/"):
                    found.append(int(place.parent.name))
        return found

    def is_clean(self):
        """Whether no command runs, and none has left a folder."""
        return not self.served() and not list(self.temporary.glob("shorttail-command-*"))

    def wait_until_clean(self):
        until(self.is_clean, self.server)

    def steps(self, token="admin"):
        """Connect and authenticate, and return step(name, given), which answers the reply without its msgid."""
        peer = self.server.connect()
        self.peers.append(peer)
        peer.ask(0, 0, "auth", [TOKENS[token]])

        def step(name, **given):
            peer.send(msgpack.packb([0, 1, "command", [name, given]]))
            return peer.reply()[2:]

        return step

    def kill(self):
        self.server.kill()


def finished(process):
    """Wait for a process of `popen`, and return (exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err
