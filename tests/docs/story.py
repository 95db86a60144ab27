"""Runs a document as one story: its blocks in order, in one folder, and what they print is compared with what is shown.

Sybil finds the blocks and reports the line of the block that fails. This module runs them. What the language of a
block means:

    python    is executed in the namespace of the document. The text that it prints is what the comments beside its
              calls of print() show.
    console   each line `$ command` is run by the shell. The lines after it are what the command prints.
    promql    names metrics that the document's server has.
    text      is shown to the reader and not run. It may not hold a line `$ command`.

A block of any language whose text before it ends in "Write `FILE`:" is written to that file instead. A Python block
whose text ends in "([FILE](FILE)):" is compared with that file of the repository.

`shorttail serve` runs in the background, on free ports, until the document ends or serves again. Documents say 7711 and
7712; commands and code get the ports of the running server in their place.

Figures that change from run to run are masked before the comparison (masked() says which). In what a document shows,
a line `...` stands for any lines, and `...` within a line for any text.

Three marks, each an HTML comment on the line before a block, change this. Each gives its reason:

    <!-- not run: REASON -->              the block is not run
    <!-- first line compared: REASON -->  the block is run, and of what a command prints only the first line is compared
    <!-- every figure masked: REASON -->  all figures that the block prints are masked
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import difflib
import inspect
import io
import re
import signal
import subprocess
import time
import tokenize
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sybil import Document, Example, Region
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300.0
READS_LOG, LOG_TIMEOUT_S = re.compile("grep "), 30.0  # a thread of the server writes its log, so a line may come later
SHOWN = ("text",)  # languages whose blocks are not run
NOT_RUN, FIRST_LINE, EVERY_FIGURE = "not run", "first line compared", "every figure masked"
MARK = re.compile(rf"<!-- ({NOT_RUN}|{FIRST_LINE}|{EVERY_FIGURE}): (\S.*) -->\Z")
WRITE = re.compile(r"Write `([\w./-]+)`:\Z")
WHOLE = re.compile(r"\(\[([\w./-]+)\]\(\1\)\):\Z")
SERVE = re.compile(r"\bshorttail serve\b(?!.*--check)")
BENCH, LOCAL_BENCH = re.compile(r"\bshorttail bench (?!compare)"), re.compile(r"\bshorttail bench (?=:7711)")
LISTENS = {7711: re.compile(r"serving on \S+?:(\d+)"), 7712: re.compile(r"http on \S+?:(\d+)")}

WHOLE_NUMBER = r"(?<![\w.])[-+]?\d+(?:,\d{3}(?!\d))*"
NUMBER = rf"{WHOLE_NUMBER}(?:\.\d*)?(?:e[-+]?\d+)?"
MEASURED = re.compile(r" (?:ns|us|ms)\b")  # on a line of a table of latencies
MASKS = [
    (re.compile(r"(?<=\bplan )[0-9a-f]{8,}\b"), "HEX"),  # the id of a plan may look like a number
    (re.compile(r"\b\d{4}-\d\d-\d\dT[\d:.]+Z"), "DATE"),
    (re.compile(r"\b(?:avx512|avx2|scalar)\b"), "SIMD"),
    (re.compile(r" on [^:,]+, SIMD, \d+ CPUs?:"), " on MACHINE:"),
    (re.compile(rf"{NUMBER} (?:ns|us|ms|s)\b"), "TIME"),
    (re.compile(rf"{NUMBER} [KMG]iB\b"), "SIZE"),
    (re.compile(rf"{NUMBER}(?=%| \w+/s\b|/s\b)"), "#"),
    (re.compile(r"(?<=127\.0\.0\.1:)(?!771[12])\d+"), "#"),
    (re.compile(rf"{WHOLE_NUMBER}(?:\.\d*(?:e[-+]?\d+)?|e[-+]?\d+)(?:\.\.\.)?"), "#"),
    (re.compile(r"\b(?:[0-9a-f]{16}|(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{8,})\b"), "HEX"),
]
FIGURE = re.compile(rf"{NUMBER}|(?<= )-(?= |$)")  # in tables `-` stands for a figure that is not there


def masked(text: str, every_figure: bool = False) -> str:
    """The text with figures that differ from run to run replaced, runs of spaces as one space, and no empty lines.

    Masked are dates, hashes, times, sizes, rates, percentages, decimal fractions, the vector instructions of the CPU,
    and ports other than the documents'.
    On a line that holds times in ns, us or ms, and with `every_figure` on every line, all figures are masked.
    """
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return "".join(f"{masked_line(line, every_figure)}\n" for line in lines if line)


def masked_line(line: str, every_figure: bool) -> str:
    every_figure = every_figure or MEASURED.search(line) is not None
    for pattern, mask in MASKS:
        line = pattern.sub(mask, line)
    return FIGURE.sub("#", line).replace("TIME", "#") if every_figure else line


def difference(shown: str, printed: str, every_figure: bool = False) -> str | None:
    """None if the text `printed` is what the document has `shown`, else how they differ."""
    shown, printed = masked(shown, every_figure), masked(printed, every_figure)
    pattern = "".join(
        r"(?:.*\n)*?" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + r"\n"
        for line in shown.splitlines()
    )
    if re.fullmatch(pattern, printed):
        return None
    return "\n".join(difflib.unified_diff(shown.splitlines(), printed.splitlines(), "shown", "printed", lineterm=""))


@dataclass
class Block:
    """A fenced block of a document: its language, its text, and what the lines before it say."""

    line: int
    language: str
    source: str
    mark: str | None  # NOT_RUN, FIRST_LINE or EVERY_FIGURE
    reason: str
    written_to: str | None
    whole: str | None  # the file of the repository that the block shows

    @classmethod
    def of(cls, example: Example) -> Block:
        before = example.document.text[: example.start].rstrip()
        mark = MARK.search(before)
        before = before[: mark.start()].rstrip() if mark else before
        written, whole = WRITE.search(before), WHOLE.search(before)
        return cls(
            line=example.line,
            language=example.region.lexemes["language"],
            source=str(example.region.lexemes["source"]),
            mark=mark[1] if mark else None,
            reason=mark[2] if mark else "",
            written_to=written[1] if written else None,
            whole=whole[1] if whole else None,
        )


def examples(path: Path, evaluate: Any = None) -> Iterator[Example]:
    """The fenced blocks of a document, in order, as examples of Sybil."""

    def parse(document: Document) -> Iterator[Region]:
        for region in FencedCodeBlockLexer(r".*")(document):
            region.evaluator = evaluate
            yield region

    yield from Document.parse(str(path), parse).examples()


def blocks(path: Path) -> list[Block]:
    return [Block.of(example) for example in examples(path)]


@dataclass
class Story:
    """A document while it is run. The working directory of the process is `folder` meanwhile.

    ports: port that the document names -> port in use. already_ran: command -> what it printed, for commands that
    were run before for several documents. Load tests take half a second.
    """

    path: Path
    folder: Path
    ports: dict[int, int] = field(default_factory=dict)
    already_ran: dict[str, str] = field(default_factory=dict)
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    server: subprocess.Popen[bytes] | None = None
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def run(self, until: str | None = None) -> None:
        """Runs all blocks, or those before the heading `until`. Raises SybilFailure for a block that differs."""
        text = self.path.read_text()
        end = len(text) if until is None else text.index(f"\n{until}\n")
        try:
            for example in examples(self.path, self.evaluate):
                if example.start < end:
                    example.evaluate()
            self.stop()
        finally:
            self.clean_up()

    def clean_up(self) -> None:
        """Ends a server that still runs, and whatever connections the document's code has left open."""
        if self.server is not None:
            self.server.kill()
            self.server.wait()
        self.closing.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            self.namespace.clear()

    def evaluate(self, example: Example) -> str | None:
        """Runs one block; returns what is wrong with it."""
        block = Block.of(example)
        if block.mark == NOT_RUN:
            return None
        if block.written_to is not None:
            (self.folder / block.written_to).write_text(block.source)
            return None
        if block.language in SHOWN:
            return None
        if block.whole is not None:
            return difference((ROOT / block.whole).read_text(), block.source)
        evaluators = {"python": self.python, "console": self.console, "promql": self.promql}
        if block.language not in evaluators:
            return f"language {block.language!r} is none of {', '.join([*evaluators, *SHOWN])}"
        return evaluators[block.language](block)

    # -- languages ---------------------------------------------------------------------------------------------

    def python(self, block: Block) -> str | None:
        source = self.with_ports(block.source)
        place = "\n" * block.line + source  # so that a traceback names the line of the document
        code = compile(place, str(self.path), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            waiting = eval(code, self.namespace)
            if inspect.iscoroutine(waiting):
                asyncio.run(waiting)
        said = " ".join(self.with_documented_ports(printed.getvalue()).split())
        return difference(" ".join(shown_by_prints(source)), said, block.mark == EVERY_FIGURE)

    def console(self, block: Block) -> str | None:
        for command, shown in commands(block.source):
            refused = re.search(r"^error: ", shown, re.MULTILINE) is not None
            if SERVE.search(command) and not refused:
                status, printed = 0, self.serve(command)
            else:
                status, printed = self.shell(command)
            printed = self.with_documented_ports(printed)
            deadline_s = time.monotonic() + LOG_TIMEOUT_S
            while READS_LOG.match(command) and difference(shown, printed) and time.monotonic() < deadline_s:
                status, printed = self.shell(command)
            if status != (1 if refused else 0):
                return f"$ {command}\nended with status {status}:\n{printed}"
            if block.mark == FIRST_LINE:
                shown, printed = shown.partition("\n")[0], printed.partition("\n")[0]
            if wrong := difference(shown, printed, block.mark == EVERY_FIGURE):
                return f"$ {command}\n{wrong}"
        return None

    def promql(self, block: Block) -> str | None:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[7712]}/metrics", timeout=TIMEOUT_S) as response:
            known = set(re.findall(r"^# TYPE (\w+)", response.read().decode(), re.MULTILINE))
        named = {name.removesuffix("_bucket") for name in re.findall(r"\bshorttail_\w+", block.source)}
        return f"no metrics {sorted(named - known)}" if named - known or not named else None

    # -- commands ----------------------------------------------------------------------------------------------

    def shell(self, command: str) -> tuple[int, str]:
        """The exit status of a command, and what it printed."""
        if command in self.already_ran:
            return 0, self.already_ran[command]
        if 7711 in self.ports:
            command = SERVE.sub(r"\g<0> --port 7711", command)
            command = LOCAL_BENCH.sub(r"\g<0>--metrics http://127.0.0.1:7712/metrics ", command)
        if BENCH.search(command):
            command += " --duration 0.5s --warmup 0.1s"
        done = subprocess.run(
            ["/bin/sh", "-c", self.with_ports(command)],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            text=True,
        )
        return done.returncode, done.stdout

    def serve(self, command: str) -> str:
        """Starts a server in the background, in the place of the one that runs; returns what it printed."""
        self.stop()
        command = SERVE.sub(r"exec \g<0> --port 0 --http-port 0", command)
        log = self.folder / ".printed-by-the-server"
        with log.open("wb") as output:
            self.server = subprocess.Popen(
                ["/bin/sh", "-c", command], cwd=self.folder, stdout=output, stderr=subprocess.STDOUT
            )
        deadline_s = time.monotonic() + TIMEOUT_S
        while not re.search(r"^serving on .*\n", printed := log.read_text(), re.MULTILINE):
            if self.server.poll() is not None or time.monotonic() > deadline_s:
                raise AssertionError(f"$ {command}\ndid not serve:\n{printed}")
            time.sleep(0.01)
        self.ports |= {port: int(found[1]) for port, listens in LISTENS.items() if (found := listens.search(printed))}
        return printed

    def stop(self) -> None:
        """Stops the server, if there is one, as a user does."""
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            status = self.server.wait(TIMEOUT_S)
            self.server = None
            assert status == 0, f"the server ended with status {status}"

    def with_ports(self, text: str) -> str:
        for documented, used in self.ports.items():
            text = re.sub(rf"(?<=[: ]){documented}\b", str(used), text)
        return text

    def with_documented_ports(self, text: str) -> str:
        for documented, used in self.ports.items():
            text = re.sub(rf"(?<=[: ]){used}\b", str(documented), text)
        return text


def commands(source: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with the text after it. A command whose line ends in `\\` goes on."""
    if not source.startswith("$ "):
        raise ValueError("a console block starts with a line `$ command`")
    for part in re.split(r"^\$ ", source, flags=re.MULTILINE)[1:]:
        found = re.match(r"(?:.*\\\n)*.*\n?", part)
        assert found is not None
        yield found[0].strip(), part[found.end() :]


def shown_by_prints(source: str) -> list[str]:
    """The comments on the last line of each call of print(), and on the lines of their own right after it."""
    ends = {
        node.end_lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    shown: list[str] = []
    follows = {end + 1 for end in ends if end is not None}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        alone = token.line[: token.start[1]].isspace() or token.start[1] == 0
        if token.type == tokenize.COMMENT and (line in ends or (alone and line in follows)):
            shown.append(token.string.removeprefix("#").strip())
            follows.add(line + 1)
    return shown
