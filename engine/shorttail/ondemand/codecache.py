"""A private directory of compiled functions, so that a second start need not compile, nor import Numba.

What lies here is machine code that will be run, so nobody else may be able to write it: the directory is the user's
own and closed to others, or it is not used. A cache that is missing, closed, full or damaged costs time, never an
error. Several processes may use it at once: files appear whole, by rename.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

MAGIC = b"shorttail code 1\n"
SUFFIX = ".code"


def directory() -> Path:
    """$SHORTTAIL_CACHE_DIR, or `shorttail` in the user's cache directory."""
    chosen = os.environ.get("SHORTTAIL_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return Path(base if Path(base).is_absolute() else os.path.expanduser("~/.cache"), "shorttail")  # noqa: PTH111


def private_directory() -> Path | None:
    """The cache, made if it is not there; None, and a line in the log, where it is not for this user alone."""
    path = directory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    except (OSError, RuntimeError) as error:
        log.warning("compiled functions are not cached: %s: %s", path, error)
        return None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        log.warning(
            "compiled functions are not cached: %s must be a directory of this user that is closed to others;"
            " run `chmod 700` on it, or set SHORTTAIL_CACHE_DIR",
            path,
        )
        return None
    return path


def load(key: str) -> bytes | None:
    """What was stored under `key` (hex digits), or None."""
    folder = private_directory()
    if folder is None:
        return None
    try:
        descriptor = os.open(folder / f"{key}{SUFFIX}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                return None
            data = file.read()
    except OSError:
        return None
    digest, body = data[len(MAGIC) :][:32], data[len(MAGIC) + 32 :]
    if not data.startswith(MAGIC) or hashlib.sha256(body).digest() != digest:
        log.warning("a cached function is damaged and will be compiled again: %s", folder / f"{key}{SUFFIX}")
        return None
    return body


def store(key: str, body: bytes) -> None:
    """Keep `body` under `key`, if that can be done."""
    folder = private_directory()
    if folder is None:
        return
    name = ""
    try:
        descriptor, name = tempfile.mkstemp(dir=folder, suffix=".new")  # mode 0600
        with os.fdopen(descriptor, "wb") as file:
            file.write(MAGIC + hashlib.sha256(body).digest() + body)
        Path(name).replace(folder / f"{key}{SUFFIX}")
    except OSError as error:
        log.warning("a compiled function is not cached: %s: %s", folder, error)
        with suppress(OSError):
            if name:
                Path(name).unlink()
