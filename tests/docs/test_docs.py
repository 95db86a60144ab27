"""Every block of README.md and docs/ runs, in the order of its document, and prints what the document shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from preparations import PREPARATIONS, Shared, inside
from story import NOT_RUN, ROOT, Block, Story, blocks

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = [(path, block) for path in DOCUMENTS for block in blocks(path) if block.mark is not None]
# A block that is marked is one that nobody tries: raise this number only when there is no other way.
NOT_RUN_MAX = 11


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(tmp_path_factory.mktemp("documents"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_document(path: Path, shared: Shared, tmp_path: Path) -> None:
    story = Story(path, tmp_path)
    with inside(tmp_path):
        PREPARATIONS.get(path.name, lambda *_: None)(story, shared)
        story.run()


@pytest.mark.parametrize(
    ("path", "block"),
    [pytest.param(path, block, id=f"{path.name}:{block.line}") for path, block in MARKED if block.mark == NOT_RUN],
)
def test_block_that_is_not_run(path: Path, block: Block) -> None:
    """Lists the blocks that no test runs, each with its reason, in the summary of a run."""
    pytest.skip(f"{path.name}:{block.line} is not run: {block.reason}")


def test_few_blocks_are_not_run() -> None:
    not_run = [f"{path.name}:{block.line} {block.reason}" for path, block in MARKED if block.mark == NOT_RUN]
    assert len(not_run) <= NOT_RUN_MAX, "\n".join(not_run)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_code_is_in_fenced_blocks(path: Path) -> None:
    """Indented code has no language, so that no test finds it; and `text` must not hide a command."""
    outside = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r"\n\n {4}\S.*", outside)
    for block in blocks(path):
        assert block.language != "text" or not re.search(r"^\$ ", block.source, re.MULTILINE), f"line {block.line}"


def test_preparations_are_of_documents() -> None:
    assert PREPARATIONS.keys() <= {path.name for path in DOCUMENTS}
