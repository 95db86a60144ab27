"""`shorttail bench` as a user runs it: the table, the JSON, the page in a browser, and errors of one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import commands
import pytest
from serving import TIMEOUT_S, Server, make_store

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from fakes import good, http_server, reply, rpc_server

BENCH = [sys.executable, "-m", "shorttail", "bench"]
QUICK = [
    "--duration",
    "400ms",
    "--warmup",
    "50ms",
    "--connections",
    "4",
    "--keys",
    "user_id=uniform:1:1000",
    "--model",
    "m",
]
FIGURES = 6
pytestmark = pytest.mark.usefixtures("unused_port")
# The names of Debian, Fedora, Google and Microsoft; the variable CHROMIUM overrides them.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")


def bench(*arguments: str, code: int = 0) -> str:
    """Run the command in this process. Returns its stdout if it succeeded, else its stderr."""
    result = commands.run("bench", *arguments)
    assert result.code == code, result
    return result.err if code else result.out


def bench_json(*arguments: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(bench(*arguments, "--json"))
    return document


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, unused_port: int) -> Path:
    """A folder with a sweep and a run with errors: sweep.json, .html and .hlog, failing.json and .html."""
    folder = tmp_path_factory.mktemp("runs")

    def answer(request: list[Any]) -> bytes:
        return good(request) if request[1] & 192 else reply(request[1], error={"code": "INTERNAL", "message": "<b>&"})

    with rpc_server() as fake:
        options = [
            *QUICK,
            "--rate",
            "200:800:x2",
            "--report",
            str(folder / "sweep.html"),
            "--hdr",
            str(folder / "sweep.hlog"),
        ]
        (folder / "sweep.json").write_text(bench(fake.address, *options, "--json", "--label", "sweep"))
    with rpc_server(answer) as fake:
        options = [*QUICK, "--rate", "800", "--report", str(folder / "failing.html")]
        (folder / "failing.json").write_text(bench(fake.address, *options, "--json"))
    return folder


def test_a_real_server_with_keys_from_its_store_and_verified_answers(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    server = Server(store, log=tmp_path / "log")
    try:
        address = "{}:{}".format(*server.address)
        options = ["--predict", "total", "--features", "stats:age,stats:tier", "--mix", "predict=3,features=1"]
        options += ["--keys", f"store:{store}", "--rate", "500", "--duration", "600ms", "--rows", "3", "--verify", "40"]
        document = bench_json(address, *options)
        (step,) = document["steps"]
        assert step["good"] == step["requests"] > 0, step["errors"]
        assert set(step["by_kind"]) == {"predict", "features"}
        assert document["workload"]["columns"]["user_id"].startswith(f"store:{store}:stats (uniform, 3 rows")
        assert document["verified"]["compared"] >= 20
        assert document["verified"]["different"] == 0
        assert "did you mean 'total'" in bench(address, "--predict", "totl", code=1)
    finally:
        server.kill()


def test_the_table_and_the_rules_of_percentiles() -> None:
    with rpc_server() as fake:
        output = bench(fake.address, *QUICK, "--rate", "1k,2k", "--seed", "7")
    lines = output.splitlines()
    assert "open loop, Poisson arrivals; 4 connections" in lines[0]
    assert lines[0].endswith("seed 7")
    assert lines[2].split()[:4] == ["offered/s", "achieved/s", "good/s", "bad"]
    # 400 and 800 answers: enough for P50, too few for P99.
    assert "P50" in lines[2]
    assert "P99.9" not in lines[2]
    assert len(lines[3].split()) == len(lines[4].split())


def test_the_json_describes_the_run_and_the_machine(runs: Path) -> None:
    document = json.loads((runs / "sweep.json").read_text())
    assert [step["rate_per_s"] for step in document["steps"]] == [[200, 200], [400, 400], [800, 800]]
    for step in document["steps"]:
        assert step["good"] == step["requests"] == step["latency"]["count"]
        assert sum(part["good"] for part in step["over_time"]) == step["good"]
        assert step["send_lag"]["count"] == step["requests"]
        assert step["machine_hiccups"]["count"] > 100
    assert document["machine"]["cpus"] >= 1
    assert document["load"]["arrivals"] == "Poisson"
    assert document["command"].startswith("shorttail bench")
    failing = json.loads((runs / "failing.json").read_text())["steps"][0]
    assert failing["errors"]["INTERNAL"]["count"] == failing["error"] > 0
    assert failing["latency"]["count"] == failing["good"]


def test_the_hdr_log_has_every_request_of_the_run(runs: Path) -> None:
    from hdrh.histogram import HdrHistogram
    from hdrh.log import HistogramLogReader

    steps = json.loads((runs / "sweep.json").read_text())["steps"]
    reader = HistogramLogReader(str(runs / "sweep.hlog"), HdrHistogram(1, 3_600_000_000_000, 3))
    whole = HdrHistogram(1, 3_600_000_000_000, 3)
    try:
        while (part := reader.get_next_interval_histogram()) is not None:
            whole.add(part)
    finally:
        reader.close()
    assert whole.get_total_count() == sum(step["latency"]["count"] for step in steps)
    assert whole.get_max_value() == pytest.approx(1e3 * max(step["latency"]["max_us"] for step in steps), rel=0.001)


def test_compare_reads_what_json_wrote(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "both.html"
    output = bench("compare", str(runs / "sweep.json"), str(runs / "failing.json"), "--report", str(page))
    lines = output.splitlines()
    assert len(lines) == 1 + 3 + 1
    assert [line.split()[0] for line in lines[1:]] == ["sweep"] * 3 + ["failing"]
    figures = check_page(page)
    assert any("sweep" in name for name in figures[0]["legend"])
    assert any("failing" in name for name in figures[0]["legend"])


def test_http_targets(tmp_path: Path) -> None:
    (tmp_path / "body.json").write_text('{"id": {{nonce}}, "user": "{{user}}", "items": [{{item...}}]}')
    page = tmp_path / "out.html"
    with http_server(lambda head, body: b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)) as fake:
        options = ["--body", str(tmp_path / "body.json"), "--keys", "user=zipf:1:100", "--value", "item=uniform:1:9"]
        options += ["--rows", "4", "--rate", "400", "--duration", "400ms", "--warmup", "0s", "--report", str(page)]
        document = bench_json(f"http://{fake.address}/predict", *options)
        bodies = [json.loads(body) for _, body in fake.requests]
    assert document["steps"][0]["good"] == document["steps"][0]["requests"] == len(bodies)
    assert all(len(body["items"]) == 4 and 1 <= body["user"] <= 100 for body in bodies)
    check_page(page)


def test_a_capacity_search_respects_the_objective() -> None:
    """A server that takes 0.5 ms for each request can do fewer than 2,000 requests/s."""

    def answer(request: list[Any]) -> bytes:
        time.sleep(0.0005)
        return good(request)

    with rpc_server(answer) as fake:
        options = [*QUICK, "--find-capacity", "--slo", "p50=20ms", "--rate", "800", "--timeout", "300ms"]
        options += ["--duration", "100ms"]
        document = bench_json(fake.address, *options)
    capacity = document["capacity"]
    assert 0 <= capacity["rate_per_s"] < 1 / 0.0005
    assert len(document["steps"]) >= 3
    # Long enough for the 200 samples that a P50 needs.
    assert all(step["requests"] >= 150 for step in document["steps"])


def test_a_wrong_answer_is_fatal_and_still_reported() -> None:
    with rpc_server(lambda request: good([0, request[1] ^ 1])) as fake:
        done = commands.run("bench", fake.address, *QUICK, "--json")
    assert done.code == 1
    (step,) = done.json["steps"]
    assert step["fatal"].startswith("wrong answer: ")
    assert step["counts"]["wrong_answers"] == 1


def test_verify_finds_answers_that_change() -> None:
    count = [0]

    def answer(request: list[Any]) -> bytes:
        count[0] += 1
        return reply(request[1], {"outputs": {"y": [float(count[0])]}, "version": 1})

    with rpc_server(answer) as fake:
        done = commands.run("bench", fake.address, *QUICK, "--verify", "5")
    assert done.code == 1
    assert re.search(
        r"sampled requests sent again, answers compared: \d differ, first: predict m: 'y' was \[\d+\.0\]", done.out
    )


def heed_sigint() -> None:
    """A shell lets what it starts in the background ignore Ctrl-C, and so the tests, if they were started so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    "options",
    [
        ["--rate", "500"],
        ["--rate", "500,1k", "--threads", "2"],
        ["--closed"],
        ["--rate", "100..900"],
        ["--find-capacity", "--slo", "p99=1s"],
        ["--rate", "500", "--warmup", "10m"],
    ],
    ids=" ".join,
)
def test_ctrl_c_ends_the_run_and_still_reports(options: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    with rpc_server() as fake:
        command = [*BENCH, fake.address, *QUICK[2:], *options, "--duration", "10m", "--json", "--report", str(page)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed_sigint) as process:
            try:
                end_s = time.monotonic() + TIMEOUT_S
                while len(fake.requests) < 100:
                    assert time.monotonic() < end_s, "it sends nothing"
                    time.sleep(0.01)
                process.send_signal(signal.SIGINT)
                output, errors = process.communicate(timeout=TIMEOUT_S)
            finally:
                process.kill()
    assert process.returncode == 130, errors
    step = json.loads(output)["steps"][-1]
    assert step["interrupted"]
    assert step["error"] == 0
    assert step["duration_s"] <= step["seconds"] < 600, "the time that passed, not the planned one"
    if "--warmup" in options:
        assert (step["requests"], step["offered_per_s"], step["duration_s"]) == (0, 0, 0)
    else:
        assert step["good"] > 0
        assert step["offered_per_s"] * step["duration_s"] == pytest.approx(step["requests"], abs=0.5)
        assert step["good_per_s"] * step["seconds"] == pytest.approx(step["good"], abs=0.5)
        last = step["over_time"][-1]
        assert last["start_s"] + last["length_s"] == pytest.approx(step["duration_s"], abs=0.2)
    assert "</html>" in page.read_text()
    # The command waits for requests in flight, but not for long.
    assert step["good"] + step["timeout"] + step["lost"] == step["requests"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["127.0.0.1:1", "--predict", "m"], 1, "no server at 127.0.0.1:1: connection refused"),
        (["nowhere:x"], 1, "address 'nowhere:x' is not understood"),
        (["{}", "--predict", "m", "--rate", "1k:50k:1.5"], 1, "'1k:50k:1.5' is not a sweep"),
        (["{}", "--find-capacity"], 1, "--find-capacity needs an objective: --slo p99=5ms"),
        (["{}", "--slo", "p99=5ms"], 1, "--slo is an option of --find-capacity"),
        (["{}", "--closed", "--rate", "1k"], 1, "--closed sends when answers arrive"),
        (["{}", "--mix", "predict=x"], 1, "--mix 'predict=x' is not understood"),
        (["{}", "--body", "x.json"], 1, "--body is only for HTTP servers"),
        (["http://127.0.0.1:1/x", "--deadline-ms", "5"], 1, "--deadline-ms is only for a shorttail server"),
        (["http://{}/", "--predict", "m"], 1, "--predict is only for a shorttail server"),
        (["http://{}/", "--body", "/none.json"], 1, "--body /none.json: cannot be read: No such file"),
        (
            ["{}", "--predict", "m", "--report", "/none/out.html"],
            1,
            "--report /none/out.html: there is no folder /none",
        ),
        (["{}", "--predict", "m", "--report", "/tmp"], 1, "--report /tmp: this is a folder; give the name of a file"),
        (["{}", "--predict", "m", "--hdr", "/tmp"], 1, "--hdr /tmp: this is a folder; give the name of a file"),
        (["{}", "--predict", "m", "--report", "/proc/out.html"], 1, "--report /proc/out.html: cannot be written: "),
        (["compare", "none.json", "--report", "/tmp"], 1, "--report /tmp: this is a folder"),
        (["{}", "--predict", "m", "--overwrite-live-rows"], 1, "--overwrite-live-rows says what --push does"),
        (["{}", "--threads", "9", "--connections", "2"], 1, "--threads 9: more than --connections 2"),
        (["{}", "--duration", "10 parsecs"], 1, "--duration '10 parsecs' is not a duration"),
        (["{}", "again"], 2, "unexpected extra argument (again)"),
        (["compare"], 2, "compare needs results"),
        (["compare", "/none.json"], 1, "/none.json: there is no such file"),
        ([], 2, "Missing argument"),
    ],
)
def test_wrong_options_are_an_error_of_one_line(arguments: list[str], code: int, message: str) -> None:
    with rpc_server() as fake:
        words = [argument.replace("{}", fake.address) for argument in arguments]
        assert message in commands.error_of("bench", *words, code=code)
        assert fake.requests == []


# -- the page ----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The texts of each figure; `outside`: the URLs that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: list[dict[str, Any]] = []
        self.outside: list[str] = []
        self.open: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag == "figure":
            self.figures.append({"title": "", "legend": [], "x": "", "y": "", "ticks": [], "lines": 0})
        if tag not in ("meta", "link"):
            self.open.append((tag, found.get("class") or ""))
        self.outside += [
            value for name in ("src", "href") if (value := found.get(name)) and not value.startswith("data:")
        ]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "path":
            self.figures[-1]["lines"] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, kind = self.open[-1] if self.open else ("", "")
        figure = self.figures[-1] if self.figures else {}
        if tag == "figcaption":
            figure["title"] = data
        elif tag == "li" and figure:
            figure["legend"].append(data)
        elif tag == "text" and kind == "tick":
            figure["ticks"].append(data)
        elif tag == "text":
            figure[kind.split()[1]] = data


def check_page(path: Path) -> list[dict[str, Any]]:
    """Check that each figure has a title, axes with units and ticks, and a legend for all lines; nothing is fetched."""
    text = path.read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert page.outside == []
    assert "<script" not in text
    assert "prefers-color-scheme: dark" in text
    assert "nan" not in re.findall(r'd="([^"]*)"', text)
    for figure in page.figures:
        assert figure["title"], figure
        assert figure["lines"] >= len(figure["legend"]) > 0, figure
        assert len(figure["ticks"]) >= 4, figure
        assert figure["x"] == "run" or re.search(r"\((s|requests/s|log 1/\(1-p\))\)", figure["x"]), figure
        assert re.search(r"\((µs|ms|requests/s|%)", figure["y"]), figure
    return page.figures


def test_every_figure_has_axes_units_and_a_legend(runs: Path) -> None:
    assert len(check_page(runs / "sweep.html")) == FIGURES
    text = (runs / "failing.html").read_text()
    assert "&lt;b&gt;&amp;" in text, "what a server says is not markup"
    assert "<b>" not in text
    assert "of the requests failed" in text


def browser() -> str:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip("no Chromium here; install one (Debian: apt-get install chromium) or name it in CHROMIUM")
    return found


def in_browser(path: Path, tmp_path: Path, *options: str) -> str:
    """Return the page after layout in a browser. Asserts that the console is empty."""
    command = [
        browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--enable-logging=stderr", "--log-level=0", f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND", *options, path.as_uri(),
    ]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # no `make asan`
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert said == []
    return done.stdout


def test_the_console_check_sees_an_error(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<script>nobody()</script><img src='gone.png'>")
    with pytest.raises(AssertionError, match="nobody"):
        in_browser(page, tmp_path, "--dump-dom")


@pytest.mark.parametrize("name", ["sweep", "failing"])
def test_the_page_opens_in_a_browser(runs: Path, tmp_path: Path, name: str) -> None:
    document = in_browser(runs / f"{name}.html", tmp_path, "--dump-dom")
    assert document.count("<figure>") == FIGURES
    assert document.count("<svg") == FIGURES


@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)")])
def test_the_page_is_dark_if_the_reader_prefers_it(runs: Path, tmp_path: Path, scheme: str, ground: str) -> None:
    page = tmp_path / "asked.html"
    asks = "<script>document.title = getComputedStyle(document.body).backgroundColor</script></body>"
    page.write_text((runs / "sweep.html").read_text().replace("</body>", asks))
    preferred = "0" if scheme == "dark" else "1"
    document = in_browser(page, tmp_path, "--dump-dom", f"--blink-settings=preferredColorScheme={preferred}")
    assert f"<title>{ground}</title>" in document
