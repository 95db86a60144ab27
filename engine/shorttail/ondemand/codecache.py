"""Caches compiled functions in a private directory, so that a later start neither compiles nor imports Numba.

The files are machine code that will be executed, so no other user may be able to write them: the directory belongs to
the user and is closed to others, or it is not used. A cache that is missing, unusable, full or damaged costs time and
never raises an error. Several processes may use it at once, because a rename makes each file appear complete.
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
KNOWN = ".known"


def directory() -> Path:
    """Return $SHORTTAIL_CACHE_DIR, else `shorttail` in the user's cache directory."""
    chosen = os.environ.get("SHORTTAIL_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return Path(base if Path(base).is_absolute() else os.path.expanduser("~/.cache"), "shorttail")  # noqa: PTH111


def private_directory() -> Path | None:
    """Return the cache directory, and make it if needed. Logs a warning and returns None if others could use it."""
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
            "compiled functions are not cached: %s must be a directory that belongs to this user and is closed to"
            " others; run `chmod 700` on it, or set SHORTTAIL_CACHE_DIR",
            path,
        )
        return None
    return path


def load(key: str) -> bytes | None:
    """Return the bytes stored under `key` (hexadecimal digits), None if there are none or they are damaged."""
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


def note(key: str) -> bool:
    """Note a key (hexadecimal digits) for good. Returns whether it was not noted before, also if it cannot be noted."""
    folder = private_directory()
    if folder is None:
        return True
    try:
        os.close(os.open(folder / f"{key}{KNOWN}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return False
    except OSError as error:
        log.warning("the cache of compiled functions cannot be written: %s: %s", folder, error)
    return True


def store(key: str, body: bytes) -> None:
    """Store `body` under `key`. Logs a warning if that fails."""
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
