"""A file system of a few MiB that a test can fill: a tmpfs in a user and mount namespace of its own.

Programs that are started with `SmallDisk.prefix` see it at `SmallDisk.folder`; for the others that folder stays empty.
A tmpfs has no space for a page of a sparse file when it is full, so a write to such a page through a map ends in
SIGBUS, as it does on a disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PAGE_BYTES = 4096
ROOM = 100  # a mode of fault beside those of shim.c: the file system has room for so many pages
BALLAST = "ballast"


class SmallDisk:
    """A mounted file system; a context manager. `problem` says why the system does not permit it, or is ""."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.folder = folder
        self.problem = ""
        self.prefix: list[str] = []
        if shutil.which("unshare") is None or shutil.which("nsenter") is None:
            self.problem = "the commands unshare and nsenter are missing"
            return
        script = f"mount -t tmpfs -o size={size_bytes} none '{folder}' && echo mounted && exec cat"
        pipe = subprocess.PIPE
        self._holder = subprocess.Popen(["unshare", "-rm", "sh", "-c", script], stdin=pipe, stdout=pipe, stderr=pipe)
        assert self._holder.stdout is not None
        assert self._holder.stderr is not None
        if self._holder.stdout.readline() != b"mounted\n":
            self.problem = f"no namespace with a tmpfs: {self._holder.stderr.read().decode().strip()}"
            return
        self.prefix = ["nsenter", "--preserve-credentials", "-U", "-m", "-t", str(self._holder.pid)]

    def __enter__(self) -> SmallDisk:
        return self

    def __exit__(self, *error: object) -> None:
        if hasattr(self, "_holder"):
            self._holder.communicate()  # `cat` ends with its input, and the namespace with `cat`

    def run(self, *arguments: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
        """Run a program that sees the file system."""
        command = [*self.prefix, *map(os.fspath, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    def fill(self, pages: int = 0) -> None:
        """Leave room for so many pages."""
        self._ballast(str(pages))

    def free(self) -> None:
        """Give the room back that fill() took."""
        self._ballast()

    def _ballast(self, *arguments: str) -> None:
        done = self.run(sys.executable, __file__, self.folder, *arguments)
        assert done.returncode == 0, done.stderr


class FullDisk:
    """A fault for the jobs of workload.py, with the methods of zygote.Shim: it leaves room for `nth - 1` pages."""

    def arm(self, path: str | os.PathLike[str], mode: int, nth: int) -> None:
        self._folder = mount_of(Path(path))
        fill(self._folder, nth - 1)

    def disarm(self) -> None:
        free(self._folder)

    def reached(self, nth: int, message: str | None) -> bool:
        """Whether the room was too small."""
        return message is not None


def mount_of(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_mount())


def fill(folder: Path, pages: int) -> None:
    free(folder)
    found = os.statvfs(folder)
    size_bytes = found.f_bavail * found.f_frsize - pages * PAGE_BYTES
    with (folder / BALLAST).open("wb") as file:
        if size_bytes > 0:
            os.posix_fallocate(file.fileno(), 0, size_bytes)


def free(folder: Path) -> None:
    (folder / BALLAST).unlink(missing_ok=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        fill(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        free(Path(sys.argv[1]))
