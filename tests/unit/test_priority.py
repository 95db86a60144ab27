"""Commands that work on whole tables leave the CPU to processes that answer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

RUN = """
import os, sys
import shorttail.cli
shorttail.cli.main = lambda: print(os.getpriority(os.PRIO_PROCESS, 0))
from shorttail.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("words", "nice"),
    [
        ("serve", 0),
        ("predict m", 0),
        ("apply definitions.py", 10),
        ("views scan v", 19),
        ("verify", 19),
        ("--help", 19),
    ],
)
def test_the_priority_of_a_command(words: str, nice: int) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, *words.split()], check=True, capture_output=True, text=True)
    assert int(done.stdout) == max(nice, os.getpriority(os.PRIO_PROCESS, 0))
