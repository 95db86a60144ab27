"""What a reader has before a document begins, for the documents that do not make it themselves.

Each function takes the story of a document, whose folder is the working directory, and fills that folder. PREPARATIONS
at the end says which document needs what. What takes long is made once and copied: the quick start's folder, and the
demo after `make demo`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet
import pytest
from onnx import TensorProto, helper, numpy_helper
from story import ROOT, Story, blocks

import shorttail as st

DAMAGED_TABLE = 2  # the id of the table of operations.md's view
PAGE_BYTES = 4096


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The working directory is `folder`, and the programs of this interpreter's environment come first."""
    path = os.environ.get("PATH", os.defpath)
    programs = [sysconfig.get_path("scripts")]
    if shutil.which("curl") is None:
        programs.append(str(ROOT / "tests" / "docs" / "bin"))
    os.environ["PATH"] = os.pathsep.join([*programs, path])
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        os.environ["PATH"] = path


@dataclass
class Shared:
    """What several documents start from, each made when the first of them asks for it."""

    folder: Path

    @cached_property
    def quick_start(self) -> Path:
        """The folder of the quick start's reader when the store is full: data, model, definitions, store."""
        made = self.folder / "quick-start"
        made.mkdir()
        with inside(made):
            Story(ROOT / "docs" / "quickstart.md", made).run(until="## 4. Serve")
        return made

    @cached_property
    def demo(self) -> Path:
        """A clone's folder after `make demo`; what that printed is in `printed`."""
        made = self.folder / "demo"
        built = shutil.ignore_patterns("out", "__pycache__", "results")
        shutil.copytree(ROOT / "demo", made / "demo", ignore=built)
        shutil.copytree(ROOT / "bench", made / "bench", ignore=built)
        assert "\n\t$(BIN)/python demo/run.py\n" in (ROOT / "Makefile").read_text()
        with inside(made):
            done = subprocess.run([sys.executable, "demo/run.py"], stdout=subprocess.PIPE, text=True, timeout=300)
        assert done.returncode == 0, done.stdout
        (made / "printed").write_text(done.stdout)
        return made


# -- one function for each document --------------------------------------------------------------------------------


def quick_start(story: Story, shared: Shared) -> None:
    """The quick start's data, model, definitions and store."""
    shutil.copytree(shared.quick_start, story.folder, dirs_exist_ok=True)


def http(story: Story, shared: Shared) -> None:
    """What the quick start made, and the store that models.md makes for its raw tensors."""
    quick_start(story, shared)
    (source,) = (block.source for block in blocks(ROOT / "docs" / "models.md") if '"products.onnx"' in block.source)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(source, {})


def demo(story: Story, shared: Shared) -> None:
    """A clone after `make demo`."""
    shutil.copytree(shared.demo / "demo", story.folder / "demo")
    story.already_ran["make demo"] = (shared.demo / "printed").read_text()


def on_demand(story: Story, shared: Shared) -> None:
    """A model of four columns."""
    write_linear(story.folder / "fraud.onnx", [1, 1, 1, 1])


def models(story: Story, shared: Shared) -> None:
    """A store with a logistic regression and the demo's forest, and two new files for the first."""
    write_linear(story.folder / "risk.onnx", [1, 2, 3])
    write_linear(story.folder / "risk-new.onnx", [3, 2, 1])
    write_linear(story.folder / "risk-next.onnx", [3, 2, 2])
    shutil.copy(shared.demo / "demo" / "out" / "late.onnx", story.folder / "trees.onnx")
    make_store(
        """
import shorttail as st

risk = st.Model("risk", path="risk.onnx", inputs=["request:a", "request:b", "request:c"])
trees = st.Model("trees", path="trees.onnx", inputs=[f"request:c{i}" for i in range(23)])
"""
    )


def forests(story: Story, shared: Shared) -> None:
    """The demo's model."""
    shutil.copy(shared.demo / "demo" / "out" / "late.onnx", story.folder)


def load_testing(story: Story, shared: Shared) -> None:
    """A store of 1,000 users and 1,000 items with three models, and another HTTP server."""
    write_linear(story.folder / "model.onnx", [1, 1, 1])
    numbers = np.arange(1, 1001)
    values = numbers.astype(np.float32)
    make_store(
        """
import shorttail as st

user = st.Entity("user", keys={"user_id": st.Int64})
item = st.Entity("item", keys={"item_id": st.Int64})
stats = st.FeatureView("stats", entity=user, features=[st.Feature("age", st.Float32), st.Feature("tier", st.String)])
items = st.FeatureView("items", entity=item, features=[st.Feature("price", st.Float32)])
columns = {
    "total": ["stats:age", "items:price", "request:amount"],
    "fraud": ["stats:age", "request:amount", "request:distance"],
    "ranking": ["stats:age", "items:price", "request:hour"],
}
models = [st.Model(name, path="model.onnx", inputs=inputs) for name, inputs in columns.items()]
""",
        stats={"user_id": numbers, "age": values, "tier": ["gold"] * 1000},
        items={"item_id": numbers, "price": values},
    )
    story.ports[8000] = serve_recommendations(story)


def operations(story: Story, shared: Shared) -> None:
    """A store, a damaged copy of it, and a certificate. The document's store has more rows, which takes longer."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    rows = 100_000
    table = pa.table({"user_id": np.arange(rows), "age": np.ones(rows, np.float32), "visits": np.arange(rows)})
    make_store(
        """
import shorttail as st

user = st.Entity("user", keys={"user_id": st.Int64})
stats = st.FeatureView(
    "stats", entity=user, features=[st.Feature("age", st.Float32), st.Feature("visits", st.Int64)]
)
""",
        stats=table,
    )
    shutil.copytree(story.folder / "store", story.folder / "damaged")
    damage(story.folder / "damaged" / "data.mdb")
    (story.folder / "backups").mkdir()
    subject = ["-subj", "/CN=127.0.0.1", "-days", "2"]
    certificate = ["-keyout", "server.key", "-out", "server.pem"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *certificate, *subject],
        check=True,
        capture_output=True,
    )


# -- what they share -----------------------------------------------------------------------------------------------


def make_store(definitions: str, **rows: object) -> None:
    """Makes `store` in the working directory, and fills each view that has rows."""
    Path("definitions.py").write_text(definitions)
    with st.Engine.open("store", create=True) as engine:
        engine.apply("definitions.py")
        for view, data in rows.items():
            engine.load(view, data if isinstance(data, pa.Table) else pa.table(data))


def write_linear(path: Path, weights: list[float]) -> None:
    """Writes a model: float32 [rows, len(weights)] -> p, float32 [rows, 1], the weighted sum of a row."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["p"])],
        "linear",
        [value("x", TensorProto.FLOAT, [None, len(weights)])],
        [value("p", TensorProto.FLOAT, [None, 1])],
        [numpy_helper.from_array(np.array(weights, np.float32)[:, None], "w")],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def damage(data: Path) -> None:
    """Changes a byte of a row in a page of the view's table, in the middle of the file (docs/format.md)."""
    content = bytearray(data.read_bytes())
    table = DAMAGED_TABLE.to_bytes(4, "little")
    pages = range(len(content) // 2 // PAGE_BYTES * PAGE_BYTES, len(content), PAGE_BYTES)
    page = next(page for page in pages if content[page + PAGE_BYTES - 16 : page + PAGE_BYTES - 12] == table)
    content[page + PAGE_BYTES // 2] ^= 1
    data.write_bytes(content)


class Recommendations(BaseHTTPRequestHandler):
    """Answers a JSON object with the id of the request's, as the HTTP server of load-testing.md does."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({"id": asked["id"], "scores": [0.5 for _ in asked["items"]]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: object) -> None:
        pass


def serve_recommendations(story: Story) -> int:
    """Starts that server in a thread until the document ends, and returns its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Recommendations)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    story.closing.callback(server.server_close)
    story.closing.callback(server.shutdown)
    return int(server.server_address[1])


def remote(story: Story, shared: Shared) -> None:
    """A store with a view that is not loaded, the view's definition, and its rows."""
    Path("definitions.py").write_text(
        "import shorttail as st\n\n"
        'user = st.Entity("user", keys={"user_id": st.Int64})\n'
        'stats = st.FeatureView("user_stats", entity=user, ttl="30d", source=st.ParquetSource("users.parquet"),\n'
        '    features=[st.Feature("age", st.Int32), st.Feature("tier", st.String)])\n'
    )
    rows = {"user_id": [1, 2, 3], "age": pa.array([31, 45, 22], pa.int32()), "tier": ["gold", "tin", None]}
    pa.parquet.write_table(pa.table(rows), "users.parquet")
    with st.Engine.open("store", create=True) as engine:
        engine.apply("definitions.py")


PREPARATIONS: dict[str, Callable[[Story, Shared], None]] = {
    "README.md": demo,
    "clients.md": demo,
    "forests.md": forests,
    "http.md": http,
    "load-testing.md": load_testing,
    "metrics.md": quick_start,
    "models.md": models,
    "on-demand.md": on_demand,
    "history.md": quick_start,
    "operations.md": operations,
    "protocol.md": demo,
    "remote.md": remote,
    "security.md": quick_start,
}
