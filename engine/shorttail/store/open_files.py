"""Whether the files at a store's path are still those that this process has open.

A store that is deleted, moved away or replaced stays open where it is mapped: lookups go on, but what is written goes
to files that nobody will open again. So every write compares first, and again before it is acknowledged.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from shorttail.errors import Unavailable


class OpenFiles:
    """The files of a store that a process has open, by name."""

    def __init__(self, path: Path, *names: str) -> None:
        self.folder = Path(os.path.abspath(path))  # noqa: PTH100  symlinks stay, and the process may change its folder
        self._known: dict[Path, os.stat_result] = {}
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        """Note a file that was just opened. Raises OSError if it has gone already."""
        self._known[self.folder / name] = (self.folder / name).stat()

    def are_at(self, path: Path) -> bool:
        """Whether one of these files is in a folder: the same, by whatever path, or one that it was moved to."""
        for file, known in self._known.items():
            with suppress(OSError):
                if _is_same((path / file.name).stat(), known):
                    return True
        return False

    def change(self) -> str:
        """Return what happened to the files at the path: "deleted", "replaced" or "overwritten"; "" for nothing."""
        try:
            for file, known in self._known.items():
                found = file.stat()
                if not _is_same(found, known):
                    return "replaced"
                if found.st_size < known.st_size:
                    return "overwritten"  # no file gets shorter; touching the end of its map would end in SIGBUS
        except (FileNotFoundError, NotADirectoryError):
            return "deleted"
        except OSError:
            pass  # a permission that was withdrawn says nothing about the files
        return ""


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether two results are of one file. No other file gets its numbers while a process has it open."""
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


class Overwritten(Unavailable):
    """Raised when other content was written into the files of a store that is open: its map holds nothing of use."""


def changed_store(path: str | os.PathLike[str], what: str) -> Unavailable:
    """Return the error for a store that is not at its path any more. what: what OpenFiles.change() returned."""
    text = f"store '{path}' was {what} while it was open, and takes no writes: restart the server, or reopen the store"
    return Overwritten(text) if what == "overwritten" else Unavailable(text)
