"""`shorttail bench` with the server's metrics: time by stage as text, as JSON and on the page."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_asking import http_port
from serving import Server, make_store
from test_bench import FIGURES, QUICK, bench, bench_json, check_page, in_browser

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from fakes import rpc_server

STAGES = ["queue", "lookup", "transform", "infer", "encode"]
LOAD = ["--warmup", "50ms", "--duration", "400ms", "--connections", "4", "--keys", "user_id=uniform:1:3"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("served")
    started = Server(make_store(home), "--workers", "2", log=home / "log")
    yield started
    started.kill()


@pytest.fixture(scope="module")
def sweep(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sweep.json and sweep.html."""
    folder = tmp_path_factory.mktemp("swept")
    options = ["--predict", "total", *LOAD, "--rate", "500:2000:x2", "--report", str(folder / "sweep.html")]
    options += ["--metrics", f"http://127.0.0.1:{http_port(server)}", "--label", "sweep"]
    (folder / "sweep.json").write_text(bench("{}:{}".format(*server.address), *options, "--json"))
    return folder


def test_json_has_a_breakdown_of_every_step(sweep: Path, server: Server) -> None:
    document = json.loads((sweep / "sweep.json").read_text())
    assert document["metrics"]["url"] == f"http://127.0.0.1:{http_port(server)}/metrics"
    assert document["metrics"]["note"] == ""
    assert len(document["steps"]) == 3
    for step in document["steps"]:
        found = step["server"]
        # All requests of the run and its warm-up, and no others.
        assert step["good"] <= found["requests"] <= step["good"] * 1.5
        assert 0 < found["batches"] <= found["requests"]
        assert found["workers"] == 2
        assert 0 <= found["worker_cpu"] < 2
        assert list(found["stages"]) == STAGES
        assert sum(part["mean_us"] for part in found["stages"].values()) == pytest.approx(
            found["total"]["mean_us"], abs=0.01
        )
        assert sum(part["share"] for part in found["stages"].values()) == pytest.approx(1, abs=0.001)
        # A batch cannot take longer in the server than the slowest request took for the client.
        assert found["total"]["mean_us"] < step["latency"]["max_us"]
        if found["batches"] >= 200:
            assert found["total"]["p50_us"] > 0
    assert re.match(r"Of .* that a batch takes in the server at .* are queue: ", document["metrics"]["finding"])
    assert document["metrics"]["finding"] in document["findings"]


def test_the_page_shows_bars_and_a_table(sweep: Path, tmp_path: Path) -> None:
    figures = check_page(sweep / "sweep.html")
    assert len(figures) == FIGURES + 2
    times, shares = (figure for figure in figures if "by stage" in figure["title"])
    for figure in (times, shares):
        assert figure["legend"] == STAGES[::-1]
        assert figure["lines"] == 3 * len(STAGES)
        assert figure["x"] == "offered (requests/s)"
    assert times["y"] in ("time (µs)", "time (ms)")
    assert shares["y"] == "share of the time (%)"
    text = (sweep / "sweep.html").read_text()
    assert text.count("<td>infer</td>") == text.count("<td>total</td>") == 3
    assert "interpolated" in text
    rendered = in_browser(sweep / "sweep.html", tmp_path, "--dump-dom")
    assert rendered.count("<figure>") == FIGURES + 2
    assert rendered.count('<g class="bar') == 2 * 3 * len(STAGES)


def test_a_terminal_shows_the_mean_time_of_each_stage(server: Server) -> None:
    url = f"http://127.0.0.1:{http_port(server)}/metrics"
    output = bench("{}:{}".format(*server.address), "--predict", "total", *LOAD, "--rate", "800", "--metrics", url)
    head = next(line for line in output.splitlines() if "queue" in line and "encode" in line)
    assert head.split()[:7] == ["offered/s", "requests", *STAGES]
    assert "are queue: " in output
    assert "no times by stage" not in output


def test_mixed_and_http_requests_have_a_breakdown_too(server: Server, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{http_port(server)}"
    options = ["--predict", "total", "--features", "stats:age", *LOAD, "--rate", "800", "--metrics", url]
    (step,) = bench_json("{}:{}".format(*server.address), *options)["steps"]
    assert sum(part["share"] for part in step["server"]["stages"].values()) == pytest.approx(1, abs=0.001)
    tensors: list[dict[str, Any]] = [
        {"name": name, "shape": [1], "datatype": kind, "data": [f"<{name}>"]}
        for name, kind in (("user_id", "INT64"), ("amount", "FP64"))
    ]
    body = json.dumps({"inputs": tensors}).replace('"<', "{{").replace('>"', "}}")
    (tmp_path / "body.json").write_text(body)
    options = ["--body", str(tmp_path / "body.json"), *LOAD, "--value", "amount=1.5", "--rate", "300"]
    document = bench_json(f"{url}/v2/models/total/infer", *options)
    (step,) = document["steps"]
    assert step["good"] == step["requests"] > 0, step["errors"]
    assert document["metrics"] is not None, "its own /metrics is found without being told"
    assert document["metrics"]["url"] == f"{url}/metrics"
    assert list(step["server"]["stages"]) == STAGES


def test_runs_with_and_without_a_breakdown_can_be_compared(sweep: Path, tmp_path: Path) -> None:
    document = json.loads((sweep / "sweep.json").read_text())
    for step in document["steps"]:
        del step["server"]
    del document["metrics"]
    (tmp_path / "old.json").write_text(json.dumps({**document, "label": "old"}))
    page = tmp_path / "both.html"
    files = [str(tmp_path / "old.json"), str(sweep / "sweep.json")]
    bench("compare", *files, "--report", str(page))
    figures = check_page(page)
    assert len(figures) == FIGURES + 2
    assert [figure["x"] for figure in figures if "by stage" in figure["title"]] == ["run", "run"]
    bench("compare", files[0], "--report", str(page))
    assert len(check_page(page)) == FIGURES


def test_without_metrics_there_is_a_note_and_no_error(tmp_path: Path, unused_port: int) -> None:
    page = tmp_path / "out.html"
    with rpc_server() as fake:
        output = bench(fake.address, *QUICK, "--rate", "500", "--report", str(page))
        quiet = bench(fake.address, *QUICK, "--rate", "500", "--metrics", "off")
        refused = bench(fake.address, *QUICK, "--metrics", "http://127.0.0.1:1/metrics", code=1)
    lines = [line for line in output.splitlines() if "times by stage" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"no times by stage from http://127.0.0.1:{unused_port}/metrics: connection refused; ")
    assert "no times by stage" in page.read_text()
    assert not [figure for figure in check_page(page) if "by stage" in figure["title"]]
    assert "stage" not in quiet
    assert refused.startswith("error: --metrics http://127.0.0.1:1/metrics: connection refused; ")
    assert refused.count("\n") == 1
