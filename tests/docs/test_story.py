"""A document that is wrong fails, whatever is wrong with it; one that is right does not."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from preparations import inside
from story import Story, blocks, difference, masked
from sybil.example import SybilFailure


def tell(tmp_path: Path, text: str) -> None:
    """Runs a document with this text, in which `'''` stands for the fences of a block."""
    path = tmp_path / "document.md"
    path.write_text(textwrap.dedent(text).replace("'''", "```"))
    with inside(tmp_path):
        Story(path, tmp_path).run()


RIGHT = {
    "what a command prints": """
        '''console
        $ echo one && echo two
        one
        two
        $ true
        '''
        """,
    "any lines, and any text": """
        '''console
        $ seq 1 9
        ...
        8
        ...
        $ echo seed 17
        seed ...
        '''
        """,
    "a command that fails": """
        '''console
        $ echo 'error: no file'; false
        error: no file
        '''
        """,
    "what Python prints": """
        '''python
        import asyncio

        print({"a": [1, 2]})  # {'a': [1, 2]}
        print("one line,", "and",
              "another")  # one line,
        #   and another
        x = 1  # a comment of no print
        '''

        '''python
        await asyncio.sleep(0)
        print(x + 1)  # 2
        '''
        """,
    "a file that is written and read": """
        Write `there.txt`:

        '''text
        some text
        '''

        '''console
        $ cat there.txt
        some text
        '''
        """,
    "a marked block": """
        <!-- not run: it would fail -->
        '''console
        $ false
        '''
        """,
}
WRONG = {
    "a line that is not printed": ("'''console\n$ echo one\none\ntwo\n'''", "-two"),
    "a line that is not shown": ("'''console\n$ echo one\n'''", "+one"),
    "another count": ("'''console\n$ echo 3 rows\n2 rows\n'''", "-2 rows\n+3 rows"),
    "another word": ("'''console\n$ echo 3.5 us more\n2.25 us less\n'''", "-# less\n+# more"),
    "the second of two commands": ("'''console\n$ echo one\none\n$ echo two\none\n'''", "$ echo two"),
    "a command that fails unseen": ("'''console\n$ false\n'''", "ended with status 1"),
    "a failure that does not happen": ("'''console\n$ echo 'error: no'\nerror: no\n'''", "ended with status 0"),
    "what Python prints unseen": ("'''python\nprint(1)\n'''", "+1"),
    "another value in Python": ("'''python\nprint([1])  # [2]\n'''", "-[2]\n+[1]"),
    "a language that nothing runs": ("'''bash\nls\n'''", "language 'bash' is none of"),
    "a block of no language": ("'''\nls\n'''", "language '' is none of"),
    "a first line": (
        "<!-- first line compared: the rest is luck -->\n'''console\n$ seq 3\n2\n3\n4\n'''",
        "-2\n+1",
    ),
    "a file that is shown": ("As it is ([LICENSE](LICENSE)):\n\n'''python\nprint()\n'''", "+print()"),
}


@pytest.mark.parametrize("text", RIGHT.values(), ids=RIGHT)
def test_right_documents(tmp_path: Path, text: str) -> None:
    tell(tmp_path, text)


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG)
def test_wrong_documents(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SybilFailure) as failure:
        tell(tmp_path, f"A title\n\n{text}\n")
    assert said in str(failure.value)
    assert "line " in str(failure.value)


def test_an_exception_of_python_names_the_line_of_the_document(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as failure:
        tell(tmp_path, "A title\n\n'''python\nx = 0\n1 / x\n'''\n")
    assert (failure.traceback[-1].path, failure.traceback[-1].lineno + 1) == (tmp_path / "document.md", 5)


def test_a_mark_without_a_reason_is_none(tmp_path: Path) -> None:
    (tmp_path / "document.md").write_text("<!-- not run: -->\n```console\n$ false\n```\n")
    assert [block.mark for block in blocks(tmp_path / "document.md")] == [None]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("1,000 rows in 0.01 s (96,000 rows/s)", "1,000 rows in 12.3 s (81 rows/s)"),
        ("2026-11-21T07:01:23Z", "2027-01-02T00:00:00.125Z"),
        ("bucket 9798000000000000", "bucket 9798abc000000000"),
        ("serving on 127.0.0.1:43869", "serving on 127.0.0.1:1024"),
        ("65.1 MiB, 65% used", "3 GiB, 7% used"),
        ("[[0.944, 0.0559836]]", "[[1.5e-05, 3.]]"),
        ("late   1", "late 1"),
        ("31,606  -  193 us", "15 2.27 ms  193 ns"),
    ],
)
def test_figures_that_change_are_masked(text: str, same: str) -> None:
    assert masked(text) == masked(same)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("1,000 rows in 0.01 s", "1,001 rows in 0.01 s"),
        ("version 1: 4 columns", "version 1: 5 columns"),
        ("serving on 127.0.0.1:7711", "serving on 127.0.0.1:1024"),
        ("predict-1 a - b", "predict-2 a - b"),
        ('{"data":[0,0.5]}', '{"data":[1,0.5]}'),
    ],
)
def test_what_does_not_change_is_compared(text: str, other: str) -> None:
    assert difference(text, other) is not None
    assert difference(text, text) is None
