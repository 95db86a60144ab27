"""Reads files that a user names, without waiting for ever where the name is a FIFO, a device or a terminal."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

PIPE_BYTES = 65_536
_copies = ""

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_text(mode: int) -> str:
    """Return what a file of this mode (st_mode) is, such as "a FIFO"."""
    return _KINDS.get(stat.S_IFMT(mode), "of an unknown kind")


def use_copies(folder: str | os.PathLike[str]) -> None:
    """From now on read the files that definitions name from `folder`, in which each has its whole path.

    For a process that works with the files of another machine.
    """
    global _copies
    _copies = os.fspath(folder)


def copy_of(path: str | os.PathLike[str]) -> Path:
    """Return the path from which to read a file that a definition names. With copies, `path` is absolute."""
    return Path(_copies + os.path.normpath(path)) if _copies else Path(path)


def without_copies(text: str) -> str:
    """Return a text in which the paths of copies are the paths that the definitions name."""
    return text.replace(_copies, "") if _copies else text


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError if there is no file, or if it is no regular one: for files that are read several times."""
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {kind_text(mode)}, not a regular file", os.fspath(path))


def read_input(path: str | os.PathLike[str]) -> bytes:
    """Read a whole file, or what a command writes into a pipe, as `<(command)` of a shell gives it.

    Raises OSError, also for a folder, a socket, a device, and a FIFO that no process has open for writing.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb", buffering=0) as file:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISFIFO(mode):
            check_regular(path)
            return file.readall()
        first = file.read(PIPE_BYTES)  # None: a process that may write has written nothing yet
        if first == b"":
            raise OSError(errno.EINVAL, "it is a FIFO that no process writes to", os.fspath(path))
        os.set_blocking(fd, True)
        return (first or b"") + file.readall()
